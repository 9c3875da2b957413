"""What other runtimes take of cache types, and how they are set: data with sources and the date of a look.

A file per runtime. ``types`` are the cache types that it takes, ``apart`` whether K and V may differ,
``use`` the one that serves best there (``bits`` per value when it is none of llama.cpp's), ``aliases`` its
own names of llama.cpp's types, ``shards`` whether it takes a model of several files, ``steps`` and
``file.text`` templates (see ``fallback``).
``file.verified`` says how the form of the file was checked; without it no file is made. ``file.add`` marks
lines that go into a file that the runtime makes.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ggufrq.base.errors import UsageError
from ggufrq.base.toml import tomllib
from ggufrq.cache.kv import kv_type, kv_types


@dataclass(frozen=True)
class FileForm:
    """A settings file: templates of its name and text, ``format`` that says how values are written in it,
    and how its form was verified."""

    name: str
    format: str
    verified: str
    text: str
    add: bool = False


@dataclass(frozen=True)
class Runtime:
    """A runtime as its file describes it."""

    id: str
    name: str
    checked: datetime.date
    version: str
    sources: tuple[str, ...]
    types: tuple[str, ...]
    apart: bool
    use: str
    flash_attention: str
    steps: tuple[str, ...]
    notes: tuple[str, ...] = ()
    shards: bool = True
    bits: float = 0.0
    aliases: Mapping[str, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    file: FileForm | None = None

    @property
    def bits_per_value(self) -> float:
        """Bits per value of the type that serves best there."""
        return self.bits or kv_type(self.use).bits

    def takes(self, name: str) -> bool:
        """Whether it takes llama.cpp's cache type of this name, or the same under another."""
        return self.aliases.get(name, name) in self.types

    def types_beside(self, names: Sequence[str]) -> tuple[str, ...]:
        """The types that it takes, but for those that llama.cpp calls so."""
        others = {self.aliases.get(name, name) for name in names}
        return tuple(name for name in self.types if name not in others)


@cache
def runtimes() -> dict[str, Runtime]:
    """All runtimes by the name that the command line takes, in the order in which it lists them."""
    order = ("lmstudio", "ollama", "koboldcpp", "jan", "vllm", "llama.cpp")
    return {name: _load(name) for name in order}


def runtime(name: str) -> Runtime:
    """The runtime with this name. Raises UsageError."""
    try:
        return runtimes()[name]
    except KeyError:
        raise UsageError(
            f"nothing is known of a runtime '{name}'", remedy=f"one of {', '.join(runtimes())}"
        ) from None


def _load(name: str) -> Runtime:
    path = Path(__file__).with_name(f"{name}.toml")
    data: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    form = data.pop("file", None)
    data |= {key: tuple(data.get(key, ())) for key in ("sources", "types", "steps", "notes")}
    made = Runtime(id=name, file=FileForm(**form) if form else None, **data)
    if made.use not in made.types or not (made.bits or made.use in kv_types()):
        raise ValueError(f"{path.name}: {made.use} is no type of {made.name}, or has no bits")
    return made
