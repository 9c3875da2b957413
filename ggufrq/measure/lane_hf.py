"""What caches of transformers hold and lose on a model, ours beside its own: ``ggufrq validate --lane hf``.

A text is read in pieces, as a chat is, in 32 bits, and the predictions over each cache are compared with
those over a dense one. What transformers' own caches take in with a piece is exact for that piece; so
are, with ours and ``+recentN``, the newest N tokens of each query.
"""

from __future__ import annotations

import importlib.util
import inspect
import platform
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache

from ggufrq.base import machine, paths
from ggufrq.base.errors import GgufrqError, ModelError, UsageError
from ggufrq.codec.tables import code, head_block
from ggufrq.hf import IsoQuantCache, PlanarQuantCache, RotorQuantCache
from ggufrq.models.resolve import resolve

#: Ours, and those of transformers itself.
DEFAULT_CASES = "iso4,iso3,iso2,hqq4,hqq2,quanto4,quanto2,fp8"
#: Tokens of a piece.
PIECE = 64

_OURS = {"iso": IsoQuantCache, "planar": PlanarQuantCache, "rotor": RotorQuantCache}
_PACKAGES = {"hqq": "hqq", "quanto": "optimum-quanto", "fp8": ""}
_TYPE = re.compile(r"(iso|planar|rotor)([2-5])(?:/\1([2-5]))?|(hqq)([12348])|(quanto)([24])|(fp8)")
_SUFFIX = re.compile(r"recent(\d+)|first(\d+)|(profile)|(plain)")


@dataclass(frozen=True)
class Options:
    """Tokens of a window, and how many windows; of the newest and first tokens how many are exact in
    caches that are not written otherwise; the profile of K of ours."""

    tokens: int = 1024
    windows: int = 1
    recent: int = 32
    first: int = 1
    profile: str | Path | None = None
    text: Path | None = None


@dataclass(frozen=True)
class Case:
    """``make`` makes the cache for a configuration, ``bits`` says how many a value of K or V takes in
    heads of so many values, but for exact tokens. ``package`` is what it takes."""

    name: str
    make: Callable[[Any], Any]
    bits: Callable[[int], float]
    package: str = ""


@dataclass(frozen=True)
class Row:
    """Bits of a value of K or V in the cache's code, and in all that is held in the end, where exact
    tokens take 16; the mean divergence in nats with its error, its 99.9 %, how often the likeliest token
    is the same. Or why there is nothing of it."""

    name: str
    bits: float | None = None
    held: float | None = None
    kld: float | None = None
    error: float | None = None
    kld_999: float | None = None
    same_top: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Result:
    """``scored`` predictions of ``model`` for each row, with these versions, on this processor."""

    model: str
    processor: str
    versions: dict[str, str]
    tokens: int
    windows: int
    scored: int
    rows: list[Row]

    def data(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"lane": "hf", **asdict(self)}


def parse_cases(text: str, options: Options) -> list[Case]:
    """``iso3``, K and V apart ``iso3/iso4``, transformers' own ``hqq4``, ``quanto4``, ``fp8``; with
    ``+recentN``, ``+firstN``, ``+profile``, ``+plain``. Raises UsageError."""
    words = [word.strip() for word in text.split(",") if word.strip()]
    if not words:
        raise UsageError("there is no cache to measure", remedy=f"--kv {DEFAULT_CASES}")
    cases = [_case(word, options) for word in words]
    return list({case.name: case for case in cases}.values())


def _case(word: str, options: Options) -> Case:
    kind, *suffixes = word.split("+")
    found, more = _TYPE.fullmatch(kind), [_SUFFIX.fullmatch(one) for one in suffixes]
    if found is None or None in more:
        raise UsageError(
            f"'{word}' is no cache of transformers that is known",
            remedy=f"{DEFAULT_CASES}; K and V apart iso3/iso4; iso3+recent32+first1",
        )
    recent, first, profile = options.recent, options.first, options.profile
    for one in more:
        assert one is not None
        recent = int(one[1]) if one[1] else recent
        first = int(one[2]) if one[2] else first
        if one[3] and profile is None:
            raise UsageError(f"'{word}' takes a profile", remedy="--kv-profile weights")
        profile = None if one[4] else profile
    if found[1]:
        bits, v_bits = int(found[2]), int(found[3] or found[2])
        name = kind + (f" +recent{recent}" if recent else "") + (f" +first{first}" if first else "")
        make = partial(_OURS[found[1]], bits, v_bits, recent=recent, first=first, profile=profile)
        return Case(
            name + (" +profile" if profile is not None else ""),
            lambda config: make(config=config),
            lambda dim: sum(_bits(b, dim) for b in (bits, v_bits)) / 2,
        )
    if found[8]:
        return Case("fp8", lambda config: QuantizedCache("fp8", config), lambda dim: 8.0)
    backend, nbits = (found[4], int(found[5])) if found[4] else (found[6], int(found[7]))
    # a scale and a zero in 16 bits for each 64 values; along a head, so that tokens are apart
    axes = {"axis_key": 1, "axis_value": 1} if backend == "hqq" else {"axis_key": 0, "axis_value": 0}
    return Case(
        kind + (f" +recent{recent}" if recent else ""),
        lambda config: QuantizedCache(backend, config, nbits=nbits, residual_length=recent, **axes),
        lambda dim: nbits + 0.5,
        _PACKAGES[backend],
    )


