"""Bits held and divergence of caches on mlx: ours beside mlx-lm's own, the table of docs/mlx.md.

    python bench/mlx_caches.py [--tokens 2048] [--profile FILE|weights] [MODEL …]

Bits are those of all that a cache holds for tokens, room for the next ones among them. Each cache takes the
first tokens of the embedded held-out text in one prefill, in which a token sees those before it through the
cache; predictions are compared with those over mlx-lm's KVCache, all in float32.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

from ggufrq.base import paths
from ggufrq.mlx import QuantizedCache, load, make_cache

Make = Callable[[Any], list[Any]]


def theirs(bits: int) -> Make:
    """mlx-lm's cache in so many bits, groups of 64."""

    def make(model: Any) -> list[Any]:
        usual = make_prompt_cache(model)
        return [QuantizedKVCache(64, bits) if isinstance(one, KVCache) else one for one in usual]

    return make


def ours(bits: int, **options: Any) -> Make:
    """Ours of the family iso."""
    return lambda model: make_cache(model, bits, **options)


CASES: dict[str, Make] = {
    "mlx-lm, 8 bits": theirs(8),
    "mlx-lm, 4 bits": theirs(4),
    "mlx-lm, 2 bits": theirs(2),
    **{f"iso{bits}": ours(bits) for bits in (5, 4, 3, 2)},
    **{f"iso{bits}, no token exact": ours(bits, recent=0, first=0) for bits in (5, 4, 3, 2)},
}


def predictions(model: Any, ids: Any, cache: list[Any]) -> Any:
    """Log-probabilities [tokens, vocabulary] of what follows each token."""
    logits = model(ids, cache=cache)[0].astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found, [one.state for one in cache])
    return found


def bits_held(cache: list[Any], values: int) -> float:
    """Bits per value of K and V. What the float32 of this measurement makes 32 bits wide in mlx-lm's caches
    has 16 as a rule."""
    sizes = [one.nbytes for one in cache if isinstance(one, QuantizedCache)]
    for one in cache:
        if isinstance(one, QuantizedKVCache):
            arrays = [x for _, x in tree_flatten([one.keys, one.values])]
            sizes += [x.size * 2 if x.dtype == mx.float32 else x.nbytes for x in arrays]
    return 8.0 * float(sum(sizes)) / values


def main() -> None:
    """Print the table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", default=["docs-qwen3-8m", "docs-qwen3.5-8m"])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--profile", help="ours in the metric of this profile as well")
    args = parser.parse_args()
    cases = dict(CASES)
    if args.profile is not None:
        cases |= {f"iso{bits}, profile": ours(bits, profile=args.profile) for bits in (5, 4, 3, 2)}
    text = (paths.data_dir("texts") / "heldout.txt").read_text(encoding="utf-8")[: 16 * args.tokens]
    print("| model | cache | bits per value | mean KLD |\n|---|---|---|---|")
    for name in args.models:
        model, tokenizer = load(name)
        model.set_dtype(mx.float32)
        ids = mx.array(tokenizer.encode(text)[: args.tokens])[None]
        usual = make_prompt_cache(model)
        exact = predictions(model, ids, usual)
        values = sum(
            one.keys_and_values()[i].size for one in usual if isinstance(one, KVCache) for i in (0, 1)
        )
        for case, make in cases.items():
            cache = make(model)
            found = predictions(model, ids, cache)
            kld = (mx.exp(exact) * (exact - found)).sum(axis=-1).mean().item()
            print(f"| {name} | {case} | {bits_held(cache, values):.3f} | {kld:.5f} |", flush=True)


if __name__ == "__main__":
    main()
