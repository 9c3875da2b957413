"""The main job from start to end: build, quantize the embedded models, run one, and measure every cache
type."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import log, paths, table, texts
from ggufrq.base.progress import progress
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, parse_case
from ggufrq.cache.kv import parse_plan
from ggufrq.drive import run
from ggufrq.make import family
from ggufrq.make.plan import Family, Request, Want
from ggufrq.make.ready import model_file, weights_of
from ggufrq.measure import cost
from ggufrq.measure.cost import CostSettings
from ggufrq.measure.kept import Row
from ggufrq.models.resolve import embedded_models, resolve
from ggufrq.tools.programs import Programs

#: A few minutes on two cores for both models.
USUAL = CostSettings()
#: Well under a minute.
QUICK = CostSettings(n_ctx=512, chunks=2, prompt=128, generate=16, depth=0, repetitions=1)
PROMPT = "To create a new table in the database,"

_WIDTH = 79
_HEAD = ("cache", "bits", "bytes", "prefill", "decode", "PPL", "KLD", "99.9%", "top %")


@dataclass(frozen=True)
class DemoPlan:
    """What the demo does: models by name, cases, settings, and whether to measure anew."""

    models: tuple[str, ...]
    cases: tuple[Case, ...]
    settings: CostSettings
    fresh: bool = False


def plan(
    models: str | None = None, kv: str | None = None, *, quick: bool = False, fresh: bool = False
) -> DemoPlan:
    """The plan for the options of the command; lists have commas. Raises UsageError or ModelError."""
    names = (
        [name.strip() for name in models.split(",") if name.strip()] if models else list(embedded_models())
    )
    for name in names:
        resolve(name)
    cases = (
        [parse_case(part.strip()) for part in kv.split(",") if part.strip()] if kv else cost.default_cases()
    )
    return DemoPlan(tuple(names), tuple(cases), QUICK if quick else USUAL, fresh)


def families(names: Sequence[str], build: Build) -> list[Family]:
    """The families of the embedded models among ``names``."""
    wants = tuple(map(Want, family.DEFAULT_TYPES))
    return [family.make_family(Request(name, wants), build) for name in names if name in embedded_models()]


def answer(model: str, build: Build) -> tuple[run.Answer, list[str]]:
    """Let a model continue a sentence with an iso3 cache as ``ggufrq run`` keeps it; the answer, and what its
    cache took."""
    kept = parse_plan("iso3").as_usual()
    given = run.generate(
        model_file(model),
        PROMPT,
        kept,
        Programs.of_build(build),
        tokens=48,
        n_ctx=1024,
        raw=True,
        temperature=0,
    )
    return given, run.cache_lines(given, kept)


def measure_all(todo: DemoPlan, build: Build) -> dict[str, list[Row]]:
    """Rows by model, measured or kept from an earlier run."""
    text = paths.data_dir("texts") / "heldout.txt"
    log_path = paths.logs_dir() / "demo.log"
    log_path.unlink(missing_ok=True)
    found: dict[str, list[Row]] = {}
    with progress("Measuring", len(todo.models) * len(todo.cases), unit="rows") as bar:
        for name in todo.models:
            subject = cost.subject(name, model_file(name), weights_of(name))
            found[name] = cost.measure(
                subject,
                todo.cases,
                build,
                text,
                todo.settings,
                fresh=todo.fresh,
                log=log_path,
                listener=bar,
            )
    log.say(f"log of all that ran: {log_path}")
    return found


def render(rows: Sequence[Row]) -> str:
    """The rows of one model as a table of at most 80 columns."""
    body = [
        (
            _name(row),
            f"{row['bits_per_value']:g}",
            f"{row['cache_bytes']:,}",
            f"{row['prefill_tps']:,.0f}",
            f"{row['decode_tps']:,.0f}",
            f"{row['ppl']:.2f}",
            f"{max(row['kld_mean'], 0.0) + 0.0:.5f}",  # + 0.0: the run against itself may give -0
            f"{max(row['kld_p999'], 0.0) + 0.0:.4f}",
            f"{100 * row['same_top']:.1f}",
        )
        for row in rows
    ]
    return table.render(_HEAD, body, "lrrrrrrrr")


def caption(rows: Sequence[Row]) -> str:
    """How the rows came about, in plain words, with the commands."""
    row = rows[0]
    meta = row["meta"]
    scored = meta["chunks"] * (meta["n_ctx"] - 1 - meta["n_ctx"] // 2)
    error = 100 * row["ppl_err"] / row["ppl"]
    text = (
        f"Weights {meta['weights']}; {meta['cpu']}, {meta['threads']} threads; llama.cpp "
        f"{str(meta['llama_cpp'])[:12]}, patch set {str(meta['patch_set'])[:12]}. "
        f"bits: per value of K and V. bytes: of the cache for {row['cache_tokens']:,} tokens, from "
        f"llama.cpp's log. prefill, decode: tokens/s of llama-bench for {meta['prompt']} and "
        f"{meta['generate']} tokens behind {meta['depth']}. PPL, KLD (mean and 99.9th percentile, nats) and "
        f"how often the likeliest token is the same: llama-perplexity on the held-out text, {meta['chunks']} "
        f"chunks of {meta['n_ctx']:,} tokens ({scored:,} scored: PPL ± {error:.0f} %), against the run with "
        "an f16 cache. K is quantized from the first token on in every row: its type and size are "
        "read from the log of the very run that was scored, and any other type or size is an error."
    )
    return "\n".join(
        [
            *textwrap.wrap(text, _WIDTH),
            "The commands of the last row; others differ in -ctk and -ctv alone:",
            f"  {meta['base_command']}",
            *(f"  {command}" for command in rows[-1]["meta"]["commands"]),
        ]
    )


def render_answer(model: str, given: run.Answer, cache: Sequence[str]) -> str:
    """The sentence and its continuation, wrapped, and what the cache took."""
    said = textwrap.fill(
        " ".join((PROMPT + given.text).split()), _WIDTH, initial_indent="  ", subsequent_indent="  "
    )
    lines = [f"{model} continues a sentence with an iso3 cache:", "", said, ""]
    return "\n".join([*lines, "cache  " + "\n       ".join(cache)])


def write_json(path: Path, rows: dict[str, list[Row]]) -> None:
    """Write all rows as one JSON list."""
    everything = [row for of_model in rows.values() for row in of_model]
    paths.atomic_write(path, texts.to_json(everything, indent=1) + "\n")


def _name(row: Row) -> str:
    pair = row["type_k"] if row["type_k"] == row["type_v"] else f"{row['type_k']}/{row['type_v']}"
    mode = [] if row["mode"] in ("full", "none", "hadamard") else [row["mode"]]
    return " ".join([pair, *mode, *row.get("marks", [])])  # rows of before have none
