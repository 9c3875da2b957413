"""The card of a model for mlx-lm, from its manifest and configuration; mlx runs its quickstarts alone."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ggufrq import __version__
from ggufrq.base import log, paths, proc, texts
from ggufrq.base.errors import ModelError, ToolError, UsageError
from ggufrq.base.sizes import size_text
from ggufrq.card import head
from ggufrq.card.compose import Wishes, tell_what_is_missing
from ggufrq.card.markdown import block, code, section, table

_MANIFEST = "*.ggufrq.json"
_TIMEOUT = 600.0
_WHOLE = 16

_USUAL = """from mlx_lm import load, generate

model, tokenizer = load("{model}")
messages = [{{"role": "user", "content": "Why is the sky blue?"}}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
print(generate(model, tokenizer, prompt, max_tokens={tokens}))
"""
_PLAIN = """from mlx_lm import load, generate

model, tokenizer = load("{model}")
print(generate(model, tokenizer, "The sky is blue because", max_tokens={tokens}))
"""
_CACHE = """from ggufrq.mlx import make_cache
from mlx_lm import load, generate

model, tokenizer = load("{model}")
cache = make_cache(model, bits=3)
print(generate(model, tokenizer, "The sky is blue because", max_tokens={tokens}, prompt_cache=cache))
"""
#: Tokens of what is printed, and of what is run.
_TOKENS, _FEW = 256, 4


@dataclass(frozen=True)
class MlxFacts:
    """A model for mlx-lm: its folder and name, where it is from, what its manifest says of it, and its
    configuration. ``values`` is for the head of the card."""

    folder: Path
    name: str
    source: dict[str, Any]
    entry: dict[str, Any]
    config: dict[str, Any]
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(part["bytes"] for part in self.entry["parts"])

    @property
    def modules(self) -> dict[int, int]:
        """How many modules have how many bits; 16: as they are."""
        return {int(bits): count for bits, count in self.entry["plan"]["modules"].items()}

    @property
    def least(self) -> int:
        """The fewest bits of a module."""
        return min(self.modules)

    @property
    def text(self) -> dict[str, Any]:
        """The configuration of the language model."""
        return {**self.config, **self.config.get("text_config", {})}


@dataclass(frozen=True)
class MlxCard:
    """A card; ``ran`` has the titles of the quickstarts, and whether they were run."""

    path: Path
    text: str
    head: dict[str, Any]
    facts: MlxFacts
    ran: dict[str, bool]
    not_measured: int = 0

    def as_data(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "path": str(self.path),
            "head": self.head,
            "files": [part["name"] for part in self.facts.entry["parts"]],
            "quickstarts": [{"title": title, "ran": ran} for title, ran in self.ran.items()],
            "not_measured": self.not_measured,
        }


def is_mlx(folder: Path) -> bool:
    """Whether the manifest in a folder is that of a model for mlx-lm."""
    return bool(_manifests(folder))


def members(folder: Path) -> list[Path]:
    """The models of a family for mlx-lm, where a folder holds one: folders in it that are such models, and no
    manifest of its own."""
    if any(folder.glob(_MANIFEST)):
        return []
    return sorted(place for place in folder.iterdir() if place.is_dir() and is_mlx(place))


def repo_of(member: Path, repo: str) -> str:
    """The repository of a member of a family: that of the family, and what the weights are."""
    (name,) = (path.name.removesuffix(_MANIFEST[1:]) for path in _manifests(member))
    return f"{repo}-{name.rpartition('-mlx-')[2]}"


def make_family(places: Sequence[Path], wishes: Wishes) -> list[MlxCard]:
    """The card of each member, which names all others; none is written. Raises as ``make``."""
    repos = {place: repo_of(place, wishes.repo) if wishes.repo else None for place in places}
    cards = []
    for place, repo in repos.items():
        others = tuple((other, name or other.name) for other, name in repos.items() if other != place)
        cards.append(make(place, replace(wishes, repo=repo, siblings=(*others, *wishes.siblings))))
    return cards


def _manifests(folder: Path) -> list[Path]:
    return [path for path in folder.glob(_MANIFEST) if (paths.read_json(path) or {}).get("format") == "mlx"]


def collect(folder: Path) -> MlxFacts:
    """The facts of the model in a folder. Raises UsageError when it is none of ``ggufrq quantize --to mlx``,
    ModelError when a file is missing or not what the manifest says."""
    manifests = _manifests(folder)
    if len(manifests) != 1:
        raise UsageError(
            f"{folder} has {len(manifests) or 'no'} manifests of models for mlx, where one is needed",
            remedy="the folder that ggufrq quantize --to mlx wrote",
        )
    data = paths.read_json(manifests[0]) or {}
    name, entry = next(iter(data.get("files", {}).items()), ("", {}))
    if not isinstance(entry, dict) or not entry.get("parts") or "plan" not in entry:
        raise ModelError(f"{manifests[0]} is no manifest, or damaged")
    for part in entry["parts"]:
        path = folder / part["name"]
        if not path.is_file() or path.stat().st_size != part["bytes"]:
            raise ModelError(
                f"{part['name']} is missing from {folder}, or not what the manifest says it is",
                remedy="ggufrq quantize --to mlx makes it again",
            )
    config = paths.read_json(folder / "config.json") or {}
    return MlxFacts(folder, name, data.get("source") or {}, entry, config)


def make(folder: Path, wishes: Wishes) -> MlxCard:
    """The card of the model in a folder; it is not written.

    Raises UsageError when there is a README.md that ggufrq did not write, or for wishes that are for GGUF
    files, and as ``collect``; ToolError when a quickstart fails.
    """
    for name, given in (
        ("--report", wishes.reports),
        ("--measure", wishes.measure),
        ("--quick", wishes.quick),
    ):
        if given:
            raise UsageError(f"{name} is for families of GGUF files", remedy="leave it out")
    facts = collect(folder)
    path = folder / "README.md"
    before = head.earlier(texts.read(path), force=wishes.force) if path.is_file() else head.Earlier()
    others = [(repo, collect(place)) for place, repo in wishes.siblings]
    data = head.metadata(
        facts,
        base_model=wishes.base_model,
        license=wishes.license,
        quantized_by=wishes.quantized_by or (wishes.repo or "").rpartition("/")[0] or None,
        before=before.head,
        library="mlx",
        tags=("mlx", "quantized"),
    )
    tell_what_is_missing(data)
    run = wishes.run and find_spec("mlx_lm") is not None
    if wishes.run and not run:
        log.say("mlx-lm is not installed: the quickstarts are printed as not run")
    starts = _quickstarts(facts, wishes.repo or facts.name, run=run)
    date = datetime.now(timezone.utc).date().isoformat()
    parts = [
        head.render(data),
        f"# {(wishes.repo or facts.name).rpartition('/')[2]}",
        _summary(facts, data),
        head.own_text(before.own),
        _family(facts, others, wishes.repo),
        _usage(starts, date),
        _loss(facts),
        _bits(facts),
        _model(facts),
        _making(facts),
        f"Written on {date} by ggufrq {__version__} from the manifest and the configuration.",
    ]
    text = "\n\n".join(part for part in parts if part) + "\n"
    return MlxCard(path, text, data, facts, {title: ran for title, _, ran in starts})


def _summary(facts: MlxFacts, data: dict[str, Any]) -> str:
    base = data.get("base_model")
    of = f"[{base}](https://huggingface.co/{base})" if isinstance(base, str) else _origin(facts)
    fold = ", with AWQ's scales folded in" if facts.entry.get("fold") else ""
    return (
        f"{of} for [mlx-lm](https://github.com/ml-explore/mlx-lm): {facts.entry['recipe']}{fold}, "
        f"{facts.entry['bits']:.2f} bits per weight, {size_text(facts.bytes)}."
    )


def _family(facts: MlxFacts, others: Sequence[tuple[str, MlxFacts]], repo: str | None) -> str:
    """The repositories of a family, the fewest bits first, this one in bold."""
    rows = []
    for name, one in sorted([(repo or facts.name, facts), *others], key=lambda pair: pair[1].entry["bits"]):
        other = f"[{name}](https://huggingface.co/{name})" if "/" in name else name
        link = f"**{name}**" if one is facts else other
        what = one.entry["recipe"] + (f", {one.entry['fold']}" if one.entry.get("fold") else "")
        bits = f"{one.entry['bits']:.2f}"
        rows.append((link, what, bits, size_text(one.bytes), f"{one.entry['kld']:.5f}"))
    title = ("Repository", "Weights", "Bits per weight", "Size", "Mean KLD, nats")
    return section("The family", table(title, rows, "llrrr"))


def _quickstarts(facts: MlxFacts, name: str, *, run: bool) -> list[tuple[str, str, bool]]:
    """Title, lines, and whether they were run."""
    template = (facts.folder / "chat_template.jinja").is_file() or "chat_template" in (
        paths.read_json(facts.folder / "tokenizer_config.json") or {}
    )
    usual = _USUAL if template else _PLAIN
    found = []
    for title, lines in (("mlx-lm", usual), ("with the KV cache in iso3, by ggufrq", _CACHE)):
        if run:
            log.say(f"running the quickstart: {title}")
            _run(lines.format(model="MODEL", tokens=_FEW).replace('"MODEL"', repr(str(facts.folder))))
        found.append((title, lines.format(model=name, tokens=_TOKENS), run))
    return found


def _run(lines: str) -> None:
    log_path = paths.logs_dir() / "card-quickstart.log"
    done = proc.run([sys.executable, "-c", lines], check=False, timeout=_TIMEOUT, log=log_path)
    if done.rc != 0 or not done.stdout.strip():
        raise ToolError(
            "a quickstart of the card does not work", remedy=f"see {log_path}; --no-run prints it as not run"
        )


def _usage(starts: Sequence[tuple[str, str, bool]], date: str) -> str:
    parts = [block("pip install mlx-lm      # and 'ggufrq[mlx]' for its caches", "sh")]
    for title, lines, ran in starts:
        said = f"run on {date} on this folder, for {_FEW} tokens" if ran else "not run"
        parts += [f"**{title}** ({said})", block(lines, "python")]
    return section("Quickstart", *parts)


def _loss(facts: MlxFacts) -> str:
    wrote = facts.entry["text"]
    return section(
        "What the weights cost",
        f"Mean divergence (KLD) of its predictions from those of the model as it was: "
        f"{facts.entry['kld']:.5f} nats, over the first 256 tokens of the held-out text of ggufrq. Loaded by "
        "mlx-lm it wrote, greedily:",
        block(wrote),
    )


def _bits(facts: MlxFacts) -> str:
    """Modules by bits, and those with bits of their own."""
    rows = [
        ("as they are" if bits == _WHOLE else f"{bits}", str(count))
        for bits, count in sorted(facts.modules.items())
    ]
    given = {
        path: rule for path, rule in facts.config.get("quantization", {}).items() if isinstance(rule, dict)
    }
    note = f"{code('config.json')} has the bits of {len(given)} modules one by one." if given else ""
    return section("Bits of the modules", table(("Bits", "Modules"), rows, "rr"), note)


def _model(facts: MlxFacts) -> str:
    text = facts.text
    heads, kv_heads = text.get("num_attention_heads"), text.get("num_key_value_heads")
    said = [
        ("Type", str(facts.entry.get("arch", ""))),
        ("Weights", f"{facts.entry['plan']['weights']:,}"),
        ("Layers", str(text.get("num_hidden_layers", ""))),
        ("Heads", f"{heads} of queries, {kv_heads} of K and V" if heads and kv_heads else ""),
        (
            "Context",
            f"{text['max_position_embeddings']:,} tokens" if "max_position_embeddings" in text else "",
        ),
        ("Vocabulary", f"{text['vocab_size']:,} tokens" if "vocab_size" in text else ""),
    ]
    return section("Model", table(("", ""), [line for line in said if line[1]], "ll"))


def _making(facts: MlxFacts) -> str:
    by = facts.entry.get("made_by", {})
    said = [
        ("Source", _origin(facts)),
        (
            "Recipe",
            facts.entry["recipe"] + (f", --fold {facts.entry['fold']}" if facts.entry.get("fold") else ""),
        ),
        ("Made by", ", ".join(f"{name} {version}" for name, version in by.items())),
    ]
    note = f"Every file and its sha256 stand in {code(facts.name + '.ggufrq.json')}."
    return section("How it was made", table(("", ""), said, "ll"), note)


def _origin(facts: MlxFacts) -> str:
    source = facts.source
    if source.get("repo"):
        revision = f" at {code(str(source['revision']))}" if source.get("revision") else ""
        return f"[{source['repo']}](https://huggingface.co/{source['repo']}){revision}"
    return code(str(source.get("folder") or facts.name))
