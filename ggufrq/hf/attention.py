"""Attention over blocks, a tile at a time with a running softmax: K and V are never dense as a whole."""

from __future__ import annotations

from typing import Any

import torch
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface

from ggufrq.hf.fixed import FixedStored
from ggufrq.hf.kept import TILE, Held, Kept
from ggufrq.hf.softmax import QUERIES, Softmax, split_mask

#: The name of this attention for ``model.set_attn_implementation``.
NAME = "ggufrq"


def register() -> None:
    """Have ``sdpa``, the usual attention of models, read blocks where it is given some, and make it known as
    ``ggufrq`` as well, for models whose usual attention is another one."""
    if NAME in AttentionInterface._global_mapping:
        return
    usual = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def forward(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: Any,
        value: Any,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        blocks = isinstance(key, Held) and isinstance(value, Held)
        if not blocks or dropout or kwargs.get("position_bias") is not None:
            named = {"softcap": softcap, "s_aux": s_aux}
            kwargs |= {name: value for name, value in named.items() if value is not None}
            found: tuple[torch.Tensor, None] = usual(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **kwargs,
            )
            return found
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        options: dict[str, Any] = {"causal": causal, "softcap": softcap, "sinks": s_aux}
        if isinstance(key, FixedStored):
            out = key.moment.attend(query, attention_mask, scale, **options)
        else:
            out = attend(query, key.kept, attention_mask, scale, **options)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("sdpa", forward)
    AttentionInterface.register(NAME, forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    query: torch.Tensor,
    kept: Kept,
    mask: torch.Tensor | None,
    scale: float,
    *,
    causal: bool = True,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention [batch, heads, queries, dim of V] of ``query`` [batch, heads, queries, dim], which belongs to
    the newest tokens, over what is kept.

    ``mask`` [batch or 1, heads or 1, queries, cells] is boolean or added to scores; without one, and when
    ``causal``, several queries see what is not behind them and a single one sees all. ``softcap`` bounds
    scores, ``sinks`` [heads] are scores that take part in the softmax without a value.
    """
    queries, blocks = query.shape[2], kept.k.blocks
    mask, bias = split_mask(mask)
    kept.learn(None if mask is None else mask.any(dim=1))
    out = []
    for i in range(0, queries, QUERIES):
        rows = slice(i, i + QUERIES)
        some = _Queries(
            kept,
            query[:, :, rows],
            blocks.end - queries + i,
            None if mask is None else mask[:, :, rows],
            None if bias is None else bias[:, :, rows],
            causal=causal and mask is None and queries > 1,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
        )
        out.append(some.attend())
    return torch.cat(out, dim=2).to(query.dtype)


class _Queries(Softmax):
    """Some queries, of the cells from ``first`` on, and their softmax."""

    def __init__(
        self,
        kept: Kept,
        query: torch.Tensor,
        first: int,
        mask: torch.Tensor | None,
        bias: torch.Tensor | None,
        *,
        causal: bool,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        k, v = kept.k, kept.v
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": sinks}
        super().__init__(query, k.side.basis, v.side.basis, k.new.shape[1], v.new.shape[3], **options)
        self.kept, self.mask, self.bias, self.causal = kept, mask, bias, causal
        self.first, self.end = first, first + self.n
        self.cells = torch.arange(first, self.end, device=query.device)[:, None]

    def attend(self) -> torch.Tensor:
        """[batch, heads, queries, dim of V]."""
        k, v = self.kept.k, self.kept.v
        if self._by_kernel():
            self._newest()
            self._first()
            return self.mean()
        for (first, k_tile), (_, v_tile) in zip(k.blocks.tiles(TILE), v.blocks.tiles(TILE), strict=True):
            end = first + k_tile.shape[2]
            if self.causal and first >= self.end:
                break
            seen = self._seen(first, end)
            exact = self._exact(first, end)
            if exact is not None:
                seen = ~exact if seen is None else seen & ~exact
            if seen is None or self.n == 1 or bool(seen.any()):
                self.take(
                    k.side.codec.decode(k_tile), v.side.codec.decode(v_tile), seen, self._bias(first, end)
                )
        self._newest()
        self._first()
        return self.mean()

    def _by_kernel(self) -> bool:
        """Take all from blocks by the kernel, where it is asked for and can."""
        k, v = self.kept.k, self.kept.v
        if not k.side.triton or self.n > 1 or self.bias is not None or self.shared is not None:
            return False
        if self.mask is not None and self.mask.shape[1] > 1:
            return False
        from ggufrq.hf import kernels  # not everybody has it

        start, end = k.blocks.start, k.blocks.end
        seen, exact = self._seen(start, end), self._exact(start, end)
        if seen is None:
            seen = torch.ones(1, 1, 1, end - start, dtype=torch.bool, device=self.query.device)
        seen = (seen if exact is None else seen & ~exact)[:, 0, 0].expand(len(self.query), -1)
        chunks, codes = (k.blocks.chunks, v.blocks.chunks), (k.side.codec.code, v.side.codec.code)
        self.merge(*kernels.attend(self.query, *chunks, *codes, seen, self.scale, self.softcap))
        return True

    def _newest(self) -> None:
        """The newest tokens of each query, as they were."""
        k, v = self.kept.k, self.kept.v
        first = max(self.first - self.kept.recent + 1, k.first_exact, k.blocks.start)
        if first < self.end and self.kept.recent:
            seen, newest = self._seen(first, self.end), self._is_newest(first, self.end)
            seen = newest if seen is None else seen & newest
            rows = k.exact(first, self.end).float(), v.exact(first, self.end).float()
            self.take(*rows, seen, self._bias(first, self.end))

    def _first(self) -> None:
        """The first tokens, as they were, where they are not among the newest."""
        kept = self.kept
        if kept.starts.count == 0:
            return
        start, cells = kept.k.blocks.start, kept.starts.cells()
        inside = (cells >= start) & (cells < kept.k.blocks.end)
        cells = cells[:, None, None, :]  # [batch, 1, 1, first]
        seen = inside[:, None, None] & ~self._among_newest(cells)
        at = (cells - start).clamp(0, kept.k.blocks.end - start - 1)
        bias = None
        if self.mask is not None:
            at = at.expand(len(cells), self.mask.shape[1], self.n, -1)
            seen = seen & self.mask.expand(len(cells), -1, -1, -1).gather(3, at)
            bias = None if self.bias is None else self.bias.expand(len(cells), -1, -1, -1).gather(3, at)
        elif self.causal:
            seen = seen & (cells <= self.cells)
        self.take(kept.k.side.first.float(), kept.v.side.first.float(), seen, bias)

    def _seen(self, first: int, end: int) -> torch.Tensor | None:
        """Whether cells are seen, [batch or 1, heads or 1, queries, cells]; None where all are."""
        if self.mask is not None:
            start = self.kept.k.blocks.start
            return self.mask[..., first - start : end - start]
        if self.causal and end > self.first + 1:
            return (torch.arange(first, end, device=self.cells.device) <= self.cells)[None, None]
        return None

    def _bias(self, first: int, end: int) -> torch.Tensor | None:
        start = self.kept.k.blocks.start
        return None if self.bias is None else self.bias[..., first - start : end - start]

    def _exact(self, first: int, end: int) -> torch.Tensor | None:
        """Whether cells are seen as they were, [batch or 1, 1, queries, cells]; None where none is."""
        kept, found = self.kept, None
        if kept.recent and end > max(self.first - kept.recent + 1, kept.k.first_exact):
            found = self._is_newest(first, end)
        if kept.starts.count and first < kept.starts.end:
            among = kept.starts.among(torch.arange(first, end, device=self.cells.device))
            found = among if found is None else found | among
        return found

    def _is_newest(self, first: int, end: int) -> torch.Tensor:
        return self._among_newest(torch.arange(first, end, device=self.cells.device)[None, None, None])

    def _among_newest(self, cells: torch.Tensor) -> torch.Tensor:
        """Whether cells [batch or 1, 1, 1, n] are among the newest of each query that are held as they were,
        [batch or 1, 1, queries, n]."""
        behind = self.cells - cells
        return (behind >= 0) & (behind < self.kept.recent) & (cells >= self.kept.k.first_exact)
