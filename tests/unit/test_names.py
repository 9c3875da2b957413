"""Names as people have them: spaces, umlauts, quotes, and Windows paths."""

from __future__ import annotations

import sys
from pathlib import Path, PureWindowsPath
from typing import Any, cast

import pytest

from ggufrq.base import paths, proc
from ggufrq.base.errors import ModelError
from ggufrq.base.trees import tree_hash
from ggufrq.cache.kv import parse_plan
from ggufrq.models import hub
from ggufrq.models.resolve import resolve
from ggufrq.tools import bench, completion, perplexity, server

NAME = "Ein Ordner für 'Modelle' (日本)"
WINDOWS = cast(Path, PureWindowsPath(r"C:\Users\Jürgen Groß\mein modell.gguf"))


@pytest.mark.parametrize("text", [str(WINDOWS), r"models\a", "C:/models/a", "D:model", r"\\server\share\a"])
def test_a_windows_path_is_no_hub_id(text: str) -> None:
    assert hub.parse_id(text) is None
    with pytest.raises(ModelError, match="there is no model"):
        resolve(text)


@pytest.mark.parametrize("model", [WINDOWS, Path("/tmp") / NAME / "a b.gguf"])
def test_a_path_is_one_word_of_a_command(model: Path) -> None:
    kv: Any = parse_plan("iso3")
    commands = [
        bench.arguments(model, kv.base, prompt=1, generate=1, depth=0, repetitions=1),
        completion.arguments(model, "x", kv, tokens=1, n_ctx=256),
        perplexity.arguments(model, model, kv, model, n_ctx=512, chunks=1, divergence=True),
        server.arguments(model, kv, host="127.0.0.1", port=1, n_ctx=256),
    ]
    for command in commands:
        assert str(model) in command


def test_arguments_and_output_of_a_program_keep_them() -> None:
    code = "import sys; sys.stdout.buffer.write(sys.argv[1].encode())"
    assert proc.run([sys.executable, "-c", code, NAME + ' "x"']).stdout == NAME + ' "x"'


def test_files_in_such_a_folder(tmp_path: Path) -> None:
    folder = tmp_path / NAME
    paths.atomic_write(folder / "ä b.txt", "words\n")
    assert (folder / "ä b.txt").read_text(encoding="utf-8") == "words\n"
    assert [path.name for path in folder.iterdir()] == ["ä b.txt"]
    assert len(tree_hash(folder)) == 40
    code = "import os, sys; sys.stdout.buffer.write(os.getcwd().encode())"
    assert proc.run([sys.executable, "-c", code], cwd=folder).stdout == str(folder.resolve())


def test_the_cache_in_such_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(paths.CACHE_VARIABLE, str(tmp_path / NAME))
    assert paths.builds_dir() == tmp_path / NAME / "builds"
