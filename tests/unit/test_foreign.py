"""Files that were taken for models: what they are is said, with the command that mends it."""

from __future__ import annotations

import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from ggufrq.base.errors import GgufrqError, ModelError
from ggufrq.cli import cli
from ggufrq.ggufs import imatrix
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import read_header
from ggufrq.models.resolve import resolve


def gguf_of(path: Path, *, alignment: int | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    for i in range(4):
        writer.add_tensor(f"blk.{i}.attn_q.weight", np.ones((64, 64), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")


def page(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html>Sign in</html>")


def other_endian(path: Path) -> None:
    path.write_bytes(b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64))


def archive(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("data.pkl", "x")


def empty(path: Path) -> None:
    path.write_bytes(b"")


def before_gguf(path: Path) -> None:
    path.write_bytes(b"tjgg" + bytes(64))


KINDS: list[tuple[Callable[[Path], None], str, str]] = [
    (pointer, "a pointer of Git LFS", "lfs pull --include model.gguf"),
    (page, "a web page", "hf download REPOSITORY model.gguf"),
    (other_endian, "for big-endian machines", "gguf-convert-endian {path} little"),
    (archive, "a file of PyTorch, or an archive", "a repository with safetensors"),
    (empty, "empty", "download model.gguf again"),
    (before_gguf, "in a form from before GGUF", "convert the original model again"),
]
READERS: list[Callable[[Path], object]] = [read_header, read_gguf, imatrix.read]


@pytest.mark.parametrize(("make", "what", "remedy"), KINDS)
@pytest.mark.parametrize("read", READERS)
def test_what_it_is_and_what_to_do(
    tmp_path: Path,
    read: Callable[[Path], object],
    make: Callable[[Path], None],
    what: str,
    remedy: str,
) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(ModelError, match=what) as caught:
        read(path)
    assert remedy.format(path=path) in str(caught.value.remedy)


@pytest.mark.parametrize(("make", "what", "remedy"), KINDS)
@pytest.mark.parametrize("command", [["imatrix", "show"], ["memory"]])
def test_commands_say_it(
    tmp_path: Path,
    command: list[str],
    make: Callable[[Path], None],
    what: str,
    remedy: str,
) -> None:
    path = tmp_path / "model.gguf"
    make(path)
    done = CliRunner().invoke(cli, [*command, str(path)])
    assert isinstance(done.exception, GgufrqError) and what in done.exception.message
    assert remedy.format(path=path) in str(done.exception.remedy)


def test_a_file_that_was_cut_up(tmp_path: Path) -> None:
    whole = gguf_of(tmp_path / "model.gguf")
    data = whole.read_bytes()
    parts = [tmp_path / f"model.gguf.part{i}of2" for i in (1, 2)]
    for i, path in enumerate(parts):
        path.write_bytes(data[i * 20_000 : (i + 1) * 20_000] if i == 0 else data[20_000:])
    whole.unlink()
    for i, path in enumerate(parts, 1):
        with pytest.raises(ModelError, match=f"it is part {i} of 2 of a file that was cut up") as caught:
            read_gguf(resolve(str(path)).path or path)
        assert caught.value.remedy == f"cat {parts[0]} {parts[1]} > {whole}"


def test_how_much_is_missing_is_that_of_the_whole(tmp_path: Path) -> None:
    whole = gguf_of(tmp_path / "model.gguf")
    data = whole.read_bytes()
    whole.write_bytes(data[: len(data) // 4])
    with pytest.raises(ModelError, match=f"it has {len(data) // 4:,} of {len(data):,} bytes"):
        read_gguf(whole)


@pytest.mark.parametrize("alignment", [24, 4, 1, 0])
def test_an_alignment_that_llama_cpp_refuses(tmp_path: Path, alignment: int) -> None:
    path = gguf_of(tmp_path / "model.gguf", alignment=64)
    key = b"general.alignment" + struct.pack("<I", 4)
    at = path.read_bytes().index(key) + len(key)
    data = bytearray(path.read_bytes())
    data[at : at + 4] = struct.pack("<I", alignment)
    path.write_bytes(data)
    with pytest.raises(ModelError, match=f"its alignment is {alignment}, which is no power of two"):
        read_header(path)


def test_one_file_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(20))
    with pytest.raises(ModelError, match="is one file of a model") as caught:
        resolve(str(tmp_path / "model.safetensors"))
    assert str(tmp_path) in str(caught.value.remedy)
