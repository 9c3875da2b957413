"""The softmax of some queries over K and V that come a part at a time."""

from __future__ import annotations

import math

import torch

from ggufrq.hf.basis import Basis

#: Queries that are worked on at a time.
QUERIES = 256


class Softmax:
    """Some queries [batch, heads, queries, dim], and their softmax as far as it is: the largest score,
    the sum, and the sum of values, each [batch, heads of K, heads that share one, queries, …].

    ``softcap`` bounds scores, ``sinks`` [heads] are scores that take part without a value.
    """

    def __init__(
        self,
        query: torch.Tensor,
        k: Basis,
        v: Basis,
        kv_heads: int,
        v_dim: int,
        *,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> None:
        self.basis, self.scale, self.softcap = v, scale, softcap
        batch, self.heads, self.n, dim = query.shape
        self.kv_heads = kv_heads
        rows = query.reshape(batch, kv_heads, -1, dim)
        self.query = k.queries(rows)
        # what all scores of a query share cancels in a softmax, but not under a cap or beside sinks
        self.shared = None if softcap is None and sinks is None else k.shared(rows)
        each = (batch, kv_heads, self.heads // kv_heads, self.n)
        self.largest = torch.full((*each, 1), -math.inf, device=query.device)
        self.sum = torch.zeros(*each, 1, device=query.device)
        self.values = torch.zeros(*each, v_dim, device=query.device)
        if sinks is not None:
            self.largest = sinks.float().view(1, kv_heads, -1, 1, 1).expand_as(self.largest)
            self.sum = torch.ones_like(self.sum)

    def take(
        self, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor | None, bias: torch.Tensor | None
    ) -> None:
        """Let K and V [batch, heads, cells, dim] in the bases of the sides take part. ``seen`` and ``bias``
        are [batch or 1, heads or 1, queries, cells]."""
        scores = self.query @ k.mT
        scores = scores if self.shared is None else scores + self.shared
        scores = (scores * self.scale).view(*self.sum.shape[:-1], k.shape[2])
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        if bias is not None:
            scores = scores + self._by_head(bias)
        if seen is not None:
            scores = scores.masked_fill(~self._by_head(seen), -math.inf)
        largest = torch.maximum(self.largest, scores.amax(-1, keepdim=True))
        against = largest.masked_fill(largest == -math.inf, 0)
        weights = torch.exp(scores - against)
        before = torch.exp(self.largest - against)
        self.sum = self.sum * before + weights.sum(-1, keepdim=True)
        self.values = self.values * before + (weights.flatten(2, 3) @ v).view_as(self.values)
        self.largest = largest

    def merge(self, largest: torch.Tensor, total: torch.Tensor, values: torch.Tensor) -> None:
        """Let K and V take part whose softmax is known as far as this one."""
        both = torch.maximum(self.largest, largest)
        against = both.masked_fill(both == -math.inf, 0)
        mine, theirs = torch.exp(self.largest - against), torch.exp(largest - against)
        self.sum = self.sum * mine + total * theirs
        self.values = self.values * mine + values * theirs
        self.largest = both

    def mean(self) -> torch.Tensor:
        """The weighted mean of values, as models have them, [batch, heads, queries, dim of V]."""
        mean = self.values / self.sum.where(self.sum > 0, 1)
        return self.basis.restore(mean.flatten(2, 3)).view(len(mean), self.heads, self.n, -1)

    def _by_head(self, x: torch.Tensor) -> torch.Tensor:
        """x [batch or 1, heads or 1, queries, cells] in the shape of scores."""
        heads = (1, 1) if x.shape[1] == 1 else (self.kv_heads, -1)
        return x.reshape(len(x), *heads, *x.shape[2:])


def split_mask(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Of a mask that is boolean or added to scores, what is seen and what is added."""
    if mask is None or mask.dtype == torch.bool:
        return mask, None
    return mask > torch.finfo(mask.dtype).min / 2, mask.float()
