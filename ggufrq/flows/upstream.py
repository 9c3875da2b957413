"""Whether the patch set works on another upstream: it applies, it builds, and what is built passes.

The verdict is a row, a dict of plain values kept in ``patches/compat/rows.json`` by commit; the table in
``docs/upstream.md`` is made from them.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

from ggufrq.base import log, machine, paths, proc, texts
from ggufrq.base.errors import BuildError, GgufrqError, PatchError, ToolError
from ggufrq.build.builds import ensure_build
from ggufrq.build.project import Build, BuildOptions, Project
from ggufrq.cache.kv import parse_plan
from ggufrq.drive.run import generate
from ggufrq.flows.demo import PROMPT
from ggufrq.make.ready import model_file
from ggufrq.measure.validate.assemble import failed
from ggufrq.measure.validate.plan import make_plan
from ggufrq.measure.validate.validation import validate
from ggufrq.patchset import compat, patches, series
from ggufrq.source.snapshot import Snapshot
from ggufrq.tools.programs import Programs

#: What is built of an upstream: enough to quantize, run and score, and its own tests of types and operations.
TARGETS = ("llama-quantize", "llama-completion", "llama-perplexity")
TEST_TARGETS = ("test-quantize-fns", "test-backend-ops")
#: Operations that touch a cache, in test-backend-ops.
OPERATIONS = ("FLASH_ATTN_EXT", "SET_ROWS", "GET_ROWS", "CPY")
#: Caches whose cost on the model is compared with that in the pinned build: each code, each rotation.
CASES = "planar4,iso3,rotor2"
MODEL = "docs-qwen3-8m"
ROWS = f"{series.COMPAT}/rows.json"

Row = dict[str, Any]


def check(
    upstream: Snapshot,
    root: Path,
    *,
    build: bool = True,
    options: BuildOptions | None = None,
) -> Row:
    """The row of an upstream for the patch set in ``root``. ``build`` False: only whether it applies.

    A failure is part of the row, not an exception; ``passed`` says what it comes to. Raises GgufrqError where
    the pinned build, which figures are compared with, cannot be had.
    """
    row: Row = {
        "upstream": upstream.name,
        "commit": upstream.pin.commit,
        "date": upstream.pin.date,
        "checked": date.today().isoformat(),
        "pinned": upstream.pinned,
        "series": series.load(root).hash,
        "fitted": [],
        "without": [],
        "applies": False,
        "builds": None,
        "tests": {},
        "figures": {},
        "problems": [],
    }
    try:
        patch_set = compat.load(root, upstream.pin.commit)
        row["fitted"] = compat.fitted(root, upstream.pin.commit)
        row["without"] = list(patch_set.without)
        found = patches.fit(patch_set, upstream.tree)
    except PatchError as error:
        return {**row, "problems": [error.message]}
    row["applies"] = not found.failures
    row["moved"] = len(found.moved)
    row["problems"] = [str(failure) for failure in found.failures]
    if found.failures or not build:
        return row
    chosen = options or BuildOptions()
    if options is None and chosen.backend in patch_set.without:
        chosen = BuildOptions("cpu")
    reference = ensure_build(chosen)
    project = Project(upstream.pin, patch_set, TARGETS, TEST_TARGETS)
    log.say(f"building llama.cpp {upstream.pin.short}")
    tests = BuildOptions(chosen.backend, chosen.native, True, chosen.jobs, chosen.cmake_args)
    try:
        made = ensure_build(tests, project=project)
    except BuildError as error:
        return {**row, "builds": False, "problems": [error.message]}
    row |= {"builds": True, "cpu": machine.processor().name, "cores": machine.cores()}
    row["compiler"] = made.manifest.get("versions", {}).get("compiler")
    _test(row, made, reference)
    return row


def passed(row: Row) -> bool:
    """Whether everything that was tried went well."""
    return bool(row["applies"]) and row["builds"] is not False and not row["problems"]


def _test(row: Row, made: Build, reference: Build) -> None:
    """Run the tests of a build and note each in the row: ``ok``, or why not among ``problems``."""

    def take(name: str, work: Callable[[], str]) -> None:
        log.say(f"{row['upstream']}: {name}")
        try:
            row["tests"][name] = work()
        except GgufrqError as error:
            row["tests"][name] = "failed"
            row["problems"].append(f"{name}: {error.message}")

    take("test-quantize-fns", lambda: _functions(made))
    take("test-backend-ops", lambda: _operations(made))
    take("a sentence with iso3", lambda: _sentence(made))
    take("validate", lambda: _validate(row, made, reference))


def _functions(made: Build) -> str:
    """Upstream's own test of types: errors of quantization and of dot products."""
    proc.run([made.tool("test-quantize-fns")], timeout=1800)
    return "ok"


