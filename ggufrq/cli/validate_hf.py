"""``ggufrq validate --lane hf``: caches of transformers."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from ggufrq.base import log, paths, table, texts
from ggufrq.base.errors import UsageError
from ggufrq.cache.kv import DEFAULT_FIRST, DEFAULT_RECENT, Sought
from ggufrq.report import numbers

#: What means something with ``--lane hf``.
_TAKEN = {
    *("model", "lane", "kv", "kv_profile", "kv_recent", "kv_first", "ctx", "chunks", "text", "threads"),
    *("quick", "json_file"),
}


def validate_hf(
    model: str,
    *,
    kv: str | None,
    profile: Path | Sought | None,
    recent: int | None,
    first: int | None,
    ctx: list[int] | None,
    chunks: int | None,
    text: Path | None,
    threads: int | None,
    quick: bool,
    json_file: Path | None,
) -> None:
    """Measure and print the table. Raises UsageError for what is not for this lane, and when torch or
    transformers is missing."""
    context = click.get_current_context()
    for parameter in context.command.params:
        given = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name not in _TAKEN:
            raise UsageError(f"{parameter.opts[-1]} is for GGUF files, not for --lane hf")
    if ctx is not None and len(ctx) > 1:
        raise UsageError("--lane hf takes one --ctx", remedy=f"--ctx {ctx[0]}")
    try:
        from ggufrq.measure import lane_hf
    except ImportError as error:
        raise UsageError(
            f"--lane hf takes torch and transformers 5.22 or newer ({error})",
            remedy="pip install 'ggufrq[hf]'",
        ) from None
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    options = lane_hf.Options(
        tokens=ctx[0] if ctx else (256 if quick else 1024),
        windows=chunks or 1,
        recent=DEFAULT_RECENT if recent is None else recent,
        first=DEFAULT_FIRST if first is None else first,
        # the file beside a GGUF says nothing here, and one from the weights takes a build: when asked for
        profile=profile if isinstance(profile, Path) else "weights" if profile is Sought.WEIGHTS else None,
        text=text,
    )
    cases = lane_hf.parse_cases(kv or lane_hf.DEFAULT_CASES, options)
    for case in cases:
        package = lane_hf.missing(case)
        if kv is not None and package is not None:
            raise UsageError(f"{case.name} takes {package}", remedy=f"pip install {package}")
    result = lane_hf.measure(model, cases, options, lambda row: log.say(f"{row.name}: {_loss(row)}"))
    click.echo(_table(result))
    if json_file is not None:
        paths.atomic_write(json_file, texts.to_json(result.data(), indent=1, allow_nan=False) + "\n")


def _loss(row: object) -> str:
    from ggufrq.measure.lane_hf import Row

    assert isinstance(row, Row)
    return row.refused or numbers.with_error(row.kld, row.error)


def _table(result: object) -> str:
    from ggufrq.measure.lane_hf import Result

    assert isinstance(result, Result)
    rows = [
        [
            row.name,
            numbers.significant(row.bits, 4),
            numbers.fixed(row.held, 2),
            numbers.with_error(row.kld, row.error),
            numbers.significant(row.kld_999),
            numbers.percent(row.same_top),
        ]
        for row in result.rows
        if row.held is not None
    ]
    head = ("cache", "bits", "held", "mean KLD, nats", "99.9 %", "top %")
    versions = ", ".join(f"{name} {number}" for name, number in result.versions.items())
    parts = [
        f"{result.model}, {result.windows} × {result.tokens:,} tokens, in 32 bits, against a dense cache\n"
        + (table.render(head, rows, "lrrrrr") if rows else "no cache could be measured"),
        *(f"{row.name}: {row.refused}" for row in result.rows if row.refused),
        f"held: all bytes of attention layers over values of K and V, exact tokens as 16 bits\n"
        f"{versions}; {result.processor}",
    ]
    return "\n\n".join(parts)
