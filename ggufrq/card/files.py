"""Sections of a card on its files: the table, its siblings, the model, how it was made, and memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ggufrq.base.sizes import size_text
from ggufrq.cache.kv import KvPair, KvPlan, KvType, exact_words, kv_types
from ggufrq.card.facts import CardFile, Facts
from ggufrq.card.markdown import code, section, table
from ggufrq.ggufs.files import model_header
from ggufrq.ggufs.memory_shape import head_sizes
from ggufrq.measure.kept import Row
from ggufrq.memory.cells import ContextSettings, held_plan
from ggufrq.memory.estimate import Estimate, Memory
from ggufrq.report import numbers

#: Memory that machines and cards come with, in GB.
MEMORIES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256, 384, 512, 768, 1024)
#: Of a class of memory so much is left for the compute buffers, which differ by backend.
SPARE = 0.15
_SHORTEST = 8192
#: What files are for that are no models.
_OTHERS = {
    "mmproj": "vision projector",
    "mtp": "head that predicts further tokens",
    "draft": "draft that guesses tokens for the model",
    "profile": "metric of K for the rotated cache types, which `ggufrq run` finds beside the model",
}
_COLUMNS = ("f16", "q8_0", "q4_0", "iso4", "iso3", "iso2")


def files(facts: Facts, rows: Mapping[str, Row], repo: str | None) -> str:
    """Filename, type, size, split, and what each is good for."""
    head = ("Filename", "Quant type", "File Size", "Split", "Description")
    best = min(rows.values(), key=lambda row: float(row["kld_mean"]), default=None)
    lines = []
    for file in facts.files:
        name = file.name if len(file.parts) == 1 else file.parts[0]
        link = f"[{name}](https://huggingface.co/{repo}/blob/main/{name})" if repo else code(name)
        split = f"{len(file.parts)} parts" if len(file.parts) > 1 else "no"
        lines.append((link, file.type, size_text(file.bytes), split, _description(facts, file, best)))
    note = (
        f"The memory is the smallest usual size in which the weights and {usual_tokens(facts):,} tokens of "
        f"{facts.cache_type} cache leave {100 * SPARE:.0f} % for compute buffers, which differ by backend."
    )
    return section("Files", table(head, lines, "llrll"), note if facts.shape is not None else "")


def siblings(facts: Facts, others: Sequence[tuple[str, Facts]], repo: str | None) -> str:
    """The repositories of a family, this one in bold."""
    if not others:
        return ""
    lines = []
    for name, family in [(repo or facts.base, facts), *others]:
        here = family is facts
        sizes = [file.bytes for file in family.models]
        span = size_text(min(sizes)) + (f" to {size_text(max(sizes))}" if len(sizes) > 1 else "")
        types = ", ".join(file.recipe or file.type for file in reversed(family.models))
        link = f"**{name}**" if here else f"[{name}](https://huggingface.co/{name})"
        lines.append((link, _count(family.parameters), types, span))
    lines.sort(key=lambda line: line[0].strip("*[").lower())
    return section("The family", table(("Repository", "Parameters", "Types", "Size"), lines, "lrlr"))


def model(facts: Facts) -> str:
    """What the metadata of the files says of the model."""
    layers, shape = facts.number("block_count"), facts.shape
    heads, kv_heads = facts.number("attention.head_count"), facts.number("attention.head_count_kv")
    said = [
        ("Architecture", facts.arch),
        ("Parameters", f"{facts.parameters:,}"),
        (
            "Layers",
            f"{layers:,}" + (f", {len(shape.cached):,} with a KV cache" if shape else "") if layers else "",
        ),
        ("Heads", f"{heads} of queries, {kv_heads} of K and V" if heads and kv_heads else ""),
        ("Values of a head", " and ".join(map(str, head_sizes(facts.values)))),
        ("Context", f"{facts.n_ctx:,} tokens" if facts.n_ctx else ""),
        ("Vocabulary", f"{len(facts.values.get('tokenizer.ggml.tokens') or ()):,} tokens"),
        (
            "Chat template",
            ("yes, with thinking on and off" if facts.thinks else "yes") if facts.template else "no",
        ),
        ("License", str(facts.values.get("general.license") or "")),
    ]
    return section("Model", table(("", ""), [line for line in said if line[1]], "ll"))


def making(facts: Facts) -> str:
    """Source, recipe, importance matrix, and what made the files."""
    source, values = facts.source, facts.values
    revision = f" at {code(str(source['revision']))}" if source.get("revision") else ""
    if source.get("repo"):
        origin = f"[{source['repo']}](https://huggingface.co/{source['repo']}){revision}"
        origin += f", {code(str(source['file']))}" if source.get("file") else ""
    else:
        origin = code(str(source.get("file") or source.get("folder") or facts.base))
        origin += f", id {code(str(source['id'])[:16])}" if source.get("id") else ""
    recipes = sorted({file.recipe for file in facts.models if file.recipe})
    plain = sorted({file.type for file in facts.models if not file.recipe})
    commit, patches = str(values.get("ggufrq.llama_cpp", "")), str(values.get("ggufrq.patch_set", ""))
    said = [
        ("Source", origin),
        ("Its weights", str(values.get("ggufrq.source.weights") or "")),
        ("Made by", code(str(values.get("general.quantized_by", "ggufrq")))),
        ("llama.cpp", code(commit)),
        ("Patch set", code(patches)),
        ("Recipes", ", ".join(map(code, recipes)) if recipes else "none; llama-quantize chooses the types"),
        ("Types of llama-quantize", ", ".join(map(code, plain))),
        ("Importance matrix", _matrix(facts)),
    ]
    note = f"Every file, its sha256 and what it was made from stand in {code(facts.base + '.ggufrq.json')}."
    return section("How it was made", table(("", ""), [line for line in said if line[1]], "ll"), note)


def memory(facts: Facts) -> str:
    """What the cache takes by context and type, from the shape of the model's own tensors."""
    title = "Memory of the KV cache"
    if facts.shape is None:
        return section(title, "Cannot be told from the tensors of this model.")
    kinds = [kind for name in _COLUMNS if facts.takes(kind := kv_types()[name])]
    head = ("Context", *(f"{kind.name} ({facts.bits(kind):g} bits)" for kind in kinds))
    contexts = _contexts(facts)
    lines = [
        (f"{n:,}", *(numbers.size(estimate(facts, plan_of(kind), n).cache) for kind in kinds))
        for n in contexts
    ]
    notes = (
        "planar and rotor take as much as iso with the same number. "
        if facts.takes(kv_types()["iso3"])
        else ""
    )
    notes += "Bits are those of a value with its share of the scale; the weights come on top."
    if facts.takes(kv_types()["iso3"]):
        plan = held_plan(facts.shape, plan_of(kv_types()["iso3"]))
        said = [exact_words(plan.recent, plan.first) + " in f16"] if plan.recent + plan.first else []
        said += ["the profile of K"] if plan.profile is not None else []
        notes += (
            f" Bytes of the rotated types count {' and '.join(said)}, as `ggufrq run` keeps them."
            if said
            else ""
        )
    if state := estimate(facts, plan_of(kv_types()["f16"]), contexts[0]).state:
        notes += f" So do {numbers.size(state)} of recurrent state for each sequence, whatever the type."
    if (why := facts.why_not(kv_types()["iso3"])) is not None:
        notes += f" The rotated types cannot be used here: {why}."
    return section(title, table(head, lines, "r" * len(head)), notes)


