"""A layer of a fixed size, for ``torch.compile``: what changes are values of tensors that stay where they
are.

All that reads or writes blocks is an operator of its own, which a compiler takes as it is: from the same rows
the same blocks come, compiled or not, and roundings to 16 bits are not left out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.hf.basis import Basis, basis
from ggufrq.hf.codec import codec
from ggufrq.hf.kept import TILE, Held, rows_at
from ggufrq.hf.side import (
    Settings,
    State,
    among_first,
    begin,
    first_cells,
    in_16_bits,
    require_alike,
    require_negative,
)
from ggufrq.hf.softmax import QUERIES, Softmax, split_mask
from ggufrq.profile.file import LayerProfile


@dataclass(frozen=True)
class Part:
    """K or V at one moment: blocks [batch, heads, size, bytes], and in 16 bits, in the same basis,
    ``exact`` [batch, heads, n, dim], which are the rows before the new ones and those, and ``first``
    [batch, heads, first, dim]; then the basis, see there, and the bits of a value."""

    blocks: torch.Tensor
    exact: torch.Tensor
    first: torch.Tensor
    into: torch.Tensor
    query: torch.Tensor
    mean: torch.Tensor | None
    bits: int

    @property
    def basis(self) -> Basis:
        """That of the blocks."""
        return Basis(self.into, self.query, self.mean)

    @property
    def dim(self) -> int:
        """Values of a head."""
        return self.first.shape[3]

    def fields(self) -> tuple[Any, ...]:
        """All of it, as operators take it."""
        return self.blocks, self.exact, self.first, self.into, self.query, self.mean, self.bits

    def decoded(self, first: int, end: int) -> torch.Tensor:
        """The cells ``first`` … ``end`` - 1 from their blocks, in the basis."""
        return codec(self.bits, self.dim, self.blocks.device).decode(self.blocks[:, :, first:end])


@dataclass(frozen=True)
class Where:
    """Where tokens are at one moment: the cells [batch] where rows begin, -1 where that is not known; how
    many cells there were before the new ones, and how many of those are held as they were. All are
    tensors."""

    rows: torch.Tensor
    before: torch.Tensor
    held: torch.Tensor

    def fields(self) -> tuple[Any, ...]:
        """All of it, as operators take it."""
        return self.rows, self.before, self.held


@dataclass(frozen=True)
class Moment:
    """What a layer holds when ``new`` tokens have come. Each query sees ``recent`` of the newest as they
    were."""

    k: Part
    v: Part
    where: Where
    recent: int
    new: int
    dtype: torch.dtype

    def attend(
        self,
        query: torch.Tensor,
        mask: torch.Tensor | None,
        scale: float,
        *,
        causal: bool = True,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As ``ggufrq.hf.attention.attend``, but that a single query without a mask sees nothing behind
        it."""
        options = (mask, self.recent, self.new, scale, causal, softcap, sinks)
        out: torch.Tensor = torch.ops.ggufrq.attend(query, *self._fields(), *options)
        return out

    def dense(self, name: str) -> torch.Tensor:
        """K or V [batch, heads, size, dim], those newest and first tokens as they were that the last query
        sees so."""
        out: torch.Tensor = torch.ops.ggufrq.dense(*self._fields(), self.recent, self.new, name == "v")
        return out.to(self.dtype)

    def _fields(self) -> tuple[Any, ...]:
        return *self.k.fields(), *self.v.fields(), *self.where.fields()


class FixedStored(Held):
    """That of a layer of a fixed size; cells behind the last one are of any value."""

    def __init__(self, moment: Moment, name: str) -> None:
        self.moment = moment
        self.name = name
        self.part: Part = getattr(moment, name)

    @property
    def shape(self) -> torch.Size:
        """As of the tensor."""
        return torch.Size((*self.part.blocks.shape[:3], self.part.dim))

    @property
    def dtype(self) -> torch.dtype:
        """As of the tensor."""
        return self.moment.dtype

    @property
    def device(self) -> torch.device:
        """As of the tensor."""
        return self.part.blocks.device

    def dense(self) -> torch.Tensor:
        """The tensor."""
        return self.moment.dense(self.name)


