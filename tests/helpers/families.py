"""Families made in one line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ggufrq.build.project import Build
from ggufrq.make.family import make_family, parse_wants
from ggufrq.make.plan import Family, Request
from ggufrq.make.recipe import Recipe


def family_of(
    model: str,
    types: Sequence[str | Recipe],
    build: Build,
    *,
    imatrix: Path | Sequence[Path] = (),
    **options: Any,
) -> Family:
    """A family of types and recipes by name; the other options are those of ``Request``."""
    matrices = (imatrix,) if isinstance(imatrix, Path) else tuple(imatrix)
    return make_family(Request(model, parse_wants(types, build), imatrix=matrices, **options), build)
