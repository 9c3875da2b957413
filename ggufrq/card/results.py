"""Sections of a card on what was measured; a cell without a measurement says so."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ggufrq.base import machine
from ggufrq.cache.kv import kv_types
from ggufrq.card.facts import Facts
from ggufrq.card.markdown import NOT_MEASURED, code, section, table
from ggufrq.card.measured import CASES, Measured
from ggufrq.report import numbers

_WEIGHTS = ("Filename", "Bits", "PPL", "Mean KLD, nats", "99.9 % KLD", "Same top token, %")
_QUALITY = ("Cache", "Bits", "Context", "PPL", "Mean KLD, nats", "99.9 % KLD", "Same top token, %")
_SPEED = ("Cache", "Behind, tokens", "Prefill, tokens/s", "of f16", "Decode, tokens/s", "of f16")


def weights(facts: Facts, measured: Measured) -> str:
    """What quantized weights cost, with the cache in f16."""
    lines, row = [], None
    for file in facts.models:
        found = measured.weights.get(file.name)
        row = found or row
        figures = (NOT_MEASURED,) * 4 if found is None else tuple(_figures(found))
        lines.append((code(file.name), f"{file.bits:.2f}", *figures))
    note = ""
    if row is not None:
        meta, settings = row["meta"], row["meta"]["settings"]
        texts = f"{settings['chunks']} texts of {settings['n_ctx']:,} tokens of {code(meta['text_name'])}"
        note = (
            f"Against {measured.reference} (PPL {numbers.significant(row['ppl_base'], 4)}), with the cache "
            f"in f16: {texts}, the second half of each scored by llama-perplexity of llama.cpp "
            f"{code(str(meta['llama_cpp'])[:12])}, {machine.processor().name or 'unknown processor'}, "
            f"{meta['cores']} cores; {code('ggufrq card DIR --measure')}. ± is one standard error."
        )
    return section("What the weights cost", table(_WEIGHTS, lines, "lrrrrr"), note)


def caches(facts: Facts, measured: Measured) -> str:
    """What caches cost in quality and speed, per file that was validated."""
    title = "What the KV cache costs"
    if not measured.results:
        names = [name for name in CASES if facts.takes(kv_types()[name])]
        rows = [(name, f"{facts.bits(kv_types()[name]):g}", *(NOT_MEASURED,) * 5) for name in names]
        rates = [(name, *(NOT_MEASURED,) * 5) for name in names]
        return section(title, table(_QUALITY, rows, "lrrrrrr"), table(_SPEED, rates, "lrrrrr"))
    parts: list[str] = []
    for result in measured.results:
        parts += [
            f"On {code(result['subject']['file'])}, each against the same run with {result['base']}:",
            table(_QUALITY, list(_quality(result)), "lrrrrrr"),
            "Speed, measured in turns with the base:",
            table(_SPEED, list(_speed(result)), "lrrrrr"),
            _how(result),
        ]
    return section(title, *parts)


def _figures(row: dict[str, Any]) -> Iterator[str]:
    yield numbers.significant(row["ppl"], 4)
    yield numbers.with_error(row["kld_mean"], row["kld_mean_err"], most=6)
    yield numbers.significant(row["kld_p999"])
    yield numbers.percent(row["same_top"], row.get("same_top_err"))


def _quality(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for case in result["cases"]:
        bits = f"{case['bits_per_value']:.5g}" if case["bits_per_value"] else NOT_MEASURED
        rows = case["quality"] or []
        if not rows:
            yield (case["name"], bits, *(NOT_MEASURED,) * 5)
        for row in rows:
            figures = list(_figures(row))
            if case["is_base"]:
                figures[1:] = ["–"] * 3
            yield (case["name"], bits, f"{row['ctx']:,}", *figures)


def _speed(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for case in result["cases"]:
        points = (case["speed"] or {}).get("points") or []
        if not points:
            yield (case["name"], *(NOT_MEASURED,) * 5)
        for point in points:
            cells = [case["name"], f"{point['depth']:,}"]
            for what in ("prefill", "decode"):
                cells.append(numbers.with_error(point[f"{what}_tps"], point.get(f"{what}_err")))
                ratio = None if case["is_base"] else point.get(f"{what}_ratio")
                cells.append(numbers.ratio(ratio, point.get(f"{what}_ratio_err")))
            yield tuple(cells)


def _how(result: dict[str, Any]) -> str:
    where, settings = result["machine"], result["settings"]
    # The command may name the model by its place on the machine that it was measured on.
    again = shlex.join(
        Path(word).name if "/" in word and " " not in word else word for word in shlex.split(result["again"])
    )
    return (
        f"{where['cpu']}, {where['cores']} cores, {result['date'][:10]}, llama.cpp "
        f"{code(str(where['llama_cpp'])[:12])}, patch set {code(str(where['patch_set'])[:8])}, text "
        f"{code(result['text']['file'])}, {settings['chunks']} texts per context; {code(again)}. "
        "K is quantized from the first token. ± is one standard error."
    )
