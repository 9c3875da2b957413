"""The figures of a result as tables of words, for the page and the terminal alike.

A cell is its words, or words with the verdict on them. A table is None where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ggufrq.report import numbers

NOT_MEASURED = "not measured"

Result = dict[str, Any]
Case = dict[str, Any]
Cell = str | tuple[str, str | None]


@dataclass(frozen=True)
class Table:
    """``align`` has l, r or w (long words) for each column; the first column names the row."""

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    align: str


def summary(result: Result) -> Table:
    """Every case with one figure of each section, at the longest context and depth."""
    rows = []
    for case in result["cases"]:
        quality, speed = _last(case["quality"]), _last((case["speed"] or {}).get("points"))
        needle, greedy, sanity = case["needle"], case["greedy"], case["sanity"]
        rows.append(
            [
                case["name"],
                _bits(case),
                numbers.percent((case["memory"] or {}).get("of_f16")),
                _kld(quality, case),
                _ppl(quality, case),
                numbers.percent(quality.get("same_top"), quality.get("same_top_err")),
                *(_ratio(speed, kind, case) for kind in ("prefill", "decode")),
                numbers.percent(greedy["share_same"]) if greedy else numbers.NONE,
                (f"{needle['hits']} of {needle['of']}", needle["verdict"]) if needle else numbers.NONE,
                (numbers.percent(sanity["repeated"]), sanity["verdict"]) if sanity else numbers.NONE,
            ]
        )
    head = (
        "cache", "bits per value", "size, % of f16", "mean KLD", "PPL, %", "same top token, %",
        "prefill", "decode", "greedy text same, %", "needles", "repeated, %",
    )  # fmt: skip
    longest = max((row["ctx"] for case in result["cases"] for row in case["quality"] or []), default=None)
    depth = max(
        (point["depth"] for case in result["cases"] for point in (case["speed"] or {}).get("points", [])),
        default=None,
    )
    at = [f"quality at a context of {longest:,}"] if longest else []
    at += [f"speed behind {depth:,} tokens"] if depth is not None else []
    return Table(", ".join(at), head, rows, "l" + "r" * (len(head) - 1))


def quality(result: Result, ctx: int) -> Table | None:
    """Perplexity and divergence at one context."""
    rows = []
    for case in result["cases"]:
        row = next((row for row in case["quality"] or [] if row["ctx"] == ctx), None)
        if row is not None:
            base = case["is_base"]
            tail = ["kld_median", "kld_p99", "kld_p999", "kld_max"]
            rows.append(
                [
                    case["name"],
                    _bits(case),
                    numbers.with_error(row["ppl"], row["ppl_err"]),
                    _ppl(row, case),
                    _kld(row, case),
                    *(numbers.NONE if base else numbers.significant(row[name]) for name in tail),
                    numbers.percent(row["same_top"], row["same_top_err"]),
                ]
            )
    scored = _scored(result, ctx)
    head = ("cache", "bits", "PPL", "PPL, %", "mean KLD", "median", "99 %", "99.9 %", "max", "same top, %")
    title = f"Context {ctx:,}, {scored:,} tokens scored; KLD in nats; PPL, %: change against the base"
    return Table(title, head, rows, "l" + "r" * 9) if rows else None


def speed(result: Result) -> Table | None:
    """Tokens per second and ratios at every depth."""
    found = [(case, case["speed"]) for case in result["cases"] if case["speed"]]
    if not found:
        return None
    rows: list[list[Cell]] = []
    for case, section in found:
        for point in section["points"]:
            row: list[Cell] = [case["name"], f"{point['depth']:,}"]
            for kind in ("prefill", "decode"):
                row.append(_tps(point[f"{kind}_tps"], point[f"{kind}_err"]))
                row.append(_ratio(point, kind, case))
            rows.append(row)
    settings, threads = result["settings"], found[0][1]["threads"]
    title = (
        f"by llama-bench, {threads} {'thread' if threads == 1 else 'threads'}: prefill of "
        f"{settings['speed_prompt']} and decode of {settings['speed_generate']} tokens, "
        f"{settings['speed_rounds']} rounds in turns; medians of tokens/s, and of ratios to the base of the "
        "same round"
    )
    head = ("cache", "depth", "prefill, t/s", "ratio", "decode, t/s", "ratio")
    return Table(title, head, rows, "lrrrrr")


def needles(result: Result) -> Table | None:
    """Needles found, and what the right answers lost."""
    title = "needles, and the log-probability of the right answers against the base (nats, mean per answer)"
    return _answers(result, "needle", title)


def retrieval(result: Result) -> Table | None:
    """Several keys in one text."""
    settings = result["settings"]
    keys = f"{settings['retrieval_keys']} keys in a text of {settings['retrieval_ctx']:,} tokens"
    title = keys + "; log-probability of the right answers against the base (nats, mean per answer)"
    return _answers(result, "retrieval", title)


def greedy(result: Result) -> Table | None:
    """Where greedy texts leave those of the base."""

    def row(case: Case, it: dict[str, Any]) -> list[Cell]:
        return [
            f"{it['agree']} of {it['prompts']}",
            numbers.percent(it["share_same"]),
            f"{it['mean_same']:,.0f}",
            f"{it['median_same']:,.0f}",
            f"{min(it['first_difference']):,}" if it["first_difference"] else numbers.NONE,
        ]

    settings = result["settings"]
    title = (
        f"Greedy texts of {settings['greedy_tokens']} tokens: how many are the base's to the end, "
        "and how many tokens are the same before the first that differs"
    )
    head = ("cache", "whole texts", "same, %", "mean", "median", "least")
    return _each(result, "greedy", title, head, row)


def sanity(result: Result) -> Table | None:
    """Repetition and garbage in long sampled texts."""

    def row(case: Case, it: dict[str, Any]) -> list[Cell]:
        return [
            (numbers.percent(it["repeated"], it["repeated_err"]), it["verdict"]),
            numbers.percent(it["garbage"]),
            f"{it['ended']} of {it['prompts']}",
            f"{it['mean_length']:,.0f}",
        ]

    title = (
        f"Sampled texts of {result['settings']['sanity_tokens']} tokens: 4-grams that occurred before in "
        "the same text, characters that are none, texts that the model ended itself, mean length in tokens"
    )
    return _each(result, "sanity", title, ("cache", "repeated, %", "garbage, %", "ended", "length"), row)


def memory(result: Result) -> Table | None:
    """Bytes of the cache, from the tools' own logs."""

    def row(case: Case, it: dict[str, Any]) -> list[Cell]:
        per_token = it["bytes_per_token"]
        return [
            _bits(case),
            numbers.percent(it["of_f16"]),
            f"{per_token:,.0f}" if per_token else numbers.NONE,
            *(numbers.size(per_token * n) if per_token else numbers.NONE for n in (8192, 32768, 131072)),
        ]

    head = ("cache", "bits", "% of f16", "bytes per token", "8K tokens", "32K", "128K")
    first: dict[str, Any] = next((case["memory"] for case in result["cases"] if case["memory"]), {})
    state = first.get("recurrent_mib")
    title = "bytes per token as llama.cpp's log reports them, the rest by multiplication"
    title += f"; besides a recurrent state of {state:g} MiB in every case" if state else ""
    return _each(result, "memory", title, head, row)


