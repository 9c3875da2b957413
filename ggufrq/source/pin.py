"""The pin: which llama.cpp is patched, and where its tree can be had."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.base.errors import SourceError
from ggufrq.base.toml import tomllib

#: The pin that comes with ggufrq.
PIN_FILE = Path(__file__).with_name("pin.toml")


@dataclass(frozen=True)
class Sdist:
    """A source distribution on PyPI that carries the tree: where in it, and the archive's sha256."""

    name: str
    version: str
    sha256: str
    folder: str
    git_dir: str


@dataclass(frozen=True)
class Pin:
    """The upstream commit that is patched, the hash of its tree, and where to get it."""

    url: str
    commit: str
    tree: str
    date: str
    sdist: Sdist | None = None

    @property
    def short(self) -> str:
        """The commit in nine digits."""
        return self.commit[:9]


def pin_toml(pin: Pin) -> str:
    """The text of ``pin.toml`` for a pin."""
    lines = [
        "# The upstream llama.cpp that ggufrq patches and builds.",
        "[llama_cpp]",
        *(f'{name} = "{getattr(pin, name)}"' for name in ("url", "commit", "tree", "date")),
    ]
    if pin.sdist is not None:
        names = ("name", "version", "sha256", "folder", "git_dir")
        lines += ["", "# The same tree on PyPI, for machines that cannot reach GitHub.", "[sdist]"]
        lines += [f'{name} = "{getattr(pin.sdist, name)}"' for name in names]
    return "\n".join(lines) + "\n"


def load_pin(path: Path | None = None) -> Pin:
    """Read ``pin.toml`` (the one that comes with ggufrq by default). Raises SourceError when it is
    malformed.
    """
    path = path or PIN_FILE
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        upstream: dict[str, Any] = data["llama_cpp"]
        sdist: dict[str, Any] | None = data.get("sdist")
        pin = Pin(**upstream, sdist=Sdist(**sdist) if sdist else None)
    except (OSError, tomllib.TOMLDecodeError, KeyError, TypeError) as error:
        raise SourceError(
            f"{path} cannot be read: {error}", remedy="restore it: git checkout ggufrq/source/pin.toml"
        ) from error
    for what, value, digits in (("commit", pin.commit, 40), ("tree", pin.tree, 40)):
        if not re.fullmatch(rf"[0-9a-f]{{{digits}}}", value):
            raise SourceError(f"{path}: {what} must be {digits} hexadecimal digits, not '{value}'")
    return pin
