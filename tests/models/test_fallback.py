"""What `ggufrq fallback llama.cpp` writes is what llama-server loads."""

from __future__ import annotations

import time
from pathlib import Path

import requests

from ggufrq.base import loopback, proc
from ggufrq.drive.serve import choose_port
from ggufrq.make.plan import Family
from ggufrq.runtimes import runtime
from ggufrq.runtimes.fallback import advise, write
from ggufrq.tools.logs import parse_context
from ggufrq.tools.programs import Programs

NAME = "docs-qwen3-8m"


def test_preset_of_llama_server(families: dict[str, Family], programs: Programs, tmp_path: Path) -> None:
    advice = advise(runtime("llama.cpp"), families[NAME].file("Q4_K_M"), 1024)
    (file,) = write(advice, tmp_path)
    port, log = choose_port("127.0.0.1", None), tmp_path / "log"
    command = [programs.tool("llama-server"), "--models-preset", file, "--port", str(port), "-lv", "4"]
    with proc.start([*command, "--host", "127.0.0.1"], log=log):
        answer = None
        for _ in range(300):
            try:
                answer = loopback.session().post(
                    f"http://127.0.0.1:{port}/v1/completions",
                    json={"model": NAME, "prompt": "CREATE TABLE", "max_tokens": 2},
                    timeout=60,
                )
            except requests.ConnectionError:
                time.sleep(0.2)
                continue
            break
    assert answer is not None and answer.ok, log.read_text()
    # the router writes the log of its child with its port in front
    lines = [line.partition("] ")[2] for line in log.read_text().splitlines() if line.startswith("[")]
    context = parse_context("\n".join(lines))
    assert context is not None and context.tokens == 1024
    assert (context.k_types, context.v_types) == ({"q8_0"}, {"q8_0"})
    assert context.kv_bytes == advice.kv_bytes
