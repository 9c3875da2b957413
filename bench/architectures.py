"""Which architectures and heads take an iso3 cache: the tables of docs/architectures.md.

    python bench/architectures.py measure OUT.json [--bin DIR]          # of the kept build, or that in DIR
    python bench/architectures.py table BEFORE.json NOW.json            # both as Markdown
    python bench/architectures.py sides [--only REGEX]                  # K or V alone in iso3: perplexity

Every model of random weights that upstream's ``test-llama-archs -o`` makes reads a text, K and V in f16 and
then in iso3 (K and V of one type, which MLA takes); then models of ours with heads of other sizes, in pairs,
too. A divergence says that the cache is read as it was written; how large it is says little, since attention
of random weights hardly chooses. What is refused is told by the program's own sentence.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from ggufrq.base import paths, proc
from ggufrq.base.errors import ToolError
from ggufrq.build.builds import require_build
from ggufrq.cache.kv import parse_plan
from ggufrq.ggufs.header import read_header
from ggufrq.report.numbers import significant
from ggufrq.tools.logs import Context, error_lines
from ggufrq.tools.perplexity import arguments, parse_divergence, parse_perplexity

TEXT = paths.data_dir("texts") / "heldout.txt"
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GGML_NO_BACKTRACE": "1", "LLAMA_RQ_PROFILE": "none"}
#: Types that models with heads of other sizes are tried in.
PAIRS = ("iso2", "iso3", "iso4", "iso3/f16", "f16/iso3")
#: K or V alone, how many standard errors of ln PPL are noise, and what is not told from 0, since errors below
#: some millionths are printed as 0.
ONE_SIDE = ("iso3/f16", "f16/iso3")
NOISE, LEAST = 3, 1e-5


def perplexity(programs: Path, model: Path, kv: str, base: Path, *, divergence: bool) -> proc.Completed:
    """A run of llama-perplexity over two texts of 128 tokens."""
    plan = parse_plan(kv)
    given = arguments(model, TEXT, plan, base, n_ctx=128, chunks=2, divergence=divergence, threads=1)
    return proc.run([programs / "llama-perplexity", *given], env=ENVIRONMENT, check=False, timeout=300)


def kept(context: Context) -> str:
    """What the heads of a cache are kept in."""
    if not context.caches:
        return "a recurrent state alone"
    cache = context.caches[0]
    narrow = [side for side, it in (("K", cache.k_narrow), ("V", cache.v_narrow)) if it]
    said = [f"blocks of 64 ({' and '.join(narrow)})"] if narrow else ["blocks of 128"]
    return ", ".join(said + (["filled up"] if context.filled else []))


def tried(programs: Path, model: Path, kinds: tuple[str, ...], scratch: Path) -> dict[str, Any]:
    """For each cache what came of it: ``kld`` and ``kept``, or ``why`` there is none."""
    base = scratch / "base"
    found: dict[str, Any] = {}
    done = perplexity(programs, model, "f16", base, divergence=False)
    try:
        found["f16"] = {"ppl": parse_perplexity(done.stdout, done.stderr).ppl}
    except ToolError as error:
        return {"f16": {"why": (error_lines(done.stderr) or [error.message])[0]}}
    for kind in kinds:
        done = perplexity(programs, model, kind, base, divergence=True)
        try:
            result = parse_divergence(done.stdout, done.stderr)
            ratio = [result.ln_ratio, result.ln_ratio_err]
            found[kind] = {"kld": result.kld_mean, "kept": kept(result.context), "ln_ratio": ratio}
        except ToolError as error:
            found[kind] = {"why": (error_lines(done.stderr) or [error.message])[0]}
    base.unlink(missing_ok=True)
    return found


def of_other_heads(folder: Path) -> Iterator[tuple[str, Path]]:
    """Models with heads of the sizes that there are, by their names."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "helpers"))
    models: Any = importlib.import_module("head_models")
    plain = partial(partial, models.ordinary)
    made: Mapping[str, Callable[[Path], Path]] = {
        **{str(n): plain(size=n) for n in (32, 40, 64, 80, 96, 112, 128, 160, 256, 512)},
        "192/128": partial(models.expanded, nope=128, rope=64, v=128),
        "576/512 (MLA)": models.latent,
        "640/512 (MLA)": partial(models.latent, v=512, rope=128),
    }
    for name, make in made.items():
        yield name, make(folder / f"{len(name)}-{name[:3].strip('/')}.gguf")


def of_upstream(folder: Path, programs: Path) -> list[Path]:
    """Upstream's models of random weights, made in a folder."""
    folder.mkdir()
    proc.run([programs / "test-llama-archs", "-s", "1", "-o", folder], env=ENVIRONMENT, timeout=900)
    return sorted(folder.rglob("*.gguf"))


