"""Names of files made from a model's, and of those that belong beside it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import PurePath

_ENCODING = re.compile(r"[-_.](?:(?:UD-)?I?Q\d\w*|TQ\d\w*|MXFP4\w*|B?F16|F32)$", re.IGNORECASE)
_SHARD = re.compile(r"-\d{5}-of-\d{5}$")
#: How the file of a KV cache's profile ends.
PROFILE_END = "-kv.gguf"
#: Metadata of a file with the name of the recipe that it was made by.
RECIPE = "ggufrq.recipe"


def base_name(stem: str) -> str:
    """The name of a model without ``-GGUF``, shard numbers and the encoding at its end."""
    name = _SHARD.sub("", stem)
    name = re.sub(r"[-_.]GGUF$", "", name, flags=re.IGNORECASE)
    return _ENCODING.sub("", name) or name


def names_beside(model: PurePath, recipe: object = None) -> Iterator[str]:
    """Names that the file of a profile may have beside this model: its quantization left out or not, and then
    without the ``recipe``, too, that the file of a family says it was made by (``RECIPE``); this last one
    llama.cpp's programs do not look for."""
    base = base_name(model.stem)
    family = [base.removesuffix(f"-{recipe}")] if recipe else []
    yield from dict.fromkeys(f"{name}{PROFILE_END}" for name in (base, model.stem, *family))
