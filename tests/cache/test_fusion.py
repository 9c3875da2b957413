"""Which rotations and stores of a model's graph the CUDA backend puts into one launch.

The choice is made without CUDA (overlay, ggml-cuda/rq-fuse.h), so that it is seen here on the graphs
that llama.cpp builds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from kv_drivers import DENSE, HYBRID, means, run

from ggufrq.base import paths

pytestmark = [pytest.mark.native, pytest.mark.build]

#: rotations, stores, rotations that are written out, nodes: of Q, K and V with both stores; of one alone
QKV, ONE = (3, 2, 1, 12), (1, 0, 1, 1)
OUT = (0, 0, 0, 4)  # the rotation of the output with attention
LAYERS = {DENSE: 8, HYBRID: 2}  # with attention


@pytest.fixture(scope="session")
def launches(compiled: Callable[[str], Path]) -> Callable[..., Counter[tuple[int, ...]]]:
    program = compiled("fusion")

    def see(model: Path, k: str, v: str, tokens: int = 1, **options: object) -> Counter[tuple[int, ...]]:
        found = run(program, model, paths.data_dir("texts") / "heldout.txt", k, v, str(tokens), **options)  # type: ignore[arg-type]
        return Counter(map(tuple, found))

    return see


@pytest.mark.parametrize("name", [DENSE, HYBRID])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("k", "v"), [("iso3", "iso3"), ("planar4", "rotor2")])
def test_a_layer_takes_two(
    launches: Callable[..., Counter[tuple[int, ...]]],
    f16_models: dict[str, Path],
    name: str,
    tokens: int,
    k: str,
    v: str,
) -> None:
    assert launches(f16_models[name], k, v, tokens) == {QKV: LAYERS[name], OUT: LAYERS[name]}


def test_caches_that_are_rotated_in_part(
    launches: Callable[..., Counter[tuple[int, ...]]], f16_models: dict[str, Path], tmp_path: Path
) -> None:
    model = f16_models[DENSE]
    assert launches(model, "iso3", "f16") == {(2, 1, 1, 7): 8}  # V lies between, and is stored by upstream
    assert launches(model, "f16", "iso3") == {ONE: 8, OUT: 8}  # upstream fuses RoPE and the store of K
    assert launches(model, "f16", "f16") == {}
    # K of another type is written out, where Q was: one after the other
    assert launches(model, "iso3", "iso3", layers="3:q8_0/iso3") == {QKV: 7, ONE: 3, OUT: 8}
    # other nodes read K and V, too, or come between K and its store: all is written out
    calib = means(model, tmp_path / "calib.gguf", size=0.1)
    for options in ({"recent": 32}, {"calib": calib}):
        found = launches(model, "iso3", "iso3", **options)
        assert sum(rotations * count for (rotations, *_), count in found.items()) + found[OUT] == 32
        assert all(rotations == kept for rotations, _, kept, _ in found)
