"""The environment that programs get, by programs that print theirs."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from ggufrq.base import environment, proc
from ggufrq.cache.kv import parse_plan

pytestmark = pytest.mark.skipif(os.name != "posix", reason="its programs are scripts")


def told(folder: Path, name: str, **env: str | None) -> dict[str, Any]:
    """What a program of this name in a folder finds in its environment."""
    folder.mkdir(parents=True, exist_ok=True)
    program = folder / name
    program.write_text(f"#!{sys.executable}\nimport json, os\nprint(json.dumps(dict(os.environ)))\n")
    program.chmod(0o755)
    found: dict[str, Any] = json.loads(proc.run([program], env=env).stdout)
    return found


def test_options_of_the_shell_do_not_reach_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"LLAMA_ARG_API_PREFIX": "/x", "LLAMA_ARG_NO_CONT_BATCHING": "1", "LLAMA_API_KEY": "k"}
    for name, value in {**options, "LLAMA_ARG_RPC": "h:1", "LLAMA_ARG_THREADS": "3"}.items():
        monkeypatch.setenv(name, value)
    found = told(tmp_path, "llama-server")
    assert not options.keys() & found.keys()
    assert (found["LLAMA_ARG_RPC"], found["LLAMA_ARG_THREADS"]) == ("h:1", "3")
    assert environment.kept_out() == options
    asked = told(tmp_path, "llama-server", LLAMA_ARG_API_PREFIX="/y", LLAMA_ARG_RPC=None)
    assert asked["LLAMA_ARG_API_PREFIX"] == "/y" and "LLAMA_ARG_RPC" not in asked
    assert told(tmp_path, "git").items() >= options.items()


def test_a_cache_of_the_shell_is_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What says how a cache is kept comes from ggufrq alone, but not rotations and scales."""
    names = [f"LLAMA_RQ_{name}" for name in ("LAYERS", "PROFILE", "CALIB", "RECENT", "FIRST")]
    for name in names:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("LLAMA_RQ_MODE", "block")
    monkeypatch.setenv("LLAMA_RQ_SCALE", "norm")
    found = told(tmp_path, "llama-rq-moments")
    assert {name: found[name] for name in names if name in found} == {"LLAMA_RQ_PROFILE": "none"}
    assert (found["LLAMA_RQ_MODE"], found["LLAMA_RQ_SCALE"]) == ("block", "norm")
    asked = parse_plan("iso3; 0:q8_0").with_exact(32).environment()
    found = told(tmp_path, "llama-bench", **asked)
    wanted = {"LLAMA_RQ_LAYERS": "0:q8_0", "LLAMA_RQ_PROFILE": "none", "LLAMA_RQ_RECENT": "32"}
    assert {name: found[name] for name in names if name in found} == wanted


def test_no_debugger_speaks_for_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GGML_NO_BACKTRACE", raising=False)
    assert told(tmp_path, "llama-quantize")["GGML_NO_BACKTRACE"] == "1"
    assert told(tmp_path, "test-backend-ops")["GGML_NO_BACKTRACE"] == "1"
    assert "GGML_NO_BACKTRACE" not in told(tmp_path, "ninja")


@pytest.mark.skipif(sys.platform != "linux", reason="the variable has another name")
def test_own_libraries_go_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/other")
    (tmp_path / "lib").mkdir()
    folder = tmp_path / "bin"
    assert told(folder, "llama-cli")["LD_LIBRARY_PATH"] == f"{folder}:{tmp_path / 'lib'}:/opt/other"
    assert told(folder, "git")["LD_LIBRARY_PATH"] == "/opt/other"
