"""Importance matrices: read, merged, written, and what is in them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from ggufrq.base.errors import ModelError
from ggufrq.cli import cli
from ggufrq.ggufs import imatrix
from ggufrq.ggufs.imatrix import Entry, Matrix


def matrix(*, columns: int = 4, experts: int = 1, name: str = "blk.0.ffn_up.weight", seed: int = 1) -> Matrix:
    rng = np.random.default_rng(seed)
    entries = {
        name: Entry(rng.random((experts, columns), np.float32) * 1024, np.full(experts, 1024.0, np.float32)),
        "blk.0.attn_q.weight": Entry(
            rng.random((1, columns), np.float32) * 1024, np.array([1024.0], np.float32)
        ),
    }
    return Matrix(entries, (f"text {seed}.txt",), 2, 512)


def same(a: Matrix, b: Matrix) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        np.array_equal(entry.sums, b.entries[name].sums)
        and np.array_equal(entry.counts, b.entries[name].counts)
        for name, entry in a.entries.items()
    )


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    for number, made in enumerate((matrix(), matrix(experts=3))):
        path = tmp_path / f"{number}.gguf"
        imatrix.write(made, path)
        found = imatrix.read(path)
        assert same(found, made)
        assert (found.datasets, found.chunks, found.chunk_size) == (("text 1.txt",), 2, 512)
        again = tmp_path / "again.gguf"
        imatrix.write(found, again)
        assert again.read_bytes() == path.read_bytes()


def test_merged_matrices_are_as_if_of_one_text() -> None:
    a, b = matrix(experts=2), matrix(experts=2, seed=2)
    both = imatrix.merge([a, b, a], ["a", "b", "a"])
    entry = both.entries["blk.0.ffn_up.weight"]
    first, second = (it.entries["blk.0.ffn_up.weight"] for it in (a, b))
    assert np.array_equal(entry.sums, first.sums + second.sums + first.sums)
    assert entry.counts.tolist() == [3072.0, 3072.0]
    assert (both.chunks, both.datasets) == (6, ("text 1.txt", "text 2.txt"))
    assert same(imatrix.merge([a], ["a"]), a)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (matrix(name="blk.0.ffn_gate.weight"), "only one of them has blk.0.ffn_gate.weight"),
        (matrix(columns=8), "has 8 columns there and 4 here"),
        (matrix(experts=2), "of another model"),
        (Matrix(matrix().entries, (), 2, 2048), "chunks of 2048 tokens"),
    ],
)
def test_matrices_of_different_models_are_not_merged(other: Matrix, says: str) -> None:
    with pytest.raises(ModelError, match=says):
        imatrix.merge([matrix(), other], ["a", "b"])


def damaged(path: Path, sums: np.ndarray, counts: np.ndarray | None, kind: str = "imatrix") -> Path:
    writer = gguf.GGUFWriter(path, "")
    writer.add_type(kind)
    writer.add_tensor("a.weight.in_sum2", sums)
    if counts is not None:
        writer.add_tensor("a.weight.counts", counts)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


ONE = np.ones((1, 4), np.float32)


@pytest.mark.parametrize(
    ("sums", "counts", "kind", "says"),
    [
        (ONE, None, "imatrix", "lacks the counts"),
        (ONE * np.nan, ONE[:, :1], "imatrix", "no sums of squares"),
        (-ONE, ONE[:, :1], "imatrix", "no sums of squares"),
        (ONE, -ONE[:, :1], "imatrix", "no sums of squares"),
        (np.ones((3, 4), np.float32), np.ones((2, 1), np.float32), "imatrix", "has 2 counts"),
        (ONE.astype(np.float16), ONE[:, :1], "imatrix", "lacks the counts"),
        (ONE, ONE[:, :1], "model", "is no importance matrix"),
    ],
)
def test_damaged_files(
    tmp_path: Path, sums: np.ndarray, counts: np.ndarray | None, kind: str, says: str
) -> None:
    with pytest.raises(ModelError, match=says):
        imatrix.read(damaged(tmp_path / "m.gguf", sums, counts, kind))


def test_files_that_are_cut_off_or_something_else(tmp_path: Path) -> None:
    whole = tmp_path / "whole.gguf"
    imatrix.write(matrix(), whole)
    cut = tmp_path / "cut.gguf"
    for end in (len(whole.read_bytes()) - 40, 100, 5):
        cut.write_bytes(whole.read_bytes()[:end])
        with pytest.raises(ModelError, match="damaged"):
            imatrix.read(cut)
    cut.write_bytes(b"\x02\x00\x00\x00old form")
    with pytest.raises(ModelError, match="no importance matrix in GGUF form"):
        imatrix.read(cut)
    with pytest.raises(ModelError, match="is missing"):
        imatrix.read(tmp_path / "none.gguf")


def test_statistics() -> None:
    sums = np.array([[4.0, 4.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    made = Matrix({"a": Entry(sums, np.array([2.0, 0.0], np.float32))}, (), 1, 512)
    (row,) = imatrix.statistics(made)
    assert (row.columns, row.experts, row.unseen, row.tokens) == (4, 2, 1, 2)
    assert (row.total, row.mean, row.largest, row.active) == (4.0, 1.0, 2.0, 0.5)
    assert row.deviation == pytest.approx(1.0)
    assert row.entropy == pytest.approx(math.log2(2) / math.log2(4))


def test_the_commands(tmp_path: Path) -> None:
    for seed in (1, 2):
        imatrix.write(matrix(seed=seed, experts=2), tmp_path / f"{seed}.gguf")
    files = [str(tmp_path / f"{seed}.gguf") for seed in (1, 2)]
    both = tmp_path / "both.gguf"
    done = CliRunner().invoke(cli, ["imatrix", "merge", *files, "-o", str(both)], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    done = CliRunner().invoke(cli, ["imatrix", "show", str(both)], catch_exceptions=False)
    assert "text 1.txt, text 2.txt: 4 chunks of 512 tokens" in done.stdout
    assert "\nblk.0.ffn_up " in done.stdout and "\nblk.0.attn_q " in done.stdout
    done = CliRunner().invoke(cli, ["imatrix", "show", str(both), "--top", "1", "--json"])
    data = json.loads(done.stdout)
    assert data["chunks"] == 4 and len(data["tensors"]) == 1
    assert data["tensors"][0]["tokens"] == 4096


@pytest.mark.parametrize("unseen", [0, 128])
def test_the_table_fits_a_terminal(tmp_path: Path, unseen: int) -> None:
    """With the longest names, figures that take an exponent, and experts that no token came to."""
    made = matrix(experts=256, columns=512, name="blk.10.ffn_gate_up_exps.weight")
    made.entries["blk.10.ffn_gate_up_exps.weight"].counts[:unseen] = 0
    imatrix.write(made, tmp_path / "m.gguf")
    done = CliRunner().invoke(cli, ["imatrix", "show", str(tmp_path / "m.gguf")], catch_exceptions=False)
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    (row,) = (line for line in lines if line.startswith("blk.10.ffn_gate_up_exps "))
    assert row.endswith(" 128/256") == bool(unseen) and ("unseen" in done.stdout) == bool(unseen)