_PART = (
    "Tensor {0}_blocks, Tensor {0}_exact, Tensor({1}!) {0}_first, Tensor {0}_into, Tensor {0}_query, "
    "Tensor? {0}_mean, int {0}_bits"
)
_PARTS = f"{_PART.format('k', 'a')}, {_PART.format('v', 'b')}, Tensor(c!) rows, Tensor before, Tensor held"
_CHANGED = ("k_first", "v_first", "rows")


@torch.library.custom_op(
    "ggufrq::keep",
    mutates_args=("blocks", "recent"),
    schema="(Tensor(a!) blocks, Tensor(b!) recent, Tensor rows, Tensor into, Tensor query, Tensor? mean, "
    "Tensor before, int bits) -> Tensor",
)
def _keep(
    blocks: torch.Tensor,
    recent: torch.Tensor,
    rows: torch.Tensor,
    into: torch.Tensor,
    query: torch.Tensor,
    mean: torch.Tensor | None,
    before: torch.Tensor,
    bits: int,
) -> torch.Tensor:
    """Store rows [batch, heads, cells, dim] behind the cell ``before``; what was among the newest, and these,
    as they are kept in 16 bits."""
    cells = before + torch.arange(rows.shape[2], device=rows.device)
    if rows.device.type == "cpu" and int(before) + rows.shape[2] > blocks.shape[2]:
        raise UsageError(
            f"this cache has room for {blocks.shape[2]} tokens, and {int(before)} + {rows.shape[2]} come",
            remedy="a larger max_cache_len",
        )
    stored = Basis(into, query, mean).store(rows)
    blocks.index_copy_(2, cells, codec(bits, rows.shape[3], rows.device).encode(stored))
    exact = torch.cat([recent, in_16_bits(stored)], dim=2)
    recent.copy_(exact[:, :, exact.shape[2] - recent.shape[2] :])
    return exact


@_keep.register_fake
def _like_keep(
    blocks: torch.Tensor, recent: torch.Tensor, rows: torch.Tensor, *args: Any, **kwargs: Any
) -> torch.Tensor:
    batch, heads, cells, dim = rows.shape
    return recent.new_empty(batch, heads, recent.shape[2] + cells, dim)


@torch.library.custom_op(
    "ggufrq::attend",
    mutates_args=_CHANGED,
    schema=f"(Tensor q, {_PARTS}, Tensor? mask, int recent, int new, float scale, bool causal, "
    "float? softcap, Tensor? sinks) -> Tensor",
)
def _attend(q: torch.Tensor, *args: Any) -> torch.Tensor:
    """Attention of the queries of the new cells."""
    k, v, where = Part(*args[:7]), Part(*args[7:14]), Where(*args[14:17])
    mask, recent, new, scale, causal, softcap, sinks = args[17:]
    mask, bias = split_mask(mask)
    _learn(k, v, where, new, None if mask is None else mask.any(dim=1))
    out = []
    for i in range(0, new, QUERIES):
        rows = slice(i, i + QUERIES)
        some = _Queries(
            q[:, :, rows],
            (k, v, where),
            None if mask is None else mask[:, :, rows],
            None if bias is None else bias[:, :, rows],
            first=i,
            new=new,
            recent=recent,
            causal=causal,
            options={"scale": scale, "softcap": softcap, "sinks": sinks},
        )
        out.append(some.attend())
    return torch.cat(out, dim=2).to(q.dtype)


@_attend.register_fake
def _like_attend(q: torch.Tensor, *args: Any) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], Part(*args[7:14]).dim)