def _description(facts: Facts, file: CardFile, best: Row | None) -> str:
    if file.kind != "model":
        return _OTHERS[file.kind]
    said = [f"{file.bits:.2f} bits per weight"]
    said += [f"recipe {file.recipe}"] if file.recipe else []
    said += ["importance matrix"] if file.imatrix else []
    if file.is_reference:
        said.append("what the others are measured against")
    elif best is not None and len(facts.models) > 1 and best["file"] == file.name:
        said.append("nearest to the original of those measured")
    if facts.shape is not None:
        need = needed(facts, file, plan_of(kv_types()[facts.cache_type]), usual_tokens(facts)) / 1e9
        fitting = next((size for size in MEMORIES if size >= need), None)
        said.append(f"for {fitting} GB of memory" if fitting else "for more than 1 TB of memory")
    return ", ".join(said)


def _count(parameters: int) -> str:
    """Parameters as they are named: ``7.35 M``, ``27 B``."""
    return f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _matrix(facts: Facts) -> str:
    used: dict[str, list[CardFile]] = {}
    for file in reversed(facts.models):
        if file.imatrix:
            used.setdefault(file.imatrix, []).append(file)
    there = [part["sha256"] for part in facts.matrix.get("parts", [])]
    told = []
    for sha, files in used.items():
        values = model_header(files[0].path).values
        text, chunks = (values.get(f"quantize.imatrix.{key}") for key in ("dataset", "chunks_count"))
        said = code(str(facts.matrix["name"])) if sha in there else f"sha256 {code(sha[:16])}"
        said += f", made from {code(str(text))}" if text else ""
        said += f", {chunks} chunks of 512 tokens" if chunks else ""
        told.append(f"{said}; for {', '.join(file.recipe or file.type for file in files)}")
    return ". ".join(told) or "none"


def _contexts(facts: Facts) -> list[int]:
    """8K, and twice as much each time, to the model's own context."""
    longest = facts.n_ctx or _SHORTEST
    found, tokens = [], _SHORTEST
    while tokens < longest:
        found.append(tokens)
        tokens *= 2
    return [*found, longest]


def usual_tokens(facts: Facts) -> int:
    """The context that files are recommended for: 8K, or the model's own where that is shorter."""
    return min(_SHORTEST, facts.n_ctx or _SHORTEST)


def plan_of(kind: KvType) -> KvPlan:
    """K and V in a type, with all that ``ggufrq run`` keeps beside it."""
    return KvPlan(KvPair(kind, kind)).as_usual()


def estimate(facts: Facts, plan: KvPlan, tokens: int) -> Estimate:
    """What a context of so many tokens takes beside the weights, as ``ggufrq memory`` says it."""
    assert facts.shape is not None
    return Memory(facts.shape, 0).estimate(plan, ContextSettings(tokens))


def needed(facts: Facts, file: CardFile, plan: KvPlan, tokens: int) -> float:
    """Bytes of memory for a file and so many tokens, with what is left for compute buffers."""
    context = estimate(facts, plan, tokens)
    return (file.bytes + context.cache + context.state) / (1 - SPARE)
