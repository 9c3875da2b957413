"""What a model keeps of every token and every sequence, layer by layer, from the metadata of its GGUF alone.

Follows ``load_hparams`` and ``create_memory`` in llama.cpp's src/llama-model.cpp; what depends on the
architecture is data, in ``architectures.toml``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ModelError
from ggufrq.base.toml import tomllib
from ggufrq.ggufs.header import Header, TensorInfo
from ggufrq.ggufs.tensors import type_bytes, type_name


@dataclass(frozen=True)
class Layer:
    """Values of K and of V that it keeps of a token, in heads of ``head_k`` and ``head_v`` values, of a
    window only where ``window`` is set; of the key that an indexer of sparse attention keeps beside
    (``index``) and of what is laid out with it for V (``index_v``); and values of its recurrent state, ``r``
    of the convolution and ``s``."""

    k: int = 0
    v: int = 0
    head_k: int = 0
    head_v: int = 0
    window: bool = False
    r: int = 0
    s: int = 0
    index: int = 0
    index_v: int = 0

    @property
    def caches(self) -> bool:
        """Whether it keeps K and V."""
        return bool(self.k or self.v)


@dataclass(frozen=True)
class MemoryShape:
    """What decides the memory that a model takes.

    ``window`` is the length of the window of layers that have one; ``mla`` tells that K alone is kept,
    compressed; ``native`` is the context that the model was trained for; ``weight_bytes`` is the data of all
    tensors. The rest are widths, in values of one token, of the widest layer: ``query`` of all heads, ``ffn``
    of a feed-forward network, ``expert_ffn`` of each of the ``experts`` that are used, ``convolution`` of a
    recurrent layer, ``index_query`` of all heads of an indexer; ``index_scores`` is how many values are there
    at once for a token and each one before, about.
    """

    architecture: str
    layers: tuple[Layer, ...]
    window: int
    mla: bool
    native: int
    embedding: int
    vocabulary: int
    weight_bytes: int
    query: int
    ffn: int
    experts: int
    expert_ffn: int
    convolution: int
    index_query: int = 0
    index_scores: float = 0.0

    @property
    def cached(self) -> tuple[Layer, ...]:
        """The layers with K and V, which ``--kv`` counts from 0."""
        return tuple(layer for layer in self.layers if layer.caches)

    @property
    def k_layers(self) -> tuple[int, ...]:
        """Values of K of one token in each layer of ``cached``."""
        return tuple(layer.k for layer in self.cached)

    @property
    def v_layers(self) -> tuple[int, ...]:
        """Values of V of one token in each layer of ``cached``."""
        return tuple(layer.v for layer in self.cached)

    @property
    def k_heads(self) -> tuple[int, ...]:
        """Values of a head of K in each layer of ``cached``; with MLA, what they and those of V, the first of
        them, are multiples of."""
        return tuple(
            math.gcd(layer.head_k, layer.head_v) if self.mla else layer.head_k for layer in self.cached
        )

    @property
    def v_heads(self) -> tuple[int, ...]:
        """Values of a head of V in each layer of ``cached``."""
        return tuple(layer.head_v for layer in self.cached)

    @property
    def state(self) -> int:
        """Values of the recurrent state of one sequence."""
        return sum(layer.r + layer.s for layer in self.layers)


def memory_shape(headers: Sequence[Header]) -> MemoryShape:
    """The shape of the model with these headers, of all its shards, the first one first.

    Raises ModelError when the metadata lacks something, and for models whose cache is of a kind that is not
    computed here.
    """
    facts = _Facts(headers[0].values)
    refused = _rules()["refused"].get(facts.architecture)
    if refused is not None:
        fixed = facts.architecture in _rules()["unread"]
        raise ModelError(
            f"the memory of {facts.architecture} is not computed: it {refused}",
            remedy="its cache can be kept in f16 and q8_0: --kv q8_0" if fixed else None,
        )
    tokens = headers[0].values.get("tokenizer.ggml.tokens", ())
    return MemoryShape(
        architecture=facts.architecture,
        layers=facts.layers(),
        window=facts.window,
        mla=facts.mla,
        native=facts.number("context_length"),
        embedding=facts.number("embedding_length"),
        vocabulary=facts.number("vocab_size", len(tokens)) or len(tokens),
        weight_bytes=sum(_bytes(tensor) for header in headers for tensor in header.tensors),
        query=max((heads * facts.head("key", i) for i, heads in enumerate(facts.heads)), default=0),
        ffn=max(facts.per_layer("feed_forward_length", 0), default=0),
        experts=max(facts.per_layer("expert_used_count", 0), default=0),
        expert_ffn=max(facts.per_layer("expert_feed_forward_length", None) or facts.ffn, default=0),
        convolution=facts.convolution,
        index_query=facts.index_query,
        index_scores=facts.index_scores,
    )


def tensor_bytes(headers: Sequence[Header]) -> dict[str, int]:
    """Bytes of the data of all tensors by name, of a model with these headers of its files."""
    return {tensor.name: _bytes(tensor) for header in headers for tensor in header.tensors}


def layers_of(values: Mapping[str, Any]) -> tuple[Layer, ...]:
    """All layers of the model with this metadata. Raises ModelError when it lacks something."""
    return _Facts(values).layers()


def is_mla(values: Mapping[str, Any]) -> bool:
    """Whether the model with this metadata keeps K alone, compressed."""
    return _Facts(values).mla


def head_sizes(values: Mapping[str, Any]) -> tuple[int, ...]:
    """Values of a head of K or V, each size once, over all layers that keep any; none where the metadata does
    not tell."""
    try:
        layers = [layer for layer in layers_of(values) if layer.caches]
    except ModelError:
        return ()
    k, v = ([layer.head_k for layer in layers if layer.k], [layer.head_v for layer in layers if layer.v])
    return tuple(dict.fromkeys([*k, *v]))


def is_named(architecture: str, rule: str) -> bool:
    """Whether ``architectures.toml`` names an architecture in the list of a rule."""
    return architecture in _rules()[rule]["names"]


def unread(architecture: str) -> str | None:
    """Why llama.cpp's graph of an architecture cannot read K in a type of ours, None where it can."""
    found: str | None = _rules()["unread"].get(architecture)
    return found


