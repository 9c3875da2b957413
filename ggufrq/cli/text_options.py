"""Types of options that are texts: the border at which they are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ggufrq.base import paths, texts


class _Text(click.types.StringParamType):
    """A text, which must be UTF-8."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return texts.argument(str(value), param.opts[-1] if param is not None else "the text")


class _TextFile(click.Path):
    """A file with a text in UTF-8; of one with a mark at its start a copy without it."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        path = super().convert(value, param, ctx)
        return paths.plain_text(path) if isinstance(path, Path) and path.is_file() else path


TEXT = _Text()
TEXT_FILE = _TextFile(path_type=Path, exists=True, dir_okay=False)
