"""What caches of transformers hold and lose: ours beside a dense one and, where their packages are, its own
quantized ones. The tables of docs/transformers.md.

    python bench/hf_caches.py docs-qwen3-8m
    python bench/hf_caches.py FOLDER --profile weights --tokens 1024

A text is read in pieces, as a chat is: what transformers' own caches hold of the first piece, and of each one
when it comes, is exact. Bits are all bytes that layers hold at the end, over the values of K and V.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import math
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from kvlab.markdown import table, with_error
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, QuantizedCache, logging

from ggufrq.base import paths
from ggufrq.hf import IsoQuantCache
from ggufrq.models.resolve import embedded_models


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="an embedded model, or a folder")
    parser.add_argument("--profile", help="of K: weights, or a file; ours with it, too")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    parser.add_argument("--piece", type=int, default=32, help="tokens of a piece")
    parser.add_argument("--bits", default="4,3,2", help="of ours, with commas")
    args = parser.parse_args()

    logging.set_verbosity_error()
    folder = embedded_models().get(args.model, Path(args.model))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    text = (paths.data_dir("texts") / "heldout.txt").read_text(encoding="utf-8")
    ids = AutoTokenizer.from_pretrained(folder)(text[: 8 * args.tokens * args.windows]).input_ids
    windows = torch.tensor(ids[: args.tokens * args.windows]).view(args.windows, 1, args.tokens)
    dense = [read(model, window, DynamicCache(config=model.config), args.piece) for window in windows]
    rows = []
    for name, make in caches(model.config, [int(b) for b in args.bits.split(",")], args.profile).items():
        lost, bits = [], 0.0
        for window, (want, full) in zip(windows, dense, strict=True):
            got, held = read(model, window, make(), args.piece)
            bits += held / full * 32 / len(windows)
            lost.append((want.exp() * (want - got)).sum(-1))
        each = torch.cat(lost)
        error = float(each.std()) / math.sqrt(len(each))
        rows.append([name, f"{bits:.2f}", with_error(float(each.mean()), error)])
        print(rows[-1], file=sys.stderr, flush=True)
    print(table([args.model, "bits held", "mean KLD"], rows))


def caches(config: Any, bits: list[int], profile: str | None) -> dict[str, Callable[[], Any]]:
    """How each cache is made, by what the table calls it."""
    made: dict[str, Callable[[], Any]] = {}
    for package, backend in (("optimum.quanto", "quanto"), ("hqq", "hqq")):
        if importlib.util.find_spec(package.partition(".")[0]) and importlib.util.find_spec(package):
            for b in (4, 2):
                axes = {} if backend == "quanto" else {"axis_key": 1, "axis_value": 1}
                made[f"{backend} {b}, newest 128"] = partial(QuantizedCache, backend, config, nbits=b, **axes)
    for b in bits:
        for recent, first in ((0, 0), (32, 1), (128, 1)):
            for which in dict.fromkeys((None, profile)):
                name = f"iso{b}, newest {recent}" + (f", first {first}" if first else "")
                name += "" if which is None else ", profile"
                made[name] = partial(
                    IsoQuantCache, b, recent=recent, first=first, profile=which, config=config
                )
    return made


def read(model: Any, ids: torch.Tensor, cache: Any, piece: int) -> tuple[torch.Tensor, int]:
    """Log probabilities [tokens, words] behind each token but the first piece's, and the bytes that attention
    layers hold in the end."""
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    out = []
    with torch.no_grad():
        for part in ids.split(piece, dim=1):
            out.append(model(part, **{name: cache}).logits[0].log_softmax(-1))
    found: dict[int, int] = {}
    for layer in cache.layers:
        if not hasattr(layer, "conv_states"):
            bytes_of([layer.tensors() if hasattr(layer, "tensors") else vars(layer)], found)
    return torch.cat(out[1:]), sum(found.values())


def bytes_of(thing: Any, found: dict[int, int]) -> None:
    """Bytes of every storage in a thing, by address."""
    if isinstance(thing, torch.Tensor) and hasattr(thing, "__tensor_flatten__"):
        bytes_of([getattr(thing, name) for name in thing.__tensor_flatten__()[0]], found)
    elif isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        bytes_of(list(thing.values()), found)
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            bytes_of(one, found)


if __name__ == "__main__":
    main()
