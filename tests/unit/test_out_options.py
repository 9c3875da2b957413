"""Files that commands write: what would be lost, and what cannot be written, is told before the work."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from ggufrq import cli
from ggufrq.base.errors import UsageError
from ggufrq.cli.out_options import JSON, MATRIX, PROFILE, RECIPE, require_writable
from ggufrq.make.recipe import Recipe, dump


@pytest.mark.parametrize(
    "command",
    [
        ["imatrix", "make", "model.gguf", "-o"],
        ["imatrix", "merge", "a.gguf", "-o"],
        ["sensitivity", "model.gguf", "--bpw", "5", "-o"],
        ["calibrate", "model.gguf", "-o"],
        ["tune", "model.gguf", "--budget", "3.5", "--json"],
        ["validate", "model.gguf", "--json"],
        ["claims", "model.gguf", "--json"],
        ["demo", "--json"],
    ],
)
@pytest.mark.usefixtures("no_programs")
def test_a_model_is_not_overwritten(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "precious.gguf"
    model.write_bytes(b"GGUF" + bytes(100))
    assert cli.invoke([*command, str(model)]) == UsageError.exit_code
    assert f"{model} is there, and no" in capsys.readouterr().err
    assert model.stat().st_size == 104
    assert cli.invoke([*command, str(tmp_path / "nowhere" / "x")]) == UsageError.exit_code
    assert "there is no folder" in capsys.readouterr().err
    assert cli.invoke([*command, os.devnull]) == UsageError.exit_code


def _header(kind: str) -> bytes:
    """A GGUF file of one value and no tensors."""
    key = b"general.type"
    value = struct.pack("<IQ", 8, len(kind)) + kind.encode()
    return b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, len(key)) + key + value


def test_its_like_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    for kind, held in (
        (JSON, b"{}"),
        (RECIPE, dump(Recipe("r", tensors={"*": "q4_k"})).encode()),
        (MATRIX, _header("imatrix")),
        (PROFILE, _header("kv-profile")),
    ):
        require_writable(file, kind)
        file.write_bytes(held)
        require_writable(file, kind)
        file.write_text("anything else")
        with pytest.raises(UsageError, match=f"is there, and no {kind.name}: it would be lost"):
            require_writable(file, kind)
        file.unlink()
    with file.open("wb") as large:  # is not read to the end
        large.truncate(1 << 36)
    with pytest.raises(UsageError, match="and no JSON"):
        require_writable(file, JSON)
    file.unlink()
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UsageError, match="cannot be written"):
        require_writable(file, JSON)
