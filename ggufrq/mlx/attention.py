"""Attention over blocks, a tile at a time with a running softmax: K and V are never dense as a whole."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx_lm.models.base as base

from ggufrq.mlx import kernel
from ggufrq.mlx.basis import Basis
from ggufrq.mlx.codec import Codec

#: Cells that are decoded at a time, and queries that are worked on at a time.
TILE = 512
QUERIES = 256
#: Below all scores, and finite, so that nothing subtracts infinities.
LOWEST = -1e30


@dataclass(frozen=True)
class Side:
    """K or V of a layer at one moment."""

    codec: Codec
    basis: Basis
    blocks: mx.array  # [batch, heads, cells, bytes], from ``start`` on
    rows: mx.array  # the newest and these tokens, as the model made them, from ``first_row`` on
    first: mx.array  # the first tokens of each sequence likewise [batch, heads, n, dim]


@dataclass(frozen=True)
class Held:
    """K and V of a layer at one moment. Cells are counted from the first one that there ever was; those
    before ``start`` are gone, ``end`` - 1 is the newest. Sequences begin at ``left`` [batch], or at 0."""

    k: Side
    v: Side
    start: int
    end: int
    first_row: int
    left: mx.array | None
    recent: int
    keep: int  # so many of the first tokens are seen from outside of the window, too
    window: int | None
    metal: bool  # whether one query alone goes through the Metal kernel


@dataclass(frozen=True)
class Stored:
    """What a cache gives to the model in place of K or V."""

    held: Held


def attend(queries: mx.array, held: Held, scale: float, mask: mx.array | str | None) -> mx.array:
    """Attention [batch, heads, queries, dim of V] of ``queries`` [batch, heads, queries, dim of K], those of
    the newest tokens, over what is held.

    ``mask`` is boolean or added to scores, [queries, cells] or [batch or 1, heads or 1, queries, cells] with
    the cells that are held; or "causal": what is not behind a query, within the window; or None: all of that.
    """
    n = queries.shape[2]
    if isinstance(mask, mx.array):
        mask = mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape)
    out = []
    for i in range(0, n, QUERIES):
        some = queries[:, :, i : i + QUERIES]
        part = mask[:, :, i : i + QUERIES] if isinstance(mask, mx.array) else mask
        first = held.end - n + i
        out.append(_Queries(some, first, held, scale, part, causal=mask is not None or n == 1).attend())
    return mx.concatenate(out, axis=2).astype(queries.dtype)


class _Queries:
    """Some queries, of the cells ``first`` … ``end`` - 1, and their softmax as far as it is: the largest
    score, the sum, and the sum of values, each [batch, heads of K, heads that share one, queries, …]."""

    def __init__(
        self,
        queries: mx.array,
        first: int,
        held: Held,
        scale: float,
        mask: mx.array | str | None,
        *,
        causal: bool,
    ) -> None:
        batch, self.heads, n, self.dim = queries.shape
        kv_heads = held.k.blocks.shape[1]
        self.shape = (batch, kv_heads, self.heads // kv_heads, n)
        self.held, self.first, self.end = held, first, first + n
        self.mask = mask if isinstance(mask, mx.array) else None
        self.causal = causal and self.mask is None
        self.queries = (queries.astype(mx.float32) * scale).reshape(batch, kv_heads, -1, self.dim)
        self.cells = mx.arange(first, self.end)[:, None]
        self.largest = mx.full((*self.shape, 1), LOWEST)
        self.sum = mx.zeros((*self.shape, 1))
        self.values = mx.zeros((*self.shape, held.v.rows.shape[3]))

    def attend(self) -> mx.array:
        """[batch, heads, queries, dim of V], float32."""
        held = self.held
        rotated = self.queries @ held.k.basis.query
        start, end = held.start, held.end
        if self.causal:
            end = min(end, self.end)
            if held.window is not None:
                start = max(start, self.first - held.window + 1)
        if held.metal and self._by_kernel(rotated, start, end):
            end = start
        for at in range(start, end, TILE):
            tile = slice(at - held.start, min(at + TILE, end) - held.start)
            # One tile after the other, so that not all of them are decoded at once.
            blocks = [held.k.blocks[:, :, tile], held.v.blocks[:, :, tile]]
            k, v = mx.depends(blocks, [self.values])
            seen, bias = self._of_tile(at, min(at + TILE, end))
            self._take(rotated, held.k.codec.decode(k), held.v.codec.decode(v), seen, bias)
        self.values = held.v.basis.restore(self.values)
        self._newest()
        self._first()
        mean = self.values / mx.where(self.sum > 0, self.sum, 1)
        return mean.reshape(self.shape[0], self.heads, self.shape[3], -1)

    def _by_kernel(self, rotated: mx.array, start: int, end: int) -> bool:
        """Whether the Metal kernel has taken the blocks: those of one query, of sequences without padding."""
        held = self.held
        if self.shape[3] > 1 or self.mask is not None or held.left is not None:
            return False
        if held.recent:
            end = max(start, min(end, max(self.first - held.recent + 1, held.first_row)))
        start = max(start, held.k.first.shape[2])
        if start < end:
            queries = rotated.reshape(*self.shape[:3], self.dim)
            codecs, dim = (held.k.codec, held.v.codec), self.values.shape[4]
            cells = start - held.start, end - held.start
            found = kernel.decode(queries, held.k.blocks, held.v.blocks, *codecs, dim, *cells)
            self.largest, self.sum, self.values = found
        return True

    def _of_tile(self, at: int, end: int) -> tuple[mx.array | None, mx.array | None]:
        """Which of the cells ``at`` … ``end`` - 1 are seen as blocks, and what is added to their scores."""
        held = self.held
        cells = mx.arange(at, end)[None, None, None]
        seen, bias = self._visible(cells, at, end)
        not_exact = []
        if held.recent and end > max(self.first - held.recent + 1, held.first_row):
            not_exact.append(~self._among_newest(cells))
        if held.k.first.shape[2] and (held.left is not None or at < held.k.first.shape[2]):
            left = 0 if held.left is None else held.left[:, None, None, None]
            not_exact.append((cells < left) | (cells >= left + held.k.first.shape[2]))
        for condition in not_exact:
            seen = condition if seen is None else seen & condition
        return seen, bias

    def _visible(self, cells: mx.array, at: int, end: int) -> tuple[mx.array | None, mx.array | None]:
        """Which of the cells ``at`` … ``end`` - 1 are seen at all, None: all; and what is added to scores."""
        if self.mask is not None:
            part = self.mask[..., at - self.held.start : end - self.held.start]
            return (part, None) if part.dtype == mx.bool_ else (None, part)
        seen = None
        if self.causal and end > self.first + 1:
            seen = cells <= self.cells
        if self.causal and self.held.window is not None and at <= self.end - 1 - self.held.window:
            inside = cells > self.cells - self.held.window
            seen = inside if seen is None else seen & inside
        return seen, None

    def _among_newest(self, cells: mx.array) -> mx.array:
        """Whether cells [batch or 1, 1, 1, n] are among a query's newest, [batch or 1, 1, queries, n]."""
        held = self.held
        return (cells <= self.cells) & (cells > self.cells - held.recent) & (cells >= held.first_row)

    def _newest(self) -> None:
        """The newest tokens of each query, as they were."""
        held = self.held
        at = max(self.first - held.recent + 1, held.first_row, held.start)
        if held.recent == 0 or at >= self.end:
            return
        rows = slice(at - held.first_row, self.end - held.first_row)
        cells = mx.arange(at, self.end)[None, None, None]
        seen, bias = self._visible(cells, at, self.end)
        newest = self._among_newest(cells)
        seen = newest if seen is None else seen & newest
        k = held.k.basis.centred(held.k.rows[:, :, rows])
        self._take(self.queries, k, held.v.rows[:, :, rows], seen, bias)

    def _first(self) -> None:
        """The first tokens, as they were, where they are not among the newest."""
        held = self.held
        count = held.k.first.shape[2]
        if count == 0:
            return
        cells = mx.arange(count)[None, None, None]
        kept = cells < held.keep
        if held.left is not None:
            cells = cells + held.left[:, None, None, None]
        seen = cells < held.end
        if held.recent:
            seen = seen & ~self._among_newest(cells)
        bias = None
        if self.mask is not None:
            seen = seen & ((cells >= held.start) | kept)
            at = mx.clip(cells - held.start, 0, self.mask.shape[3] - 1)
            batch = max(at.shape[0], self.mask.shape[0])
            mask = mx.broadcast_to(self.mask, (batch, *self.mask.shape[1:]))
            at = mx.broadcast_to(at, (batch, *self.mask.shape[1:3], count))
            part = mx.take_along_axis(mask, at, axis=3)
            if part.dtype == mx.bool_:
                seen = seen & (part | (kept & (cells <= self.cells)))
            else:
                bias = part
        elif self.causal:
            seen = seen & (cells <= self.cells)
            if held.window is not None:
                seen = seen & (kept | (cells > self.cells - held.window))
        self._take(self.queries, held.k.basis.centred(held.k.first), held.v.first, seen, bias)

    def _take(
        self, queries: mx.array, k: mx.array, v: mx.array, seen: mx.array | None, bias: mx.array | None
    ) -> None:
        """Let K and V [batch, heads, cells, dim] take part."""
        k, v = k.astype(mx.float32), v.astype(mx.float32)
        scores = (queries @ k.swapaxes(2, 3)).reshape(*self.shape, -1)
        if bias is not None:
            scores = scores + self._by_head(bias)
        if seen is not None:
            scores = mx.where(self._by_head(seen), scores, -mx.inf)
        largest = mx.maximum(self.largest, scores.max(axis=-1, keepdims=True))
        weights = mx.exp(scores - largest)
        before = mx.exp(self.largest - largest)
        self.sum = self.sum * before + weights.sum(axis=-1, keepdims=True)
        sums = weights.reshape(*k.shape[:2], -1, k.shape[2]) @ v
        self.values = self.values * before + sums.reshape(self.values.shape)
        self.largest = largest

    def _by_head(self, x: mx.array) -> mx.array:
        """x [batch or 1, heads or 1, queries or 1, cells] in the shape of scores."""
        if x.shape[1] == 1:
            return x[:, :, None]
        return x.reshape(x.shape[0], *self.shape[1:3], *x.shape[2:])


def register() -> None:
    """Have the attention of mlx-lm's models read what our caches give them.

    They import it by value, each of them; for caches with ``bits`` it calls a function that it looks up in
    its own module, and that is where ours stands before mlx-lm's.
    """
    usual = base.quantized_scaled_dot_product_attention
    if getattr(usual, "of_ggufrq", False):
        return

    def attention(
        queries: mx.array, q_keys: Any, q_values: Any, scale: float, mask: Any, **kwargs: Any
    ) -> mx.array:
        if isinstance(q_keys, Stored):
            return attend(queries, q_keys.held, scale, mask)
        found: mx.array = usual(queries, q_keys, q_values, scale=scale, mask=mask, **kwargs)
        return found

    attention.of_ggufrq = True  # type: ignore[attr-defined]
    base.quantized_scaled_dot_product_attention = attention
