"""What a validation does: the model, the cases, and how long each part is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ggufrq.base import paths
from ggufrq.base.errors import UsageError
from ggufrq.cache.cases import MODES, Case, parse_case, parse_cases
from ggufrq.cache.kv import Sought

#: Parts of a validation, in the order in which they are done.
SECTIONS = ("check", "quality", "greedy", "needle", "retrieval", "sanity", "speed")
#: Parts that ask a server.
SERVED = ("greedy", "needle", "retrieval", "sanity")
DEFAULT_CASES = "q8_0,q4_0,iso4,iso3"


@dataclass(frozen=True)
class ValidationSettings:
    """Sizes in tokens. ``ctx``: contexts of perplexity, ``chunks`` texts each, of which the second half is
    scored. ``check_*``: the same for the short runs of the self-check."""

    ctx: tuple[int, ...] = (8192,)
    chunks: int = 2
    greedy_prompts: int = 8
    greedy_prompt_tokens: int = 128
    greedy_tokens: int = 256
    needle_ctx: tuple[int, ...] = (1024, 4096)
    needle_depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    needle_repeats: int = 1
    retrieval_ctx: int = 2048
    retrieval_keys: int = 4
    sanity_prompts: int = 4
    sanity_tokens: int = 256
    speed_depths: tuple[int, ...] = (0, 1024, 2048)
    speed_prompt: int = 256
    speed_generate: int = 32
    speed_rounds: int = 4
    check_ctx: int = 512
    check_chunks: int = 4
    seed: int = 1
    threads: int | None = None

    @property
    def server_ctx(self) -> int:
        """Context of the server that everything fits into; a multiple of 256, as llama.cpp pads it."""
        generated = max(self.greedy_tokens, self.sanity_tokens) + self.greedy_prompt_tokens
        return -(-max(*self.needle_ctx, self.retrieval_ctx, generated) // 256) * 256


USUAL = ValidationSettings()
#: Under a minute for small models: figures are rough, and few differences exceed their errors.
QUICK = ValidationSettings(
    ctx=(1024,),
    chunks=2,
    greedy_prompts=3,
    greedy_prompt_tokens=64,
    greedy_tokens=64,
    needle_ctx=(512,),
    needle_depths=(0.1, 0.5, 0.9),
    retrieval_ctx=512,
    retrieval_keys=2,
    sanity_prompts=2,
    sanity_tokens=64,
    speed_depths=(0, 512),
    speed_prompt=128,
    speed_generate=16,
    speed_rounds=3,
    check_chunks=2,
)


@dataclass(frozen=True)
class ValidationPlan:
    """What a validation does. ``cases[0]`` is the base that all others are compared with; ``again`` is the
    command line that says all this; ``ctx_asked``: the contexts are the user's own choice."""

    model: str
    cases: tuple[Case, ...]
    settings: ValidationSettings
    sections: tuple[str, ...]
    text: Path
    again: str = ""
    ctx_asked: bool = False

    @property
    def base(self) -> Case:
        """What the others are compared with."""
        return self.cases[0]


def make_plan(
    model: str,
    *,
    kv: str | None = None,
    against: str = "f16",
    ctx: Sequence[int] | None = None,
    chunks: int | None = None,
    depths: Sequence[int] | None = None,
    sections: Sequence[str] | None = None,
    profile: Path | Sought | None = None,
    recent: int | None = 0,
    first: int | None = 0,
    text: Path | None = None,
    seed: int | None = None,
    threads: int | None = None,
    quick: bool = False,
    again: str = "",
) -> ValidationPlan:
    """The plan for the options of the command; ``profile``, ``recent`` and ``first`` are as for
    ``parse_cases``. Raises UsageError."""
    base = _known(parse_case(against, profile))
    cases = parse_cases(kv or DEFAULT_CASES, profile, recent, first)
    others = [_known(case) for case in cases if case != base]
    chosen = tuple(section for section in SECTIONS if section in (sections or SECTIONS))
    for section in sections or ():
        if section not in SECTIONS:
            raise UsageError(f"there is no section '{section}'", remedy=f"--sections {','.join(SECTIONS)}")
    settings = QUICK if quick else USUAL
    if ctx:
        if min(ctx) < 256:
            raise UsageError(f"a context of {min(ctx)} tokens is too short to score", remedy="--ctx 2048")
        lengths = tuple(dict.fromkeys(ctx))
        settings = replace(settings, ctx=lengths, needle_ctx=lengths, retrieval_ctx=max(lengths))
    if depths:
        settings = replace(settings, speed_depths=tuple(dict.fromkeys(depths)))
    if chunks:
        settings = replace(settings, chunks=chunks)
    if seed is not None:
        settings = replace(settings, seed=seed)
    settings = replace(settings, threads=threads)
    return ValidationPlan(
        model,
        (base, *others),
        settings,
        chosen,
        text or paths.data_dir("texts") / "heldout.txt",
        again,
        bool(ctx),
    )


def within(plan: ValidationPlan, longest: int | None) -> ValidationPlan:
    """The plan for a model that was trained on contexts of ``longest`` tokens: what is longer becomes as long
    as that. Raises UsageError when such a context was asked for."""
    settings = plan.settings
    if longest is None:
        return plan
    if plan.ctx_asked and max(settings.ctx) > longest:
        raise UsageError(
            f"the model was trained on contexts of {longest} tokens, not of {max(settings.ctx)}",
            remedy=f"--ctx {longest}",
        )
    fitting = replace(
        settings,
        ctx=tuple(dict.fromkeys(min(n, longest) for n in settings.ctx)),
        needle_ctx=tuple(dict.fromkeys(min(n, longest) for n in settings.needle_ctx)),
        retrieval_ctx=min(settings.retrieval_ctx, longest),
        speed_depths=tuple(n for n in settings.speed_depths if n + settings.speed_prompt <= longest) or (0,),
    )
    return replace(plan, settings=fitting)


def _known(case: Case) -> Case:
    """The case, if its rotation mode is one. Raises UsageError."""
    if case.mode and not set(case.mode.split("/")) <= set(MODES):
        raise UsageError(
            f"'{case.mode}' is no rotation mode; there are {', '.join(MODES)}",
            remedy=f"{case.pair.name}:block, or K/V apart: {case.pair.name}:full/block",
        )
    return case
