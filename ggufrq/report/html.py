"""One self-contained page: plots, a table of everything with verdicts, and all that it takes to repeat it.

``page.html`` is its template. Words are escaped there, and pictures are put together as markup in ``svg``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template
from markupsafe import Markup

from ggufrq.report import plots, tables
from ggufrq.report.tables import NOT_MEASURED, Table

Result = dict[str, Any]
#: A picture, and what is written below it.
Figure = tuple[Markup, str]

_FOLDER = Path(__file__).parent
_MARKS = {"worse": "▼ ", "slower": "▼ ", "better": "▲ ", "faster": "▲ ", "failed": "✗ ", "passed": "✓ "}


@dataclass(frozen=True)
class _Cell:
    words: str
    class_: str
    mark: str = ""
    title: str = ""


@dataclass(frozen=True)
class _Grid:
    """A table as the template takes it: every row has its name and its other cells."""

    title: str
    head: list[_Cell]
    rows: list[tuple[str, list[_Cell]]]

    @property
    def sentence(self) -> str:
        return tables.sentence(self.title)


def render(result: Result) -> str:
    """The whole page of a result (see ``measure.validate.assemble``). It loads nothing."""
    contexts = sorted({row["ctx"] for case in result["cases"] for row in case["quality"] or []})
    examples = list(tables.examples(result))
    head = ("cache", "prompt", "token", "base goes on", "cache goes on")
    return _page().render(
        result=result,
        name=f"{result['subject']['name']}: what a KV cache costs",
        style=Markup((_FOLDER / "style.css").read_text(encoding="utf-8")),
        about=_about(result),
        none_word=NOT_MEASURED,
        faults=[tables.check_sentence(check) for check in result["checks"] if not check["ok"]],
        notes=[tables.sentence(note) for note in result["notes"]],
        summary=_grid(tables.summary(result)),
        quality_plots=_quality_plots(result, contexts),
        quality=[_grid(tables.quality(result, ctx)) for ctx in contexts] or [None],
        speed_plots=_speed_plots(result),
        speed=_grid(tables.speed(result)),
        needle_maps=_needle_maps(result),
        needles=_grid(tables.needles(result)),
        retrieval=_grid(tables.retrieval(result)),
        texts=[_grid(tables.greedy(result)), _grid(tables.sanity(result))],
        examples=_grid(Table("", head, examples, "lrrww")) if examples else None,
        memory=_grid(tables.memory(result)),
        comparisons=_grid(tables.comparisons(result)),
        checks=_grid(tables.checks(result)),
        facts=tables.facts(result),
    )


@cache
def _page() -> Template:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    return environment.get_template("page.html")


def _about(result: Result) -> str:
    subject, machine = result["subject"], result["machine"]
    about = [
        f"{subject['parameters']:,} parameters" if subject["parameters"] else "",
        f"weights {subject['weights']}",
        f"trained on contexts of {subject['n_ctx_train']:,} tokens" if subject["n_ctx_train"] else "",
        str(machine["cpu"]),
        str(result["date"])[:10],
    ]
    return " · ".join(filter(None, about))


def _quality_plots(result: Result, contexts: list[int]) -> list[Figure]:
    found = [(plots.divergence(result["cases"], ctx), ctx) for ctx in contexts]
    words = f"mean KLD against {result['base']}, ± one standard error"
    return [(plot, f"Context {ctx:,}: {words}") for plot, ctx in found if plot]


def _speed_plots(result: Result) -> list[Figure]:
    kinds = ("prefill", "decode")
    found = [(plots.speed(result["cases"], kind, result["base"]), kind) for kind in kinds]
    words = f"against {result['base']} in the same round"
    return [(plot, f"{kind.capitalize()} {words}") for plot, kind in found if plot]


def _needle_maps(result: Result) -> list[Figure]:
    found = [case for case in result["cases"] if case["needle"]]
    differences = [
        abs(cell["difference"]) for case in found for cell in case["needle"]["cells"] if cell["difference"]
    ]
    limit = max(differences, default=0.0)
    return [(plot, case["name"]) for case in found if (plot := plots.needles(case, limit))]


def _grid(table: Table | None) -> _Grid | None:
    if table is None:
        return None
    sides = [{"l": "l", "w": "l w"}.get(side, "") for side in table.align]
    rows = []
    for row in table.rows:
        cells = []
        for value, side in zip(row[1:], sides[1:], strict=True):
            words, verdict = value if isinstance(value, tuple) else (value, None)
            mark = _MARKS.get(verdict or "", "")
            class_ = " ".join(filter(None, [side, verdict if mark else ""]))
            cells.append(_Cell(words, class_, mark, verdict or ""))
        rows.append((str(row[0]), cells))
    head = [_Cell(words, side) for words, side in zip(table.head, sides, strict=True)]
    return _Grid(table.title, head, rows)