def _operations(made: Build) -> str:
    """Upstream's own test of operations, for our types on the CPU."""
    arguments = ["test", "-b", "CPU", "-o", ",".join(OPERATIONS), "-p", "planar|iso|rotor"]
    done = proc.run([made.tool("test-backend-ops"), *arguments], timeout=1800)
    count = done.stdout.count("iso3")
    if count < len(OPERATIONS):
        raise ToolError(f"test-backend-ops ran {count} cases of iso3 only, so that it tested nothing")
    return "ok"


def _sentence(made: Build) -> str:
    """A run with an iso3 cache, whose types and size are read from its log."""
    given = generate(
        model_file(MODEL), PROMPT, parse_plan("iso3"), Programs.of_build(made), tokens=32, n_ctx=1024,
        raw=True, temperature=0,
    )  # fmt: skip
    if not given.text.strip():
        raise ToolError("the model said nothing")
    return "ok"


def _validate(row: Row, made: Build, reference: Build) -> str:
    """The instrument on this build: codes bit for bit, attention, losses, figures beside the pinned ones."""
    plan = make_plan(
        MODEL, kv=CASES, ctx=[1024], chunks=4, sections=["check", "quality"],
        again=f"ggufrq validate {MODEL} --kv {CASES} --kv-profile none --ctx 1024 --chunks 4 "
        "--sections check,quality",
    )  # fmt: skip
    results = []
    for build in (reference, made):
        with tempfile.TemporaryDirectory(prefix="ggufrq-upstream-") as folder:
            results.append(validate(plan, build, out=Path(folder)))
    pinned, here = ({case["name"]: case for case in result["cases"]} for result in results)
    row["command"] = plan.again
    for name, case in here.items():
        if case["quality"] and pinned[name]["quality"]:
            row["figures"][name] = _figures(case["quality"][0], pinned[name]["quality"][0])
    wrong = failed(results[1])
    wrong += [
        f"{name}: mean KLD is {one['kld']:.5f}, in the pinned build {one['kld_pinned']:.5f}"
        for name, one in row["figures"].items()
        if not one["alike"]
    ]
    if wrong:
        raise ToolError("; ".join(wrong))
    return "ok"


def _figures(here: Row, pinned: Row) -> Row:
    """Perplexity and divergence from f16 in two builds, and whether they differ by no more than twice their
    errors (f16 itself has one of 0)."""
    error = 2 * math.hypot(here["kld_mean_err"], pinned["kld_mean_err"])
    return {
        "ppl": round(here["ppl"], 4),
        "ppl_pinned": round(pinned["ppl"], 4),
        "kld": max(round(here["kld_mean"], 6), 0.0),  # a run against itself may give -0
        "kld_pinned": max(round(pinned["kld_mean"], 6), 0.0),
        "alike": abs(here["kld_mean"] - pinned["kld_mean"]) <= max(error, 1e-5)
        and abs(here["ppl"] / pinned["ppl"] - 1) < 0.005,
    }


def render(row: Row) -> str:
    """A row for people, a line per step."""
    fits = f"with {', '.join(row['fitted'])} fitted" if row["fitted"] else "as it is"
    fits += f"; without {' and '.join(row['without'])}" if row.get("without") else ""
    lines = [f"{row['upstream']}: llama.cpp {row['commit'][:9]} ({row['date']})"]
    lines.append(f"  applies  {fits if row['applies'] else 'no'}")
    if row["builds"] is not None:
        lines.append(f"  builds   {'yes' if row['builds'] else 'no'}")
    lines += [f"  {verdict:8} {name}" for name, verdict in row["tests"].items()]
    lines += [
        f"  {name:8} mean KLD {one['kld']:.5f}, pinned {one['kld_pinned']:.5f}; PPL {one['ppl']:.3f}, pinned "
        f"{one['ppl_pinned']:.3f}"
        for name, one in row["figures"].items()
    ]
    return "\n".join(lines + [f"  problem: {problem}" for problem in row["problems"]])


def read_rows(root: Path) -> list[Row]:
    """The rows that are kept in the patch set, the latest upstream first."""
    try:
        rows = json.loads((root / ROWS).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise PatchError(f"{root / ROWS} cannot be read: {error}", remedy="ggufrq upstream check") from error
    return sorted(rows, key=lambda row: (str(row["date"]), str(row["commit"])), reverse=True)


def write_row(root: Path, row: Row) -> None:
    """Keep a row, in place of an older one of the same upstream."""
    rows = [row, *(one for one in read_rows(root) if one["commit"] != row["commit"])]
    rows.sort(key=lambda one: (str(one["date"]), str(one["commit"])), reverse=True)
    paths.atomic_write(root / ROWS, texts.to_json(rows, indent=1) + "\n")
