"""A layer of the cache: K and V as blocks, and the newest and first tokens as they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin

from ggufrq.base.errors import UsageError
from ggufrq.hf.basis import basis
from ggufrq.hf.blocks import Blocks
from ggufrq.hf.kept import TILE, Kept, Stored, View
from ggufrq.hf.side import Settings, Side, Starts, State, require_alike, require_negative
from ggufrq.profile.file import LayerProfile


class QuantizedAttentionLayer(CacheLayerMixin):
    """K and V of one attention layer. ``window``: how many tokens a query sees, None for all; ``triton``: by
    ``ggufrq.hf.kernels``."""

    is_compileable = False
    is_croppable = True
    supports_early_init = False

    def __init__(
        self,
        settings: Settings,
        profile: LayerProfile | None = None,
        window: int | None = None,
        triton: bool = False,
    ) -> None:
        super().__init__()
        self.settings, self.profile, self.window, self.triton = settings, profile, window, triton
        self.is_sliding = window is not None
        self.sliding_window = window
        self.record_past = False
        self._clear()

    def _clear(self) -> None:
        self.is_initialized = False
        self.sides: tuple[Side, Side] | None = None
        self.length = 0
        self.starts: Starts | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make room for heads like those of ``key_states`` and ``value_states`` [batch, heads, cells, dim].

        Raises ModelError when they cannot be kept, UsageError when kernels are not for their device.
        """
        s = self.settings
        if self.triton:
            from ggufrq.hf import kernels  # not everybody has it

            kernels.require(key_states.device)

        def side(x: torch.Tensor, bits: int, profile: LayerProfile | None) -> Side:
            batch, heads, _, dim = x.shape
            made = basis(s.family, heads, dim, x.device, profile)
            kept = torch.zeros(batch, heads, s.first, dim, dtype=torch.float16, device=x.device)
            return Side(made, bits, kept[:, :, :0].clone(), kept, self.triton)

        self.sides = side(key_states, s.bits, self.profile), side(value_states, s.v_bits, None)
        self.device = key_states.device
        self.starts = Starts(torch.full((len(key_states),), -1, device=self.device), s.first)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Any, Any]:
        """Store K (behind RoPE) and V [batch, heads, cells, dim] of new tokens. What is returned stands for K
        and V of all tokens that are held: the attention of ggufrq reads blocks from it, any other function of
        torch gets dense tensors."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.sides is not None and self.starts is not None
        new = key_states.detach(), value_states.detach()
        for side, rows in zip(self.sides, new, strict=True):
            require_alike(side.first, rows)
        views = []
        for side, rows in zip(self.sides, new, strict=True):
            side.blocks.append(rows, side.basis.store, side.codec)
            views.append(View(side, side.blocks.snapshot(), side.recent, rows))
            if self.settings.recent:
                newest = side.exact(rows[:, :, -self.settings.recent :])
                side.recent = torch.cat([side.recent, newest], dim=2)[:, :, -self.settings.recent :].clone()
        self.length += key_states.shape[2]
        if not self.record_past:
            self._drop()
        kept = Kept(self.settings.recent, self.starts, views[0], views[1], key_states.dtype)
        return Stored(kept, kept.k), Stored(kept, kept.v)

    def _drop(self) -> None:
        """Forget what no later token sees."""
        if self.window is not None and self.sides is not None:
            for side in self.sides:
                side.blocks.drop(self.length - self.window + 1)

    def get_seq_length(self) -> int:
        """Tokens that were stored."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many cells the mask for so many new tokens is over, and which is its first."""
        start = 0 if self.sides is None else self.sides[0].blocks.start
        return self.length - start + query_length, start

    def get_max_length(self) -> int:
        """The window, -1 without."""
        return self.window or -1

    def activate_past_recording(self) -> None:
        """Drop nothing behind a window until ``crop``, which can then take tokens back."""
        self.record_past = True

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the newest tokens, ``-tokens_to_remove`` of them. Raises UsageError for a positive
        number, and when that needs tokens which a window has left behind."""
        require_negative(tokens_to_remove)
        if self.sides is None or self.starts is None:
            return
        length = max(self.length + tokens_to_remove, 0)
        if length == 0:
            self._clear()
            return
        if self.window is not None and self.sides[0].blocks.start > max(length - self.window + 1, 0):
            raise UsageError(
                f"{-tokens_to_remove} tokens cannot be taken back: the window has left behind what they saw",
                remedy="call activate_past_recording() before",
            )
        for side in self.sides:
            gone = self.length - length
            side.blocks.crop(length)
            side.recent = side.recent[:, :, : max(side.recent.shape[2] - gone, 0)].clone()
        self.length = length
        self.starts.crop(length)
        self._drop()

    def reset(self) -> None:
        """Forget everything."""
        self._clear()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take the rows ``beam_idx`` of the batch."""
        self._change(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row of the batch."""
        self._change(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows ``indices`` of the batch."""
        self._change(lambda x: x[indices.to(x.device)])

    def _change(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        if self.sides is not None and self.starts is not None:
            for side in self.sides:
                side.change(rows)
            self.starts.set(rows(self.starts.rows))

    def tensors(self) -> list[torch.Tensor]:
        """All that is held for tokens."""
        return [] if self.sides is None else [x for side in self.sides for x in side.tensors()]

    def state(self) -> State | None:
        """What is held, None where that is nothing."""
        if self.sides is None or self.starts is None:
            return None
        k, v = (
            (torch.cat([tile for _, tile in side.blocks.tiles(TILE)], dim=2), side.recent, side.first)
            for side in self.sides
        )
        return State(self.sides[0].blocks.start, self.length, self.starts.rows, k, v)

    def take(self, state: State) -> None:
        """Hold what another layer did. Raises ModelError when it does not fit."""
        self.lazy_initialization(
            *(x[2].new_empty(*x[2].shape[:2], 0, x[2].shape[3]) for x in (state.k, state.v))
        )
        assert self.sides is not None and self.starts is not None
        for side, (blocks, recent, first) in zip(self.sides, (state.k, state.v), strict=True):
            side.blocks, side.recent, side.first = Blocks.of(state.start, blocks), recent, first
        self.length = state.length
        self.starts.set(state.rows)
