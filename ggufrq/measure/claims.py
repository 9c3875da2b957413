"""The published headline table, run again on any model: claim beside measurement, and which claims hold.

The claims are in ``claims.toml`` with their source. A published cost is read as "at most", a published gain
as "at least": it holds when the measurement lies on its side by twice its standard error, does not hold when
it lies so far on the other, and else cannot be told on this model. What arithmetic decides is computed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

from ggufrq import __version__, codec
from ggufrq.base import machine
from ggufrq.base.progress import SILENT, Listener
from ggufrq.base.results import ResultStore, file_sha256, results_dir
from ggufrq.base.toml import tomllib
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, parse_case
from ggufrq.cache.kv import kv_type
from ggufrq.drive.cache_check import CacheError
from ggufrq.drive.profiles import settle_cases
from ggufrq.measure.base_run import Scored
from ggufrq.measure.divergence import Divergences, Subject
from ggufrq.measure.kept import Row, kept_or_taken
from ggufrq.measure.validate import speed
from ggufrq.measure.verdict import Difference, between, paired

HOLDS, FAILS = "holds", "does not hold"
OPEN = "cannot be told on this model"
UNMEASURED = "not measured"
AT_MOST, AT_LEAST, EXACTLY = "at most", "at least", "computed"
#: Our own types and our default, measured beside what was published; and what the published perplexities were
#: taken with.
OURS = ("iso3", "planar3", "iso4", "iso3+profile", "iso3+profile+first1+recent32")
DEFERRED = "f16/iso3:block:norm"
_VERSION = 1

Result = dict[str, Any]


@dataclass(frozen=True)
class ClaimSettings:
    """``chunks`` texts of ``ctx`` tokens for perplexity; prefill of ``prompt`` and decode of ``generate``
    tokens from an empty cache for speed, ``rounds`` times in turns."""

    ctx: int
    chunks: int = 8
    prompt: int = 512
    generate: int = 64
    rounds: int = 5
    threads: int | None = None


def published() -> dict[str, Any]:
    """What was published, with sources, as in ``claims.toml``."""
    path = Path(__file__).with_name("claims.toml")
    found: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return found


def all_cases(claims: Mapping[str, Any]) -> list[Case]:
    """All that is run, the f16 cache first."""
    names = [row["case"] for row in claims["table"]["rows"].values()]
    return [parse_case(name) for name in dict.fromkeys([*names, DEFERRED, *OURS])]


def measure(
    model: Subject,
    build: Build,
    text: Path,
    settings: ClaimSettings,
    *,
    fresh: bool = False,
    log: Path,
    listener: Listener = SILENT,
) -> Result:
    """Run every case and judge the claims. What is known from an earlier run is not run again.

    A case that this build cannot do (an old one has no scale by the norm) is told of instead of measured as
    something else. Raises ToolError when a tool fails.
    """
    claims = published()
    rows: dict[str, Result] = {}
    done: list[Case] = []
    with Divergences(model, build, text, Scored(settings.ctx, settings.chunks, together=1)) as runs:
        take = partial(runs.take, log=log)
        for case in settle_cases(all_cases(claims), model.path, settings.ctx, build):
            listener.step(case.name)
            rows[case.spec] = {"name": case.name, "spec": case.spec, "error": None}
            try:
                if case.scale is not None and runs.kept(case) is None:
                    speed.check_cache(model.path, case, build, log)
                row = kept_or_taken(case, runs.kept, take, fresh=fresh, listener=listener)
            except CacheError as error:
                rows[case.spec]["error"] = error.message
                listener.advance()
                continue
            done.append(case)
            rows[case.spec] |= _quality(row)
    speeds = _speeds(model, build, done, settings, fresh=fresh, log=log, listener=listener)
    for case in done:
        rows[case.spec]["speed"] = speeds[case.name]
    return {
        "format": 1,
        "ggufrq": __version__,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "model": {"name": model.name, "weights": model.weights, "sha256": model.sha256},
        "text": {"file": text.name, "sha256": file_sha256(text)},
        "machine": {
            "cpu": build.manifest.get("cpu"),
            "cores": os.cpu_count(),
            "system": machine.system(),
            "llama_cpp": build.manifest.get("llama_cpp", {}).get("commit"),
            "patch_set": build.manifest.get("patch_set"),
            "build": build.key,
        },
        "settings": asdict(settings),
        "published": claims,
        "cases": list(rows.values()),
        "claims": judge(claims, rows),
    }


def steps(settings: ClaimSettings) -> int:
    """How far ``measure`` gets when nothing is known and every case can be done."""
    cases = all_cases(published())
    return len(cases) + speed.speed_steps(cases, _speed_settings(settings))


def judge(claims: Mapping[str, Any], rows: Mapping[str, Result]) -> list[Result]:
    """Every claim with what was published, what was found, its error, and the verdict."""
    return [*_perplexities(claims, rows), *_speed_claims(claims, rows), *_computed(claims, rows)]


def verdict(limit: float, found: Difference | None, relation: str) -> str:
    """Whether ``found`` (value and error) keeps to the limit."""
    if found is None:
        return UNMEASURED
    room = (limit - found.value) * (1 if relation == AT_MOST else -1)
    far = found.beyond * found.error
    return HOLDS if room >= far else FAILS if room < -far else OPEN


def _perplexities(claims: Mapping[str, Any], rows: Mapping[str, Result]) -> list[Result]:
    table = claims["table"]["rows"]
    base = table["f16"]["ppl"]
    found = []
    for name, row in table.items():
        if name != "f16":
            mine = rows[row["case"]]
            limit = row["ppl"] / base
            words = f"{name}: perplexity, times f16"
            found.append(_claim(words, limit, _perplexity(mine), AT_MOST, row["case"], mine["error"]))
    for better, worse in (("iso3", "turbo3"), ("planar3", "turbo3"), ("iso3", "planar3")):
        a, b = rows[table[better]["case"]], rows[table[worse]["case"]]
        ppl, kld, why = None, None, a["error"] or b["error"]
        if why is None:
            log_ratio = between(a["ln_ratio"], a["ln_ratio_err"], b["ln_ratio"], b["ln_ratio_err"])
            ppl = Difference(math.exp(log_ratio.value), math.exp(log_ratio.value) * log_ratio.error)
            kld = _quotient(a["kld_mean"], a["kld_mean_err"], b["kld_mean"], b["kld_mean_err"])
        cases = f"{table[better]['case']} / {table[worse]['case']}"
        found.append(_claim(f"{better} / {worse}: perplexity", 1.0, ppl, AT_MOST, cases, why))
        found.append(_claim(f"{better} / {worse}: mean KLD", 1.0, kld, AT_MOST, cases, why))
    deferred = rows[DEFERRED]
    words = "iso3, K in f16: perplexity, times f16"
    limit = table["iso3"]["ppl"] / base
    found.append(_claim(words, limit, _perplexity(deferred), AT_MOST, DEFERRED, deferred["error"]))
    return found


def _perplexity(row: Result) -> Difference | None:
    """Perplexity as a multiple of that with f16."""
    if row["error"] is not None:
        return None
    ratio = math.exp(row["ln_ratio"])  # the error of the ratio is that of its logarithm, times the ratio
    return Difference(ratio, ratio * row["ln_ratio_err"])


def _quotient(a: float, a_error: float, b: float, b_error: float) -> Difference | None:
    """``a / b`` with both errors; None when ``b`` is no more than its error."""
    if b <= b_error:
        return None
    return Difference(a / b, math.hypot(a_error / b, a * b_error / b**2))


def _speed_claims(claims: Mapping[str, Any], rows: Mapping[str, Result]) -> list[Result]:
    table, faster = claims["table"]["rows"], claims["table"]["faster"]
    found = []
    for kind in ("decode", "prefill"):
        for name, row in table.items():
            if name not in ("f16", "turbo3"):
                limit = row[kind] / table["f16"][kind]
                mine = rows[row["case"]]
                got = _ratio(_ratios(mine, kind))
                words = f"{name}: {kind}, times f16"
                found.append(_claim(words, limit, got, AT_LEAST, row["case"], mine["error"]))
        mine, theirs = rows[table[faster["row"]]["case"]], rows[table["turbo3"]["case"]]
        ratios = [a / b for a, b in zip(_ratios(mine, kind), _ratios(theirs, kind), strict=False)]
        cases = f"{mine['spec']} / {theirs['spec']}"
        words = f"{faster['row']}: {kind}, times turbo3"
        why = mine["error"] or theirs["error"]
        found.append(_claim(words, faster[kind], _ratio(ratios), AT_LEAST, cases, why))
    return found


def _computed(claims: Mapping[str, Any], rows: Mapping[str, Result]) -> list[Result]:
    found = []
    for claim in claims["compression"]["claims"]:
        kind = kv_type(claim["type"])
        measured = next((row for row in rows.values() if row["spec"] == claim["type"]), None)
        f16 = rows["f16"]
        times = 16 / kind.bits
        how = f"16 / {kind.bits:g} bits"
        if measured and not measured["error"] and not f16["error"] and measured["cache_bytes"]:
            times = f16["cache_bytes"] / measured["cache_bytes"]
            how = f"{f16['cache_bytes']:,} / {measured['cache_bytes']:,} bytes, from the logs"
        words = f"compression at {codec.cache_type(kind.name).bits} bits, times"
        found.append(_claim(words, claim["times"], Difference(times, 0.0), AT_LEAST, how))
    fewer = claims["parameters"]
    times = fewer["theirs"] / fewer["ours"]
    how = (
        f"{fewer['theirs']:,} / {fewer['ours']}; a Hadamard matrix has none, a dense one {fewer['theirs']:,}"
    )
    exact = _claim("rotation parameters, times fewer", fewer["times"], Difference(times, 0.0), EXACTLY, how)
    exact["verdict"] = HOLDS if round(times) == round(fewer["times"]) else FAILS
    found.append(exact)
    return [*found, *sizes(claims)]


def sizes(claims: Mapping[str, Any]) -> list[Result]:
    """The published sizes of files and of a cache, which arithmetic alone decides."""
    found = []
    told = claims["sizes"]
    for it in told["caches"]:
        size = kv_type(it["type"]).bytes_for(told["kv_values"]) * it["tokens"] / 1e9
        how = f"{told['kv_values']:,} values x {it['tokens']:,} tokens in {it['type']}"
        found.append(_size(f"Qwen3.5-27B: {it['what']}, GB", it["gigabytes"], size, size, how))
    for it in told["files"]:
        low, high = (told["weights"] * _bits(it[end]) / 8e9 for end in ("lowest", "highest"))
        kinds = it["lowest"] if it["lowest"] == it["highest"] else f"{it['lowest']} to {it['highest']}"
        how = f"{told['weights'] / 1e9:g} G weights in {kinds}"
        found.append(_size(f"Qwen3.5-27B: {it['what']}, GB", it["gigabytes"], low, high, how))
    return found


def _size(words: str, stated: float, low: float, high: float, how: str) -> Result:
    """A size that lies between two others, or not; 1 % is for norms and the like, which stay in f32."""
    claim = _claim(words, stated, Difference(high, 0.0), EXACTLY, how)
    claim["lowest"] = low
    claim["verdict"] = HOLDS if 0.99 * low <= stated <= 1.01 * high else FAILS
    return claim


def _claim(
    words: str, limit: float, found: Difference | None, relation: str, how: str, why: str | None = None
) -> Result:
    return {
        "claim": words,
        "published": limit,
        "relation": relation,
        "measured": found.value if found else None,
        "error": found.error if found else None,
        "verdict": verdict(limit, found, relation),
        "how": how,
        "why_not": why if found is None else None,
    }


def _ratios(row: Result, kind: str) -> list[float]:
    if row["error"] is not None:
        return []
    ratios: list[float] = row["speed"]["points"][0][f"{kind}_ratios"]
    return ratios


def _ratio(ratios: list[float]) -> Difference | None:
    """The median ratio with the error that its logarithms have over the rounds; None without rounds enough to
    tell one."""
    logs = paired([math.log(ratio) for ratio in ratios])
    if logs is None:
        return None
    median, error, _ = speed.judge(ratios)
    return Difference(median, error, logs.beyond)


def _bits(name: str) -> float:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    return 8 * size / block


def _quality(row: Row) -> Result:
    names = ("ppl", "ppl_err", "ppl_base", "ln_ratio", "ln_ratio_err", "kld_mean", "kld_mean_err", "same_top")
    return {
        **{name: row[name] for name in (*names, "bits_per_value", "cache_bytes", "cache_tokens", "mode")},
        "commands": [row["base_command"], row["command"]],
    }


def _speed_settings(settings: ClaimSettings) -> speed.SpeedSettings:
    return speed.SpeedSettings((0,), settings.prompt, settings.generate, settings.rounds, settings.threads)


def _speeds(
    model: Subject,
    build: Build,
    cases: list[Case],
    settings: ClaimSettings,
    *,
    fresh: bool,
    log: Path,
    listener: Listener,
) -> dict[str, Any]:
    kept = ResultStore(results_dir())
    how = _speed_settings(settings)
    facts = {
        "version": _VERSION,
        "what": "claims: speed",
        "model": model.sha256,
        "build": build.key,
        "cases": [case.facts() for case in cases],
        "settings": asdict(how),
        "cores": os.cpu_count(),
    }

    def take(facts: Result) -> Row:
        row = speed.measure_speed(model.path, cases, build, how, log=log, listener=listener)
        kept.put(facts, row, log)
        return row

    return kept_or_taken(facts, kept.get, take, fresh=fresh)
