"""What a cache costs far out: the same texts at position 0 and at later ones.

    python bench/far_positions.py DIR NAME [--at 0 16384] [--range 32768] [--chunks 3]

DIR and NAME are those of ``bench/real_models.py``, whose weights in f16 and profiles serve here. A chunk
begins at the position that is asked for, in a sequence with nothing before it: its tokens are the same at all
positions, so that what differs is RoPE's doing, which a profile that was averaged over other positions does
not fit. Divergences are of the second half of a chunk, as llama-perplexity has it. llama.cpp is called by the
bindings of llama-cpp-python over our build's libraries (``ggufrq build --python``).
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from real_models import MODELS, Row, in_f16, profile_for

from ggufrq.base import paths
from ggufrq.build.builds import require_build

Logits = npt.NDArray[np.float32]


def type_id(name: str) -> int:
    """Of a cache type, in this build of llama.cpp."""
    library = ctypes.CDLL(os.fspath(require_build().bin / "libggml-base.so"))
    library.ggml_type_name.restype = ctypes.c_char_p
    return next(i for i in range(128) if library.ggml_type_name(i) == name.encode())


def logits(
    bindings: Any, model: Any, row: Row | None, profile: Path, chunks: Sequence[Sequence[int]], at: int
) -> Iterator[Logits]:
    """Of the second half of each chunk [n_tokens/2, n_vocab]; K and V are in f16 where no row is given."""
    n_tokens = len(chunks[0])
    for name, value in (row.environment(profile) if row else {"LLAMA_RQ_PROFILE": "none"}).items():
        os.environ[name] = value or "0"
    params = bindings.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = n_tokens
    params.type_k = params.type_v = type_id(row.kv if row else "f16")
    params.flash_attn_type = 1
    params.n_threads = params.n_threads_batch = os.cpu_count() or 1
    context = bindings.llama_init_from_model(model, params)
    if not context:
        sys.exit("llama.cpp makes no context; its log says why")
    n_vocab = bindings.llama_vocab_n_tokens(bindings.llama_model_get_vocab(model))
    batch = bindings.llama_batch_init(n_tokens, 0, 1)
    for chunk in chunks:
        bindings.llama_memory_clear(bindings.llama_get_memory(context), True)
        batch.n_tokens = n_tokens
        for i, token in enumerate(chunk):
            batch.token[i], batch.pos[i] = token, at + i
            batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = 1, 0, i >= n_tokens // 2
        if bindings.llama_decode(context, batch) != 0:
            sys.exit("llama.cpp could not evaluate a chunk; its log says why")
        pointer = bindings.llama_get_logits(context)
        yield np.ctypeslib.as_array(pointer, (n_tokens - n_tokens // 2, n_vocab)).copy()
    bindings.llama_batch_free(batch)
    bindings.llama_free(context)


def divergence(base: Logits, other: Logits) -> npt.NDArray[np.float64]:
    """Kullback-Leibler divergence of each row of logits from that of ``base``, in nats."""

    def log_softmax(x: Logits) -> npt.NDArray[np.float64]:
        y: npt.NDArray[np.float64] = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        y -= np.log(np.exp(y).sum(axis=1, keepdims=True))
        return y

    p, q = log_softmax(base), log_softmax(other)
    return np.asarray((np.exp(p) * (p - q)).sum(axis=1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("name", choices=MODELS)
    parser.add_argument("--at", type=int, nargs="+", default=[0, 16384], help="first positions of the chunks")
    parser.add_argument(
        "--range", type=int, default=32768, help="positions that the profile is averaged over"
    )
    parser.add_argument("--chunks", type=int, default=3)
    args = parser.parse_args()
    build = require_build()
    os.environ["LLAMA_CPP_LIB_PATH"] = str(build.bin)
    try:
        bindings = importlib.import_module("llama_cpp")
    except ImportError:
        sys.exit("this needs the bindings of llama-cpp-python; try: ggufrq build --python --install")

    source = args.folder / f"{args.name}.gguf"
    weights, profile = in_f16(build, source), profile_for(build, source, args.range, 0)
    bindings.llama_backend_init()
    model = bindings.llama_model_load_from_file(os.fsencode(weights), bindings.llama_model_default_params())
    n_tokens = MODELS[args.name].n_ctx
    text = (paths.data_dir("texts") / "heldout.txt").read_bytes()
    room = (bindings.llama_token * (len(text) + 8))()
    vocab = bindings.llama_model_get_vocab(model)
    found = bindings.llama_tokenize(vocab, text, len(text), room, len(room), True, False)
    chunks = [room[i * n_tokens : (i + 1) * n_tokens] for i in range(args.chunks)]
    assert found >= args.chunks * n_tokens, "the text is too short for so many chunks"

    rows = [
        Row("iso3", profile=True),
        Row("iso3", profile=True, recent=32, first=1),
        Row("iso4", profile=True),
    ]
    print(f"{args.name}, {args.chunks} × {n_tokens} tokens, profile averaged over {args.range:,} positions\n")
    print("| K/V | mean KLD from position " + " | ".join(f"{at:,}" for at in args.at) + " |")
    print("|---|" + "---|" * len(args.at))
    bases = {at: list(logits(bindings, model, None, profile, chunks, at)) for at in args.at}
    for row in rows:
        cells = []
        for at in args.at:
            others = logits(bindings, model, row, profile, chunks, at)
            values = np.concatenate([divergence(*pair) for pair in zip(bases[at], others, strict=True)])
            cells.append(f"{values.mean():.4f} ± {values.std() / len(values) ** 0.5:.4f}")
        print(f"| {row.name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
