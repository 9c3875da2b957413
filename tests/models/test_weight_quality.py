"""Quality of weights, measured by the real build on an embedded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from heard import Heard

from ggufrq.base import paths, proc
from ggufrq.base.errors import GgufrqError
from ggufrq.build.project import Build
from ggufrq.make.plan import Family
from ggufrq.measure.weight_quality import WeightQuality, WeightSettings, measure_weights

NAME = "docs-qwen3-8m"
SHORT = WeightSettings(n_ctx=256, chunks=4)


def test_rows(families: dict[str, Family], llama_build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    family = families[NAME]
    reference = family.folder / f"{NAME}-BF16.gguf"
    files = [reference, family.file("Q8_0"), family.file("IQ4_XS")]
    heard = Heard()
    rows = measure_weights(reference, files, llama_build, settings=SHORT, listener=heard)
    same, eight, four = rows
    assert [row["file"] for row in rows] == [path.name for path in files]
    assert abs(same["kld_mean"]) < 1e-5 and same["same_top"] > 0.999
    assert same["ppl"] == pytest.approx(same["ppl_base"], rel=1e-3)
    assert 0 < eight["kld_mean"] < four["kld_mean"] < four["kld_p999"]
    assert (eight["bytes"], eight["bits"]) == (files[1].stat().st_size, pytest.approx(8.52, abs=0.01))
    assert heard.kept == [False, False, False]
    assert not list((paths.cache_dir() / "weight-quality").glob("*.bin"))

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("measured twice")

    monkeypatch.setattr(proc, "run", refuse)
    again = measure_weights(reference, files, llama_build, settings=SHORT, listener=heard)
    assert again == rows and heard.kept == [False] * 3 + [True] * 3


def test_other_settings_and_texts_are_measured_anew(
    families: dict[str, Family], llama_build: Build, tmp_path: Path
) -> None:
    family = families[NAME]
    file = family.file("Q8_0")
    reference = family.folder / f"{NAME}-BF16.gguf"
    text = tmp_path / "short.txt"
    text.write_text("too short")
    with WeightQuality(reference, llama_build, text=text, settings=SHORT) as quality:
        assert quality.kept(file) is None
        with pytest.raises(GgufrqError):
            quality.row(file)
