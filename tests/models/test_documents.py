"""Commands in the documents that take seconds are run, on an embedded model in place of the reader's."""

from __future__ import annotations

from pathlib import Path

import pytest
from snippets import Snippet, snippets

from ggufrq import cli
from ggufrq.base import paths
from ggufrq.make.plan import Family

REPOSITORY = Path(__file__).resolve().parents[2]
#: Commands that take seconds, with what makes them shorter still, and the option that they take seconds with.
QUICK: dict[str, tuple[list[str], str | None]] = {
    "doctor": ([], None),
    "where": ([], None),
    "completion": ([], None),
    "calibrate": (["-o", "kv.gguf", "--chunks", "2"], None),
    "run": (["-n", "8", "-c", "512"], None),
    "quantize": (["--requantize"], "--dry-run"),
    "validate": (["--sections", "quality"], "--quick"),
}


def quick(snippet: Snippet) -> bool:
    if snippet.words[0] != "ggufrq" or snippet.words[1] not in QUICK:
        return False
    needed = QUICK[snippet.words[1]][1]
    if "mlx" in snippet.words:  # tests/unit/test_mlx_weights.py, where mlx is
        return False
    elsewhere = any(word.startswith(("./", "~")) or word.count("/") == 1 for word in snippet.words[2:3])
    return (needed is None or needed in snippet.words) and not elsewhere


FOUND = [snippet for snippet in snippets(REPOSITORY) if quick(snippet)]


def test_there_is_something_to_run() -> None:
    assert {"doctor", "where", "run", "calibrate", "quantize", "validate"} <= {one.words[1] for one in FOUND}


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted({snippet.file for snippet in FOUND}))
def test_commands_run(
    families: dict[str, Family],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    file: str,
) -> None:
    """Those of a document in their order and in one folder, since one may use what another made."""
    monkeypatch.chdir(tmp_path)
    model = families["docs-qwen3-8m"].file("Q8_0")
    words = (paths.data_dir("texts") / "heldout.txt").read_text(encoding="utf-8")[:20_000]
    Path("TEXT").write_text(words, encoding="utf-8")
    instead = {"MODEL": str(model), "model.gguf": str(model), "docs-qwen3-8m": str(model), "wiki.txt": "TEXT"}
    for snippet in FOUND:
        if snippet.file == file:
            given = [instead.get(word, word) for word in snippet.words[1:]]
            end = given.index("--") if "--" in given else len(given)
            status = cli.invoke([*given[:end], *QUICK[given[0]][0], *given[end:]])
            assert status == 0, f"{snippet.line}\n{capsys.readouterr().err[-2000:]}"
