"""Claims beside measurements, in at most 80 columns."""

from __future__ import annotations

import textwrap
from typing import Any

from ggufrq.base import table
from ggufrq.report import numbers

_WIDTH = 79
_RELATIONS = {"at most": "≤ ", "at least": "≥ ", "computed": ""}
#: What ``ggufrq run`` has beside a type unless told otherwise.
_USUAL = " +profile +first1 +recent32"
_OPEN = "cannot be told"

Result = dict[str, Any]


def render(result: Result) -> str:
    """What was measured, the claims with their verdicts, and how to read them."""
    source, settings, machine = result["published"]["table"], result["settings"], result["machine"]
    how = (
        f"{settings['chunks']} texts of {settings['ctx']:,} tokens of {result['text']['file']}; "
        f"prefill of {settings['prompt']} and decode of {settings['generate']} tokens from an empty cache, "
        f"{settings['rounds']} rounds in turns; {machine['cpu']}, llama.cpp "
        f"{str(machine['llama_cpp'])[:12]}, patch set {str(machine['patch_set'])[:12]}."
    )
    read = (
        "Published costs are read as 'at most', gains as 'at least'. A claim holds, or does not, where the "
        "measurement lies beyond twice its standard error (Student's t for speeds); 'cannot be told': the "
        "difference is smaller than its error on this model. block: the rotation as published; norm: so "
        "is the scale; hadamard stands for TurboQuant; as in run: with a profile of K, the first token and "
        "the newest 32 in f16, as ggufrq run keeps it. Speeds are those of this build, not of the fork that "
        "was published, as ratios to f16."
    )
    parts = [
        f"{result['model']['name']} ({result['model']['weights']})",
        _cases(result),
        *(
            _wrapped(f"not measured: {case['name']}: {case['error']}")
            for case in result["cases"]
            if case["error"]
        ),
        _claims(result),
        _wrapped(f"{source['what']}, {source['date']}: {source['setting']}. {source['source']}"),
        _wrapped(f"Here: {how}"),
        _wrapped(read),
    ]
    return "\n\n".join(parts)


def _cases(result: Result) -> str:
    rows = []
    for case in result["cases"]:
        if case["error"]:
            continue
        point = case["speed"]["points"][0]
        base = case["spec"] == "f16"
        ratios = [
            "1" if base else numbers.with_error(point[f"{kind}_ratio"], point[f"{kind}_ratio_err"], most=2)
            for kind in ("decode", "prefill")
        ]
        rows.append(
            [
                case["name"].replace(_USUAL, " as in run"),
                f"{case['bits_per_value']:.5g}" if case["bits_per_value"] else numbers.NONE,
                numbers.NONE if base else numbers.change(case["ln_ratio"], case["ln_ratio_err"]),
                numbers.NONE if base else numbers.significant(case["kld_mean"]),
                *ratios,
            ]
        )
    head = ("cache", "bits", "PPL, %", "mean KLD", "decode", "prefill")
    return table.render(head, rows, "lrrrrr")


def _claims(result: Result) -> str:
    rows = []
    for claim in result["claims"]:
        low = claim.get("lowest")
        if claim["measured"] is None:
            here = numbers.NONE
        elif low is not None and low != claim["measured"]:
            here = f"{low:.1f} to {claim['measured']:.1f}"
        elif claim["error"]:
            here = numbers.with_error(claim["measured"], claim["error"], most=3)
        else:
            here = numbers.significant(claim["measured"])
        rows.append(
            [
                claim["claim"],
                _RELATIONS[claim["relation"]]
                + numbers.significant(claim["published"], 4 if claim["published"] < 10 else 3),
                here,
                _OPEN if claim["verdict"].startswith(_OPEN) else claim["verdict"],
            ]
        )
    return table.render(("claim", "published", "here", "verdict"), rows, "lrrl")


def _wrapped(words: str) -> str:
    return textwrap.fill(words, _WIDTH, break_on_hyphens=False, break_long_words=False)
