"""A card from what is known of a family, with what the user added to an earlier one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ggufrq import __version__
from ggufrq.advise.ladder import kept
from ggufrq.base import log, texts
from ggufrq.base.errors import UsageError
from ggufrq.build.project import Build
from ggufrq.cache.kv import kv_type
from ggufrq.card import files, head, ladder, results, usage
from ggufrq.card.facts import Facts, collect
from ggufrq.card.markdown import NOT_MEASURED
from ggufrq.card.measured import Measured, find, measure
from ggufrq.card.quickstart import Quickstart, quickstarts
from ggufrq.models.hub import parse_id
from ggufrq.report import numbers

_OURS = "iso3"


@dataclass(frozen=True)
class Wishes:
    """What the user says beside the folder. ``siblings`` are folders and repositories of the same family;
    ``reports`` results of ``ggufrq validate``; ``run`` whether quickstarts are run; ``force`` whether a card
    that ggufrq did not write may be replaced."""

    repo: str | None = None
    base_model: str | None = None
    license: str | None = None
    quantized_by: str | None = None
    siblings: tuple[tuple[Path, str], ...] = ()
    reports: tuple[Path, ...] = ()
    exclude: tuple[str, ...] = ()
    measure: bool = False
    quick: bool = False
    run: bool = True
    force: bool = False

    def __post_init__(self) -> None:
        """Raises UsageError for what is no id of a repository, which links and the head would not work by."""
        for option, repo in (("--repo", self.repo), ("--base-model", self.base_model)):
            if repo is not None and parse_id(repo) != (repo, None):
                raise UsageError(f"'{repo}' is no id of a repository", remedy=f"{option} USER/NAME")


@dataclass(frozen=True)
class Card:
    """A card: its text, its head, the quickstarts, and how many cells say that nothing was measured."""

    path: Path
    text: str
    head: dict[str, Any]
    facts: Facts
    quickstarts: tuple[Quickstart, ...]

    @property
    def not_measured(self) -> int:
        """Cells without a measurement."""
        return self.text.count(f"| {NOT_MEASURED}")

    def as_data(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "path": str(self.path),
            "head": self.head,
            "files": [file.name for file in self.facts.files],
            "quickstarts": [
                {"title": start.title, "lines": list(start.lines), "ran": start.ran}
                for start in self.quickstarts
            ],
            "not_measured": self.not_measured,
        }


def make(folder: Path, build: Build, wishes: Wishes | None = None) -> Card:
    """The card of the family in a folder; it is not written.

    Raises UsageError when there is a README.md that ggufrq did not write, and as ``collect``; ToolError when
    a quickstart or a measurement fails.
    """
    wishes = wishes or Wishes()
    path = folder / "README.md"
    before = head.Earlier()
    if path.is_file():
        before = head.earlier(texts.read(path), force=wishes.force)
    facts = collect(folder, wishes.exclude)
    others = [(repo, collect(place)) for place, repo in wishes.siblings]
    if wishes.measure:
        measure(facts, build, quick=wishes.quick)
        ladder.measure(facts, build, quick=wishes.quick)
    measured = find(facts, build, wishes.reports)
    starts = quickstarts(facts, build, run=wishes.run)
    data = head.metadata(
        facts,
        base_model=wishes.base_model,
        license=wishes.license,
        quantized_by=wishes.quantized_by or (wishes.repo or "").rpartition("/")[0] or None,
        before=before.head,
    )
    tell_what_is_missing(data)
    text = _text(facts, measured, starts, others, build, wishes.repo, data, before.own)
    return Card(path, text, data, facts, tuple(starts))


def _text(
    facts: Facts,
    measured: Measured,
    starts: Sequence[Quickstart],
    others: Sequence[tuple[str, Facts]],
    build: Build,
    repo: str | None,
    data: dict[str, Any],
    own: str,
) -> str:
    date = datetime.now(timezone.utc).date().isoformat()
    commit = str(build.manifest.get("llama_cpp", {}).get("commit", ""))
    patches = str(build.manifest.get("patch_set", ""))
    ran = "from commands that were run" if any(start.ran for start in starts) else "without running a command"
    parts = [
        head.render(data),
        f"# {facts.base} GGUF",
        _summary(facts, data, measured),
        head.own_text(own),
        files.files(facts, measured.weights, repo),
        files.siblings(facts, others, repo),
        usage.quickstart(facts, starts, repo, date),
        usage.ahead(facts, starts, repo, date),
        usage.elsewhere(facts),
        files.memory(facts),
        ladder.caches(facts, kept(facts.smallest.path, build)),
        results.weights(facts, measured),
        results.caches(facts, measured),
        usage.support(commit, patches, date),
        files.model(facts),
        files.making(facts),
        f"Written on {date} by ggufrq {__version__} from the files' metadata and from measurements, and "
        f"{ran}; where nothing was measured, it says so.",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(facts: Facts, data: dict[str, Any], measured: Measured) -> str:
    base = data.get("base_model")
    of = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else facts.name
    types = [file.recipe or file.type for file in reversed(facts.models)]
    listed = types[0] if len(types) == 1 else f"{', '.join(types[:-1])} and {types[-1]}"
    text = f"{of} in GGUF: {listed}."
    if facts.cache_type != _OURS or facts.shape is None:
        return text
    tokens = files.usual_tokens(facts)
    f16, ours = (files.estimate(facts, files.plan_of(kv_type(name)), tokens).cache for name in ("f16", _OURS))
    cases = [case for r in measured.results for case in r["cases"] if case["quality"]]
    seen = any(case["name"].split()[0] == _OURS for case in cases)  # whatever was on beside it
    cost = "was measured, see below" if seen else "was not measured on these files"
    return (
        f"{text} At {tokens:,} tokens the KV cache takes {numbers.size(ours)} in {_OURS} with all that is "
        f"kept beside it, and {numbers.size(f16)} in f16, {f16 / ours:.2f} times as much; what that costs "
        f"{cost}."
    )


def tell_what_is_missing(data: dict[str, Any]) -> None:
    """Say which keys of a head nobody gave."""
    options = {"base_model": "--base-model USER/NAME", "license": "--license ID", "quantized_by": "--repo"}
    missing = [f"{key} ({options[key]})" for key in options if key not in data]
    if missing:
        log.say(f"the head of the card has no {', no '.join(missing)}")


def parse_sibling(text: str) -> tuple[Path, str]:
    """``DIR=user/name`` as a folder and a repository. Raises UsageError."""
    folder, equals, repo = text.rpartition("=")
    if not equals or "/" not in repo or not Path(folder).is_dir():
        raise UsageError(f"'{text}' is not DIR=user/name", remedy="--sibling ../Other-GGUF=me/Other-GGUF")
    return Path(folder), repo
