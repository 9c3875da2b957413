"""One prompt through llama-cli with quantized K and V: the answer as it comes, then what the cache took."""

from __future__ import annotations

import random
import shlex
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ggufrq.base import log, paths, proc
from ggufrq.base.errors import ToolError, UsageError
from ggufrq.build import prebuilt
from ggufrq.build.builds import require_build
from ggufrq.cache.kv import KvPair, KvPlan, Sought, exact_words, kv_type
from ggufrq.drive import cache_check, profiles
from ggufrq.drive.remedies import remedy
from ggufrq.drive.threads import patience
from ggufrq.tools import cli, completion
from ggufrq.tools.logs import ended, retried
from ggufrq.tools.programs import Programs

#: What every llama.cpp has, and what LM Studio and Ollama offer; see ``runtimes.fallback``.
FALLBACK = "q8_0"
_LONGEST_ARGUMENT = 30_000


@dataclass(frozen=True)
class Answer:
    """Text and figures of one generation. Bytes are exact, from llama.cpp's own log, or None where its
    figures are too coarse; ``kv_mib`` is as printed. ``recurrent_mib`` is state that no cache type changes.
    Types are those of all layers but for the exceptions that ``kv`` names; ``profile`` is what K was kept by,
    in a few words, ``recent`` and ``first`` how many of the newest and first tokens were in f16, ``bits``
    those of a value where the log tells.
    """

    text: str
    kv: str
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
    profile: str | None = None
    recent: int = 0
    first: int = 0
    bits: float | None = None


def programs_for(folder: Path | None) -> Programs:
    """The programs to use: those in ``folder``, or our build. Raises BuildError when there is none.

    What is to be said of a backend that no card has run is said once of each build that was made elsewhere,
    that its GPU is passed over each time.
    """
    if folder is not None:
        return Programs.in_folder(folder)
    build = require_build()
    passed_over = prebuilt.not_loaded(build)
    if passed_over is not None:
        log.say(passed_over)
    caution = prebuilt.caution(build)
    if caution is not None:
        told = paths.own_dir("told") / build.key
        if not told.exists():
            log.say(caution)
            told.touch()
    return Programs.of_build(build)


def settle(plan: KvPlan, programs: Programs, *, fallback: bool, command: str) -> KvPlan:
    """The cache to use with these programs: ``plan``, or with ``fallback`` what is left of it with q8_0 in
    place of types that they lack, and without layers apart, profile, newest or first tokens if they cannot do
    these. A profile and tokens in f16 that nobody asked for are left out without a word.

    ``command`` is the command line to repeat, without ``--kv`` and the other options of the cache. Raises
    UsageError when something is missing, ToolError when it is missing in our own build.
    """
    missing = programs.missing_types(plan)
    lacks = [f"no cache type {' and '.join(missing)}"] if missing else []
    layers = plan.layered and not programs.has_option("--kv-layers")
    lacks += ["no option --kv-layers, so that all layers are alike"] * layers
    profile = plan.profile is not None and not programs.has_option("--kv-profile")
    if profile and plan.profile is Sought.AUTO:
        plan, profile = plan.with_profile(None), False
    lacks += ["no option --kv-profile"] * profile
    exact = [("--kv-recent", plan.recent), ("--kv-first", plan.first)]
    if plan.optional and not all(programs.has_option(name) for name, tokens in exact if tokens):
        plan = plan.with_exact(0)
    recent = plan.recent > 0 and not programs.has_option("--kv-recent")
    lacks += ["no option --kv-recent"] * recent
    first = plan.first > 0 and not programs.has_option("--kv-first")
    lacks += ["no option --kv-first"] * first
    if not lacks:
        return plan
    what = f"has {'; '.join(lacks)}"
    if programs.build is not None:
        raise ToolError(f"the build in {programs.build.root} {what}", remedy="ggufrq build")

    def known(pair: KvPair) -> KvPair:
        safe = kv_type(FALLBACK)
        return KvPair(*(safe if side.name in missing else side for side in (pair.k, pair.v)))

    usable = KvPlan(
        known(plan.base), () if layers else tuple((ranges, known(pair)) for ranges, pair in plan.overrides)
    )
    if not profile and usable.k_ours:
        usable = usable.with_profile(plan.profile)
    if usable.rotated or not plan.rotated:  # beside a type that is not there they go with it
        usable = usable.with_exact(0 if recent else plan.recent, 0 if first else plan.first)
        usable = replace(usable, optional=plan.optional)
    instead = (
        usable.name
        if plan.layered
        else f"{usable.name} ({usable.base.bits:g} bits per value instead of {plan.base.bits:g})"
    )
    what = f"the llama.cpp in {programs.folder} {what}"
    if not fallback:
        raise UsageError(
            f"{what}; it has {', '.join(programs.cache_types)}",
            remedy=f"{command} --kv {shlex.quote(usable.name)}, or --fallback to do that by itself: "
            f"{instead}; for LM Studio, Ollama and others: ggufrq fallback RUNTIME MODEL",
        )
    log.say(f"{what}; using {instead}")
    return usable


