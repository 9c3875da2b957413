"""The page and the tables of a validation, from a result that a real run gave."""

from __future__ import annotations

import copy
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from ggufrq.report import html, plots, terminal

RESULT = Path(__file__).resolve().parent.parent / "logs" / "report" / "result.json"
#: Elements without an end.
VOID = {"meta", "rect", "line", "circle", "polygon", "path"}


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(RESULT.read_text(encoding="utf-8"))
    return found


def many(result: dict[str, Any], count: int = 13) -> dict[str, Any]:
    """The result with many cases, at few different sizes."""
    base, case = result["cases"][0], result["cases"][1]
    cases = [base]
    for i in range(count):
        other = copy.deepcopy(case)
        other["name"] = f"planar{i}/iso3; 0-1,-1:q8_0"
        other["bits_per_value"] = 2.125 + i % 3
        for row in other["quality"]:
            row["kld_mean"] = 0.1 / (1 + i % 4) ** 3
        cases.append(other)
    return {**result, "cases": cases}


class Page(HTMLParser):
    """Which elements a page has; fails on any that is not closed."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.opened: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()
        assert self.opened == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID or self.opened[-1:] == [tag]:
            assert self.opened.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_page_is_whole_and_loads_nothing(result: dict[str, Any]) -> None:
    page = html.render(result)
    seen = Page(page).seen
    assert not {tag for tag, _ in seen} & {"script", "link", "img", "iframe", "object"}
    assert not [attrs for _, attrs in seen if {"src", "srcset", "onclick", "onload"} & set(attrs)]
    links = [attrs["href"] for _, attrs in seen if "href" in attrs]
    assert sorted(filter(None, links)) == sorted(result["logs"])  # beside the page
    assert "url(" not in page and "@import" not in page
    assert "prefers-color-scheme: dark" in page and "@media print" in page and "viewport" in page


def test_page_has_every_case_figure_and_command(result: dict[str, Any]) -> None:
    text = Page(html.render(result)).text()
    for case in result["cases"]:
        assert case["name"] in text
    for command in result["commands"]:
        assert " ".join(command.split()) in text
    for part in (
        result["again"],
        result["subject"]["sha256"],
        result["machine"]["llama_cpp"],
        result["text"]["file"],
        *(note[1:] for note in result["notes"]),
    ):
        assert part in text
    assert re.search(r"\b(nan|inf|None)\b", text) is None


def test_plots_are_well_formed_and_in_order(result: dict[str, Any]) -> None:
    cases = many(result)["cases"]
    ctx = cases[1]["quality"][0]["ctx"]
    drawn = plots.divergence(cases, ctx)
    assert drawn is not None
    tree = ElementTree.fromstring(drawn)
    assert tree.get("role") == "img" and str(ctx) in str(tree.get("aria-label"))
    marks = {str(mark.findtext("title")): mark for mark in tree if str(mark.get("class")).startswith("mark")}
    assert len(marks) == 13
    heights = []
    for case in cases[1:]:
        mark = next(mark for title, mark in marks.items() if title.startswith(case["name"] + ":"))
        points = [float(n) for n in re.findall(r"[\d.]+", mark.get("points") or "")]
        y = float(mark.get("cy") or 0) or sum(points[1::2]) / (len(points) / 2)
        heights.append((case["quality"][0]["kld_mean"], y))
    by_loss = [y for _, y in sorted(heights, reverse=True)]
    # more loss stands higher; centres of triangles are off by a little
    assert all(a < b + 4 for a, b in pairwise(by_loss))
    names = [element.text for element in tree if element.tag == "text"]
    assert all(case["name"] in names for case in cases[1:])


def test_a_loss_that_is_not_positive_does_not_break_the_logarithm(result: dict[str, Any]) -> None:
    result["cases"][1]["quality"][0]["kld_mean"] = -1e-6
    ctx = result["cases"][1]["quality"][0]["ctx"]
    drawn = plots.divergence(result["cases"], ctx)
    assert drawn is not None and "(0)" in drawn and "nan" not in drawn
    for case in result["cases"]:
        for row in case["quality"]:
            row["kld_mean"] = -1e-6
    assert plots.divergence(result["cases"], ctx) is None
    Page(html.render(result))


def test_speed_plot(result: dict[str, Any]) -> None:
    drawn = plots.speed(result["cases"], "decode", result["base"])
    assert drawn is not None
    tree = ElementTree.fromstring(drawn)
    titles = [title.text or "" for title in tree.iter("title")]
    for case in result["cases"][1:]:
        for point in case["speed"]["points"]:
            assert any(t.startswith(f"{case['name']} at {point['depth']:,}: ") for t in titles)
    assert not any(title.startswith(f"{result['base']} at") for title in titles)


def test_needle_map_has_a_cell_for_each_needle(result: dict[str, Any]) -> None:
    case = result["cases"][1]
    drawn = plots.needles(case, 1.0)
    assert drawn is not None
    tree = ElementTree.fromstring(drawn)
    colours = [element for element in tree if element.get("class") in ("loss", "gain")]
    assert len(colours) == len(case["needle"]["cells"])
    for cell in case["needle"]["cells"]:
        cell["difference"] = -2.0
    worse = plots.needles(case, 2.0)
    assert worse is not None and worse.count('class="loss"') == len(colours)
    assert 'fill-opacity="0.75"' in worse


@pytest.mark.parametrize("section", ["quality", "greedy", "needle", "retrieval", "sanity", "speed", "memory"])
def test_a_section_without_data_says_so(result: dict[str, Any], section: str) -> None:
    full = Page(html.render(result)).text().count("not measured")
    for case in result["cases"]:
        case[section] = None
    assert Page(html.render(result)).text().count("not measured") == full + 1
    told = terminal.render(result)
    assert section == "memory" or f"not measured: {section}" in told


def test_a_failed_case_does_not_hide_the_others(result: dict[str, Any]) -> None:
    case = result["cases"][1]
    case["error"] = "llama-perplexity failed: <no> memory"
    for section in ("memory", "quality", "greedy", "needle", "retrieval", "sanity", "speed"):
        case[section] = None
    case["bits_per_value"] = None
    page = html.render(result)
    assert "&lt;no&gt; memory" in page and "<no>" not in page
    assert f"{case['name']} failed:" in Page(page).text()
    assert "llama-perplexity failed: <no> memory" in " ".join(terminal.render(result).split())
    assert result["cases"][2]["name"] in terminal.render(result)


def test_a_failed_check_stands_at_the_top(result: dict[str, Any]) -> None:
    assert "faulty" not in html.render(result)
    result["checks"][0] |= {"ok": False, "found": "7 of 8 bytes differ"}
    text = Page(html.render(result)).text()
    assert text.index("This build of llama.cpp is faulty") < text.index("At a glance")
    assert text.index("7 of 8 bytes differ") < text.index("At a glance")
    assert "7 of 8 bytes differ" in " ".join(terminal.render(result).split())


def test_verdicts_have_signs_beside_their_colours(result: dict[str, Any]) -> None:
    case = result["cases"][1]
    case["quality"][-1]["verdict_kld"] = "worse"
    assert '<td class="worse" title="worse">▼ ' in html.render(result)
    assert "▼" in terminal.render(result)
    case["quality"][-1]["verdict_kld"] = "no difference seen"
    assert 'title="no difference seen">' in html.render(result)


def test_terminal_fits_80_columns(result: dict[str, Any]) -> None:
    told = terminal.render(many(result))
    assert max(map(len, told.splitlines())) <= 80
    assert told.count("planar12/iso3; 0-1,-1…") >= 2
    assert all(case["name"] in terminal.render(result) for case in result["cases"])


def test_names_are_escaped_everywhere(result: dict[str, Any]) -> None:
    result["cases"][1]["name"] = "<b>&"
    result["subject"]["name"] = "<i>"
    page = html.render(result)
    assert "<b>" not in page and "<i>" not in page
    assert "<b>&" in Page(page).text()


SCRIPT = "<script>alert('\"&\"')</script>"


def scripted(value: Any, key: str = "") -> Any:
    """The value with a script in every text, but for those that decide what is shown."""
    if isinstance(value, dict):
        return {name: scripted(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [scripted(inner, key) for inner in value]
    if isinstance(value, str) and not key.startswith("verdict"):
        return value + SCRIPT
    return value


def test_nothing_in_a_result_becomes_a_script(result: dict[str, Any]) -> None:
    plain = Page(html.render(result)).seen
    result["checks"][0]["ok"] = False
    result["cases"][1]["error"] = "it failed"
    page = Page(html.render(scripted(result)))
    tags = [tag for tag, _ in page.seen]
    assert "script" not in tags and SCRIPT in page.text()
    assert set(tags) == {tag for tag, _ in plain} | {"strong"}
    assert f"{result['subject']['name']}{SCRIPT}: what a KV cache costs" in page.text()
    assert f"decode, times {result['base']}{SCRIPT}" in page.words  # the title of an axis
    links = [attrs["href"] for tag, attrs in page.seen if tag == "a"]
    assert links == [log + SCRIPT for log in result["logs"]]


def test_what_is_not_known_of_a_model_does_not_break_the_page(result: dict[str, Any]) -> None:
    """A model whose cache is not simply its K and V projections, measured without a server."""
    for name in ("parameters", "n_ctx_train", "kv_layers", "k_values", "v_values"):
        result["subject"][name] = None
    case = result["cases"][1]
    case["bits_per_value"] = None
    for name in ("cache_bytes", "bytes_per_token", "bits_per_value", "of_f16"):
        case["memory"][name] = None
    for section in ("needle", "retrieval"):
        case[section]["mean_difference"] = case[section]["mean_difference_err"] = None
    for point in case["speed"]["points"]:
        point["verdict_decode"] = None
    text = Page(html.render(result)).text()
    assert re.search(r"\b(nan|inf|None)\b", text) is None
    assert "None" not in terminal.render(result)
