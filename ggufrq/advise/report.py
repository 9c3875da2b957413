"""A ladder as text of at most 100 columns."""

from __future__ import annotations

import shlex
import textwrap

from ggufrq.advise.ladder import Ladder, Rung
from ggufrq.base import table
from ggufrq.base.sizes import mib_text, size_text
from ggufrq.report import numbers

_WIDTH = 100


def render(found: Ladder) -> str:
    """The table, the recommendation ready to be pasted, and how it was measured."""
    wishes, scored = found.wishes, found.scored
    head = ["cache", "bits", "cache, MiB", "total, MiB", "mean KLD", "loss"]
    body = [_row(rung) for rung in found.rungs]
    if wishes.budget is not None:
        head.append("largest ctx")
        for row, rung in zip(body, found.rungs, strict=True):
            row.append("-" if rung.largest is None else f"{rung.largest:,}")
    reasons = dict.fromkeys(rung.why_not for rung in found.rungs if rung.why_not)
    estimated = "" if all(rung.exact for rung in found.rungs if rung.total is not None) else " (estimated)"
    note = (
        f"Mean KLD (nats) from the run with an f16 cache, with its standard error, over {scored.chunks} "
        f"parts of {scored.n_ctx:,} tokens of {found.text}. Bits count scales and the tokens in f16; cache, "
        f"with the profile, and total, with weights and buffers{estimated}, are for {wishes.ctx:,} tokens."
    )
    if wishes.budget is not None:
        note += f" The largest context is that within {size_text(wishes.budget)}."
    texts = [*reasons, _recommendation(found), note]
    parts = [
        f"{found.model}, {found.weights}, at {wishes.ctx:,} tokens",
        table.render(head, body, "lrrrll" + "r" * (len(head) - 6)),
        *("\n".join(textwrap.wrap(text, _WIDTH, break_on_hyphens=False)) for text in texts),
    ]
    return "\n\n".join(parts)


def _row(rung: Rung) -> list[str]:
    if rung.cache is None or rung.total is None or rung.bits is None:
        return [rung.title, *["-"] * 5]
    kld = numbers.with_error(rung.kld, rung.kld_err) if rung.kld is not None else numbers.NONE
    return [rung.title, f"{rung.bits:.4g}", mib_text(rung.cache), mib_text(rung.total), kld, rung.words]


def _recommendation(found: Ladder) -> str:
    best, wishes = found.best, found.wishes
    if best is None:
        smallest = min((rung.total for rung in found.rungs if rung.total is not None), default=0)
        assert wishes.budget is not None  # f16 loses nothing
        return (
            f"None of these leaves room for {wishes.ctx:,} tokens in {size_text(wishes.budget)}: the "
            f"smallest takes {size_text(smallest)}. A shorter --ctx, or weights of fewer bits."
        )
    kv = f"--kv {shlex.quote(best.kv)}"
    loses = "loses nothing" if best.kld is None else f"has a mean KLD of {numbers.significant(best.kld, 2)}"
    if wishes.budget is not None:
        said = f"Take {kv}: of those that fit in {size_text(wishes.budget)} it loses least; it {loses}"
        if best.kld is not None and best.kld > wishes.loss:
            said += f", more than {wishes.loss:g}, which is usually accepted"
        return f"{said}."
    limit = f"Take {kv}: the smallest with a mean KLD of {wishes.loss:g} or less, error included; it {loses}"
    return f"{limit}. ggufrq run and serve take it with --kv auto."
