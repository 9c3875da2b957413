"""AWQ: channels whose inputs are large are scaled up before their weights are quantized, and the inverse is
folded into the norm or the projection before them.

After Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978): s = activation^alpha, alpha
by search. Here the activation comes from the importance matrix, and the error is that of llama-quantize's own
code for the type that the tensor is going to get, weighed by the matrix as that does it.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ggufrq.base.errors import ModelError
from ggufrq.base.progress import SILENT, Listener
from ggufrq.build.project import Build
from ggufrq.ggufs.tensors import is_float
from ggufrq.make.fold import imatrix
from ggufrq.make.fold.changes import F32, F64
from ggufrq.make.fold.codes import Codes
from ggufrq.make.fold.facts import Heads, Pair, architecture_of, heads, pairs
from ggufrq.make.fold.folding import Folding, Found, per_kv_head, per_query_head, scaled
from ggufrq.make.fold.weights import Weights

#: Exponents that are tried; 0 leaves a pair as it is.
ALPHAS = tuple(step / 10 for step in range(11))
#: Factors stay within this and its inverse, with a geometric mean of 1.
LIMIT = 16.0
#: Rows of a tensor that the search looks at, spread over it in runs of so many.
_SAMPLE, _RUN = 256, 16
#: Channels that never saw an input count as if they had this share of the mean.
_LEAST = 1e-3


@dataclass(frozen=True)
class _Sample:
    """Rows of one expert of a reader: its type to be, mean squares of its inputs, and how many rows of the
    tensor one of these stands for."""

    kind: str
    expert: int
    values: F32
    power: F64
    weight: float


def find(
    weights: Weights,
    matrix: Path,
    types: Mapping[str, str],
    build: Build,
    *,
    listener: Listener = SILENT,
) -> Folding:
    """Factors for every pair of a model, for the ``types`` that its tensors are going to get, from the
    importance matrix ``matrix``. ``listener`` is told of the pairs.

    Raises ModelError when the architecture is not known, or nothing was found that helps.
    """
    architecture = architecture_of(weights.header.values, weights.paths[0].name)
    power = imatrix.read(matrix)
    codes = Codes(build)
    folding = Folding()
    every = pairs(architecture, weights.tensors)
    with ThreadPoolExecutor() as pool:
        listener.expect(len(every))
        for pair in every:
            shared = heads(weights.header, pair.layer) if pair.rule.rows == "heads" else None
            samples = [
                s
                for reader in pair.readers
                for s in _samples(weights, reader, types[reader], power.get(reader))
            ]
            if samples:
                factors, found = _search(pair, weights, power, shared, samples, codes, pool)
                folding.found.append(found)
                if found.gain > 1:
                    folding.add(scaled(pair, factors, weights, shared))
            listener.advance()
    if not folding.changes:
        raise ModelError(
            "--fold awq finds nothing to fold: "
            + (
                "no factor makes the error of these types smaller"
                if folding.found
                else "the importance matrix knows none of the tensors that are quantized"
            ),
            remedy="leave out --fold",
        )
    return folding


def factors_for(activity: F64, alpha: float) -> F64:
    """Factors [experts, channels] for the root mean square of the inputs: its power, clamped, with a
    geometric mean of 1 over the channels."""
    mean = activity.mean(axis=-1, keepdims=True)
    logs = alpha * np.log(np.maximum(activity, _LEAST * np.where(mean > 0, mean, 1)))
    logs -= logs.mean(axis=-1, keepdims=True)
    return np.exp(np.clip(logs, -np.log(LIMIT), np.log(LIMIT)))


def _search(
    pair: Pair,
    weights: Weights,
    power: Mapping[str, F64],
    shared: Heads | None,
    samples: list[_Sample],
    codes: Codes,
    pool: ThreadPoolExecutor,
) -> tuple[F64, Found]:
    """The best factors for what the source of a pair writes, and what they are expected to gain."""
    # Readers see the same inputs, but experts only those of their tokens: where the source is one for all
    # experts, the first reader that saw every token tells.
    known = [power[reader] for reader in pair.readers if reader in power]
    experts = weights.shape(pair.source)[0]
    fitting = [p for p in known if len(p) == experts]
    activity = np.sqrt(fitting[0] if fitting else known[0].mean(axis=0, keepdims=True))
    if shared is not None:
        activity = per_kv_head(activity, shared)

    def error(alpha: float) -> float:
        factors = factors_for(activity, alpha)
        columns = factors if shared is None else per_query_head(factors, shared)
        return sum(
            s.weight * codes.error(s.kind, s.values, columns[s.expert % len(columns)], s.power)
            for s in samples
        )

    errors = list(pool.map(error, ALPHAS))
    best = min(range(len(ALPHAS)), key=lambda i: errors[i])
    gain = errors[0] / errors[best] if errors[best] > 0 else 1.0
    name = f"blk.{pair.layer}.{pair.rule.name}"
    return factors_for(activity, ALPHAS[best]), Found(name, gain, f"alpha {ALPHAS[best]:g}")


def _samples(weights: Weights, name: str, kind: str, power: F64 | None) -> list[_Sample]:
    """Rows of a tensor that is going to be quantized, of every expert."""
    if power is None or is_float(kind):
        return []
    experts, rows, _ = weights.shape(name)
    wanted = max(_RUN, _SAMPLE // experts)
    made = []
    for expert in range(experts):
        if rows <= wanted:
            values = weights.read(name, expert)
        else:
            starts = np.linspace(0, rows - _RUN, max(1, wanted // _RUN)).astype(int)
            values = np.concatenate([weights.read(name, expert, int(start), _RUN) for start in starts])
        weight = rows / len(values)
        made.append(_Sample(kind, expert, values, np.maximum(power[expert % len(power)], 1e-20), weight))
    return made
