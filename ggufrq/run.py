"""One prompt through llama-cli with quantized K and V: the answer as it comes, then what the cache took."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggufrq import hub, log, paths, proc
from ggufrq.build import find_build, require_build
from ggufrq.errors import ModelError, ToolError, UsageError
from ggufrq.kv import KvPair, kv_type, parse_kv
from ggufrq.quantize import make_family
from ggufrq.resolve import resolve
from ggufrq.tools import Programs, cli, completion
from ggufrq.tools.logs import Context, retried, uses

#: What every llama.cpp has, and what LM Studio and Ollama offer.
FALLBACK = "q8_0"
_LONGEST_ARGUMENT = 30_000


@dataclass(frozen=True)
class Answer:
    """Text and figures of one generation. Bytes are exact, from llama.cpp's own log, or None where its
    figures are too coarse; ``kv_mib`` is as printed. ``recurrent_mib`` is state that no cache type changes.
    """

    text: str
    type_k: str
    type_v: str
    tokens_held: int
    kv_bytes: int | None
    f16_bytes: int | None
    kv_mib: float
    recurrent_mib: float
    prompt_tokens: int
    prompt_tps: float
    tokens: int
    tps: float
    log: Path


def programs_for(folder: Path | None) -> Programs:
    """The programs to use: those in ``folder``, or our build. Raises BuildError when there is none."""
    return Programs.in_folder(folder) if folder is not None else Programs.of_build(require_build())


def model_file(model: str, *, revision: str | None = None) -> Path:
    """The GGUF file to run for a user's MODEL: itself, the Hub's, or Q8_0 of an embedded model (made now if
    absent).

    Raises ModelError for a model that is not in GGUF yet.
    """
    chosen = resolve(model)
    if chosen.kind == "gguf":
        assert chosen.path is not None
        return chosen.path
    if chosen.kind == "hub":
        assert chosen.repo is not None
        return hub.fetch_gguf(chosen.repo, chosen.label, revision)
    if chosen.kind == "folder":
        raise ModelError(
            f"{chosen.path} is not in GGUF yet", remedy=f"ggufrq quantize {chosen.path} --types Q8_0"
        )
    return make_family(model, ["Q8_0"], find_build() or require_build()).file("Q8_0")


def settle(pair: KvPair, programs: Programs, *, fallback: bool, command: str) -> KvPair:
    """The pair to use with these programs: ``pair``, or with ``fallback`` q8_0 in place of types that they
    lack.

    ``command`` is the command line to repeat, without ``--kv``. Raises UsageError when types are missing.
    """
    missing = programs.missing_types(pair)
    if not missing:
        return pair
    if programs.build is not None:
        raise ToolError(
            f"the build in {programs.build.root} has no cache type {' and '.join(missing)}",
            remedy="ggufrq build",
        )
    safe = kv_type(FALLBACK)
    usable = KvPair(*(safe if side.name in missing else side for side in (pair.k, pair.v)))
    what = f"the llama.cpp in {programs.folder} has no cache type {' and '.join(missing)}"
    if not fallback:
        raise UsageError(
            f"{what}; it has {', '.join(programs.cache_types)}",
            remedy=f"{command} --kv {usable.name}, or --fallback to do that by itself "
            f"({usable.bits:g} bits per value instead of {pair.bits:g}); in LM Studio and Ollama: q8_0 for K "
            "and V, flash attention on",
        )
    log.say(f"{what}; using {usable.name} ({usable.bits:g} bits per value instead of {pair.bits:g})")
    return usable


def generate(
    model: Path,
    prompt: str,
    pair: KvPair,
    programs: Programs,
    *,
    tokens: int = 256,
    n_ctx: int = 4096,
    raw: bool = False,
    threads: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Answer:
    """Answer ``prompt`` by llama-cli, or with ``raw`` continue it by llama-completion, with K and V as in
    ``pair``.

    ``on_text`` gets the answer in pieces as it comes. Raises ToolError with llama.cpp's own reason when it
    fails, also when its exit status says otherwise, and when the cache was not kept in the types asked for.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty", remedy='-p "…"')
    if not raw and prompt.startswith(cli.COMMANDS):
        raise UsageError(
            f"llama-cli takes a prompt that begins with {prompt.split()[0]} as a command of its own"
        )
    tool = completion if raw else cli
    name = "llama-completion" if raw else "llama-cli"
    log_path = paths.logs_dir() / f"{name}.log"
    log_path.unlink(missing_ok=True)
    out = _Text(on_text)
    with _passed(prompt) as handed:
        args = tool.arguments(
            model,
            handed,
            pair,
            tokens=tokens,
            n_ctx=n_ctx,
            threads=threads,
            temperature=temperature,
            seed=random.randrange(1 << 31) if seed is None else seed,
        )
        command = [programs.tool(name), *args]
        try:
            figures = retried(lambda: _attempt(command, prompt, out, log_path, raw=raw))
        except ToolError as error:
            raise ToolError(error.message, remedy=_remedy(error.message, log_path)) from None
    if not uses(figures.context, pair):
        kinds = "/".join([",".join(figures.context.k_types), ",".join(figures.context.v_types)])
        raise ToolError(
            f"llama.cpp kept the cache in {kinds} although {pair.name} was asked for",
            remedy=f"see {log_path}",
        )
    return _answer(out.text, figures, pair, log_path)