def comparisons(result: Result) -> Table | None:
    """Cases that are not the base, two by two."""
    rows: list[list[Cell]] = [
        [
            f"{it['a']} − {it['b']}",
            f"{it['ctx']:,}",
            numbers.with_error(it["difference"], it["error"]),
            (
                f"{it['a']} {it['verdict']}" if it["verdict"] in ("worse", "better") else it["verdict"],
                it["verdict"],
            ),
        ]
        for it in result["comparisons"]
    ]
    title = "differences of mean KLD, nats; errors of both combined"
    return Table(title, ("caches", "context", "difference", "verdict"), rows, "lrrl") if rows else None


def checks(result: Result) -> Table | None:
    """What of the build was held against what."""
    rows = [
        [
            check["case"] or "build",
            check["check"],
            ("passed", "passed") if check["ok"] else ("FAILED", "failed"),
            check["what"],
            check["found"],
            check["expected"],
        ]
        for check in result["checks"]
    ]
    return Table("", ("cache", "check", "", "what", "found", "expected"), rows, "lllwww") if rows else None


def examples(result: Result) -> Iterable[list[Cell]]:
    """Texts of cases and the base from where they part."""
    for case in result["cases"]:
        for it in (case["greedy"] or {}).get("examples", []):
            yield [case["name"], str(it["prompt"]), str(it["at"]), it["base"], it["case"]]


