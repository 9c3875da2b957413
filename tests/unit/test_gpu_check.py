"""scripts/gpu_check.py as far as it goes without a GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf import GGUFReader

from ggufrq.base.errors import ToolError
from ggufrq.build.project import llama_project

REPOSITORY = Path(__file__).resolve().parents[2]
LOGS = REPOSITORY / "tests" / "logs"


@pytest.fixture(scope="module")
def check() -> ModuleType:
    path = REPOSITORY / "scripts" / "gpu_check.py"
    spec = importlib.util.spec_from_file_location("gpu_check", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu_check"] = module
    spec.loader.exec_module(module)
    return module


def make_run(check: ModuleType, tmp_path: Path, minutes: float = 9) -> Any:
    (tmp_path / "gpu-check").mkdir(exist_ok=True)
    (tmp_path / "gpu-check" / "bundle.json").write_text(json.dumps({"patch_set": "abc", "models": []}))
    return check.Run(tmp_path, tmp_path / "results", minutes)


def test_output_of_perf(check: ModuleType) -> None:
    rows = check.parse_perf((LOGS / "tools" / "backend-ops-perf.txt").read_text())
    assert [(row["type_K"], row["kv"], row["nr23"]) for row in rows] == [
        ("f16", "4096", "[4,1]"),
        ("iso3", "4096", "[4,1]"),
    ]
    assert rows[1]["us"] == 3642.64


def test_output_of_test(check: ModuleType) -> None:
    found = check.parse_test((LOGS / "tools" / "backend-ops-test.txt").read_text())
    assert found["passed"] == found["of"] > 0 and found["failures"] == []


def test_a_unit_that_is_done_is_not_measured_again(check: ModuleType, tmp_path: Path) -> None:
    calls = []

    def measure() -> dict[str, Any]:
        calls.append(1)
        return {"value": 42}

    make_run(check, tmp_path).unit("one", 1, measure)
    make_run(check, tmp_path).unit("one", 1, measure)
    assert len(calls) == 1
    kept = json.loads((tmp_path / "results" / "one.json").read_text())
    assert kept["value"] == 42 and kept["patch_set"] == "abc"


def test_a_unit_that_does_not_fit_is_left_for_the_next_time(check: ModuleType, tmp_path: Path) -> None:
    run = make_run(check, tmp_path, minutes=1)
    with pytest.raises(check.NoTime, match="two"):
        run.unit("two", 100, lambda: {})
    assert list((tmp_path / "results").iterdir()) == []


@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_models_of_random_weights_are_whole(check: ModuleType, tmp_path: Path, arch: str) -> None:
    shape = check.Shape("small", arch, 2, 256, 512, 8, 2, 128, vocabulary=320)
    check.write_model(tmp_path / "small.gguf", shape)
    reader = GGUFReader(tmp_path / "small.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * (9 if arch == "llama" else 11)
    assert tuple(tensors["blk.1.attn_q.weight"].shape) == (256, 1024)
    assert tensors["blk.0.attn_norm.weight"].data[0] == 1.0
    last = reader.tensors[-1]
    assert (tmp_path / "small.gguf").stat().st_size >= last.data_offset + last.n_bytes


def test_report_of_nothing_and_of_some(check: ModuleType, tmp_path: Path) -> None:
    assert check.report(tmp_path) == ""
    rows = [
        {"cache": name, "prefill": 1000.0 * factor, "decode": 50.0 * factor}
        for name, factor in (("f16", 0.9), ("iso3", 2.0), ("f16", 1.1))
    ]
    unit = {"shape": {"name": "llama-3.1-8b-like"}, "depth": 8192, "rows": rows}
    (tmp_path / "speed-llama-3.1-8b-like-8192.json").write_text(json.dumps(unit))
    text = check.report(tmp_path)
    assert "| llama-3.1-8b-like | 8192 | iso3 | 2000 | 2.00 | 100.0 | 2.00 |" in text
    perf = check.parse_perf((LOGS / "tools" / "backend-ops-perf.txt").read_text())
    (tmp_path / "attention-128.json").write_text(json.dumps({"rows": perf}))
    assert "| 128 | [4,1] | 4096 | iso3 | 3642.6 | 1 | 12.39 |" in check.report(tmp_path)


def test_definitions_are_those_of_a_build(check: ModuleType) -> None:
    assert set(check.TARGETS) <= {*llama_project().targets, *llama_project().test_targets}


def test_a_build_that_takes_too_long_is_ended_and_goes_on_the_next_time(
    check: ModuleType, tmp_path: Path
) -> None:
    run = make_run(check, tmp_path, minutes=0.02)
    with pytest.raises(check.NoTime):
        run.compile([sys.executable, "-c", "import time; time.sleep(30)"])
    run = make_run(check, tmp_path)
    with pytest.raises(ToolError):
        run.compile([sys.executable, "-c", "raise SystemExit(1)"])