def _attempt(
    command: list[str | Path], prompt: str, out: _Text, log_path: Path, *, raw: bool
) -> completion.Generation:
    stream = completion.continuation() if raw else cli.Answer(prompt)
    out.begin()
    done = proc.run(command, log=log_path, check=False, on_stdout=lambda chunk: out.take(stream.feed(chunk)))
    figures = completion.parse_timing(done.stderr)
    out.take(stream.close())
    if done.rc != 0:
        raise ToolError(proc.failure_message(done))
    return figures


class _Text:
    """Hands text on as it comes; of a run that is repeated with the same seed only what has not come yet."""

    def __init__(self, on_text: Callable[[str], None] | None) -> None:
        self._on_text = on_text
        self._given = 0
        self.text = ""

    def begin(self) -> None:
        """A run begins, with the same text as the one before."""
        self.text = ""

    def take(self, piece: str) -> None:
        """The next piece of the run."""
        self.text += piece
        fresh = self.text[self._given :]
        if fresh:
            self._given = len(self.text)
            if self._on_text is not None:
                self._on_text(fresh)


def cache_lines(answer: Answer, pair: KvPair) -> list[str]:
    """What the cache took, and what f16 would have taken."""
    size = f"{answer.kv_bytes:,} bytes" if answer.kv_bytes is not None else f"{answer.kv_mib:.2f} MiB"
    lines = [f"{pair.name}, {pair.bits:g} bits per value: {size} for {answer.tokens_held:,} tokens"]
    if pair.name != "f16":
        if answer.kv_bytes and answer.f16_bytes is not None:
            lines.append(
                f"f16 takes {answer.f16_bytes:,} bytes, {answer.f16_bytes / answer.kv_bytes:.2f} times that"
            )
        else:
            lines.append(f"f16 takes {16 / pair.bits:.2f} times that")
    if answer.recurrent_mib:
        lines.append(f"and {answer.recurrent_mib:.2f} MiB of recurrent state in f32, whatever the cache type")
    return lines


def speed_text(answer: Answer) -> str:
    """Tokens per second, as one line."""
    return (
        f"prompt {answer.prompt_tokens:,} tokens at {answer.prompt_tps:,.0f} tokens/s, "
        f"answer {answer.tokens:,} at {answer.tps:,.1f} tokens/s"
    )


def default_pair() -> KvPair:
    """What ``--kv`` is when it is not given."""
    return parse_kv("iso3")


@contextmanager
def _passed(prompt: str) -> Iterator[str | Path]:
    """The prompt as it is, or a file with it when it is too long for a command line."""
    if len(prompt.encode()) <= _LONGEST_ARGUMENT:
        yield prompt
        return
    with tempfile.TemporaryDirectory(prefix="ggufrq-") as folder:
        path = Path(folder) / "prompt.txt"
        path.write_text(prompt, encoding="utf-8", newline="")
        yield path


def _answer(text: str, figures: completion.Generation, pair: KvPair, log_path: Path) -> Answer:
    context: Context = figures.context
    values = context.kv_values
    return Answer(
        text=text,
        type_k=pair.k.name,
        type_v=pair.v.name,
        tokens_held=context.tokens,
        kv_bytes=context.kv_bytes,
        f16_bytes=None if values is None else 2 * values,
        kv_mib=context.kv_mib,
        recurrent_mib=context.recurrent_mib,
        prompt_tokens=figures.prompt_tokens,
        prompt_tps=figures.prompt_tps,
        tokens=figures.tokens,
        tps=figures.tps,
        log=log_path,
    )


def _remedy(message: str, log_path: Path) -> str:
    if "exceeds the available context size" in message or "prompt is too long" in message:
        return "a larger context: -c N"
    if "cannot hold this model's" in message:
        return "--kv q8_0"
    return f"see {log_path}"
