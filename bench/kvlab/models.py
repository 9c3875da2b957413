"""The embedded models in torch, with K and V changed on their way into attention.

transformers computes the models; its attention is replaced by one that passes K (after RoPE) and V through a
scheme first, in every layer, so that errors travel through the model as they do in llama.cpp.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ggufrq.base import paths

F32 = npt.NDArray[np.float32]
#: (layer, "k" or "v", x [heads, tokens, head_dim]) -> the same shape.
Change = Callable[[int, str, F32], F32]
_numbers = itertools.count()


@dataclass(frozen=True)
class Captured:
    """Of one layer: Q [heads, tokens, dim], times the scale of attention; K and V [kv_heads, tokens, dim]."""

    q: F32
    k: F32
    v: F32


class Lab:
    """An embedded model and windows of ``n_ctx`` tokens of a text; the second half of each is scored, as
    llama-perplexity does."""

    def __init__(self, model: str, n_ctx: int, chunks: int, text: str = "heldout.txt") -> None:
        logging.set_verbosity_error()
        folder = paths.data_dir("models") / model
        self.name = model
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.model.eval()
        own = f"kvlab{next(_numbers)}"  # the table of attention functions is one for all models
        ALL_ATTENTION_FUNCTIONS.register(own, self._attention)
        self.model.config._attn_implementation = own
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        words = Path(paths.data_dir("texts") / text).read_text(encoding="utf-8")
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        self.n_ctx = n_ctx
        self.windows = [torch.tensor(ids[i * n_ctx : (i + 1) * n_ctx])[None] for i in range(chunks)]
        self.change: Change | None = None
        self.capture: dict[int, Captured] | None = None
        self.recent = 0  # so many tokens up to the query's own are seen unchanged
        self._base: list[torch.Tensor] = []

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        layer = module.layer_idx
        if self.capture is not None:
            k, v = key[0].numpy().copy(), value[0].numpy().copy()
            self.capture[layer] = Captured((query[0] * scaling).numpy().copy(), k, v)
        plain_key, plain_value = key, value
        if self.change is not None:
            key = torch.from_numpy(self.change(layer, "k", key[0].numpy()))[None]
            value = torch.from_numpy(self.change(layer, "v", value[0].numpy()))[None]
        if self.change is not None and self.recent:
            out = self._two(query * scaling, (key, value), (plain_key, plain_value))
            return out.transpose(1, 2).contiguous(), None
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scaling, enable_gqa=True
        )
        return out.transpose(1, 2).contiguous(), None

    def _two(
        self,
        query: torch.Tensor,
        old: tuple[torch.Tensor, torch.Tensor],
        new: tuple[torch.Tensor, torch.Tensor],
    ) -> torch.Tensor:
        """Attention to ``old`` keys and values, but to ``new`` ones for the most recent tokens."""
        shared = query.shape[1] // old[0].shape[1]
        (ok, ov), (nk, nv) = (tuple(x.repeat_interleave(shared, dim=1) for x in pair) for pair in (old, new))
        position = torch.arange(query.shape[2])
        distance = position[:, None] - position[None, :]
        recent = distance < self.recent
        logits = torch.where(recent, query @ nk.transpose(2, 3), query @ ok.transpose(2, 3))
        weights = logits.masked_fill(distance < 0, float("-inf")).softmax(dim=-1)
        return (weights * ~recent) @ ov + (weights * recent) @ nv

    def captured(self, window: int) -> dict[int, Captured]:
        """Q, K and V of every layer with attention, of one window, without any change."""
        self.capture, self.change = {}, None
        with torch.inference_mode():
            self.model(self.windows[window])
        found, self.capture = self.capture, None
        return found

    def _logits(self, window: torch.Tensor) -> torch.Tensor:
        """Log probabilities of the scored half [tokens, vocabulary]."""
        first = self.n_ctx // 2
        with torch.inference_mode():
            logits = self.model(window).logits[0, first:-1]
        return torch.log_softmax(logits, dim=-1)

    def divergence(self, change: Change) -> F32:
        """Kullback-Leibler divergence of every scored token from the unchanged model, in nats [tokens]."""
        if not self._base:
            self.change = None
            self._base = [self._logits(window) for window in self.windows]
        self.change = change
        found = []
        for window, base in zip(self.windows, self._base, strict=True):
            found.append((base.exp() * (base - self._logits(window))).sum(dim=-1))
        self.change = None
        return np.asarray(torch.cat(found).numpy(), np.float32)


def mean_and_error(x: Sequence[float] | F32) -> tuple[float, float]:
    """Mean and its standard error, of values taken as independent."""
    values = np.asarray(x, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