def _bits(bits: int, dim: int) -> float:
    made = code(bits, head_block(dim))
    return 8 * made.bytes / made.block


def missing(case: Case) -> str | None:
    """The package that a case takes and that is not installed."""
    module = {"hqq": "hqq", "optimum-quanto": "optimum.quanto"}.get(case.package)
    if module is None:
        return None
    there = importlib.util.find_spec(module.partition(".")[0]) and importlib.util.find_spec(module)
    return None if there else case.package


def measure(model: str, cases: Sequence[Case], options: Options, said: Callable[[Row], None]) -> Result:
    """Measure the cases on a model: an embedded one, a folder, or an id on the Hub. ``said`` hears each row.

    Raises UsageError for a GGUF and for a text that is too short, ModelError when the model cannot be loaded.
    """
    place = resolve(model)
    if place.kind == "gguf":
        raise UsageError(
            f"{model} is a GGUF, and the lane of transformers takes a model as it is on the Hub",
            remedy="its folder or its id on the Hub",
        )
    where = place.repo or str(place.path)
    transformers.logging.set_verbosity_error()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(where, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(where)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"transformers cannot load {model}: {str(error).splitlines()[0]}") from None
    path = options.text or paths.data_dir("texts") / "heldout.txt"
    wanted = options.tokens * options.windows
    ids = tokenizer(path.read_text(encoding="utf-8")[: 16 * wanted]).input_ids[:wanted]
    if len(ids) < wanted:
        raise UsageError(
            f"{path} has {len(ids):,} tokens, and {options.windows} × {options.tokens:,} are asked for",
            remedy="a longer --text, or a smaller --ctx or --chunks",
        )
    if options.tokens <= PIECE:
        raise UsageError(
            f"--ctx {options.tokens}: the first {PIECE} tokens are not scored", remedy="--ctx 1024"
        )
    windows = torch.tensor(ids).view(options.windows, 1, options.tokens)
    dense = [_read(loaded, window, DynamicCache(config=loaded.config)) for window in windows]
    rows = []
    for case in cases:
        rows.append(_row(case, loaded, windows, dense))
        said(rows[-1])
    names = ("transformers", "torch", *sorted({case.package for case in cases if case.package}))
    versions = {name: version(name) for name in names if name not in map(missing, cases)}
    return Result(
        place.name,
        machine.processor().name or platform.machine(),
        versions,
        options.tokens,
        options.windows,
        sum(len(want) for want, _ in dense),
        rows,
    )


def _row(case: Case, model: Any, windows: torch.Tensor, dense: Sequence[tuple[torch.Tensor, int]]) -> Row:
    package = missing(case)
    if package is not None:
        return Row(case.name, refused=f"{package} is not installed")
    lost, same, held, full = [], [], 0, 0
    for window, (want, size) in zip(windows, dense, strict=True):
        try:
            got, bytes_held = _read(model, window, case.make(model.config))
        except (ValueError, GgufrqError) as error:  # what transformers' caches do not do, or ours
            return Row(case.name, refused=str(error).splitlines()[0])
        held, full = held + bytes_held, full + size
        lost.append((want.exp() * (want - got)).sum(-1))
        same.append((want.argmax(-1) == got.argmax(-1)).float())
    each, top = torch.cat(lost).double(), torch.cat(same)
    text = model.config.get_text_config(decoder=True)
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Row(
        case.name,
        case.bits(dim),
        16 * held / full,
        float(each.mean()),
        float(each.std()) / len(each) ** 0.5,
        float(each.quantile(0.999)),
        float(top.mean()),
    )


def _read(model: Any, ids: torch.Tensor, cache: Any) -> tuple[torch.Tensor, int]:
    """Log probabilities [tokens, words] behind each token but the first piece's, and the bytes that attention
    layers hold in the end, what the 32 bits of a measurement make wider as if it had 16."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = []
    with torch.no_grad():
        for part in ids.split(PIECE, dim=1):
            out.append(model(part, **{name: cache}).logits[0].log_softmax(-1))
    found: dict[int, int] = {}
    for layer in cache.layers:
        if not hasattr(layer, "conv_states"):
            for x in _tensors(layer.tensors() if hasattr(layer, "tensors") else vars(layer)):
                size = x.untyped_storage().nbytes()
                found[x.untyped_storage().data_ptr()] = size // 2 if x.dtype == torch.float32 else size
    return torch.cat(out[1:]), sum(found.values())


def _tensors(thing: Any) -> Iterator[torch.Tensor]:
    """Every tensor in a thing, those that others consist of."""
    if isinstance(thing, torch.Tensor) and hasattr(thing, "__tensor_flatten__"):
        yield from _tensors([getattr(thing, name) for name in thing.__tensor_flatten__()[0]])
    elif isinstance(thing, torch.Tensor):
        yield thing
    elif isinstance(thing, dict):
        yield from _tensors(list(thing.values()))
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            yield from _tensors(one)
