"""The codes and attention over blocks in Triton, for CUDA: ``triton=True`` of a cache. Not run on a card yet.

``TRITON_INTERPRET=1`` runs them on the CPU, which is how they are tested.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl

from ggufrq.base.errors import UsageError
from ggufrq.codec.pack import low_plane
from ggufrq.codec.quant import BITS_INF, BITS_MAX, BITS_MIN, LARGEST_FP16
from ggufrq.codec.tables import Code

#: Blocks that a program encodes.
BLOCKS = 4
#: Cells of a step of attention, and chunks of cells that a program goes through.
STEP, CHUNKS = 32, 4


def require(device: torch.device) -> None:
    """Raise UsageError for a device that the kernels are not for."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f"triton=True is for CUDA, and the model is on {device.type}", remedy="triton=False")


def encode(x: torch.Tensor, c: Code) -> torch.Tensor:
    """See ``Codec.encode``."""
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], x.shape[-1] // c.block * c.bytes, dtype=torch.uint8, device=x.device)
    blocks = x.numel() // c.block
    table = _integers(c, x.device)
    encode_kernel[triton.cdiv(blocks, BLOCKS),](x, out, table, blocks, **encode_constants(c))
    return out


def encode_constants(c: Code) -> dict[str, Any]:
    """What is constant in the kernel that encodes."""
    return {
        **{
            "BITS": c.bits,
            "LOW": low_plane(c.bits),
            "BLOCK": c.block,
            "BYTES": c.bytes,
            "LEVELS": len(c.magnitudes),
        },
        **{"STARTS": len(c.starts), "N": BLOCKS, "INF": int(BITS_INF), "MOST": int(BITS_MAX)},
        **{"LEAST": int(BITS_MIN), "LARGEST": float(LARGEST_FP16)},
    }


@cache
def _integers(c: Code, device: torch.device) -> torch.Tensor:
    """Magnitudes, twice the middles between them, and starts of a code."""
    return torch.tensor([*c.magnitudes, *c.mid2, *c.starts], dtype=torch.int32, device=device)


@cache
def _centroids(c: Code, device: torch.device) -> torch.Tensor:
    return torch.tensor(c.centroids, dtype=torch.float32, device=device)


