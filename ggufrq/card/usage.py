"""Sections of a card on using the files: quickstarts, other runtimes, and who takes which cache type."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from ggufrq.cache.kv import kv_types
from ggufrq.card.facts import Facts
from ggufrq.card.markdown import block, code, folded, section, table
from ggufrq.card.quickstart import AHEAD, Quickstart
from ggufrq.runtimes import runtime, runtimes
from ggufrq.runtimes.fallback import Advice, advise

#: Runtimes whose settings are printed; the others are named in the table of who takes what.
_SHOWN = ("lmstudio", "ollama")
_COMMON = ("f16", "q8_0", "q4_0")
_TRANSFORMERS = (
    "The original model in transformers keeps K and V in the same blocks by `ggufrq.hf` (`ggufrq[hf]`; not "
    "run here): `model.generate(…, past_key_values=IsoQuantCache(bits=3))`, or PlanarQuantCache, "
    'RotorQuantCache; with `profile="NAME-kv.gguf", config=model.config` in the metric of a profile.'
)


def quickstart(facts: Facts, starts: Sequence[Quickstart], repo: str | None, date: str) -> str:
    """Commands, each with whether it was run."""
    parts = []
    if repo:
        parts += _download(repo, facts.needed)
    parts += _commands([start for start in starts if not start.title.startswith(AHEAD)], date)
    note = (
        "Those that were run had a few more options, to stop after some tokens and to show in the log that K "
        "and V are kept in the type that is named; the server had another port."
        if any(start.ran for start in starts)
        else ""
    )
    return section("Quickstart", *parts, note)


def ahead(facts: Facts, starts: Sequence[Quickstart], repo: str | None, date: str) -> str:
    """The head that predicts further tokens: where it is, and the command that was tried."""
    if not facts.guesses:
        return ""
    head = facts.head
    place = f"in {code(head.name)} beside the model" if head is not None else "in the files of the model"
    parts = [
        f"The model has a head that predicts further tokens, {place}. The model checks what it guesses "
        "several tokens at a time: the greedy text is the same with and without, but for ties.",
    ]
    if repo and head is not None:
        parts += _download(repo, head.parts)
    parts += _commands([start for start in starts if start.title.startswith(AHEAD)], date)
    if repo:
        finds = ", where llama.cpp finds the head by its name" if head is not None else ""
        parts += [
            f"**From the Hub**{finds} (not run here)",
            block(f"llama-server -hf {repo}:{facts.tag} --spec-type draft-mtp", "sh"),
        ]
    return section("Tokens guessed ahead", *parts)


def _download(repo: str, names: Sequence[str]) -> list[str]:
    command = f"hf download {repo} {shlex.join(names)} --local-dir ."
    return ["**Download** (not run here)", block(command, "sh")]


def _commands(starts: Sequence[Quickstart], date: str) -> list[str]:
    parts = []
    for start in starts:
        ran = f"run on {date} before it was printed{start.by}" if start.ran else "not run"
        parts += [f"**{start.title}** ({ran})", block("\n".join(start.lines), "sh")]
    return parts


def elsewhere(facts: Facts) -> str:
    """LM Studio and Ollama, which do not know our types."""
    parts = []
    for name in _SHOWN:
        advice = advise(runtime(name), facts.smallest.path, place=f"./{facts.smallest.path.name}")
        parts.append(folded(f"{advice.runtime.name}, {advice.use} (not run here)", _settings(advice)))
    return section("In programs without these cache types", *parts, _note(facts))


def support(commit: str, patches: str, date: str) -> str:
    """Which runtime takes which cache type, and when that was looked up."""
    rotated = [kind.name for kind in kv_types().values() if kind.ours]
    head = ("Runtime", *_COMMON, "others", "planar, iso, rotor", "K and V apart", "looked up")
    lines: list[Sequence[str]] = [
        (
            f"llama.cpp with ggufrq's patch set {patches[:8]}",
            *("yes" for _ in _COMMON),
            ", ".join(runtime("llama.cpp").types_beside(_COMMON)),
            f"yes, all {len(rotated)}",
            "yes",
            f"{date}, built from {commit[:12]}",
        )
    ]
    for other in runtimes().values():
        lines.append(
            (
                other.name,
                *("yes" if other.takes(name) else "no" for name in _COMMON),
                ", ".join(other.types_beside(_COMMON)),
                "no",
                "yes" if other.apart else "no",
                f"[{other.checked}]({other.sources[0]})",
            )
        )
    return section("Who takes which cache type", table(head, lines, "llllllll"), _TRANSFORMERS)


def _settings(advice: Advice) -> str:
    parts = []
    for file in advice.files:
        parts += [f"{code(file.name)}:", block(file.text)]
    parts.append("\n".join(f"{number}. {step}" for number, step in enumerate(advice.steps, 1)))
    parts.append(f"Flash attention: {advice.runtime.flash_attention}. Looked up on {advice.runtime.checked}.")
    return "\n\n".join(parts)


def _note(facts: Facts) -> str:
    command = code(f"ggufrq fallback RUNTIME {facts.smallest.path.name}")
    names = ", ".join(other.name for other in runtimes().values())
    return f"{command} gives the settings for {names}."
