"""The Metal kernel of decode.metal in place of tiles, for one query over blocks. No Mac has run it yet: it is
used only where it is asked for."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx

from ggufrq.base.errors import UsageError
from ggufrq.mlx.codec import Codec

#: Parts of the cells, which different simdgroups work on, at most, and cells of a part at least.
PARTS, CELLS = 32, 64
INPUTS = ("q", "k", "v", "places", "k_centroids", "v_centroids")
OUTPUTS = ("values", "sums")
_FILE = Path(__file__).with_name("decode.metal")


def require() -> None:
    """Raise UsageError unless there is a GPU that runs it."""
    if not mx.metal.is_available():
        raise UsageError("metal=True takes the GPU of a Mac, which mlx does not find", remedy="leave it out")


def decode(
    queries: mx.array,
    k: mx.array,
    v: mx.array,
    k_codec: Codec,
    v_codec: Codec,
    dim: int,
    start: int,
    end: int,
) -> tuple[mx.array, mx.array, mx.array]:
    """The softmax of ``queries`` [batch, heads of K, heads that share one, dim of K], scaled and in the basis
    of K, over the cells ``start`` … ``end`` - 1 of blocks [batch, heads of K, cells, bytes]: the largest
    score and the sum [batch, heads of K, heads that share one, 1, 1], the sum of values [… , 1, ``dim``]."""
    batch, heads, share, k_dim = queries.shape
    parts = max(1, min(PARTS, (end - start) // CELLS))
    rows = batch * heads * share
    template = {
        **{"DK": k_dim, "DV": dim, "HEADS": heads * share, "SHARE": share, "PARTS": parts},
        **{
            "K_BITS": k_codec.bits,
            "K_BLOCK": k_codec.block,
            "V_BITS": v_codec.bits,
            "V_BLOCK": v_codec.block,
        },
    }
    values, sums = _kernel()(
        inputs=[
            queries.reshape(rows, k_dim),
            k,
            v,
            mx.array([start, end], mx.int32),
            *(_centroids(codec) for codec in (k_codec, v_codec)),
        ],
        template=list(template.items()),
        grid=(32, rows, parts),
        threadgroup=(32, 1, 1),
        output_shapes=[(rows, parts, dim), (rows, parts, 2)],
        output_dtypes=[mx.float32, mx.float32],
    )
    return joined(values, sums, (batch, heads, share))


def joined(
    values: mx.array, sums: mx.array, shape: tuple[int, int, int]
) -> tuple[mx.array, mx.array, mx.array]:
    """What the parts found as one softmax."""
    largest = sums[..., 0].max(axis=1, keepdims=True)
    weights = mx.exp(sums[..., 0] - largest)
    total = (weights * sums[..., 1]).sum(axis=1)
    mean = (weights[..., None] * values).sum(axis=1)
    return largest.reshape(*shape, 1, 1), total.reshape(*shape, 1, 1), mean.reshape(*shape, 1, -1)


@cache
def _kernel() -> Any:
    header, _, body = _FILE.read_text(encoding="utf-8").partition("// body\n")
    # blocks lie in a buffer with room behind them, which is not copied
    return mx.fast.metal_kernel(
        name="ggufrq_decode",
        input_names=list(INPUTS),
        output_names=list(OUTPUTS),
        header=header,
        source=body,
        ensure_row_contiguous=False,
    )


def _centroids(codec: Codec) -> mx.array:
    """The centroids, as many as five bits have."""
    found = list(codec.code.centroids)
    return mx.array([*found, *[0] * (32 - len(found))], mx.float32)
