"""How many kernels a model's graph takes on Metal, beside f16."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_metal import Harness
from kv_drivers import DENSE, metric, run

from ggufrq.base import paths
from ggufrq.build.project import Build
from ggufrq.models.convert import convert

pytestmark = [pytest.mark.build, pytest.mark.slow]

LAYERS = 8


@pytest.fixture(scope="module")
def model(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("model") / f"{DENSE}.gguf"
    return convert(paths.data_dir("models") / DENSE, target, llama_build.source)


@pytest.fixture(scope="module")
def launches(harness: Harness, model: Path) -> Callable[..., Counter[str]]:
    program = harness.link_program("launches")

    def see(k: str, v: str, tokens: int, **options: object) -> Counter[str]:
        """By the beginnings of their names: ours, and all others together."""
        text = paths.data_dir("texts") / "heldout.txt"
        found = run(program, model, text, k, v, str(tokens), **options)  # type: ignore[arg-type]
        ours = ("kernel_rq_store", "kernel_rq_recent", "kernel_rq_behind", "kernel_rq_kv", "kernel_set_rows")
        return Counter(next((name for name in ours if kernel.startswith(name)), "others") for kernel in found)

    return see


@pytest.mark.parametrize("profile", [False, True])
def test_decoding_takes_two_launches_a_layer_more_than_f16(
    launches: Callable[..., Counter[str]], model: Path, tmp_path: Path, profile: bool
) -> None:
    """The product of Q and the rotation of the output, and three with newest tokens."""
    f16 = launches("f16", "f16", 1)
    assert f16["kernel_set_rows"] == 2 * LAYERS and f16.keys() == {"kernel_set_rows", "others"}
    path = metric(model, tmp_path / "kv.gguf", spread=1.3) if profile else None
    ours = launches("iso3", "iso3", 1, profile=path)
    assert ours == {"kernel_rq_store": 2 * LAYERS, "others": f16["others"] + 2 * LAYERS}
    held = launches("iso3", "iso3", 1, profile=path, recent=32)
    assert held - ours == {"kernel_rq_recent": LAYERS, "kernel_set_rows": 2 * LAYERS}
    assert not ours - held


def test_many_tokens_take_a_copy_with_newest_rows_behind_it(launches: Callable[..., Counter[str]]) -> None:
    found = launches("q8_0", "q8_0", 40, recent=32)
    assert found["kernel_rq_kv"] == found["kernel_rq_behind"] == 2 * LAYERS
    ours = launches("iso3", "iso3", 9)
    assert ours["kernel_rq_store"] == 2 * LAYERS and not ours["kernel_set_rows"]