@cache
def _rules() -> dict[str, Any]:
    text = Path(__file__).with_name("architectures.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)
    return found


def _bytes(tensor: TensorInfo) -> int:
    kind = type_name(tensor.type)
    if kind is None:
        raise ModelError(f"{tensor.name} has the unknown type {tensor.type}", remedy="a newer ggufrq")
    return type_bytes(kind, tensor.values, tensor.columns) if tensor.values else 0


class _Facts:
    """Metadata as llama.cpp reads it, with its defaults."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        self.architecture = str(values.get("general.architecture", ""))
        if not self.architecture:
            raise ModelError("the file does not say of which architecture it is", remedy="a GGUF of a model")
        loops = self.number("num_loops", 1)  # a model that runs through its layers several times
        self.count = self.number("block_count") * loops
        self.predicting = self.number("nextn_predict_layers", 0)
        self.own = self.count - self.predicting
        self.heads = self.per_layer("attention.head_count", 0)
        self.kv_heads = self.per_layer("attention.head_count_kv", None) or self.heads
        self.ffn = self.per_layer("feed_forward_length", 0)
        self.mla = bool(self.number("attention.key_length_mla", 0))
        self.windows = self._windows()
        self.window = self._window if any(self.windows) else 0

    def number(self, key: str, default: int | None = None) -> int:
        """A number of the architecture's own. Raises ModelError when it is missing and has no default."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if not isinstance(value, int):
            raise ModelError(
                f"the metadata has no {self.architecture}.{key}", remedy="convert the model again"
            )
        return int(value)

    def per_layer(self, key: str, default: int | None) -> tuple[int, ...]:
        """A number for each layer, from one number or a list. Empty without default."""
        value = self.values.get(f"{self.architecture}.{key}", default)
        if value is None:
            return ()
        listed = tuple(map(int, value)) if isinstance(value, tuple) else (int(value),) * self.count
        if len(listed) < self.count:
            listed *= -(-self.count // max(1, len(listed)))  # a model that runs through its layers again
        return listed[: self.count]

    def layers(self) -> tuple[Layer, ...]:
        """All layers of the main model; those that predict further tokens are no part of its context."""
        if self.architecture in _rules()["none"]["names"]:
            return (Layer(),) * self.count
        shared = self._shared_from()
        recurrent, attends = self._kinds()
        chooses = self._indexers()
        return tuple(
            self._layer(i, keeps=attends[i] and i < shared, state=recurrent[i], chooses=chooses[i])
            for i in range(self.own if self.own > 0 else self.count)
        )

    def _layer(self, i: int, *, keeps: bool, state: bool, chooses: bool) -> Layer:
        head_k, head_v = self.head("key", i), self.head("value", i)
        heads = self.kv_heads[i] if keeps else 0
        r, s = self._state() if state else (0, 0)
        v = 0 if self.mla else heads * head_v
        window = bool(heads) and self.windows[i]
        if not (heads and chooses) or window:
            return Layer(heads * head_k, v, head_k, head_v, window, r + self._history(i), s)
        with_v = _rules()["indexer"][self.architecture]["layers"] == "sparse"
        index = self.number("attention.indexer.key_length")
        return Layer(heads * head_k, v, head_k, head_v, window, r, s, index, head_v if with_v else 0)

    def _indexers(self) -> tuple[bool, ...]:
        """Which layers have an indexer, among those that keep K and V of all tokens."""
        rule = _rules()["indexer"].get(self.architecture)
        if rule is None or not self.number("attention.indexer.top_k", 0):
            return (False,) * self.count
        if rule["layers"] == "sparse":
            dense = self.number("leading_dense_block_count", 0)
            return tuple(i >= dense for i in range(self.count))
        if rule["layers"] == "all":
            return (True,) * self.count
        listed = self.per_layer("attention.indexer.types", None)
        if listed:
            return tuple(map(bool, listed))
        if "long" not in rule:
            raise ModelError(
                "the metadata does not say which layers have an indexer", remedy="convert the model again"
            )
        short = self.number("context_length") < rule["long"]
        return tuple(short or i < 2 or (i - 2) % 4 == 0 for i in range(self.count))

    @property
    def index_query(self) -> int:
        """Values of the queries of an indexer for one token."""
        if not any(self._indexers()):
            return 0
        return self.number("attention.indexer.head_count") * self.number("attention.indexer.key_length")

    @property
    def index_scores(self) -> float:
        """Values that choosing takes for a token and each one before: those of each head, twice, where they
        are pooled; else scores, their order and two masks, of which llama.cpp's dry runs gave four or
        five."""
        if not any(self._indexers()):
            return 0.0
        if not _rules()["indexer"][self.architecture].get("pools"):
            return 4.5
        pooled = max(self.per_layer("attention.compress_ratios", 1), default=1)
        return 2 * self.number("attention.indexer.head_count") / max(1, pooled)

    def _history(self, i: int) -> int:
        """Values that a layer with embeddings of n-grams keeps of earlier ones (``ple_conv_state`` in
        src/llama-hparams.cpp)."""
        if i not in self.values.get(f"{self.architecture}.ple.layers", ()):
            return 0
        kernel, size = self.number("ple.conv_kernel", 0), self.number("ple.ngram_size", 0)
        streams = self.number("hyper_connection.count", 1)
        return max(0, kernel - 1) * size * streams * self.number("embedding_length")

    def head(self, what: str, i: int) -> int:
        """Values of a head of K (``key``) or V (``value``)."""
        heads = next((count for count in self.heads if count), 0)  # layers without attention have none
        if not heads:
            return 0
        whole = self.number(f"attention.{what}_length", self.number("embedding_length") // heads)
        return self.number(f"attention.{what}_length_swa", whole) if self.windows[i] else whole

    def _windows(self) -> tuple[bool, ...]:
        """Which layers see a window only."""
        rule = _rules()["windows"].get(self.architecture)
        nothing = (False,) * self.count
        self._window = 0
        if rule is None or self.own != rule.get("layers", self.own):
            return nothing
        self._window = self.number("attention.sliding_window", rule.get("window", 0))
        if not self._window:
            return nothing
        self._window = rule.get("fixed", self._window)
        pattern = self.values.get(f"{self.architecture}.attention.sliding_window_pattern", rule.get("every"))
        if isinstance(pattern, tuple):
            return (*map(bool, pattern), *nothing)[: self.count]
        if not isinstance(pattern, int):
            raise ModelError(
                "the metadata does not say which layers have a window", remedy="convert it again"
            )
        whole = 0 if rule.get("dense_first") else pattern - 1
        return tuple(i < self.own and (pattern == 0 or i % pattern != whole) for i in range(self.count))

    @property
    def convolution(self) -> int:
        """Channels of the convolution of a recurrent layer."""
        inner, kda = self.number("ssm.inner_size", 0), self.number("kda.head_dim", 0)
        groups = self.number("ssm.group_count", 0)
        return 3 * self.heads[0] * kda if kda else inner + 2 * groups * self.number("ssm.state_size", 0)

    def _shared_from(self) -> int:
        """The first layer that uses the K and V of an earlier one."""
        fixed: int | None = _rules()["shared_from"].get(self.architecture)
        if fixed is not None:
            return fixed
        return self.count - self.number("attention.shared_kv_layers", 0)

    def _kinds(self) -> tuple[tuple[bool, ...], tuple[bool, ...]]:
        """Which layers keep a recurrent state, and which keep K and V."""
        rule = _rules()["recurrent"].get(self.architecture)
        yes, no = (True,) * self.count, (False,) * self.count
        if rule is None:
            return no, yes
        if rule == "all":
            return yes, no
        if rule == "both":
            return yes, yes
        if rule == "heads":
            recurrent = tuple(heads == 0 for heads in self.kv_heads)
            return recurrent, tuple(not it for it in recurrent)
        if rule == "ffn":
            bare = tuple(size == 0 for size in self.ffn)
            headless = tuple(heads == 0 for heads in self.kv_heads)
            return (
                tuple(a and b for a, b in zip(bare, headless, strict=True)),
                tuple(a and not b for a, b in zip(bare, headless, strict=True)),
            )
        listed = self.per_layer("attention.recurrent_layers", None)
        every = self.number("full_attention_interval", rule)
        recurrent = tuple(map(bool, listed)) or tuple((i + 1) % every != 0 for i in range(self.count))
        return recurrent, tuple(not it for it in recurrent)

    def _state(self) -> tuple[int, int]:
        """Values of the state of a recurrent layer: of its convolution, and of the recurrence itself
        (``n_embd_r`` and ``n_embd_s`` in src/llama-hparams.cpp)."""
        width = self.number("embedding_length")
        head = self.number("wkv.head_size", 0)
        if head:
            return self.number("token_shift_count", 2) * width, width * head
        inner, size = self.number("ssm.inner_size", 0), self.number("ssm.state_size", 0)
        kernel = self.number("ssm.conv_kernel", 0)
        head = self.number("kda.head_dim", 0)
        if head:
            return (kernel - 1 if kernel else 3) * self.convolution, head * head * self.heads[0]
        short = self.number("shortconv.l_cache", 0)
        if short:
            return width * (short - 1), size * inner
        r = max(0, kernel - 1) * self.convolution
        if self.architecture == "minimax-01":  # linear attention, in heads as large as those of K
            head = self.head("key", 0)
            return r, head * head * self.heads[0]
        return r, size * inner
