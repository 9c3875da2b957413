"""The file of llama-rq-moments: sums over a text of K, K Kᵀ and Q Qᵀ of each KV head, before RoPE."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

import numpy as np
import numpy.typing as npt

from ggufrq.base.errors import ModelError
from ggufrq.ggufs.files import read_gguf
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.values import DAMAGED
from ggufrq.profile.moments import Moments

F64 = npt.NDArray[np.float64]

VERSION = 1
_F64 = 28
_TENSOR = re.compile(r"^(fit|held)\.(\d+)\.(k|kk|qq)\.(rope|norm|plain)$")
#: What was summed: what RoPE is given; that, normalized, where heads are normalized behind RoPE; or what
#: attention reads.
How = Literal["rope", "norm", "plain"]
_AGAIN = "make it again: ggufrq calibrate"


@dataclass(frozen=True)
class LayerSums:
    """Sums over ``tokens`` tokens: ``k`` [heads, dim], ``kk`` and ``qq`` [heads, dim, dim], those of the
    queries over all that read the head; ``how``: of what they are."""

    tokens: int
    k: F64
    kk: F64
    qq: F64
    how: How

    @property
    def moments(self) -> Moments:
        """Moments of K."""
        return Moments(self.k / self.tokens, self.kk / self.tokens)

    @property
    def queries(self) -> F64:
        """Second moments of the queries, up to a factor, [heads, dim, dim]."""
        return self.qq / self.tokens

    def __add__(self, other: LayerSums) -> LayerSums:
        return LayerSums(
            self.tokens + other.tokens, self.k + other.k, self.kk + other.kk, self.qq + other.qq, self.how
        )


Layers = dict[int, LayerSums]


@dataclass(frozen=True)
class Sums:
    """Sums by layer over the chunks that a profile is made from, and over those held out."""

    fit: Layers
    held: Layers

    @property
    def all(self) -> Layers:
        """Over all chunks."""
        return {il: sums + self.held[il] if self.held else sums for il, sums in self.fit.items()}


def read_sums(path: Path) -> Sums:
    """Read it. Raises ModelError when it is missing, damaged, not whole, or its values are not finite."""
    read_gguf(path)
    header = read_header(path)
    values = header.values
    if values.get("general.type") != "kv-moments" or values.get("rq.moments.version") != VERSION:
        raise ModelError(
            f"{path} has no moments of K and of the queries, or of another version", remedy=_AGAIN
        )
    n_ctx, chunks, held, done = (
        int(values.get(f"rq.moments.{key}", 0)) for key in ("n_ctx", "chunks", "held", "done")
    )
    if not 0 <= held < chunks == done or n_ctx < 1:
        raise ModelError(f"{path} is over {done} of {chunks} chunks only", remedy=_AGAIN)
    tokens = {"fit": (chunks - held) * n_ctx, "held": held * n_ctx}
    found: dict[tuple[str, int], dict[str, tuple[F64, How]]] = {}
    with path.open("rb") as file:
        for tensor in header.tensors:
            name = _TENSOR.match(tensor.name)
            if name is None or tensor.type != _F64:
                raise ModelError(f"{path} has a tensor that it should not have, {tensor.name}", remedy=_AGAIN)
            file.seek(header.data_offset + tensor.offset)
            data = np.frombuffer(file.read(8 * tensor.values), "<f8").astype(np.float64)
            if not np.isfinite(data).all():
                raise ModelError(
                    f"the model computes no numbers: K or the queries of layer {name[2]} are NaN or infinite",
                    remedy=DAMAGED,
                )
            data = data.reshape(tuple(reversed(tensor.shape)))
            found.setdefault((name[1], int(name[2])), {})[name[3]] = (data, cast(How, name[4]))
    layers = {which: _layers(path, which, count, found) for which, count in tokens.items()}
    return Sums(layers["fit"], layers["held"])


def _layers(
    path: Path, which: str, tokens: int, found: dict[tuple[str, int], dict[str, tuple[F64, How]]]
) -> Layers:
    layers: Layers = {}
    for (of, il), parts in sorted(found.items()):
        if of != which:
            continue
        if parts.keys() != {"k", "kk", "qq"} or len({how for _, how in parts.values()}) != 1:
            raise ModelError(
                f"it is not known what RoPE is given in layer {il}, so no profile can be made from a text",
                remedy="take the one from the weights: --kv-profile weights",
            )
        dim = parts["kk"][0].shape[-1]
        kk, qq = (parts[name][0].reshape(-1, dim, dim) for name in ("kk", "qq"))
        layers[il] = LayerSums(tokens, parts["k"][0].reshape(-1, dim), kk, qq, parts["kk"][1])
    if not layers and tokens:
        raise ModelError(f"{path} has no layers", remedy=_AGAIN)
    return layers
