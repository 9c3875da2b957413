"""The examples of docs/mlx.md run as they are written."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

pytest.importorskip("mlx.core", reason="needs mlx: pip install 'ggufrq[mlx]'")
pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'ggufrq[mlx]'")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "mlx.md"
EXAMPLES = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_an_example_runs(
    example: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "docs/mlx.md", "exec"), {})
    assert len(capsys.readouterr().out.split()) > 3
