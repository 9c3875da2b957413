from __future__ import annotations

import random
from itertools import combinations, pairwise

import pytest

from ggufrq.report.svg import Labels, Scale, element, spread, width_of

BORDER = (0.0, 0.0, 440.0, 330.0)


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return min(a[2], b[2]) - max(a[0], b[0]) > 0.01 and min(a[3], b[3]) - max(a[1], b[1]) > 0.01


@pytest.mark.parametrize("seed", range(5))
def test_labels_overlap_neither_each_other_nor_points_nor_the_border(seed: int) -> None:
    draw = random.Random(seed)
    columns = [60, 140, 200, 230]  # as types of 2, 3, 4 and 4.5 bits lie
    points = [(draw.choice(columns), draw.uniform(40, 290)) for _ in range(13)]
    points += [(390.0, 300.0), (390.0, 300.0)]  # two at one place, near the border
    labels = Labels(BORDER)
    for x, y in points:
        labels.keep_clear(x, y)
    marks = list(labels.taken)
    for i, (x, y) in enumerate(points):
        labels.place(x, y, f"planar{i} block")
    boxes = labels.taken[len(marks) :]
    assert len(boxes) == len(points)
    assert not [pair for pair in combinations(boxes, 2) if overlap(*pair)]
    assert not [(box, mark) for box in boxes for mark in marks if overlap(box, mark)]
    for left, top, right, bottom in boxes:
        assert left >= 0 and top >= 0 and right <= BORDER[2] and bottom <= BORDER[3]


def test_a_label_that_stands_apart_has_a_line_to_its_point() -> None:
    labels = Labels(BORDER)
    drawn = [labels.place(200, 150, "a label of some length") for _ in range(8)]
    assert not any("<line" in part for part in drawn[0])
    assert any("<line" in part for part in drawn[-1])


def test_spread() -> None:
    moved = spread([100, 100, 101, 250], 10, 300, gap=14)
    assert all(b - a >= 13.9 for a, b in pairwise(sorted(moved)))
    assert moved[3] == 250 and sum(moved[:3]) / 3 == pytest.approx(100.3, abs=1)
    assert min(spread([12, 12, 12], 10, 300, gap=14)) >= 10
    assert spread([], 0, 1) == []


@pytest.mark.parametrize(
    ("scale", "ticks"),
    [
        (Scale(0.0001, 0.15, 0, 1, log=True), [0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1]),
        (Scale(0.08, 5.5, 0, 1, log=True), [0.1, 0.2, 0.5, 1, 2, 5]),
        (Scale(0.8, 1.25, 0, 1, log=True), [1]),
        (Scale(0, 10, 0, 1), [0, 2, 4, 6, 8, 10]),
    ],
)
def test_ticks(scale: Scale, ticks: list[float]) -> None:
    assert scale.ticks() == pytest.approx(ticks)


def test_scale_is_linear_or_logarithmic() -> None:
    assert Scale(0, 10, 100, 200)(5) == 150
    assert Scale(1, 100, 300, 100, log=True)(10) == pytest.approx(200)


def test_attributes_are_escaped() -> None:
    assert (
        element("a", class_="x", stroke_width=1.25, id=None, title='<"')
        == '<a class="x" stroke-width="1.2" title="&lt;&#34;"/>'
    )
    assert width_of("iso3") < width_of("planar3")