def attend(
    query: torch.Tensor,
    k_chunks: list[torch.Tensor],
    v_chunks: list[torch.Tensor],
    k_code: Code,
    v_code: Code,
    seen: torch.Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one query for each head, ``query`` [batch, heads of K, heads that share one, dim] in the basis of K,
    over chunks of blocks [batch, heads, CHUNK, bytes]: the largest score, the sum of the softmax, and that of
    values, [batch, heads of K, heads that share one, 1, 1 or dim of V]. ``seen`` [batch, cells]."""
    batch, heads, group, _ = query.shape
    rows = k_chunks[0].shape[2:], v_chunks[0].shape[2:]
    constants = attend_constants(group, query.shape[3], rows, k_code, v_code)
    splits = triton.cdiv(len(k_chunks), CHUNKS)
    device, v_dim = query.device, constants["V_DIM"]
    largest, total = torch.empty(2, batch, heads, splits, group, device=device)
    values = torch.empty(batch, heads, splits, group, v_dim, device=device)
    k_at, v_at = (
        torch.tensor([chunk.data_ptr() for chunk in chunks], dtype=torch.int64, device=device)
        for chunks in (k_chunks, v_chunks)
    )
    attend_kernel[batch * heads, splits](
        query.contiguous(),
        k_at,
        v_at,
        seen.to(torch.uint8).contiguous(),
        largest,
        total,
        values,
        _centroids(k_code, device),
        _centroids(v_code, device),
        seen.shape[1],
        heads,
        splits,
        scale,
        softcap or 1.0,
        CAPPED=softcap is not None,
        **constants,
    )
    top = largest.amax(2, keepdim=True)
    weights = torch.exp(largest - top.masked_fill(top == -torch.inf, 0))
    total, values = (weights * total).sum(2), (weights[..., None] * values).sum(2)
    return top[:, :, 0, :, None, None], total[..., None, None], values[..., None, :]


def attend_constants(
    group: int, dim: int, rows: tuple[Sequence[int], Sequence[int]], k_code: Code, v_code: Code
) -> dict[str, Any]:
    """What is constant in the kernel of attention, but ``CAPPED``, for so many heads that share one of K, and
    chunks of so many rows of so many bytes of K and of V."""
    (chunk, k_bytes), (_, v_bytes) = rows
    v_dim = v_bytes // v_code.bytes * v_code.block
    return {
        **{"GROUP": group, "ROWS": max(16, triton.next_power_of_2(group)), "STEP": min(STEP, chunk)},
        **{"DIM": dim, "WIDE": triton.next_power_of_2(dim), "V_DIM": v_dim},
        **{"V_WIDE": triton.next_power_of_2(v_dim), "K_BYTES": k_bytes, "V_BYTES": v_bytes},
        **{
            "K_BITS": k_code.bits,
            "K_LOW": low_plane(k_code.bits),
            "K_BLOCK": k_code.block,
            "K_SIZE": k_code.bytes,
        },
        **{
            "V_BITS": v_code.bits,
            "V_LOW": low_plane(v_code.bits),
            "V_BLOCK": v_code.block,
            "V_SIZE": v_code.bytes,
        },
        **{"CHUNK": chunk, "CHUNKS": CHUNKS},
    }


@triton.jit
def _power(e):
    """2**e, exact, for the exponent of a normal number."""
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _levels(a, s, table, LEVELS: tl.constexpr):
    """Levels and centroids of the magnitudes a [n, block] under the scales s [n, 1]."""
    level = a * 0
    m = level + tl.load(table)
    for i in tl.static_range(LEVELS - 1):
        bound = tl.minimum((s * tl.load(table + LEVELS + i).to(tl.int64)) >> 12, 32767)
        above = (a.to(tl.int64) > bound).to(tl.int32)
        level += above
        m += above * (tl.load(table + i + 1) - tl.load(table + i))
    return level, m


@triton.jit
def _dot(a, b):
    return tl.sum((a * b).to(tl.int64), 1)[:, None]


@triton.jit
def _stored(s, e, LARGEST: tl.constexpr):
    """Scales as they are stored; e is the exponent of the largest magnitude."""
    return tl.minimum(s.to(tl.float32) * _power(e - 18), LARGEST).to(tl.float16)


@triton.jit
def encode_kernel(
    x,
    out,
    table,
    blocks,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    BYTES: tl.constexpr,
    LEVELS: tl.constexpr,
    STARTS: tl.constexpr,
    N: tl.constexpr,
    INF: tl.constexpr,
    MOST: tl.constexpr,
    LEAST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Blocks of x [blocks, BLOCK], by the steps of ``TorchCodec._encode`` and in its units."""
    row = tl.program_id(0) * N + tl.arange(0, N)
    there = (row < blocks)[:, None]
    word = tl.load(
        x + row[:, None].to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[None, :], mask=there, other=0.0
    ).to(tl.int32, bitcast=True)
    magnitude = word & 0x7FFFFFFF
    nan = magnitude > INF
    magnitude = tl.where(nan, 0, tl.minimum(magnitude, MOST))
    negative = (word < 0) & (nan == 0)
    largest = tl.max(magnitude, 1)[:, None]
    zero = largest < LEAST
    e = tl.where(zero, 0, (largest >> 23) - 127)
    a = (magnitude.to(tl.float32, bitcast=True) * _power(14 - e)).to(tl.int32)

    top = tl.max(a, 1)[:, None].to(tl.int64)
    s = top * 0
    best = s
    for i in tl.static_range(STARTS):
        _, m = _levels(a, (top * tl.load(table + 2 * LEVELS - 1 + i).to(tl.int64)) >> 3, table, LEVELS)
        num = _dot(a, m)
        si = (num << 11) // _dot(m, m)
        gain = si * num
        s = tl.where(gain > best, si, s)
        best = tl.maximum(best, gain)
    _, m = _levels(a, s, table, LEVELS)
    s = (_dot(a, m) << 11) // _dot(m, m)
    d = _stored(s, e, LARGEST)
    s = (d.to(tl.float32) * _power(18 - e)).to(tl.int64)
    zero = zero | (s == 0)
    level, m = _levels(a, s, table, LEVELS)
    wide = a.to(tl.int64)
    d = _stored((tl.sum(wide * wide, 1)[:, None] << 11) // tl.maximum(_dot(a, m), 1), e, LARGEST)
    scale = d.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    zero = zero | (scale == 0)
    scale = tl.where(zero, 0, scale)
    index = level + LEVELS
    index = tl.where(negative, -1 - index, index) & ((1 << BITS) - 1)
    index = tl.where(zero, 0, index)

    at = out + row[:, None].to(tl.int64) * BYTES
    two = tl.arange(0, 2)[None, :]
    tl.store(at + two, ((scale >> (8 * two)) & 255).to(tl.uint8), mask=there)
    shift = LOW * tl.arange(0, 8 // LOW)[None, :, None]
    planes = tl.sum(tl.reshape(index & ((1 << LOW) - 1), [N, 8 // LOW, BLOCK * LOW // 8]) << shift, 1)
    tl.store(at + 2 + tl.arange(0, BLOCK * LOW // 8)[None, :], planes.to(tl.uint8), mask=there)
    if BITS > LOW:
        shift = tl.arange(0, 8)[None, :, None]
        planes = tl.sum(tl.reshape(index >> LOW, [N, 8, BLOCK // 8]) << shift, 1)
        at += 2 + BLOCK * LOW // 8
        tl.store(at + tl.arange(0, BLOCK // 8)[None, :], planes.to(tl.uint8), mask=there)


@triton.jit
def _decode(
    row,
    d,
    there,
    table,
    BITS: tl.constexpr,
    LOW: tl.constexpr,
    BLOCK: tl.constexpr,
    SIZE: tl.constexpr,
    DIM: tl.constexpr,
):
    """Values [cells, dim] of rows of blocks at the addresses ``row`` [cells]."""
    j = (d % BLOCK)[None, :]
    at = row[:, None] + (d // BLOCK)[None, :] * SIZE
    inside = there[:, None] & (d < DIM)[None, :]
    scale = tl.load(at.to(tl.pointer_type(tl.float16)), mask=inside, other=0.0)
    at += 2
    width = BLOCK * LOW // 8
    byte = tl.load(at + j % width, mask=inside, other=0).to(tl.int32)
    index = (byte >> (j // width * LOW)) & ((1 << LOW) - 1)
    if BITS > LOW:
        byte = tl.load(at + width + j % (BLOCK // 8), mask=inside, other=0).to(tl.int32)
        index = index | (((byte >> (j // (BLOCK // 8))) & 1) << LOW)
    return tl.load(table + index) * (scale.to(tl.float32) * 0.0078125)


@triton.jit
def attend_kernel(
    query,
    k_at,
    v_at,
    seen,
    largest,
    total,
    values,
    k_table,
    v_table,
    cells,
    heads,
    splits,
    scale,
    softcap,
    CAPPED: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    STEP: tl.constexpr,
    DIM: tl.constexpr,
    WIDE: tl.constexpr,
    V_DIM: tl.constexpr,
    V_WIDE: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    K_BITS: tl.constexpr,
    K_LOW: tl.constexpr,
    K_BLOCK: tl.constexpr,
    K_SIZE: tl.constexpr,
    V_BITS: tl.constexpr,
    V_LOW: tl.constexpr,
    V_BLOCK: tl.constexpr,
    V_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Some chunks of one head of K and V, for the heads that share it."""
    head = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    g = tl.arange(0, ROWS)
    d = tl.arange(0, WIDE)
    e = tl.arange(0, V_WIDE)
    q = tl.load(
        query + (head * GROUP + g[:, None]) * DIM + d[None, :],
        mask=(g < GROUP)[:, None] & (d < DIM)[None, :],
        other=0.0,
    )
    top = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, V_WIDE], tl.float32)
    for chunk in range(split * CHUNKS, tl.minimum((split + 1) * CHUNKS, (cells + CHUNK - 1) // CHUNK)):
        k_row = tl.load(k_at + chunk).to(tl.pointer_type(tl.uint8)) + head * CHUNK * K_BYTES
        v_row = tl.load(v_at + chunk).to(tl.pointer_type(tl.uint8)) + head * CHUNK * V_BYTES
        for first in range(0, CHUNK, STEP):
            n = first + tl.arange(0, STEP)
            there = chunk * CHUNK + n < cells
            shown = tl.load(seen + (head // heads) * cells + chunk * CHUNK + n, mask=there, other=0) != 0
            k = _decode(k_row + n * K_BYTES, d, there, k_table, K_BITS, K_LOW, K_BLOCK, K_SIZE, DIM)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if CAPPED:
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            scores = tl.where(shown[None, :], scores, float("-inf"))
            above = tl.maximum(top, tl.max(scores, 1))
            against = tl.where(above == float("-inf"), 0.0, above)
            before = tl.exp(top - against)
            weights = tl.exp(scores - against[:, None])
            v = _decode(v_row + n * V_BYTES, e, there, v_table, V_BITS, V_LOW, V_BLOCK, V_SIZE, V_DIM)
            weight = weight * before + tl.sum(weights, 1)
            mean = mean * before[:, None] + tl.dot(weights, v, input_precision="ieee")
            top = above
    at = (head * splits + split) * GROUP + g
    tl.store(largest + at, top, mask=g < GROUP)
    tl.store(total + at, weight, mask=g < GROUP)
    tl.store(
        values + at[:, None] * V_DIM + e[None, :],
        mean,
        mask=(g < GROUP)[:, None] & (e < V_DIM)[None, :],
    )
