"""Tokens per second and thread over caches of transformers and of mlx-lm, ours beside each library's own.

    python bench/cache_speed.py hf                  # the table of docs/transformers.md, a minute and a half
    python bench/cache_speed.py mlx --prompt 512    # that of docs/mlx.md, likewise
    python bench/cache_speed.py hf MODEL --kv dense,iso3,quanto4 --rounds 6 --prompt 4096

Unless a MODEL is given (an embedded one, a folder, an id on the Hub) it is one of random weights with two
layers of an 8B's attention (32 heads, 8 of K and V, of 128) and narrow matrices beside them, so that what is
measured is attention and the cache. Each round takes all caches in turns: a prompt at once, as both libraries
read one of that length, then tokens one by one behind it; in 32 bits, on one thread. Ratios are those to the
dense cache of the same round. For a machine that does nothing else; caches whose package is not installed are
left out by name.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # before either library is imported
sys.path.insert(0, str(Path(__file__).parent.parent))

from ggufrq.base import machine, table
from ggufrq.measure.validate.speed import judge
from ggufrq.models.resolve import resolve

#: The model unless one is given, as both libraries call it.
SHAPE: dict[str, Any] = {
    **{"num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
    **{"hidden_size": 128, "intermediate_size": 128, "vocab_size": 1024, "rms_norm_eps": 1e-6},
}
DENSE = "dense"
CASES = {"hf": "dense,iso4,iso3,hqq4,quanto4,fp8", "mlx": "dense,iso4,iso3,mlx8,mlx4"}
PACKAGES = {"hf": ("transformers", "torch", "hqq", "optimum-quanto"), "mlx": ("mlx", "mlx-lm")}

#: Reads tokens behind what a cache holds and waits for what follows them; a cache is made by its name.
Read = Callable[[list[int], Any], None]
Make = Callable[[], Any]


def of_transformers(model: str | None, names: list[str], positions: int) -> tuple[Read, dict[str, Make]]:
    """A model in transformers, and caches by name."""
    import inspect

    import torch
    from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, logging

    from ggufrq.measure import lane_hf

    logging.set_verbosity_error()
    torch.set_num_threads(1)
    loaded: Any
    if model is None:
        config = LlamaConfig(**SHAPE, max_position_embeddings=positions)
        loaded = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    else:
        place = resolve(model)
        loaded = AutoModelForCausalLM.from_pretrained(place.repo or str(place.path), dtype=torch.float32)
    loaded.eval()
    argument = "cache" if "cache" in inspect.signature(loaded.forward).parameters else "past_key_values"
    made: dict[str, Make] = {DENSE: lambda: DynamicCache(config=loaded.config)}
    for case in lane_hf.parse_cases(",".join(name for name in names if name != DENSE), lane_hf.Options()):
        if (package := lane_hf.missing(case)) is not None:
            print(f"{case.name} is left out: {package} is not installed", file=sys.stderr)
            continue
        made[case.name] = partial(case.make, loaded.config)

    def read(tokens: list[int], cache: Any) -> None:
        with torch.inference_mode():
            loaded(torch.tensor([tokens]), logits_to_keep=1, **{argument: cache})

    return read, made


def of_mlx(model: str | None, names: list[str], positions: int) -> tuple[Read, dict[str, Make]]:
    """A model in mlx-lm, and caches by name."""
    import mlx.core as mx
    from mlx_lm.models import llama
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, make_prompt_cache

    from ggufrq.mlx import load, make_cache

    if model is None:
        more = {"model_type": "llama", "max_position_embeddings": positions}
        loaded: Any = llama.Model(llama.ModelArgs(**SHAPE, **more))
    else:
        loaded = load(model)[0]
    loaded.set_dtype(mx.float32)

    def theirs(bits: int) -> Make:
        return lambda: [
            QuantizedKVCache(64, bits) if isinstance(one, KVCache) else one
            for one in make_prompt_cache(loaded)
        ]

    def ours(name: str) -> Make:
        family: Any = name[:-1]
        return lambda: make_cache(loaded, int(name[-1]), family=family)

    made: dict[str, Make] = {DENSE: lambda: make_prompt_cache(loaded)}
    for name in names:
        if name != DENSE:
            made[name] = theirs(int(name[3:])) if name.startswith("mlx") else ours(name)

    def read(tokens: list[int], cache: Any) -> None:
        mx.eval(loaded(mx.array([tokens]), cache=cache)[:, -1], [one.state for one in cache])

    return read, made


def speeds(read: Read, make: Make, prompt: int, generate: int) -> tuple[float, float]:
    """Tokens per second of a prompt, and one by one behind it."""
    tokens = [1 + i * 7919 % 1000 for i in range(prompt + generate)]
    cache = make()
    started = time.perf_counter()
    read(tokens[:prompt], cache)
    middle = time.perf_counter()
    for token in tokens[prompt:]:
        read([token], cache)
    return prompt / (middle - started), generate / (time.perf_counter() - middle)


def measured(lane: str, options: argparse.Namespace) -> list[list[str]]:
    """A row for each cache: medians, and the ratios to the dense one with their errors."""
    names = [DENSE, *(name for name in (options.kv or CASES[lane]).split(",") if name != DENSE)]
    of = of_transformers if lane == "hf" else of_mlx
    read, made = of(options.model, names, options.prompt + options.generate)
    for make in made.values():  # what is compiled at first use
        speeds(read, make, 64, 1)
    rounds = []
    for _ in range(options.rounds):
        rounds.append(
            {name: speeds(read, make, options.prompt, options.generate) for name, make in made.items()}
        )
    rows = []
    for name in made:
        row = [name]
        for at in (0, 1):
            row.append(f"{statistics.median(one[name][at] for one in rounds):,.4g}")
            median, error, _ = judge([one[name][at] / one[DENSE][at] for one in rounds])
            row.append("" if name == DENSE else f"{median:.3f} ± {error:.3f}")
        rows.append(row)
    return rows


def main() -> None:
    """Measure and print a table for each lane."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("lanes", help="hf, mlx, or both with a comma")
    parser.add_argument("model", nargs="?", help="a folder, an id on the Hub, or an embedded model")
    parser.add_argument("--kv", help="caches; of mlx-lm itself mlx8, mlx4, mlx2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompt", type=int, default=1024)
    parser.add_argument("--generate", type=int, default=40)
    options = parser.parse_args()
    heads = ("cache", "prefill, t/s", "to dense", "decode, t/s", "to dense")
    for lane in options.lanes.split(","):
        if lane not in CASES:
            parser.error(f"'{lane}' is none of {', '.join(CASES)}")
        rows = measured(lane, options)
        of = options.model or "2 layers of 32/8 heads of 128"
        where = f"{machine.processor().name}, 1 thread, {options.rounds} rounds"
        print(f"{of}, {options.prompt} tokens and {options.generate} one by one, in 32 bits; {where}")
        print(", ".join(f"{name} {version(name)}" for name in PACKAGES[lane] if _has(name)))
        print(table.render(heads, rows, "lrrrr"), flush=True)


def _has(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


if __name__ == "__main__":
    main()
