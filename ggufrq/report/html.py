"""One self-contained page: plots, a table of everything with verdicts, and all that it takes to repeat it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from ggufrq.report import plots, tables
from ggufrq.report.tables import NOT_MEASURED, Table

Result = dict[str, Any]

_MARKS = {"worse": "▼ ", "slower": "▼ ", "better": "▲ ", "faster": "▲ ", "failed": "✗ ", "passed": "✓ "}


def render(result: Result) -> str:
    """The whole page of a result (see ``measure.validate.assemble``). It loads nothing."""
    name = f"{result['subject']['name']}: what a KV cache costs"
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    parts = [
        *_head(result, name),
        *_section("At a glance", _summary(result)),
        *_section("Quality against size", _quality(result)),
        *_section("Speed", _speed(result)),
        *_section("Needles in a haystack", _needles(result)),
        *_section("Several keys", _tables([tables.retrieval(result)])),
        *_section("Long texts", _texts(result)),
        *_section("Memory", _tables([tables.memory(result)])),
        *_section("One against another", _tables([tables.comparisons(result)])),
        *_section("Is the build right?", _checks(result)),
        *_section("How to run this again", _again(result)),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(name)}</title>\n<style>\n{style}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _head(result: Result, name: str) -> Iterable[str]:
    subject, machine = result["subject"], result["machine"]
    about = [
        f"{subject['parameters']:,} parameters" if subject["parameters"] else "",
        f"weights {subject['weights']}",
        f"trained on contexts of {subject['n_ctx_train']:,} tokens" if subject["n_ctx_train"] else "",
        str(machine["cpu"]),
        str(result["date"])[:10],
    ]
    yield f"<h1>{escape(name)}</h1>"
    yield f'<p class="dim about">{escape(" · ".join(filter(None, about)))}</p>'
    failed = [check for check in result["checks"] if not check["ok"]]
    if failed:
        yield '<div class="banner bad" role="alert"><p><strong>✗ This build of llama.cpp is faulty.</strong> '
        yield "What follows tells of the fault, not of the cache types.</p>"
        for check in failed:
            yield f"<p>{escape(tables.check_sentence(check))}</p>"
        yield "</div>"
    elif result["checks"]:
        count = len(result["checks"])
        yield f'<div class="banner"><p>✓ All {count} self-checks of the build passed.</p></div>'
    for case in result["cases"]:
        if case["error"]:
            yield '<div class="banner bad" role="alert"><p>'
            yield f"<strong>✗ {escape(case['name'])} failed:</strong> {escape(case['error'])}</p></div>"
    if result["notes"]:
        yield "<ul>" + "".join(f"<li>{escape(tables.sentence(n))}</li>" for n in result["notes"]) + "</ul>"


def _summary(result: Result) -> Iterable[str]:
    yield from _table(tables.summary(result))
    yield (
        f'<p class="small dim">Everything is compared with {escape(result["base"])}. ± is one standard '
        "error. ▼ and ▲ stand where a difference is larger than chance explains (twice its error, or "
        "Student’s t at 95 % over few rounds); no mark: no difference seen.</p>"
    )


def _quality(result: Result) -> Iterable[str]:
    figures = []
    for ctx in _contexts(result):
        plot = plots.divergence(result["cases"], ctx)
        if plot:
            figures.append(
                (plot, f"Context {ctx:,}: mean KLD against {result['base']}, ± one standard error")
            )
    yield from _figures(figures, "plots")
    yield from _tables(tables.quality(result, ctx) for ctx in _contexts(result))
    if not _contexts(result):
        yield _none()


def _speed(result: Result) -> Iterable[str]:
    figures = []
    for kind in ("prefill", "decode"):
        plot = plots.speed(result["cases"], kind, result["base"])
        if plot:
            figures.append((plot, f"{kind.capitalize()} against {result['base']} in the same round"))
    yield from _figures(figures, "plots")
    yield from _tables([tables.speed(result)])


def _needles(result: Result) -> Iterable[str]:
    found = [case for case in result["cases"] if case["needle"]]
    if not found:
        yield _none()
        return
    differences = [
        abs(cell["difference"]) for case in found for cell in case["needle"]["cells"] if cell["difference"]
    ]
    limit = max(differences, default=0.0)
    figures = []
    for case in found:
        plot = plots.needles(case, limit)
        if plot:
            figures.append((plot, case["name"]))
    yield (
        '<p class="small dim">Across: length of the text. Down: how much of it stands before the needle. '
        "✓ ✗: whether greedy decoding gives the answer. The figure, and the colour, is what the right "
        f"answer’s log-probability differs from {escape(result['base'])}’s, in nats: orange lost, blue "
        "gained.</p>"
    )
    yield from _figures(figures, "maps")
    yield from _tables([tables.needles(result)])


def _texts(result: Result) -> Iterable[str]:
    yield from _tables([tables.greedy(result), tables.sanity(result)])
    examples = list(tables.examples(result))
    if examples:
        yield f"<details><summary>Where texts leave those of {escape(result['base'])}</summary>"
        yield from _table(
            Table("", ("cache", "prompt", "token", "base goes on", "cache goes on"), examples, "lrrww")
        )
        yield "</details>"


def _checks(result: Result) -> Iterable[str]:
    table = tables.checks(result)
    if table is None:
        yield _none()
        return
    yield "<details" + (" open" if any(not check["ok"] for check in result["checks"]) else "") + ">"
    yield f"<summary>{len(table.rows)} checks of the build against the specification</summary>"
    yield from _table(table)
    yield "</details>"


def _again(result: Result) -> Iterable[str]:
    if result["again"]:
        yield f'<pre class="wrap">{escape(result["again"])}</pre>'
    yield '<dl class="facts">'
    for name, value in tables.facts(result):
        yield f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
    yield "</dl>"
    if result["commands"]:
        yield f"<details><summary>{len(result['commands'])} commands that were run</summary>"
        yield f'<pre class="wrap">{escape(chr(10).join(result["commands"]))}</pre></details>'
    if result["logs"]:
        yield f"<details><summary>{len(result['logs'])} raw logs, beside this page</summary><ul>"
        yield "".join(
            f'<li><a href="{escape(log)}"><code>{escape(log)}</code></a></li>' for log in result["logs"]
        )
        yield "</ul></details>"


def _section(title: str, parts: Iterable[str]) -> Iterable[str]:
    yield f"<section>\n<h2>{escape(title)}</h2>"
    yield from parts
    yield "</section>"


def _figures(figures: Sequence[tuple[str, str]], class_: str) -> Iterable[str]:
    if figures:
        yield f'<div class="{class_}">'
        for plot, words in figures:
            yield f"<figure>{plot}<figcaption>{escape(words)}</figcaption></figure>"
        yield "</div>"


def _tables(found: Iterable[Table | None]) -> Iterable[str]:
    for table in found:
        if table is None:
            yield _none()
        else:
            yield from _table(table)


def _table(table: Table) -> Iterable[str]:
    label = f' aria-label="{escape(table.title)}"' if table.title else ""
    if table.title:
        yield f'<p class="small dim">{escape(tables.sentence(table.title))}</p>'
    yield f'<div class="scroll" tabindex="0"><table{label}>'
    sides = [{"l": "l", "w": "l w"}.get(side, "") for side in table.align]
    cells = "".join(
        f'<th scope="col"{_class(side)}>{escape(word)}</th>'
        for word, side in zip(table.head, sides, strict=True)
    )
    yield f"<thead><tr>{cells}</tr></thead><tbody>"
    for row in table.rows:
        cells = f'<th scope="row" class="l">{escape(str(row[0]))}</th>'
        for value, side in zip(row[1:], sides[1:], strict=True):
            words, verdict = value if isinstance(value, tuple) else (value, None)
            mark = _MARKS.get(verdict or "", "")
            class_ = " ".join(filter(None, [side, verdict if mark else ""]))
            title = f' title="{escape(verdict)}"' if verdict else ""
            cells += f"<td{_class(class_)}{title}>{mark}{escape(words)}</td>"
        yield f"<tr>{cells}</tr>"
    yield "</tbody></table></div>"


def _class(name: str) -> str:
    return f' class="{name}"' if name else ""


def _contexts(result: Result) -> list[int]:
    return sorted({row["ctx"] for case in result["cases"] for row in case["quality"] or []})


def _none() -> str:
    return f'<p class="none">{NOT_MEASURED}</p>'
