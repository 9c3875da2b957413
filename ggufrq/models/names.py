"""Names of files made from a model's, and of those that belong beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath

_ENCODING = re.compile(r"[-_.](?:(?:UD-)?I?Q\d\w*|TQ\d\w*|MXFP4\w*|B?F16|F32)$", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
#: How the file of a KV cache's profile ends.
PROFILE_END = "-kv.gguf"


def base_name(stem: str) -> str:
    """The name of a model without ``-GGUF``, shard numbers and the encoding at its end."""
    name = _SHARD.sub("", stem)
    name = re.sub(r"[-_.]GGUF$", "", name, flags=re.IGNORECASE)
    return _ENCODING.sub("", name) or name


def names_beside(model: PurePath) -> Iterator[str]:
    """Names that the file of a profile may have beside this model, its quantization left out or not."""
    yield from dict.fromkeys(f"{name}{PROFILE_END}" for name in (base_name(model.stem), model.stem))