def sides(programs: Path, only: str) -> None:
    """Prints of each model by how much, in standard errors, K or V alone in iso3 changes ln PPL, and in how
    many that is noise."""
    counts = [0, 0]
    with tempfile.TemporaryDirectory() as name:
        for model in of_upstream(Path(name) / "models", programs):
            if re.search(only, model.stem) is None:
                continue
            found = tried(programs, model, ONE_SIDE, Path(name))
            ratios = [found.get(kind, {}).get("ln_ratio") for kind in ONE_SIDE]
            if None in ratios:
                whys = [found[kind]["why"] for kind in ("f16", *ONE_SIDE) if "why" in found.get(kind, {})]
                print(f"{model.stem}: {short(whys[0])}", flush=True)
                continue
            within = [abs(value) <= max(NOISE * error, LEAST) for value, error in ratios]
            counts = [counts[0] + all(within), counts[1] + 1]
            told = ", ".join(
                f"{kind} {r[0]:+.6f} ± {r[1]:.6f}" for kind, r in zip(ONE_SIDE, ratios, strict=True)
            )
            print(f"{model.stem}: {told}{'' if all(within) else ' (beyond)'}", flush=True)
    print(f"{counts[0]} of {counts[1]} within {NOISE} standard errors")


def measure(out: Path, programs: Path) -> None:
    """Writes what came of every model."""
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        models = of_upstream(scratch / "models", programs)
        found: dict[str, Any] = {"architectures": {}, "heads": {}}
        for number, model in enumerate(models, 1):
            print(f"{number}/{len(models)} {model.stem}", file=sys.stderr)
            header = read_header(model).values
            arch = header["general.architecture"]
            heads = [header.get(f"{arch}.attention.{side}_length") for side in ("key", "value")]
            result = tried(programs, model, ("iso3",), scratch)
            found["architectures"][model.stem] = {"heads": heads, **result}
            model.unlink()
        for name, model in of_other_heads(scratch):
            print(f"heads of {name}", file=sys.stderr)
            found["heads"][name] = tried(programs, model, PAIRS, scratch)
        paths.atomic_write(out, json.dumps(found, indent=1) + "\n")


def cell(found: Mapping[str, Any], kind: str, *, long: bool = True) -> str:
    """What came of a cache, as a cell of a table."""
    if kind not in found:
        return f"not in f16 either: {short(found['f16']['why'])}" if long else "–"
    if "why" in found[kind]:
        return short(found[kind]["why"])
    return f"{significant(found[kind]['kld'])}" + (f", {found[kind]['kept']}" if long else "")


def short(why: str) -> str:
    """A sentence without the name of its function, and the size of what was asked for."""
    return re.sub(r"^(?:llama_rq: )?(?:cache types? [\w/]+ )?", "", why).replace("|", "/")


def table(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Both tables as Markdown."""
    ran = [sum("kld" in it.get("iso3", {}) for it in run["architectures"].values()) for run in (before, now)]
    lines = [f"{ran[0]} of {len(now['architectures'])} ran before, {ran[1]} now.", ""]
    lines += ["| model of test-llama-archs | iso3 before | iso3 now |", "|---|---|---|"]
    alike: list[str] = []
    for name, it in now["architectures"].items():
        was = before["architectures"].get(name, {"f16": {"why": "not there"}})
        if "kld" not in it.get("iso3", {}) or "kld" not in was.get("iso3", {}):
            lines.append(f"| {name} | {cell(was, 'iso3')} | {cell(it, 'iso3')} |")
            continue
        alike.append(f"{name} {significant(it['iso3']['kld'])}")
    lines += ["", f"The other {len(alike)} ran before, too; their mean KLD now: {', '.join(alike)}."]
    lines += ["", f"| heads, K/V | {' | '.join(PAIRS)} |", "|---" * (len(PAIRS) + 1) + "|"]
    for name, it in now["heads"].items():
        lines.append(f"| {name} | {' | '.join(cell(it, kind, long=False) for kind in PAIRS)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("out", type=Path)
    measuring.add_argument("--bin", type=Path, default=None)
    tables = commands.add_parser("table")
    tables.add_argument("before", type=Path)
    tables.add_argument("now", type=Path)
    alone = commands.add_parser("sides")
    alone.add_argument("--bin", type=Path, default=None)
    alone.add_argument("--only", default="")
    given = parser.parse_args()
    if given.command == "sides":
        sides(given.bin or require_build().bin, given.only)
    elif given.command == "measure":
        measure(given.out, given.bin or require_build().bin)
    else:
        print(table(*(json.loads(path.read_text()) for path in (given.before, given.now))))


if __name__ == "__main__":
    os.nice(5)
    main()
