"""What a case wrote, beside what the base wrote: agreement, answers found, repetition."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any, Protocol

from ggufrq.measure.kept import Row
from ggufrq.measure.verdict import Difference, mean_and_error, paired
from ggufrq.tools.logs import PROFILE_SOURCES

_EXAMPLES = 3
_EXAMPLE = 80


class _Section(Protocol):
    def __call__(self, mine: Row, base: Row, *, is_base: bool) -> dict[str, Any]: ...


def greedy(mine: Row, base: Row, *, is_base: bool) -> dict[str, Any]:
    """How far greedy texts stay the base's own, in tokens."""
    same: list[int] = []
    examples: list[Row] = []
    for i, (a, b) in enumerate(zip(mine["answers"], base["answers"], strict=True)):
        n = first_difference(a["tokens"], b["tokens"])
        same.append(n)
        if n < len(b["tokens"]) and len(examples) < _EXAMPLES:
            # texts part at the latest where tokens do; show what each says from there
            at = first_difference(a["text"], b["text"])
            cut = slice(at, at + _EXAMPLE)
            examples.append({"prompt": i, "at": n, "base": b["text"][cut], "case": a["text"][cut]})
    tokens = len(base["answers"][0]["tokens"])
    return {
        "prompts": len(same),
        "tokens": tokens,
        "agree": sum(n == tokens for n in same),
        "mean_same": sum(same) / len(same),
        "median_same": median(same),
        "first_difference": same,
        "share_same": sum(same) / (tokens * len(same)),
        "examples": examples,
    }


def needle(mine: Row, base: Row, *, is_base: bool) -> dict[str, Any]:
    """Answers found and how likely they were, cell by cell."""
    return {"cells": _beside(mine["cells"], base["cells"]), **_found(mine["cells"], base["cells"], is_base)}


def retrieval(mine: Row, base: Row, *, is_base: bool) -> dict[str, Any]:
    """The same for several keys in one text."""
    keys = _beside(mine["keys"], base["keys"])
    return {"ctx": mine["ctx"], "keys": keys, **_found(mine["keys"], base["keys"], is_base)}


def sanity(mine: Row, base: Row, *, is_base: bool) -> dict[str, Any]:
    """Repetition, garbage and ends of texts drawn with the same seeds."""
    found: dict[str, Any] = {"prompts": len(mine["texts"])}
    found["tokens"] = max(text["length"] for text in [*mine["texts"], *base["texts"]])
    for prefix, texts in (("", mine["texts"]), ("base_", base["texts"])):
        mean, error = mean_and_error([text["repeated"] for text in texts])
        found[f"{prefix}repeated"] = mean
        found[f"{prefix}repeated_err"] = error
        found[f"{prefix}garbage"] = sum(text["garbage"] for text in texts) / len(texts)
        found[f"{prefix}ended"] = sum(text["ended"] for text in texts)
        found[f"{prefix}mean_length"] = sum(text["length"] for text in texts) / len(texts)
    worse = paired(
        [
            a["repeated"] + a["garbage"] - b["repeated"] - b["garbage"]
            for a, b in zip(mine["texts"], base["texts"], strict=True)
        ]
    )
    return {**found, "verdict": _verdict(worse, more_is_worse=True, is_base=is_base)}


SECTIONS: dict[str, _Section] = {
    "greedy": greedy,
    "needle": needle,
    "retrieval": retrieval,
    "sanity": sanity,
}


def first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    """How many items two sequences share from their start."""
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))


def _beside(mine: list[Row], base: list[Row]) -> list[Row]:
    return [
        {
            **a,
            "base_hit": b["hit"],
            "base_logprob": b["logprob"],
            "difference": a["logprob"] - b["logprob"],
        }
        for a, b in zip(mine, base, strict=True)
    ]


def _found(mine: list[Row], base: list[Row], is_base: bool) -> dict[str, Any]:
    difference = paired([a["logprob"] - b["logprob"] for a, b in zip(mine, base, strict=True)])
    base_hits = sum(row["hit"] for row in base)
    return {
        "hits": sum(row["hit"] for row in mine),
        "base_hits": base_hits,
        "of": len(mine),
        "mean_difference": difference.value if difference else None,
        "mean_difference_err": difference.error if difference else None,
        "verdict": _verdict(difference, more_is_worse=False, is_base=is_base),
        "base_fails": 2 * base_hits < len(base),
    }


def _verdict(difference: Difference | None, *, more_is_worse: bool, is_base: bool) -> str | None:
    if difference is None or is_base:
        return None
    return difference.verdict(more_is_worse=more_is_worse)


def notes(cases: list[dict[str, Any]], checks: list[Row], n_ctx_train: int | None, shaped: bool) -> list[str]:
    """Sentences that a reader needs to read the figures rightly."""
    base, told = cases[0], []
    for section, what in (("needle", "needles"), ("retrieval", "keys")):
        found = base[section]
        if found and found["base_fails"]:
            told.append(
                f"with a cache of {base['name']} the model itself finds {found['hits']} of {found['of']} "
                f"{what}: hits say nothing here; how likely the right answer was does"
            )
    if any(case["quality"] for case in cases):
        longest = max(row["ctx"] for case in cases for row in case["quality"] or [])
        told.append(
            "standard errors are over the scored tokens as if these were independent; a difference counts "
            "beyond twice its error"
        )
        if n_ctx_train is not None and longest < min(8192, n_ctx_train):
            told.append(f"measured up to {longest} tokens only: the loss may grow with the context")
    for source in dict.fromkeys(case["profile_source"] for case in cases if case["profile_source"]):
        told.append(f"+profile: K is stored by a profile {PROFILE_SOURCES.get(source, source)}")
    if not shaped:
        told.append("the size of this model's cache cannot be computed from its file; sizes were not checked")
    if any(not check["ok"] for check in checks):
        told.append("a self-check failed: the figures may show a fault of the build, not the cost of a type")
    elif any(case["ours"] for case in cases) and not any(check["check"] == "code" for check in checks):
        told.append("the build was not checked against the specification (--sections check)")
    return told