def generate(
    model: Path,
    prompt: str,
    plan: KvPlan,
    programs: Programs,
    *,
    tokens: int = 256,
    n_ctx: int = 4096,
    raw: bool = False,
    threads: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
    env: proc.Environment | None = None,
    places: Sequence[str] = (),
) -> Answer:
    """Answer ``prompt`` by llama-cli, or with ``raw`` continue it by llama-completion, with K and V as in
    ``plan``, whose profile is looked for now (``profiles``).

    ``on_text`` gets the answer in pieces as it comes; ``env`` is added to the program's environment,
    ``places`` are its options for where the model lies (``passed_on.places``).
    Raises ToolError with llama.cpp's own reason when it fails, also when its exit status says otherwise, and
    when the cache was not kept as ``plan`` says.
    """
    if not prompt.strip():
        raise UsageError("the prompt is empty", remedy='-p "…"')
    if not raw and prompt.startswith(cli.COMMANDS):
        raise UsageError(
            f"llama-cli takes a prompt that begins with {prompt.split()[0]} as a command of its own"
        )
    plan, profile = profiles.settle(plan, model, n_ctx, programs.build, threads, places)
    tool = completion if raw else cli
    name = "llama-completion" if raw else "llama-cli"
    log_path = paths.logs_dir() / f"{name}.log"
    log_path.unlink(missing_ok=True)
    out = _Text(on_text)
    with _passed(prompt) as handed:
        args = tool.arguments(
            model,
            handed,
            plan,
            tokens=tokens,
            n_ctx=n_ctx,
            threads=threads,
            temperature=temperature,
            seed=random.randrange(1 << 31) if seed is None else seed,
        )
        command = [programs.tool(name), *args, *places]
        try:
            figures = retried(
                lambda: _attempt(
                    command,
                    prompt,
                    out,
                    log_path,
                    env={**patience(), **(env or {}), **plan.environment()},
                    raw=raw,
                )
            )
        except ToolError as error:
            raise ToolError(error.message, remedy=remedy(error.message, log_path)) from None
    plan = cache_check.as_kept(figures.context, plan)
    if not cache_check.as_asked(figures.context, plan):
        raise ToolError(
            f"llama.cpp kept {cache_check.found(figures.context)}, although {plan.title} was asked for",
            remedy=f"see {log_path}",
        )
    return replace(_answer(out.text, figures, plan, model, log_path), profile=profile)


def _attempt(
    command: list[str | Path],
    prompt: str,
    out: _Text,
    log_path: Path,
    *,
    env: proc.Environment,
    raw: bool,
) -> completion.Generation:
    stream = completion.continuation() if raw else cli.Answer(prompt)
    out.begin()
    done = proc.run(
        command, env=env, log=log_path, check=False, on_stdout=lambda chunk: out.take(stream.feed(chunk))
    )
    figures = completion.parse_timing(done.stderr)
    out.take(stream.close())
    if done.rc != 0:
        raise ToolError(ended(done))
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


def cache_lines(answer: Answer, plan: KvPlan) -> list[str]:
    """What the cache took, and what f16 would have taken."""
    size = f"{answer.kv_bytes:,} bytes" if answer.kv_bytes is not None else f"{answer.kv_mib:.2f} MiB"
    times = answer.f16_bytes / answer.kv_bytes if answer.kv_bytes and answer.f16_bytes is not None else None
    if times is None and not plan.layered and not answer.recent and not answer.first:
        times = 16 / (answer.bits or plan.base.bits)
    bits = "" if times is None else f", {16 / times:g} bits per value"
    lines = [f"{plan.name}{bits}: {size} for {answer.tokens_held:,} tokens"]
    if answer.profile is not None:
        lines.append(answer.profile)
    exact = exact_words(answer.recent, answer.first)
    if exact:
        lines.append(f"{exact} in f16, which is counted above")
    if times is not None and plan.name != "f16":
        f16 = "f16 takes" if answer.f16_bytes is None else f"f16 takes {answer.f16_bytes:,} bytes,"
        lines.append(f"{f16} {times:.2f} times that")
    if answer.recurrent_mib:
        lines.append(f"and {answer.recurrent_mib:.2f} MiB of recurrent state in f32, whatever the cache type")
    return lines


def speed_text(answer: Answer) -> str:
    """Tokens per second, as one line; without them where too little was done to tell."""
    prompt = f"prompt {_tokens(answer.prompt_tokens)}"
    prompt += f" at {answer.prompt_tps:,.0f} tokens/s" if answer.prompt_tps else ""
    rate = f" at {answer.tps:,.1f} tokens/s" if answer.tps else ""
    return f"{prompt}, answer {answer.tokens:,}{rate}"


def _tokens(count: int) -> str:
    return f"{count:,} token" + "s" * (count != 1)


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


def _answer(text: str, figures: completion.Generation, plan: KvPlan, model: Path, log_path: Path) -> Answer:
    context = figures.context
    return Answer(
        text=text,
        kv=plan.name,
        type_k=plan.base.k.name,
        type_v=plan.base.v.name,
        tokens_held=context.tokens,
        kv_bytes=cache_check.cache_bytes(context, plan, model),
        f16_bytes=cache_check.f16_bytes(context, model),
        kv_mib=context.kv_mib,
        recurrent_mib=context.recurrent_mib,
        prompt_tokens=figures.prompt_tokens,
        prompt_tps=figures.prompt_tps,
        tokens=figures.tokens,
        tps=figures.tps,
        log=log_path,
        recent=context.recent,
        first=context.first,
        bits=cache_check.bits(context),
    )