@torch.library.custom_op(
    "ggufrq::dense",
    mutates_args=_CHANGED,
    schema=f"({_PARTS}, int recent, int new, bool of_v) -> Tensor",
)
def _dense(*args: Any) -> torch.Tensor:
    """K or V dense, in float32."""
    k, v, where = Part(*args[:7]), Part(*args[7:14]), Where(*args[14:17])
    recent, new, of_v = args[17:]
    _learn(k, v, where, new, None)
    part = v if of_v else k
    size = part.blocks.shape[2]
    out = torch.empty(*part.blocks.shape[:3], part.dim, device=part.blocks.device)
    for first in range(0, size, TILE):
        out[:, :, first : first + TILE] = part.basis.restore(part.decoded(first, first + TILE))
    cells = torch.arange(size, device=out.device)
    newest = _among_newest(cells, where.before + new - 1, where, recent)
    if recent:
        at = cells - where.before + part.exact.shape[2] - new
        rows = part.exact[:, :, at.clamp(0, part.exact.shape[2] - 1)].float()
        out = torch.where(newest[:, None], part.basis.restore(rows), out)
    count = part.first.shape[2]
    if count:
        at = first_cells(where.rows, count)
        inside = ((at >= 0) & (at < where.before + new))[:, None, :, None]
        inside = inside & ~newest[at.clamp(0, size - 1)][:, None, :, None]
        at = rows_at(at, out)
        rows = part.basis.restore(part.first.float())
        out.scatter_(2, at, torch.where(inside, rows, out.gather(2, at)))
    return out


@_dense.register_fake
def _like_dense(*args: Any) -> torch.Tensor:
    part = Part(*args[7:14]) if args[19] else Part(*args[:7])
    return part.first.new_empty(*part.blocks.shape[:3], part.dim, dtype=torch.float32)


def _learn(k: Part, v: Part, where: Where, new: int, visible: torch.Tensor | None) -> None:
    """Keep those of the first tokens that are among the new ones, see ``Kept.learn``."""
    where.rows.copy_(begin(where.rows, visible, 0))
    cells = first_cells(where.rows, k.first.shape[2])
    inside = ((cells >= where.before) & (cells < where.before + new))[:, None, :, None]
    for part in (k, v):
        at = rows_at(cells - where.before + part.exact.shape[2] - new, part.exact)
        part.first.copy_(torch.where(inside, part.exact.gather(2, at), part.first))


def _among_newest(cells: torch.Tensor, at: torch.Tensor, where: Where, recent: int) -> torch.Tensor:
    """Whether cells are among the newest that are held as they were, for a query of the cell ``at``."""
    behind = at - cells
    return (behind >= 0) & (behind < recent) & (cells >= where.before - where.held)


