"""Whether the build is right: a fault of it must not pass for a property of a cache type.

Five rules, none of which needs another build:

- *cache*: types, bytes and rotations of every run, from its own log (``cache_check.check_context``).
- *code*: the build's libraries encode, decode and rotate seeded data bit for bit as specified in numpy.
- *attention*: the CPU's flash attention over known blocks agrees with float64; see ``probe``.
- *loss*: with one side in a type of ours and the other in f16, the divergence from f16 must lie between a
  ``LEAST`` part of what q4_0 foretells and ``MARGIN`` times that. Divergence goes with the squared error of
  the code: foretold is q4_0's divergence on that side times the ratio of the relative squared errors on
  Gaussian values, which is what rotated values look like. The lower limit is taken from q4_0 with upstream's
  rotation, since outliers would make q4_0 lose more than any rotated type; the upper one from q4_0 without
  any rotation, so that a fault of the rotations does not hide in it. (q8_0 is no measure of a side that was
  not quantized: it loses hardly more than f16 in another order of operations.) Types in ``block`` or ``none``
  mode, or scaled by the norm, may lose any amount: they have no upper limit.
- *reference*: q4_0 loses more without a rotation than a ``LEAST`` part of what it loses with it. A side that
  no type is quantized on, or an upstream rotation that is not undone, shows here.

A rotation that is not undone costs hundreds of times what is foretold, a side kept in f16 a tenth or less.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from ggufrq import codec
from ggufrq.base import proc
from ggufrq.base.environment import of_libraries, of_package
from ggufrq.base.errors import ToolError
from ggufrq.base.progress import Listener
from ggufrq.build.project import Build
from ggufrq.cache.cases import SCALE_VARIABLE, Case
from ggufrq.cache.kv import KvPair, KvPlan, KvType, kv_type, parse_plan
from ggufrq.drive.cache_check import CacheError
from ggufrq.measure.divergence import Divergences
from ggufrq.measure.kept import kept_or_taken

#: How far a divergence may lie above the foretold one, and below it. On the embedded models those of sound
#: builds are between 0.48 and 1.1 times the foretold ones.
MARGIN = 8.0
LEAST = 0.15
_SAMPLE = (512, 128)

Check = dict[str, Any]


def types_of(cases: Iterable[Case]) -> list[str]:
    """Names of our types in any layer of any case, each once."""
    pairs = [pair for case in cases for pair in case.plan.pairs]
    return list(dict.fromkeys(kind.name for pair in pairs for kind in (pair.k, pair.v) if kind.ours))


def specification() -> str:
    """A hash of the numpy codec, which the build is held against."""
    digest = hashlib.sha256()
    for path in sorted(Path(codec.__file__).parent.glob("*.[jp]*")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def probe(build: Build, names: list[str], log: Path | None = None) -> list[Check]:
    """The rules *code* and *attention* for the types named. Raises ToolError when the libraries cannot be
    used at all."""
    command = [sys.executable, "-m", "ggufrq.measure.validate.probe", str(build.bin), *names]
    env = {**of_package(), SCALE_VARIABLE: None, **of_libraries(build.bin)}
    done = proc.run(command, env=env, log=log, timeout=600, check=False)
    try:
        found: dict[str, list[Check]] = json.loads(done.stdout)
    except ValueError:
        raise ToolError(f"the libraries of the build do not work: {proc.failure_message(done)}") from None
    return [{**check, "case": name} for name in names for check in found[name]]


def unmeasured(section: str, why: str) -> Check:
    """A part of the whole run that gave no result, as an entry of the result."""
    return {
        "check": section,
        "case": None,
        "ok": False,
        "what": f"whether the runs for {section} give a result",
        "found": why,
        "expected": "one",
    }


def loss_runs(cases: Iterable[Case]) -> list[Case]:
    """The short runs that the rule *loss* takes: q4_0 by itself, then every side of every case of ours, alone
    and together."""
    runs = [_reference(side, mode) for mode in ("none", None) for side in "KV"]
    for case in _judged(cases):
        runs += [_alone(case, side) for side in "KV" if _kind(case, side).ours]
        runs.append(case)
    return list(dict.fromkeys(runs))


def losses(
    runs: Divergences, cases: Iterable[Case], listener: Listener, log: Path, *, fresh: bool = False
) -> list[Check]:
    """The rules *loss* and *reference*, and *cache* for the runs that these take: those that are not kept
    yet, or ``fresh`` all. ``listener`` is told of every run."""
    found: dict[Case, float] = {}
    checks: list[Check] = []
    take = partial(runs.take, log=log)
    for case in loss_runs(cases):
        listener.step(f"self-check: {case.name}")
        try:
            found[case] = kept_or_taken(case, runs.kept, take, fresh=fresh, listener=listener)["kld_mean"]
        except CacheError as error:
            checks.append(cache_check(case, error.message, ok=False))
            listener.advance()
    checks += reference(found)
    for case in _judged(cases):
        if found.keys() >= set(loss_runs([case])):
            checks += judge(case, found)
    return checks


def cache_check(case: Case, found: str, *, ok: bool) -> Check:
    """The rule *cache* as an entry of the result."""
    return {
        "check": "cache",
        "case": case.name,
        "ok": ok,
        "what": "types, bytes and rotations of the cache in the logs of the runs that were scored",
        "found": found,
        "expected": case.name,
    }


def reference(found: dict[Case, float]) -> list[Check]:
    """Whether q4_0 itself loses what it should, on either side."""
    checks: list[Check] = []
    for side in "KV":
        plain, rotated = _reference(side, "none"), _reference(side, None)
        if not {plain, rotated} <= found.keys():
            continue
        least = found[rotated] * LEAST
        checks.append(
            {
                "check": "reference",
                "case": plain.name,
                "ok": found[plain] > max(least, 0.0),
                "what": f"divergence from f16 with {side} alone in q4_0, against the same with its rotation",
                "found": f"{found[plain]:.5f}",
                "expected": f"above {least:.5f}",
            }
        )
    return checks


def judge(case: Case, found: dict[Case, float]) -> list[Check]:
    """What the divergences (nats, by run) say about one case of ours."""
    checks: list[Check] = []
    least, most = 0.0, 0.0
    for side in "KV":
        kind = _kind(case, side)
        floor = foretold(kind, found[_reference(side, None)]) * LEAST
        ceiling = foretold(kind, found[_reference(side, "none")]) * MARGIN
        if kind.ours:
            name = f"{side.lower()}_alone"
            checks.append(_between(name, case, f"{side} alone", found[_alone(case, side)], floor, ceiling))
            least = max(least, floor)
        most += ceiling
    checks.append(_between("loss", case, "K and V", found[case], least, most))
    return checks


def foretold(kind: KvType, of_q4_0: float) -> float:
    """The divergence of one side in a type of which q4_0 costs ``of_q4_0``, by squared errors; 0 for types
    whose error is not known here and for floats."""
    return of_q4_0 * relative_error(kind.name) / relative_error("q4_0")


@lru_cache
def relative_error(name: str) -> float:
    """Squared error of a type on Gaussian values, relative to their power; 0 for floats."""
    import gguf

    x = np.random.default_rng(1).standard_normal(_SAMPLE).astype(np.float32)
    if name in ("f32", "f16", "bf16"):
        return 0.0
    if any(kind.name == name for kind in codec.cache_types()):
        bits = codec.cache_type(name).bits
        y = codec.dequantize(codec.quantize(x, bits), bits)
    else:
        kind = gguf.GGMLQuantizationType[name.upper()]
        try:
            y = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
        except NotImplementedError:  # iq4_nl: as many bits as q4_0, and a little better
            return relative_error("q4_0")
    return float(((x - y) ** 2).sum() / (x**2).sum())


def _between(check: str, case: Case, what: str, value: float, least: float, most: float) -> Check:
    limited = case.mode in (None, "full", "hadamard") and case.scale != "norm"
    return {
        "check": check,
        "case": case.name,
        "ok": value > least and (value < most or not limited),
        "what": f"divergence from f16 with {what} in {case.name}, against what q4_0 foretells",
        "found": f"{value:.5f}",
        "expected": f"above {least:.5f}" + (f" and below {most:.5f}" if limited else ""),
    }


def _judged(cases: Iterable[Case]) -> list[Case]:
    """Cases of ours without their profile, layers and tokens in f16, each once: layers change less than the
    margin, the others take away what is judged; all are checked in the log anyway."""
    plain = (Case(KvPlan(case.pair), case.mode, case.scale) for case in cases if case.pair.ours)
    return list(dict.fromkeys(plain))


def _kind(case: Case, side: str) -> KvType:
    return case.pair.k if side == "K" else case.pair.v


def _alone(case: Case, side: str) -> Case:
    kind, f16 = _kind(case, side), kv_type("f16")
    pair = KvPair(kind, f16) if side == "K" else KvPair(f16, kind)
    return Case(KvPlan(pair), case.mode, case.scale)


def _reference(side: str, mode: str | None) -> Case:
    return Case(parse_plan("q4_0/f16" if side == "K" else "f16/q4_0"), mode)
