"""AWQ for models of mlx-lm: the factors of ``make.fold.awq``, chosen for mlx's own code and folded into the
modules as they are loaded, where norms that are stored without their 1 have it already (Qwen3.5)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from ggufrq.base import log, paths, texts
from ggufrq.base.errors import ModelError
from ggufrq.base.progress import progress
from ggufrq.ggufs.header import TensorInfo
from ggufrq.make.fold.awq import ALPHAS, factors_for
from ggufrq.make.fold.changes import F64
from ggufrq.make.fold.facts import Heads, Pair, architectures, pairs
from ggufrq.make.fold.fold_file import summary
from ggufrq.make.fold.folding import Folding, Found, per_kv_head, per_query_head
from ggufrq.mlx import names
from ggufrq.mlx.bits import WHOLE, Choice, bits_of
from ggufrq.mlx.names import GROUP

#: The text that inputs are seen on: so many pieces of so many tokens.
PIECES, TOKENS = 8, 256
#: Rows of a weight that the search looks at, in runs of so many.
_SAMPLE, _RUN = 256, 16
#: Files of models whose norms add 1 to their weights when they are used.
_ADDS_ONE = ("gemma", "gemma2", "gemma3_text")
_HEADS = ("n_kv_heads", "num_key_value_heads", "num_kv_heads")


def calibration(tokenizer: Any, pieces: int, tokens: int) -> mx.array:
    """The beginning of the calibration text as token ids [pieces, tokens]."""
    text = texts.read(paths.data_dir("texts") / "calibration.txt")
    ids = tokenizer.encode(text[: 16 * pieces * tokens])[: pieces * tokens]
    pieces = min(pieces, max(1, len(ids) // tokens))
    return mx.array(ids[: pieces * tokens]).reshape(pieces, -1)


@contextmanager
def replaced(model: Any, modules: Mapping[str, Any]) -> Iterator[None]:
    """Have other modules at these paths for as long as the context lasts."""
    before = dict(model.named_modules())
    model.update_modules(tree_unflatten(list(modules.items())))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten([(path, before[path]) for path in modules]))


def fold(model: Any, tokenizer: Any, choices: Mapping[str, Choice], kept: Path) -> None:
    """Scale the weights of a model so that what they are quantized to by ``choices`` loses less, without
    changing what it computes. Factors are kept in the file ``kept``, so that a run that goes on has the same.

    Raises ModelError when the architecture is not known, or nothing was found that helps.
    """
    folder = _Folder(model, choices)
    if kept.is_file():
        factors = {
            name: np.array(x).astype(np.float64)
            for name, x in mx.load(str(kept), format="safetensors").items()
        }
    else:
        factors = folder.find(calibration(tokenizer, PIECES, TOKENS))
        with paths.atomic_path(kept) as temporary:
            whole = {name: mx.array(x.astype(np.float32)) for name, x in factors.items()}
            with temporary.open("wb") as file:
                mx.save_safetensors(file, whole)
        factors = {name: x.astype(np.float32).astype(np.float64) for name, x in factors.items()}
    for pair in folder.pairs:
        if pair.source in factors:
            folder.apply(pair, factors[pair.source])


class _Seen(nn.Module):  # type: ignore[misc]
    """A module that sums the squares of its inputs."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.sums = mx.zeros(())

    def __call__(self, x: mx.array, *args: Any, **kwargs: Any) -> Any:
        self.sums = self.sums + mx.square(x.astype(mx.float32)).reshape(-1, x.shape[-1]).mean(axis=0)
        return self.module(x, *args, **kwargs)


@dataclass
class _Reader:
    """Rows of a weight that is going to be quantized, how many of the whole one of these stands for, and the
    bits."""

    values: mx.array
    weight: float
    bits: int


