"""``python -m ggufrq.mlx.server``: mlx_lm.server, whose models keep K and V in types of ggufrq."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import mlx_lm.server as server

from ggufrq.base import log
from ggufrq.base.errors import GgufrqError
from ggufrq.mlx import make_cache
from ggufrq.mlx.models import SOURCE
from ggufrq.mlx.prompt import CLASSES


def main(arguments: Sequence[str] | None = None) -> None:
    """Run it. Options that are not ours are mlx_lm.server's own."""
    parser = argparse.ArgumentParser(prog="python -m ggufrq.mlx.server", description=__doc__)
    parser.add_argument("--bits", type=int, default=3, help="code of K, 2 to 5 (default: 3)")
    parser.add_argument("--v-bits", type=int, help="code of V (default: that of K)")
    parser.add_argument("--family", choices=list(CLASSES), default="iso", help="rotation (default: iso)")
    parser.add_argument("--recent", type=int, default=32, help="newest tokens as they were (default: 32)")
    parser.add_argument("--first", type=int, default=1, help="first tokens as they were (default: 1)")
    parser.add_argument("--profile", help='NAME-kv.gguf, or "weights"')
    parser.epilog = "What else mlx_lm.server takes, as --model and --port: python -m mlx_lm.server --help"
    chosen, others = parser.parse_known_args(arguments)
    if {"--kv-bits", "--kv-group-size", "--quantized-kv-start"} & {word.partition("=")[0] for word in others}:
        parser.error("--kv-bits and its kind are for mlx-lm's own caches: --bits")
    usual = server.load

    def load(path: str, *args: Any, **kwargs: Any) -> Any:
        loaded = usual(path, *args, **kwargs)
        model = loaded[0]
        setattr(model, SOURCE, str(path))
        model.make_cache = lambda: make_cache(model, **vars(chosen))
        kinds = dict.fromkeys(type(one).__name__ for one in model.make_cache())
        log.say(f"{path} has caches of {', '.join(kinds)}")
        return loaded

    server.load = load
    sys.argv = ["mlx_lm.server", *others]
    server.main()


if __name__ == "__main__":
    try:
        main()
    except GgufrqError as error:
        sys.exit("\n  try: ".join(filter(None, (str(error), error.remedy))))
