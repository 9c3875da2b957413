"""Checks of a finished file beyond its types: the ``gguf`` package opens it, and llama.cpp runs it."""

from __future__ import annotations

from pathlib import Path

from ggufrq.base import log, machine, proc
from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.cache.kv import parse_plan
from ggufrq.ggufs.drafts import SIMPLE, draft_kind
from ggufrq.ggufs.files import GgufFacts, open_with_gguf
from ggufrq.tools import completion, fit_params
from ggufrq.tools.logs import Incomplete, ended, retried

#: Tokens of the short run; of shorter ones the end of the log is often lost, see ``logs.Incomplete``.
TOKENS = 16
_ATTEMPTS = 10
#: Up to this size one thread will do; more would wait for each other when the machine is busy.
_SMALL = 1 << 30
_PROMPT = "The"
#: A model beyond this share of the memory would be read from the disk again for every token.
_SHARE = 0.8
#: Architectures that read a text but do not write one.
_ENCODERS = ("bert", "t5encoder")


def loads(model: Path, build: Build, log_path: Path) -> None:
    """Let llama.cpp load a model without its weights, which need not be there. Raises ModelError with its
    reason when it refuses: a tensor that is missing or has another shape, say."""
    args = fit_params.loading(model)

    def attempt() -> str | None:
        done = proc.run([build.tool("llama-fit-params"), *args], log=log_path, check=False, timeout=600)
        found = fit_params.refusal(done.stdout + done.stderr)
        if found is None and done.rc != 0:
            raise Incomplete("llama-fit-params does not say why it failed")
        return found

    try:
        reason = retried(attempt, _ATTEMPTS)
    except Incomplete:  # it loaded, and failed later, which is no matter here
        reason = None
    if reason is not None:
        raise ModelError(
            f"llama.cpp does not load this model: {reason}",
            remedy="download or convert it again; its files do not fit together",
        )


def check_file(path: Path, facts: GgufFacts, build: Build, log_path: Path, *, run: bool = True) -> int:
    """Open a file with the ``gguf`` package and let it write a few tokens; how many it wrote.

    0 when ``run`` is off, for models that write no text or not alone, and for those larger than the memory.
    Raises ModelError or ToolError.
    """
    open_with_gguf(path)
    writes = draft_kind(path) == SIMPLE and not any(name in facts.architecture for name in _ENCODERS)
    if not run or not writes:
        return 0
    memory = machine.memory()
    if memory is not None and facts.file_bytes > _SHARE * memory[0]:
        log.say(f"{path.name.lstrip('.')} is larger than the memory: it is not run for a test")
        return 0
    return short_run(path, build, log_path)


def short_run(path: Path, build: Build, log_path: Path) -> int:
    """Let a model write a few tokens; how many it wrote. Raises ModelError or ToolError."""
    args = completion.arguments(
        path,
        _PROMPT,
        parse_plan("f16"),
        tokens=TOKENS,
        n_ctx=64,
        threads=1 if path.stat().st_size < _SMALL else None,
        temperature=0,
        seed=1,
    )

    def attempt() -> int:
        done = proc.run(
            [build.tool("llama-completion"), *args, "--ignore-eos", "--no-warmup", "--no-repack"],
            log=log_path,
            check=False,
        )
        if done.rc != 0:
            raise ModelError(
                f"llama.cpp does not run the new file: {ended(done)}",
                remedy=f"see {log_path}",
            )
        return completion.parse_timing(done.stderr).tokens

    return retried(attempt, _ATTEMPTS)