class _Queries(Softmax):
    """Some queries, ``first`` and following of the new ones, and their softmax."""

    def __init__(
        self,
        query: torch.Tensor,
        held: tuple[Part, Part, Where],
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        *,
        first: int,
        new: int,
        recent: int,
        causal: bool,
        options: dict[str, Any],
    ) -> None:
        self.k, self.v, self.where = held
        super().__init__(query, self.k.basis, self.v.basis, self.k.blocks.shape[1], self.v.dim, **options)
        self.mask, self.bias, self.causal = mask, bias, causal
        self.begin, self.new, self.recent = first, new, recent
        places = torch.arange(first, first + self.n, device=query.device)
        self.at = (self.where.before + places)[:, None]  # the cells of the queries

    def attend(self) -> torch.Tensor:
        """[batch, heads, queries, dim of V]."""
        count, device = self.k.first.shape[2], self.at.device
        # what is behind the last cell costs time alone, and to know that a GPU would have to be waited for
        size = int(self.where.before) + self.new if device.type == "cpu" else self.k.blocks.shape[2]
        for first in range(0, size, TILE):
            cells = torch.arange(first, min(first + TILE, size), device=device)
            seen, bias = self._seen(cells)
            exact = _among_newest(cells, self.at, self.where, self.recent)[None, None]
            exact = exact | among_first(self.where.rows, count, cells)
            last = first + len(cells)
            self.take(self.k.decoded(first, last), self.v.decoded(first, last), seen & ~exact, bias)
        if self.recent:
            old = self.k.exact.shape[2] - self.new
            rows = slice(max(self.begin + old - self.recent + 1, 0), self.begin + old + self.n)
            cells = self.where.before - old + torch.arange(rows.start, rows.stop, device=device)
            seen, bias = self._seen(cells)
            seen = seen & _among_newest(cells, self.at, self.where, self.recent)
            self.take(self.k.exact[:, :, rows].float(), self.v.exact[:, :, rows].float(), seen, bias)
        if count:
            self._first(first_cells(self.where.rows, count))
        return self.mean()

    def _first(self, cells: torch.Tensor) -> None:
        """The first tokens, as they were, where they are not among the newest."""
        cells = cells[:, None, None]  # [batch, 1, 1, first]
        seen = (cells >= 0) & (cells < self.where.before + self.new)
        seen = seen & ~_among_newest(cells, self.at, self.where, self.recent)
        bias = None
        if self.mask is not None:
            at = cells.clamp(0, self.mask.shape[3] - 1).expand(-1, self.mask.shape[1], self.n, -1)
            seen = seen & self.mask.expand(len(cells), -1, -1, -1).gather(3, at)
            bias = None if self.bias is None else self.bias.expand(len(cells), -1, -1, -1).gather(3, at)
        elif self.causal:
            seen = seen & (cells <= self.at)
        self.take(self.k.first.float(), self.v.first.float(), seen, bias)

    def _seen(self, cells: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Whether cells are seen, and what is added to their scores, [batch or 1, heads or 1, queries,
        cells]."""
        if self.mask is None:
            last = self.at if self.causal else self.where.before + self.new - 1
            return (cells <= last).expand(self.n, -1)[None, None], None
        at = cells.clamp(0, self.mask.shape[3] - 1)
        seen = self.mask[..., at] & (cells < self.where.before + self.new)
        return seen, None if self.bias is None else self.bias[..., at]


@dataclass
class _Side:
    """K or V of a layer, as it is held."""

    basis: Basis
    bits: int
    blocks: torch.Tensor
    recent: torch.Tensor
    first: torch.Tensor

    def tensors(self) -> list[torch.Tensor]:
        return [self.blocks, self.recent, self.first]


class FixedAttentionLayer(CacheLayerMixin):
    """K and V of one attention layer, of up to ``size`` tokens. ``window``: how many tokens a query sees,
    None for all; the mask tells which."""

    is_compileable = True
    is_croppable = True
    supports_early_init = True

    def __init__(
        self, settings: Settings, profile: LayerProfile | None, window: int | None, size: int
    ) -> None:
        super().__init__()
        self.settings, self.profile, self.window = settings, profile, window
        self.is_sliding = window is not None
        self.sliding_window = window
        self.max_cache_len = size
        self.recent = min(settings.recent, size)
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.sides: tuple[_Side, _Side] | None = None
        self.length = torch.tensor(0)
        #: How many of the newest are held as they were, the last ones of ``recent``.
        self.held = torch.tensor(0)
        self.rows: torch.Tensor | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """As that of ``QuantizedAttentionLayer``."""
        s, device = self.settings, key_states.device

        def side(x: torch.Tensor, bits: int, profile: LayerProfile | None) -> _Side:
            batch, heads, _, dim = x.shape
            made = basis(s.family, heads, dim, device, profile)
            code = codec(bits, dim, device).code
            size = dim // code.block * code.bytes
            blocks = torch.zeros(batch, heads, self.max_cache_len, size, dtype=torch.uint8, device=device)
            recent, first = (
                torch.zeros(batch, heads, n, dim, dtype=torch.float16, device=device)
                for n in (self.recent, s.first)
            )
            return _Side(made, bits, blocks, recent, first)

        self.sides = side(key_states, s.bits, self.profile), side(value_states, s.v_bits, None)
        self.device = device
        self.rows = torch.full((len(key_states),), -1, device=device)
        self.length, self.held = self.length.to(device), self.held.to(device)
        if not torch.compiler.is_compiling():  # what a graph writes to stays where it is
            for one in (*self.tensors(), self.rows, self.length, self.held):
                torch._dynamo.mark_static_address(one)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """As that of ``QuantizedAttentionLayer``. Raises UsageError when there is no room for so many."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.sides is not None and self.rows is not None
        for side, rows in zip(self.sides, (key_states, value_states), strict=True):
            require_alike(side.first, rows)
        new = key_states.shape[2]
        where = Where(self.rows, self.length.clone(), self.held.clone())
        parts = []
        for side, rows in zip(self.sides, (key_states.detach(), value_states.detach()), strict=True):
            basis = side.basis.into, side.basis.query, side.basis.mean
            exact = torch.ops.ggufrq.keep(side.blocks, side.recent, rows, *basis, where.before, side.bits)
            parts.append(Part(side.blocks, exact, side.first, *basis, side.bits))
        self.length.add_(new)
        self.held.add_(new).clamp_(max=self.recent)
        moment = Moment(parts[0], parts[1], where, self.recent, new, key_states.dtype)
        return FixedStored(moment, "k"), FixedStored(moment, "v")

    def get_seq_length(self) -> Any:
        """Tokens that were stored, a tensor as in other layers of a fixed size."""
        return self.length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many cells the mask is over, and which is its first."""
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        """How many tokens there is room for."""
        return self.max_cache_len

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, ``-tokens_to_remove`` of them. Raises UsageError for a positive
        number."""
        require_negative(tokens_to_remove)
        if self.sides is None or self.rows is None:
            return
        gone = min(-tokens_to_remove, int(self.length))
        self.length.sub_(gone)
        self.held.sub_(gone).clamp_(min=0)
        for side in self.sides:
            side.recent.copy_(side.recent.roll(gone, dims=2))
        self.rows.masked_fill_(self.rows >= self.length, -1)

    def reset(self) -> None:
        """Forget everything."""
        self.length.zero_()
        self.held.zero_()
        if self.rows is not None:
            self.rows.fill_(-1)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows ``beam_idx`` of the batch."""
        if self.sides is not None and self.rows is not None:
            for one in (*self.tensors(), self.rows):
                one.copy_(one.index_select(0, beam_idx.to(one.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` of the batch."""
        self._change(lambda x: x[indices.to(x.device)])

    def _change(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.sides is not None and self.rows is not None:
            for side in self.sides:
                side.blocks, side.recent, side.first = map(rows, side.tensors())
            self.rows = rows(self.rows)

    def tensors(self) -> list[torch.Tensor]:
        """All that is held for tokens."""
        return [] if self.sides is None else [x for side in self.sides for x in side.tensors()]

    def state(self) -> State | None:
        """What is held, None where that is nothing."""
        if self.sides is None or self.rows is None:
            return None
        length, held = int(self.length), int(self.held)
        k, v = (
            (side.blocks[:, :, :length], side.recent[:, :, side.recent.shape[2] - held :], side.first)
            for side in self.sides
        )
        return State(0, length, self.rows, k, v)

    def take(self, state: State) -> None:
        """Hold what another layer did. Raises ModelError when it does not fit."""
        if state.length > self.max_cache_len:
            raise ModelError(
                f"{state.length} tokens were saved, and this cache has room for {self.max_cache_len}",
                remedy=f"max_cache_len={state.length} or more",
            )
        self.lazy_initialization(
            *(x[2].new_empty(*x[2].shape[:2], 0, x[2].shape[3]) for x in (state.k, state.v))
        )
        assert self.sides is not None and self.rows is not None
        for side, (blocks, recent, first) in zip(self.sides, (state.k, state.v), strict=True):
            side.blocks[:, :, state.start : state.length] = blocks
            side.recent[:, :, side.recent.shape[2] - recent.shape[2] :] = recent
            side.first.copy_(first)
        self.length.fill_(state.length)
        self.held.fill_(state.k[1].shape[2])
        self.rows.copy_(state.rows)
