"""K and V of a model over a text: llama-server computes them with an f16 cache, its saved slots are read."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import requests

from ggufrq.base.errors import ModelError, ToolError
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPlan, parse_plan
from ggufrq.drive.serve import serving
from ggufrq.ggufs.kv_state import KvState, check_model, read_kv_state
from ggufrq.tools.programs import Programs

#: The server wants a little room behind a prompt.
_ROOM = 16
_TIMEOUT = 3600.0


def captured(
    model: Path,
    text: Path,
    build: Build,
    *,
    n_ctx: int = 2048,
    chunks: int = 4,
    first: int = 0,
    kv: KvPlan | None = None,
    threads: int | None = None,
    on_chunks: Callable[[int], None] | None = None,
) -> Generator[KvState, None, None]:
    """K and V of up to ``chunks`` chunks of ``n_ctx`` tokens of ``text``, one after the other, each chunk
    from position 0; chunks before ``first`` are skipped. Kept in f16, or in f32 with ``kv``.

    A state can be used until the next one is asked for. ``on_chunks`` is told once how many chunks there are.
    Raises ModelError when the text has less than one chunk or the model keeps K and V in a way that cannot be
    read, ToolError when llama-server fails.
    """
    check_model(model)
    with tempfile.TemporaryDirectory(prefix="ggufrq-") as folder:
        extra = ("--slot-save-path", folder, "--cache-ram", "0", "--no-warmup", "-n", "0")
        programs = Programs.of_build(build)
        size = n_ctx + _ROOM
        with serving(
            model, kv or parse_plan("f16"), programs, port=None, n_ctx=size, threads=threads, extra=extra
        ) as server:
            tokens = _post(server.url, "/tokenize", {"content": text.read_text(encoding="utf-8")})["tokens"]
            start = _post(server.url, "/tokenize", {"content": "", "add_special": True})["tokens"][:1]
            step = n_ctx - len(start)
            there = min(chunks, len(tokens) // step)
            if there == 0:
                raise ModelError(
                    f"{text} has {len(tokens)} tokens, less than one chunk of {n_ctx}",
                    remedy=f"a longer text, or --ctx {max(len(tokens) // 2, 1)}",
                )
            if on_chunks is not None:
                on_chunks(there)
            for i in range(first, there):
                prompt = [*start, *tokens[i * step : (i + 1) * step]]
                yield _chunk(server.url, prompt, Path(folder) / "chunk.bin", model)


def _chunk(url: str, prompt: list[int], path: Path, model: Path) -> KvState:
    path.unlink(missing_ok=True)
    _post(url, "/completion", {"prompt": prompt, "n_predict": 0, "cache_prompt": False, "id_slot": 0})
    _post(url, "/slots/0?action=save", {"filename": path.name})
    state = read_kv_state(path, model)
    if list(state.tokens) != prompt:
        raise ToolError(
            f"llama-server saved {len(state.tokens)} tokens, not the {len(prompt)} that it was given"
        )
    return state


def _post(url: str, route: str, data: dict[str, Any]) -> Any:
    """The answer to a request. Raises ToolError with the server's reason."""
    try:
        answer = requests.post(url + route, json=data, timeout=_TIMEOUT)
        found = answer.json()
    except (requests.RequestException, ValueError) as error:
        raise ToolError(f"llama-server does not answer {route}: {error}") from error
    if answer.status_code != 200:
        reason = found.get("error", {}).get("message", found) if isinstance(found, dict) else found
        raise ToolError(f"llama-server refuses {route}: {reason}")
    return found