class _Folder:
    def __init__(self, model: Any, choices: Mapping[str, Choice]) -> None:
        kind = names.architecture(model)
        found = architectures().get(kind)
        if found is None:
            raise ModelError(
                f"the model cannot be folded: ggufrq does not know what reads what in {kind}; it knows "
                f"{', '.join(architectures())}",
                remedy="leave out --fold",
            )
        self.model = model
        self.paths = names.modules(model)
        self.modules = dict(model.named_modules())
        self.bits = {path: bits_of(choice, 8) for path, choice in choices.items()}
        self.choices = choices
        infos = [TensorInfo(name, (), 0, 0) for name in self.paths if name.startswith("blk.")]
        unknown = [path for name, path in self.paths.items() if ".layers." in path and name[:4] != "blk."]
        if unknown:
            raise ModelError(
                f"the model cannot be folded: ggufrq does not know what {unknown[0]} of {kind} reads",
                remedy="leave out --fold",
            )
        self.pairs = pairs(found, infos)

    def at(self, name: str) -> Any:
        """The module with this name in GGUF."""
        return self.modules[self.paths[name]]

    def find(self, ids: mx.array) -> dict[str, F64]:
        """Factors for what sources write, by their names, where any help."""
        power = self._power(ids)
        folding, factors = Folding(), {}
        with progress("Searching scales", len(self.pairs), unit="pairs") as bar:
            for pair in self.pairs:
                readers = [one for name in pair.readers if (one := self._reader(name)) is not None]
                shared = self.heads(pair)
                if readers and (shared is not None or pair.rule.rows != "heads"):
                    found, best = self._search(pair, readers, power[pair.readers[0]], shared)
                    folding.found.append(found)
                    if found.gain > 1:
                        factors[pair.source] = best
                bar.advance()
        if not factors:
            raise ModelError(
                "--fold awq finds nothing to fold: no factor makes the error of these bits smaller",
                remedy="leave out --fold",
            )
        log.say(summary(folding))
        return factors

    def heads(self, pair: Pair) -> Heads | None:
        """Attention whose V a pair scales, None for other pairs and where it is not known."""
        if pair.rule.rows != "heads":
            return None
        attention = self.modules[self.paths[pair.source].rpartition(".")[0]]
        kv = next((getattr(attention, name) for name in _HEADS if hasattr(attention, name)), None)
        rows, columns = self.at(pair.source).weight.shape[0], self.at(pair.readers[0]).weight.shape[-1]
        if kv is None or rows % kv or columns % rows:
            return None
        return Heads(kv * (columns // rows), kv, rows // kv, rows // kv, 0)

    def apply(self, pair: Pair, factors: F64) -> None:
        """Divide what the source writes, and multiply the columns of its readers."""
        source = self.at(pair.source)
        if pair.rule.rows:
            divisors = mx.array(factors.astype(np.float32).reshape(-1))
            _set(source, source.weight.astype(mx.float32) / divisors[:, None])
            if "bias" in source:
                _set(source, source.bias.astype(mx.float32) / divisors, "bias")
        else:
            # What 16 bits lose of the norm goes to the readers, too, so that nothing is lost.
            one = self._adds(source)
            before = source.weight.astype(mx.float32) + one
            _set(source, before / mx.array(factors[0].astype(np.float32)) - one)
            after = source.weight.astype(mx.float32) + one
            lost = np.array(mx.where(after == 0, 1, before / mx.where(after == 0, 1, after)))
            factors = lost.astype(np.float64)[None]
        shared = self.heads(pair)
        columns = factors if shared is None else per_query_head(factors, shared)
        for name in pair.readers:
            reader = self.at(name)
            _set(reader, reader.weight.astype(mx.float32) * mx.array(columns.astype(np.float32)[0]))

    def _adds(self, norm: Any) -> float:
        if isinstance(norm, nn.RMSNorm):
            return 0.0
        if type(norm).__module__.rpartition(".")[2] in _ADDS_ONE and type(norm).__name__ == "RMSNorm":
            return 1.0
        raise ModelError(
            f"the model cannot be folded: it has norms of its own kind, {type(norm).__name__}",
            remedy="leave out --fold",
        )

    def _power(self, ids: mx.array) -> dict[str, F64]:
        """Mean square of each input [columns] of every reader."""
        wanted = dict.fromkeys(name for pair in self.pairs for name in pair.readers)
        seen = {self.paths[name]: _Seen(self.at(name)) for name in wanted}
        with replaced(self.model, seen), progress("Looking at inputs", len(ids), unit="pieces") as bar:
            for piece in ids:
                mx.eval(self.model(piece[None]), [one.sums for one in seen.values()])
                bar.advance()
        return {name: np.array(seen[self.paths[name]].sums).astype(np.float64) for name in wanted}

    def _reader(self, name: str) -> _Reader | None:
        """Rows of what is going to be quantized, spread over all of them."""
        path = self.paths[name]
        bits = self.bits.get(path, WHOLE)
        if bits == WHOLE:
            return None
        weight = self.modules[path].weight
        rows = weight.reshape(-1, weight.shape[-1])
        count = rows.shape[0]
        if count > _SAMPLE:
            starts = np.linspace(0, count - _RUN, _SAMPLE // _RUN).astype(int)
            rows = mx.concatenate([rows[int(start) : int(start) + _RUN] for start in starts])
        return _Reader(rows.astype(mx.float32), count / rows.shape[0], bits)

    def _search(
        self, pair: Pair, readers: list[_Reader], power: F64, shared: Heads | None
    ) -> tuple[Found, F64]:
        """The best factors for what the source of a pair writes, and what they are expected to gain."""
        activity = np.sqrt(power)[None]
        if shared is not None:
            activity = per_kv_head(activity, shared)
        weights = mx.array(power.astype(np.float32))

        def error(factors: F64) -> float:
            columns = factors if shared is None else per_query_head(factors, shared)
            scale = mx.array(columns[0].astype(np.float32))
            total = mx.zeros(())
            for one in readers:
                coded = mx.quantize(one.values * scale, GROUP, one.bits)
                decoded = mx.dequantize(*coded, GROUP, one.bits) / scale
                total = total + one.weight * (mx.square(decoded - one.values) @ weights).sum()
            return float(total.item())

        tried = [
            (error(factors), alpha, factors) for alpha in ALPHAS for factors in [factors_for(activity, alpha)]
        ]
        least, alpha, factors = min(tried, key=lambda one: one[0])
        gain = tried[0][0] / least if least > 0 else 1.0
        return Found(f"blk.{pair.layer}.{pair.rule.name}", gain, f"alpha {alpha:g}"), factors


def _set(module: Any, value: mx.array, name: str = "weight") -> None:
    """Replace a parameter, which keeps its type."""
    module[name] = value.astype(module[name].dtype)
