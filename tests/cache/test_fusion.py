"""Which rotations and stores of a model's graph the CUDA backend puts into one launch.

The choice is made without CUDA (overlay, ggml-cuda/rq-fuse.h), so that it is seen here on the graphs
that llama.cpp builds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import head_models
import pytest
from kv_drivers import DENSE, HYBRID, NARROW, means, metric, run

from ggufrq.base import paths

pytestmark = [pytest.mark.native, pytest.mark.build]

#: rotations, stores, rotations that are written out, nodes
KV, Q = (2, 2, 0, 9), (1, 0, 1, 1)  # K and V on their way into the cache, and the queries
ALL = (3, 2, 1, 11)  # both, where the queries are not written to where K or V of this ubatch were
K_OR_V = (1, 1, 0, 4)
OUT = (0, 0, 0, 3)  # the rotation of the output with attention
LAYERS = {DENSE: 8, HYBRID: 2, NARROW: 8}  # with attention


@pytest.fixture(scope="session")
def launches(compiled: Callable[[str], Path]) -> Callable[..., Counter[tuple[int, ...]]]:
    program = compiled("fusion")

    def see(model: Path, k: str, v: str, tokens: int = 1, **options: object) -> Counter[tuple[int, ...]]:
        found = run(program, model, paths.data_dir("texts") / "heldout.txt", k, v, str(tokens), **options)  # type: ignore[arg-type]
        return Counter(map(tuple, found))

    return see


@pytest.mark.parametrize("name", [DENSE, HYBRID, NARROW])
@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize(("k", "v"), [("iso3", "iso3"), ("planar4", "rotor2")])
def test_a_layer_takes_three_at_most(
    launches: Callable[..., Counter[tuple[int, ...]]],
    f16_models: dict[str, Path],
    name: str,
    tokens: int,
    k: str,
    v: str,
) -> None:
    found = launches(f16_models[name], k, v, tokens)
    assert found.keys() <= {KV, Q, ALL, OUT}
    assert found[KV] + found[ALL] == found[OUT] == LAYERS[name]
    assert found[Q] == found[KV]


def test_caches_that_are_rotated_in_part(
    launches: Callable[..., Counter[tuple[int, ...]]], f16_models: dict[str, Path], tmp_path: Path
) -> None:
    model = f16_models[DENSE]
    assert launches(model, "iso3", "f16") == {K_OR_V: 8, Q: 8}
    assert launches(model, "f16", "iso3") == {K_OR_V: 8, OUT: 8}
    assert launches(model, "f16", "f16") == {}
    # the means of K are subtracted before its rotation
    calib = means(model, tmp_path / "calib.gguf", size=0.1)
    found = launches(model, "iso3", "iso3", profile=calib)
    assert found[KV] + found[ALL] == found[OUT] == 8
    # a layer with K of upstream's types has upstream's rotation there
    found = launches(model, "iso3", "iso3", layers="3:q8_0/iso3")
    assert (found[KV] + found[ALL], found[K_OR_V], found[OUT]) == (7, 1, 8)
    # other nodes read K and V, too: all is written out, but the output's rotation goes with attention
    found = launches(model, "iso3", "iso3", recent=32)
    assert sum(rotations * count for (rotations, *_), count in found.items()) == 24
    assert found[OUT] == 8
    assert all(rotations == kept for rotations, _, kept, _ in found)


@pytest.mark.parametrize(("name", "layers"), [(DENSE, 8), (HYBRID, 2)])
@pytest.mark.parametrize("tokens", [1, 9])
def test_a_profile_takes_no_launch_more(
    launches: Callable[..., Counter[tuple[int, ...]]],
    f16_models: dict[str, Path],
    tmp_path: Path,
    name: str,
    layers: int,
    tokens: int,
) -> None:
    """Means, products, the order of heads and stores: two launches a layer, as without, where f16 has two
    for its stores (one, where RoPE stores K)."""
    model = f16_models[name]
    profile = metric(model, tmp_path / "kv.gguf", spread=1.3)
    found = Counter[tuple[int, ...]]()
    for launch, count in launches(model, "iso3", "iso3", tokens, profile=profile).items():
        found[launch[:3]] += count
    plain = Counter[tuple[int, ...]]()
    for launch, count in launches(model, "iso3", "iso3", tokens).items():
        plain[launch[:3]] += count
    assert found.keys() <= {(2, 2, 0), (1, 0, 1), (3, 2, 1), (0, 0, 0)}
    assert found[2, 2, 0] + found[3, 2, 1] == found[0, 0, 0] == layers
    assert found[1, 0, 1] == found[2, 2, 0]
    assert sum(found.values()) <= sum(plain.values()) + layers


@pytest.mark.parametrize("tokens", [1, 9])
def test_latent_keys_take_one_for_k_and_one_for_queries(
    launches: Callable[..., Counter[tuple[int, ...]]], tmp_path: Path, tokens: int
) -> None:
    """With MLA, where V is a view of K; or one for both."""
    both = (2, 1, 1, 6)
    found = launches(head_models.latent(tmp_path / "latent.gguf"), "iso3", "iso3", tokens)
    assert found.keys() <= {K_OR_V, Q, both, OUT}
    assert found[K_OR_V] + found[both] == found[OUT] == head_models.LAYERS
    assert found[Q] == found[K_OR_V]


def test_products_of_many_tokens_are_left_to_tensor_cores(
    launches: Callable[..., Counter[tuple[int, ...]]], f16_models: dict[str, Path], tmp_path: Path
) -> None:
    profile = metric(f16_models[DENSE], tmp_path / "kv.gguf", spread=1.3)
    found = launches(f16_models[DENSE], "iso3", "iso3", 40, profile=profile)
    assert found[K_OR_V] == found[OUT] == 8  # V, and the output
