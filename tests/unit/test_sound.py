"""What is said of values that a type does not hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from shards import split_model

from ggufrq.base import progress
from ggufrq.base.errors import ModelError
from ggufrq.ggufs import values
from ggufrq.models import sound
from ggufrq.models.convert import Entry, HfModel


@pytest.mark.parametrize(
    ("kind", "remedy"), [("F16", "a source in BF16 or F32"), ("mmproj", "without --mmproj")]
)
def test_a_value_beyond_the_type(
    tmp_path: Path, kind: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A projector is made in F16 whatever its source is in."""
    monkeypatch.setattr(values, "first_odd", lambda _: "v.bias has inf")
    np.array([1, 1e5, 2], "<f4").tofile(tmp_path / "model.safetensors")
    model = HfModel(tmp_path, {}, (), 0, entries={"v": Entry("model.safetensors", "F32", (3,), 0)})
    with pytest.raises(ModelError) as caught:
        sound.require_numbers(tmp_path / "made.gguf", model, kind)
    assert caught.value.message == (
        "v.bias has inf, because v of model.safetensors has the value 100000, and F16 holds 65504 at most"
    )
    assert caught.value.remedy == remedy


def test_a_whole_model_is_looked_at_before_the_eyes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a large model this takes minutes."""
    monkeypatch.setattr(progress, "PLAIN_INTERVAL", 0)
    model = split_model(tmp_path / "m", 2)[0]
    values.require_numbers(model, "m", remedy="")
    told = capsys.readouterr().err
    assert "Looking at the values of m: 1/2 tensors, " in told
    assert "Looking at the values of m: 2/2 tensors, " in told
