"""Models in torch, the embedded ones and those of a GGUF, with K and V changed on their way into attention.

transformers computes the models; its attention is replaced by one that passes K (after RoPE) and V through a
scheme first, in every layer, so that errors travel through the model as they do in llama.cpp.
"""

from __future__ import annotations

import itertools
import json
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
from ggufrq.ggufs.header import read_header

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
    """A model and windows of ``n_ctx`` tokens of a text; the second half of each is scored, as
    llama-perplexity does. It is an embedded one, or that of ``gguf``, which a folder of the same name with
    safetensors stands in for where there is one."""

    def __init__(
        self, model: str, n_ctx: int, chunks: int, text: str = "heldout.txt", gguf: Path | None = None
    ) -> None:
        logging.set_verbosity_error()
        folder, of_gguf = paths.data_dir("models") / model, {}
        if gguf is not None:
            copied = gguf.with_suffix("")
            folder = copied if copied.is_dir() else gguf.parent
            of_gguf = {} if copied.is_dir() else {"gguf_file": gguf.name}
        self.name = model
        self.gguf = gguf
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **of_gguf)
        self.model.eval()
        own = f"kvlab{next(_numbers)}"  # the table of attention functions is one for all models
        ALL_ATTENTION_FUNCTIONS.register(own, self._attention)
        self.model.config._attn_implementation = own
        self.n_ctx = n_ctx
        self.windows = self.windows_of(text, chunks)
        self.change: Change | None = None
        self.capture: dict[int, Captured] | None = None
        self.recent = 0  # so many tokens up to the query's own are seen unchanged
        self.first = 0  # and so many of the first ones
        self._base: list[torch.Tensor] = []

    def windows_of(self, text: str, chunks: int) -> list[torch.Tensor]:
        """``chunks`` times ``n_ctx`` tokens of a text that ships with ggufrq, each [1, n_ctx]. Like
        llama-perplexity it puts the first token of a text in front of each where the model wants one."""
        n, bos = self.n_ctx, None
        if self.gguf is None:
            ids = self._tokens(text, paths.data_dir("models") / self.name)
        else:
            # it takes minutes to read a tokenizer out of a GGUF
            kept = self.gguf.with_name(f"{self.name}-{Path(text).stem}-ids.json")
            if not kept.exists():
                found = self._tokens(text, self.gguf.parent, gguf_file=self.gguf.name)
                paths.atomic_write(kept, json.dumps(found))
            ids = json.loads(kept.read_text())
            values = read_header(self.gguf).values
            if values.get("tokenizer.ggml.add_bos_token"):
                bos = int(values["tokenizer.ggml.bos_token_id"])
        made = [torch.tensor(ids[i * n : (i + 1) * n])[None] for i in range(chunks)]
        if bos is not None:
            for window in made:
                window[0, 0] = bos
        return made

    def _tokens(self, text: str, folder: Path, **of_gguf: str) -> list[int]:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder, **of_gguf)
        words = Path(paths.data_dir("texts") / text).read_text(encoding="utf-8")
        return list(tokenizer(words, add_special_tokens=False)["input_ids"])

    def _attention(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float,
        sliding_window: int | None = None,
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
        position = torch.arange(query.shape[2])
        distance = position[:, None] - position[None, :]
        seen = distance >= 0
        if sliding_window:
            seen &= distance < sliding_window
        if self.change is not None and (self.recent or self.first):
            exact = (distance < self.recent) | (position < self.first)
            out = _two(query * scaling, (key, value), (plain_key, plain_value), seen, exact)
        else:
            out = F.scaled_dot_product_attention(
                query, key, value, attn_mask=seen, scale=scaling, enable_gqa=True
            )
        return out.transpose(1, 2).contiguous(), None

    def captured(self, window: int | torch.Tensor) -> dict[int, Captured]:
        """Q, K and V of every layer with attention, of one window, without any change."""
        self.capture, self.change = {}, None
        with torch.inference_mode():
            self.model.model(self.windows[window] if isinstance(window, int) else window, use_cache=False)
        found, self.capture = self.capture, None
        return found

    def _logits(self, window: torch.Tensor) -> torch.Tensor:
        """Log probabilities of the scored half [tokens, vocabulary]."""
        first = self.n_ctx // 2
        with torch.inference_mode():
            logits = self.model(window, use_cache=False, logits_to_keep=self.n_ctx - first).logits[0, :-1]
        return torch.log_softmax(logits.float(), dim=-1)

    def divergence(self, change: Change) -> F32:
        """Kullback-Leibler divergence of every scored token from the unchanged model, in nats [tokens]."""
        if not self._base:
            self.change = None
            self._base = [self._logits(window) for window in self.windows]
        self.change = change
        found = []
        for window, base in zip(self.windows, self._base, strict=True):
            pairs = zip(base.split(64), self._logits(window).split(64), strict=True)  # vocabularies are large
            found += [(p.exp() * (p - changed)).sum(dim=-1) for p, changed in pairs]
        self.change = None
        return np.asarray(torch.cat(found).numpy(), np.float32)


def _two(
    query: torch.Tensor,
    old: tuple[torch.Tensor, torch.Tensor],
    new: tuple[torch.Tensor, torch.Tensor],
    seen: torch.Tensor,
    exact: torch.Tensor,
) -> torch.Tensor:
    """Attention to ``old`` keys and values, but to ``new`` ones where ``exact``; both masks are
    [queries, keys]."""
    shared = query.shape[1] // old[0].shape[1]
    (ok, ov), (nk, nv) = (tuple(x.repeat_interleave(shared, dim=1) for x in pair) for pair in (old, new))
    logits = torch.where(exact, query @ nk.transpose(2, 3), query @ ok.transpose(2, 3))
    weights = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return (weights * ~exact) @ ov + (weights * exact) @ nv


def mean_and_error(x: Sequence[float] | F32) -> tuple[float, float]:
    """Mean and its standard error, of values taken as independent."""
    values = np.asarray(x, np.float64)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
