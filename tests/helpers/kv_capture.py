"""K and V of a model over a text: llama-server computes them with an f16 cache, its saved slots are read."""

from __future__ import annotations

import tempfile
from collections.abc import Generator
from pathlib import Path

from kv_state import KvState, check_model, read_kv_state

from ggufrq.base import texts
from ggufrq.base.errors import ModelError, ToolError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPlan, parse_plan
from ggufrq.drive.serve import serving
from ggufrq.tools.programs import Programs
from ggufrq.tools.server import Connection

#: The server wants a little room behind a prompt.
_ROOM = 16


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
    listener: Listener = SILENT,
) -> Generator[KvState, None, None]:
    """K and V of up to ``chunks`` chunks of ``n_ctx`` tokens of ``text``, one after the other, each chunk
    from position 0; chunks before ``first`` are skipped. Kept in f16, or in f32 with ``kv``.

    A state can be used until the next one is asked for. ``listener`` is told how many chunks there are.
    Raises ModelError when the text has less than one chunk or the model keeps K and V in a way that cannot be
    read, ToolError when llama-server fails.
    """
    check_model(model)
    with tempfile.TemporaryDirectory(prefix="ggufrq-") as folder:
        extra = ("--slot-save-path", folder, "--cache-ram", "0", "--no-warmup", "-n", "0")
        programs = Programs.of_build(build)
        size = n_ctx + _ROOM
        with (
            serving(
                model, kv or parse_plan("f16"), programs, port=None, n_ctx=size, threads=threads, extra=extra
            ) as running,
            Connection(running.url) as server,
        ):
            tokens = server.post("tokenize", {"content": texts.read(text)})["tokens"]
            start = server.post("tokenize", {"content": "", "add_special": True})["tokens"][:1]
            step = n_ctx - len(start)
            there = min(chunks, len(tokens) // step)
            if there == 0:
                raise ModelError(
                    f"{text} has {len(tokens)} tokens, less than one chunk of {n_ctx}",
                    remedy=f"a longer text, or --ctx {max(len(tokens) // 2, 1)}",
                )
            listener.expect(there)
            for i in range(first, there):
                prompt = [*start, *tokens[i * step : (i + 1) * step]]
                yield _chunk(server, prompt, Path(folder) / "chunk.bin", model)


def _chunk(server: Connection, prompt: list[int], path: Path, model: Path) -> KvState:
    path.unlink(missing_ok=True)
    server.post("completion", {"prompt": prompt, "n_predict": 0, "cache_prompt": False, "id_slot": 0})
    server.post("slots/0?action=save", {"filename": path.name})
    state = read_kv_state(path, model)
    if list(state.tokens) != prompt:
        raise ToolError(
            f"llama-server saved {len(state.tokens)} tokens, not the {len(prompt)} that it was given"
        )
    return state
