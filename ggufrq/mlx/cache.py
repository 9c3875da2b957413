"""Caches of mlx-lm, one for each layer, that hold K and V as blocks and the newest and first tokens as they
were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import mlx.core as mx
import mlx_lm.models.cache as lm

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.codec.quant import LARGEST_FP16
from ggufrq.codec.rotate import Family
from ggufrq.codec.tables import head_block, load
from ggufrq.mlx import kernel
from ggufrq.mlx.attention import Held, Side, Stored
from ggufrq.mlx.basis import Basis, of_profile, of_rotation
from ggufrq.mlx.codec import Codec
from ggufrq.profile import LayerProfile

#: Cells by which blocks grow, and in which those outside of a window go.
STEP = 256


class QuantizedCache(lm._BaseCache):  # type: ignore[misc]
    """K and V of one layer; ``make_cache`` makes a list of them for a model.

    ``bits`` (2 to 5) is the code of K, and of V unless ``v_bits`` is another one; the newest ``recent``
    tokens of each query and the ``first`` of a sequence are seen as they were. With a ``window`` a query sees
    so many tokens, itself among them, and the ``keep`` first ones. K is kept in the metric of the layer's
    ``profile``. With ``metal`` one query at a time goes through a Metal kernel that no Mac has run yet.

    Raises UsageError when a number makes no sense; ModelError, as soon as K and V come, when 64 does not
    divide their heads, or the profile is for others.

    The same object is the cache of a batch, once ``merge`` has made it one.
    """

    family: ClassVar[Family]

    def __init__(
        self,
        bits: int = 3,
        v_bits: int | None = None,
        *,
        recent: int = 32,
        first: int = 1,
        window: int | None = None,
        keep: int = 0,
        profile: LayerProfile | None = None,
        metal: bool = False,
    ) -> None:
        self.bits, self.v_bits = bits, bits if v_bits is None else v_bits
        for which, given in (("bits", self.bits), ("v_bits", self.v_bits)):
            if str(given) not in load()["codes"]:
                raise UsageError(f"{which} is {given!r}, and there are codes of 2 to 5 bits")
        if recent < 0 or first < 0 or keep < 0 or (window is not None and window < 1):
            raise UsageError("recent, first and keep must be 0 or more, window 1 or more")
        self.recent, self.first, self.window, self.keep = recent, max(first, keep), window, keep
        if metal:
            kernel.require()
        self.metal = metal
        self._metric = None if profile is None else of_profile(self.family, profile)
        self._blocks: list[
            mx.array
        ] = []  # of K and V, [batch, heads, cells, bytes], from _start on, and room
        self._rows: list[
            mx.array
        ] = []  # the newest as they were, [batch, heads, cells, dim], from _first_row
        self._firsts: list[mx.array] = []  # the first ones likewise, [batch, heads, first, dim]
        self._start = self._end = self._first_row = 0
        self._left: mx.array | None = (
            None  # of a batch: the cell in which each sequence begins, int32 [batch]
        )
        self._padding: list[int] | None = None  # of a batch: cells behind the end of each sequence, for now

    def __getitem__(self, layer: int) -> Any:
        """A model that is given one of these takes it for the list of all layers. Raises UsageError."""
        raise UsageError(
            f"{type(self).__name__} keeps K and V of one layer, and a model takes a list of them",
            remedy=f'prompt_cache=make_cache(model, bits={self.bits}, family="{self.family}")',
        )

    @property
    def group_size(self) -> int:
        """What mlx-lm asks of caches with ``bits``: values that share a scale, in heads of 128."""
        return int(load()["block"])

    @property
    def offset(self) -> int | mx.array:
        """Tokens so far, the position of the next one; of a batch int32 [batch]."""
        return self._end if self._left is None else self._end - self._left

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Stored, Stored]:
        """Take K and V [batch, heads, tokens, dim] of the next tokens."""
        new = [keys, values]
        count = keys.shape[2]
        codecs = self._codecs([keys.shape[3], values.shape[3]])
        bases = self._bases([keys.shape[3], values.shape[3]], keys.shape[1])
        if not self._blocks:
            shapes = [(*x.shape[:2], 0) for x in new]
            self._blocks = [
                mx.zeros((*shape, codec.bytes(x.shape[3])), mx.uint8)
                for shape, codec, x in zip(shapes, codecs, new, strict=True)
            ]
            self._rows = [
                mx.zeros((*s, x.shape[3]), _exact(x).dtype) for s, x in zip(shapes, new, strict=True)
            ]
            self._firsts = [mx.zeros((*x.shape[:2], self.first, x.shape[3]), _exact(x).dtype) for x in new]
        self._drop()
        used, room = self._end - self._start, self._blocks[0].shape[2]
        for i, (codec, basis, x) in enumerate(zip(codecs, bases, new, strict=True)):
            if used + count > room:
                more = -(-(used + count - room) // STEP) * STEP
                self._blocks[i] = mx.pad(self._blocks[i], [(0, 0), (0, 0), (0, more), (0, 0)])
            self._blocks[i][:, :, used : used + count] = codec.encode(basis.store(x))
            exact = _exact(x)
            self._firsts[i] = self._with_first(self._firsts[i], exact)
            self._rows[i] = mx.concatenate([self._rows[i], exact], axis=2)
        self._end += count
        stored = self.keys_and_values()
        self._forget()
        return stored

    def keys_and_values(self) -> tuple[Stored, Stored]:
        """What ``update_and_fetch`` gave last, for layers that share K and V; of its tokens no more than the
        newest are held as they were by then."""
        dims = [x.shape[3] for x in self._rows]
        k, v = (
            Side(codec, basis, blocks[:, :, : self._end - self._start], rows, first)
            for codec, basis, blocks, rows, first in zip(
                self._codecs(dims),
                self._bases(dims, self._rows[0].shape[1]),
                self._blocks,
                self._rows,
                self._firsts,
                strict=True,
            )
        )
        held = Held(
            k,
            v,
            self._start,
            self._end,
            self._first_row,
            self._left,
            self.recent,
            self.keep,
            self.window,
            self.metal,
        )
        return Stored(held), Stored(held)

    def make_mask(
        self, N: int, return_array: bool = False, window_size: int | None = None
    ) -> mx.array | str | None:
        """The mask for ``N`` more tokens, over the cells that will be held; None and "causal" stand for what
        attention does by itself."""
        self._drop()
        window = self.window if window_size is None else window_size
        usual = window == self.window or window is None or self._end + N <= window
        if self._left is None and not return_array and usual:
            return None if N == 1 else "causal"
        cells = mx.arange(self._start, self._end + N)[None]
        queries = mx.arange(self._end, self._end + N)[:, None]
        mask = cells <= queries
        if window is not None:
            mask = mask & (cells > queries - window)
        if self._left is not None:
            mask = mask & (cells >= self._left[:, None, None, None])
        return mask

    def size(self) -> int:
        """Tokens that are held."""
        return self._end - self._start

    def empty(self) -> bool:
        """Whether nothing was ever held."""
        return not self._blocks

    @property
    def nbytes(self) -> int:
        """Bytes that are held for tokens, room for the next ones among them."""
        return sum(x.nbytes for x in (*self._blocks, *self._rows, *self._firsts))

    @property
    def state(self) -> tuple[Any, ...]:
        """All of it, for ``save_prompt_cache``."""
        arrays: list[mx.array | None] = [None] * 6
        if self._blocks:
            blocks = [x[:, :, : self._end - self._start] for x in self._blocks]
            arrays = [*blocks, *self._rows, *self._firsts]
        numbers = (self.bits, self.v_bits, self.recent, self.first, self.keep, self.window)
        metric = self._metric or Basis(*[None] * 3)
        places = (self._start, self._end, self._first_row)
        return (*arrays, self._left, *numbers, *places, metric.into, metric.query, metric.mean, self.metal)

    @state.setter
    def state(self, state: Sequence[Any]) -> None:
        arrays, self._left, numbers = state[:6], state[6], state[7:13]
        self.bits, self.v_bits, self.recent, self.first, self.keep, self.window = numbers
        self._start, self._end, self._first_row = state[13:16]
        self._metric = Basis(*state[16:19]) if state[16:] and state[16] is not None else None
        self.metal = bool(state[19:] and state[19])
        pairs = [] if arrays[0] is None else [list(arrays[i : i + 2]) for i in (0, 2, 4)]
        self._blocks, self._rows, self._firsts = pairs or ([], [], [])
        self._padding = None

    def is_trimmable(self) -> bool:
        """Whether tokens can be taken back: until a window was full."""
        return self.window is None or self._end <= self.window

    def trim(self, n: int) -> int:
        """Take back the newest ``n`` tokens; says how many it were."""
        n = min(n, self._end - self._start)
        self._end -= n
        left = max(self._end - self._first_row, 0)
        self._rows = [x[:, :, :left] for x in self._rows]
        self._first_row = min(self._first_row, self._end)
        return n

    # A batch

    @classmethod
    def merge(cls, caches: Sequence[QuantizedCache]) -> QuantizedCache:
        """One cache for several sequences, padded on the left. Raises UsageError when they are of different
        kinds."""
        batch: QuantizedCache | None = None
        for one in caches:
            part = one._copy()
            if part._left is None:
                part._left = mx.zeros(1, mx.int32)
            if batch is None:
                batch = part
            else:
                batch.extend(part)
        if batch is None:
            raise UsageError("there are no caches to merge")
        return batch

    def prepare(
        self,
        *,
        left_padding: Sequence[int] | None = None,
        lengths: Sequence[int] | None = None,
        right_padding: Sequence[int] | None = None,
    ) -> None:
        """Say that the tokens that come are padded; those on the right go again by ``finalize``."""
        if self._left is None:
            raise UsageError("only the cache of a batch can be padded", remedy="merge")
        if left_padding is not None:
            if self._blocks:
                raise UsageError("only an empty cache can be padded on the left")
            self._left = self._left + mx.array(left_padding, mx.int32)
        if right_padding is not None and max(right_padding) > 0:
            self._padding = list(right_padding)

    def finalize(self) -> None:
        """Move the sequences so that all end with the newest cell."""
        if self._padding is None:
            return
        by = mx.array(self._padding, mx.int32)
        whole = self._whole()
        for held in (self._blocks, self._rows):
            for i, x in enumerate(held):
                if held is self._blocks:
                    x = x[:, :, : self._end - self._start]
                held[i] = lm.dynamic_roll(x, by[:, None], axis=2)
        self._left = self._left + by
        if not whole:
            self._cut(self._first_row + max(self._padding))
        self._padding = None
        self._forget()

    def filter(self, batch_indices: Sequence[int]) -> None:
        """Keep these sequences alone."""
        assert self._left is not None
        rows = mx.array(batch_indices, mx.int32)
        for held in (self._blocks, self._rows, self._firsts):
            held[:] = [x[rows] for x in held]
        self._left = self._left[rows]
        if self._padding is not None:
            self._padding = [self._padding[i] for i in batch_indices]
        begin = min(self._left.tolist(), default=0)
        if self._blocks and begin > self._start:
            self._blocks = [mx.contiguous(x[:, :, begin - self._start :]) for x in self._blocks]
            self._start = begin
            self._cut(begin)

    def extend(self, other: QuantizedCache) -> None:
        """Take the sequences of another batch as well. Raises UsageError when it is of another kind."""
        mine, its = self._metric, other._metric
        if self._kind() != other._kind() or (its is not None if mine is None else not mine.like(its)):
            raise UsageError(
                "caches of different kinds cannot be one batch: "
                f"{self._kind()} and {other._kind()}, or their profiles"
            )
        assert self._left is not None and other._left is not None
        parts = [self, other._copy()]
        end = max(part._end for part in parts)
        filled = [part for part in parts if part._blocks]
        wholes = [part._whole() for part in parts]
        for part in parts:
            part._shift(end - part._end)
        if filled:
            start = min(part._start for part in filled)
            first_row = max(
                (p._first_row for p, whole in zip(parts, wholes, strict=True) if not whole), default=start
            )
            first_row = max(first_row, start, end - self.recent)
            for part in parts:
                part._fit(filled[0], start, first_row)
            for name in ("_blocks", "_rows", "_firsts"):
                pairs = zip(*(getattr(part, name) for part in parts), strict=True)
                setattr(self, name, [mx.concatenate(pair, axis=0) for pair in pairs])
        self._left = mx.concatenate([part._left for part in parts])

    def extract(self, idx: int) -> QuantizedCache:
        """The cache of one sequence of a batch."""
        assert self._left is not None
        one = self._copy()
        for held in (one._blocks, one._rows, one._firsts):
            held[:] = [x[idx : idx + 1] for x in held]
        begin = self._left.tolist()[idx]
        if one._blocks:
            start = max(one._start, begin)
            used = slice(start - one._start, one._end - one._start)
            one._blocks = [mx.contiguous(x[:, :, used]) for x in one._blocks]
            one._start = start
            one._cut(begin)
        one._shift(-begin)
        one._left = None
        return one

    # Within

    def _codecs(self, dims: Sequence[int]) -> list[Codec]:
        """Of K and V with heads of so many values."""
        pairs = zip((self.bits, self.v_bits), dims, strict=True)
        return [Codec(bits, head_block(dim)) for bits, dim in pairs]

    def _bases(self, dims: Sequence[int], heads: int) -> list[Basis]:
        """Of K and V with heads of so many values, K with so many heads."""
        k, v = (of_rotation(self.family, dim) for dim in dims)
        if self._metric is None:
            return [k, v]
        shape = tuple(self._metric.into.shape[:2])
        if shape != (heads, dims[0]):
            raise ModelError(
                f"the profile is for {shape[0]} heads of {shape[1]} values, and the model has {heads} of "
                f"{dims[0]}",
                remedy="the profile of this very model",
            )
        return [self._metric, v]

    def _kind(self) -> tuple[Any, ...]:
        return (
            self.family, self.bits, self.v_bits, self.recent, self.first, self.window, self.keep
        )  # fmt: skip

    def _drop(self) -> None:
        """Let go of cells that no query to come sees, some at a time."""
        if self.window is None or self._padding is not None or not self._blocks:
            return
        gone = (self._end - self.window + 1 - self._start) // STEP * STEP
        if gone > 0:
            self._blocks = [mx.contiguous(x[:, :, gone:]) for x in self._blocks]
            self._start += gone

    def _forget(self) -> None:
        """Let go of rows that are not among the newest; until padding is gone it is not known which are."""
        self._cut(self._end - self.recent - (0 if self._padding is None else max(self._padding)))

    def _cut(self, first_row: int) -> None:
        """Have rows begin with this cell, unless they begin behind it."""
        if first_row > self._first_row:
            self._rows = [mx.contiguous(x[:, :, first_row - self._first_row :]) for x in self._rows]
            self._first_row = min(first_row, self._end)

    def _with_first(self, first: mx.array, new: mx.array) -> mx.array:
        """The first rows, those among the new ones [batch, heads, tokens, dim] put in."""
        count = new.shape[2]
        if self._left is None:
            here = max(min(self.first - self._end, count), 0)
            before, behind = first[:, :, : self._end], first[:, :, self._end + here :]
            return mx.concatenate([before, new[:, :, :here], behind], axis=2) if here else first
        at = self._left[:, None] + mx.arange(self.first)[None] - self._end
        inside = ((at >= 0) & (at < count))[:, None, :, None]
        index = mx.clip(at, 0, count - 1)[:, None, :, None]
        return mx.where(inside, mx.take_along_axis(new, index, axis=2), first)

    def _whole(self) -> bool:
        """Whether rows hold sequences from their start, so that what lies before them is padding."""
        begin = 0 if self._left is None else min(self._left.tolist())
        return self._first_row <= begin

    def _copy(self) -> QuantizedCache:
        """Another one that holds the same."""
        one: QuantizedCache = self.from_state(self.state)
        one._padding = self._padding
        return one

    def _shift(self, by: int) -> None:
        """Count cells from another one."""
        self._start, self._end, self._first_row = (x + by for x in (self._start, self._end, self._first_row))
        if self._left is not None:
            self._left = self._left + by

    def _fit(self, model: QuantizedCache, start: int, first_row: int) -> None:
        """Begin with these cells, what is missing being padding; shapes are as in ``model``."""
        assert self._left is not None
        batch = self._left.shape[0]
        if not self._blocks:
            for name in ("_blocks", "_rows", "_firsts"):
                empty = [
                    mx.zeros((batch, x.shape[1], 0 if name != "_firsts" else x.shape[2], x.shape[3]), x.dtype)
                    for x in getattr(model, name)
                ]
                setattr(self, name, empty)
            self._start = self._first_row = self._end
        self._blocks = [
            mx.pad(x[:, :, : self._end - self._start], [(0, 0), (0, 0), (self._start - start, 0), (0, 0)])
            for x in self._blocks
        ]
        self._start = start
        self._cut(first_row)
        before = self._first_row - first_row
        self._rows = [mx.pad(x, [(0, 0), (0, 0), (before, 0), (0, 0)]) for x in self._rows]
        self._first_row = first_row


class PlanarQuantCache(QuantizedCache):
    """With the rotations of planar2 to planar5."""

    family = "planar"


class IsoQuantCache(QuantizedCache):
    """With the rotations of iso2 to iso5."""

    family = "iso"


class RotorQuantCache(QuantizedCache):
    """With the rotations of rotor2 to rotor5."""

    family = "rotor"


def _exact(x: mx.array) -> mx.array:
    """K or V as the newest tokens are held: in the model's 16 bits, or f16."""
    if x.dtype != mx.float32:
        return x
    largest = float(LARGEST_FP16)
    return mx.clip(x, -largest, largest).astype(mx.float16)
