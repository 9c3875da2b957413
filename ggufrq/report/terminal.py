"""The result as tables of at most 80 columns."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from ggufrq.base import table
from ggufrq.report import numbers, tables

_WIDTH = 79
_NAME = 22
_MARKS = {"worse": "▼", "slower": "▼", "better": "▲", "faster": "▲"}

Result = dict[str, Any]


def render(result: Result) -> str:
    """All sections that were measured, and what failed."""
    subject = result["subject"]
    parts = [f"{subject['name']} ({subject['weights']}), against {result['base']}"]
    parts += [_wrapped("FAILED: " + tables.check_sentence(c)) for c in result["checks"] if not c["ok"]]
    parts += [_wrapped(f"FAILED: {c['name']}: {c['error']}") for c in result["cases"] if c["error"]]
    contexts = sorted({row["ctx"] for case in result["cases"] for row in case["quality"] or []})
    parts += [_quality(result, ctx) for ctx in contexts]
    parts += [part for part in (_behaviour(result), _speed(result)) if part]
    parts += [_wrapped(tables.sentence(note)) for note in result["notes"]]
    missing = [name for name in ("quality", "greedy", "needle", "retrieval", "sanity", "speed")]
    missing = [name for name in missing if not any(case[name] for case in result["cases"])]
    if missing:
        parts.append(f"{tables.NOT_MEASURED}: {', '.join(missing)}")
    parts.append(_wrapped("± one standard error; ▼ worse, ▲ better, where chance does not explain it."))
    return "\n\n".join(parts)


def _quality(result: Result, ctx: int) -> str:
    rows = []
    for case in result["cases"]:
        row = next((row for row in case["quality"] or [] if row["ctx"] == ctx), None)
        if row is None:
            continue
        base = case["is_base"]
        kld = numbers.NONE if base else numbers.with_error(row["kld_mean"], row["kld_mean_err"], most=6)
        change = "" if base else numbers.change(row["ln_ratio"], row["ln_ratio_err"])
        rows.append(
            [
                _name(case),
                f"{case['bits_per_value']:.5g}" if case["bits_per_value"] else numbers.NONE,
                numbers.significant(row["ppl"], 4),
                change + _mark(row["verdict_ppl"]),
                kld + _mark(row["verdict_kld"]),
                numbers.percent(row["same_top"]),
            ]
        )
    head = ("cache", "bits", "PPL", "PPL, %", "mean KLD, nats", "top %")
    return f"context {ctx:,}\n" + table.render(head, rows, "lrrrrr")


def _behaviour(result: Result) -> str | None:
    if not any(
        case[name] for case in result["cases"] for name in ("greedy", "needle", "retrieval", "sanity")
    ):
        return None
    rows = []
    for case in result["cases"]:
        greedy, sanity = case["greedy"], case["sanity"]
        rows.append(
            [
                _name(case),
                numbers.percent(greedy["share_same"]) if greedy else numbers.NONE,
                f"{greedy['agree']}/{greedy['prompts']}" if greedy else numbers.NONE,
                *(_found(case[name], case["is_base"]) for name in ("needle", "retrieval")),
                numbers.percent(sanity["repeated"]) + _mark(sanity["verdict"]) if sanity else numbers.NONE,
            ]
        )
    head = ("cache", "same, %", "whole", "needles", "keys", "repeated, %")
    return "greedy texts, needles and keys (found, nats against the base), repetition\n" + table.render(
        head, rows, "lrrrrr"
    )


def _found(section: dict[str, Any] | None, base: bool) -> str:
    if not section:
        return numbers.NONE
    hits = f"{section['hits']}/{section['of']}"
    if base or section["mean_difference"] is None:
        return hits
    return f"{hits} {numbers.fixed(section['mean_difference'], 2)}{_mark(section['verdict'])}"


def _speed(result: Result) -> str | None:
    found = [case for case in result["cases"] if case["speed"]]
    if not found:
        return None
    rows = []
    for case in found:
        for point in case["speed"]["points"]:
            row = [_name(case), f"{point['depth']:,}"]
            for kind in ("prefill", "decode"):
                row.append(numbers.significant(point[f"{kind}_tps"]))
                ratio = numbers.ratio(point[f"{kind}_ratio"], point[f"{kind}_ratio_err"])
                row.append("1" if case["is_base"] else ratio[:-1] + _mark(point[f"verdict_{kind}"]))
            rows.append(row)
    head = ("cache", "depth", "prefill", "ratio", "decode", "ratio")
    title = f"tokens/s behind so many tokens, and times {result['base']} (medians of rounds in turns)\n"
    return title + table.render(head, rows, "lrrrrr")


def _name(case: dict[str, Any]) -> str:
    name: str = case["name"]
    return name if len(name) <= _NAME else name[: _NAME - 1] + "…"


def _mark(verdict: str | None) -> str:
    return " " + _MARKS.get(verdict or "", " ")


def _wrapped(words: str | Sequence[str]) -> str:
    return textwrap.fill(str(words), _WIDTH, subsequent_indent="  ", break_on_hyphens=False)
