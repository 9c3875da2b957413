"""mlx_lm.server with our caches, for real: a process, and requests to it."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import loopback
import pytest

from ggufrq.models.resolve import embedded_models

pytest.importorskip("mlx.core", reason="needs mlx: pip install 'ggufrq[mlx]'")
mlx_lm = pytest.importorskip("mlx_lm", reason="needs mlx-lm: pip install 'ggufrq[mlx]'")

from ggufrq.mlx import make_cache  # noqa: E402

TEXT = "The function returns a new array. " * 8


@pytest.mark.slow
def test_requests_are_answered_and_prompts_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.no_proxies(monkeypatch)
    folder = str(embedded_models()["docs-qwen3-8m"])
    model, tokenizer = mlx_lm.load(folder)
    wanted = mlx_lm.generate(model, tokenizer, TEXT, max_tokens=8, prompt_cache=make_cache(model, bits=4))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path / "log"
    command = [
        sys.executable,
        "-m",
        "ggufrq.mlx.server",
        "--bits",
        "4",
        "--model",
        folder,
        "--port",
        str(port),
    ]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    try:
        answers = [ask(port, process, TEXT) for _ in range(2)]
    finally:
        process.terminate()
        process.wait()
    assert [answer["choices"][0]["text"] for answer in answers] == [wanted] * 2
    assert answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 50
    assert "has caches of IsoQuantCache" in log.read_text()


def ask(port: int, process: subprocess.Popen[bytes], prompt: str) -> dict[str, Any]:
    """The answer to a prompt, as soon as there is one."""
    body = json.dumps({"prompt": prompt, "max_tokens": 8, "temperature": 0.0}).encode()
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
    )
    while process.poll() is None:
        try:
            with urllib.request.urlopen(request, timeout=300) as response:
                found: dict[str, Any] = json.loads(response.read())
                return found
        except ConnectionRefusedError:
            time.sleep(0.3)
        except urllib.error.URLError as error:
            if not isinstance(error.reason, ConnectionRefusedError):
                raise
            time.sleep(0.3)
    raise AssertionError(f"the server ended with {process.returncode}")