def check_sentence(check: dict[str, Any]) -> str:
    """A failed check in one sentence."""
    who = check["case"] or "build"
    return f"{who}: {check['check']}: {check['what']}: found {check['found']}, expected {check['expected']}"


def sentence(words: str) -> str:
    """With a capital letter and a full stop."""
    return words[:1].upper() + words[1:] + ("" if words.endswith((".", "!", "?")) else ".")


def facts(result: Result) -> list[tuple[str, str]]:
    """What was measured, on what, with what."""
    subject, machine, text = result["subject"], result["machine"], result["text"]
    cache = ""
    if subject["kv_layers"]:
        values = f"{subject['k_values']:,} and {subject['v_values']:,} values per token"
        cache = f"; {subject['kv_layers']} layers keep K and V, {values}"
    return [
        ("model", f"{subject['file']}, {numbers.size(subject['file_bytes'])}, sha256 {subject['sha256']}"),
        ("architecture", f"{subject['arch']}{cache}"),
        ("text", f"{text['file']}, sha256 {text['sha256']}"),
        ("machine", f"{machine['cpu']}, {machine['cores']} cores, {machine['system']}"),
        ("llama.cpp", f"{machine['llama_cpp']}, patch set {machine['patch_set']}, build {machine['build']}"),
        (
            "ggufrq",
            f"{result['ggufrq']}, {result['date']}, {numbers.duration(result['seconds'])} of measuring",
        ),
        ("parts", ", ".join(result["settings"]["sections"]) + f"; seed {result['settings']['seed']}"),
    ]


def _answers(result: Result, section: str, title: str) -> Table | None:
    def row(case: Case, it: dict[str, Any]) -> list[Cell]:
        difference = numbers.with_error(it["mean_difference"], it["mean_difference_err"])
        return [
            f"{it['hits']} of {it['of']}",
            numbers.NONE if case["is_base"] else (difference, it["verdict"]),
        ]

    return _each(result, section, title, ("cache", "found", "difference"), row)


def _each(
    result: Result,
    section: str,
    title: str,
    head: Sequence[str],
    row: Callable[[Case, dict[str, Any]], list[Cell]],
) -> Table | None:
    rows = [[case["name"], *row(case, case[section])] for case in result["cases"] if case[section]]
    return Table(title, head, rows, "l" + "r" * (len(head) - 1)) if rows else None


def _last(rows: Sequence[dict[str, Any]] | None) -> dict[str, Any]:
    return rows[-1] if rows else {}


def _bits(case: Case) -> str:
    return f"{case['bits_per_value']:.5g}" if case["bits_per_value"] else numbers.NONE


def _kld(row: dict[str, Any], case: Case) -> Cell:
    if not row or case["is_base"]:
        return numbers.NONE
    return numbers.with_error(row["kld_mean"], row["kld_mean_err"]), row["verdict_kld"]


def _ppl(row: dict[str, Any], case: Case) -> Cell:
    if not row or case["is_base"]:
        return numbers.NONE
    return numbers.change(row["ln_ratio"], row["ln_ratio_err"]), row["verdict_ppl"]


def _ratio(point: dict[str, Any], kind: str, case: Case) -> Cell:
    if not point or case["is_base"]:
        return "1×" if point else numbers.NONE
    return numbers.ratio(point[f"{kind}_ratio"], point[f"{kind}_ratio_err"]), point[f"verdict_{kind}"]


def _tps(value: float, error: float) -> str:
    return numbers.with_error(value, error) if error >= 0.1 else numbers.significant(value)


def _scored(result: Result, ctx: int) -> int:
    return max(
        (row["scored"] for case in result["cases"] for row in case["quality"] or [] if row["ctx"] == ctx),
        default=0,
    )
