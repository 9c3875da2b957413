"""Models and matrices that are legal in form and wrong in content, as people report them: docs/faults.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from families import family_of

from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.ggufs import imatrix, values
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.imatrix import Entry, Matrix
from ggufrq.make.plan import Family

pytestmark = [pytest.mark.build]

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"


@pytest.fixture(scope="module")
def model(families: dict[str, Family]) -> Path:
    return families[DENSE].folder / f"{DENSE}-BF16.gguf"


@pytest.fixture(scope="module")
def known(model: Path, llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Matrix:
    """A matrix of the dense model, from random activations: two columns of each tensor matter much."""
    rng = np.random.default_rng(1)
    entries = {}
    for tensor in read_header(model).tensors:
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2:
            sums = rng.chisquare(1, (1, tensor.shape[0])).astype(np.float32) * 100
            sums[0, :2] *= 1000
            entries[tensor.name] = Entry(sums, np.array([100.0], np.float32))
    return Matrix(entries, ("text",), 1, 512)


def with_entry(whole: Matrix, name: str, sums: np.ndarray, counts: float = 100.0) -> Matrix:
    entry = Entry(sums.astype(np.float32), np.array([counts], np.float32))
    return Matrix({**whole.entries, name: entry}, whole.datasets, whole.chunks, whole.chunk_size)


def errors(source: Path, made: Path) -> dict[str, float]:
    return {loss.tensor: loss.error for loss in values.losses(source, made)}


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


TYPES = ("Q2_K", "Q4_K_M", "IQ2_XXS")


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_sums_of_zero_count_as_not_seen(
    model: Path,
    known: Matrix,
    llama_build: Build,
    tmp_path: Path,
    share: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = ("blk.0.attn_q.weight", "blk.1.ffn_down.weight")
    whole = known
    for name in names:
        sums = known.entries[name].sums.copy()
        sums[0, : int(share * sums.shape[1])] = 0
        whole = with_entry(whole, name, sums)
    given = tmp_path / "given.gguf"
    imatrix.write(whole, given)
    made = family_of(str(model), TYPES, llama_build, out=tmp_path / "out", imatrix=given, run=False)
    told = capsys.readouterr().err
    for name in names:
        assert f"importance matrix: {name}: " in told and "taken as not seen" in told
    for kind in TYPES:
        found = errors(model, made.file(kind))
        for name in names:
            assert found[name] < 0.68, (kind, name)


@pytest.mark.parametrize(
    ("sums", "counts"),
    [(np.full((1, 1), 1e38), 1.0), (np.ones((1, 1)), np.inf), (np.ones((1, 1)), 1e-30)],
)
def test_sums_that_no_activations_give_are_refused(
    model: Path, known: Matrix, llama_build: Build, tmp_path: Path, sums: np.ndarray, counts: float
) -> None:
    name = "blk.0.attn_q.weight"
    columns = known.entries[name].sums.shape[1]
    imatrix.write(with_entry(known, name, np.repeat(sums, columns, axis=1), counts), tmp_path / "given.gguf")
    with pytest.raises(ModelError, match="no sums of squares"):
        family_of(str(model), ["Q2_K"], llama_build, out=tmp_path / "out", imatrix=tmp_path / "given.gguf")
    assert not left_in(tmp_path / "out")
