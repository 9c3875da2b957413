"""Where the programs of a llama.cpp are, and which cache types it knows."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError, UsageError
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPlan

_ALLOWED = re.compile(r"--cache-type-k\s.*?allowed values:\s*([\w,\s]+?)\s*\(default", re.DOTALL)
_SUFFIX = ".exe" if os.name == "nt" else ""


@dataclass(frozen=True)
class Programs:
    """A folder with llama.cpp's programs; ``build`` when it is one that ggufrq made."""

    folder: Path
    build: Build | None = field(default=None, compare=False)

    @classmethod
    def of_build(cls, build: Build) -> Programs:
        """The programs of a build of ours."""
        return cls(build.bin, build)

    @classmethod
    def in_folder(cls, folder: Path) -> Programs:
        """The programs of another llama.cpp: its folder of programs, or the tree it was built in.

        Raises UsageError when there are none.
        """
        for candidate in (
            folder,
            folder / "bin",
            folder / "build" / "bin",
            folder / "build" / "bin" / "Release",
        ):
            if any((candidate / f"llama-{name}{_SUFFIX}").is_file() for name in ("cli", "server")):
                return cls(candidate.absolute())
        raise UsageError(
            f"{folder} has no llama-cli and no llama-server",
            remedy="--llama-cpp with the folder that holds these programs, often build/bin",
        )

    def tool(self, name: str) -> Path:
        """Path of a program. Raises ToolError when this llama.cpp does not have it."""
        if self.build is not None:
            return self.build.tool(name)
        path = self.folder / (name + _SUFFIX)
        if not path.is_file():
            raise ToolError(f"{self.folder} has no program '{name}'", remedy="ggufrq build")
        return path

    @cached_property
    def help_text(self) -> str:
        """The help that these programs print of their common options."""
        name = "llama-cli" if (self.folder / f"llama-cli{_SUFFIX}").is_file() else "llama-server"
        completed = proc.run([self.tool(name), "--help"], timeout=60, check=False)
        if completed.rc != 0:
            raise ToolError(
                proc.failure_message(completed), remedy="--llama-cpp with a folder whose programs run"
            )
        return completed.stdout + completed.stderr

    @cached_property
    def cache_types(self) -> tuple[str, ...]:
        """Names of the cache types that these programs list in their own help."""
        return parse_cache_types(self.help_text)

    def missing_types(self, plan: KvPlan) -> list[str]:
        """Types in ``plan`` that these programs do not know."""
        names = dict.fromkeys(kind.name for pair in plan.pairs for kind in (pair.k, pair.v))
        return [name for name in names if name not in self.cache_types]

    def has_option(self, name: str) -> bool:
        """Whether their help names the option ``name``, as ``--kv-layers``."""
        return re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", self.help_text) is not None


def parse_cache_types(text: str) -> tuple[str, ...]:
    """The allowed values of ``--cache-type-k`` in the help of a program. Raises ToolError when it names
    none."""
    found = _ALLOWED.search(text)
    if found is None:
        raise ToolError(
            "this llama.cpp does not say which cache types it knows; it is too old or not llama.cpp",
            remedy="ggufrq build",
        )
    return tuple(name.strip() for name in found.group(1).split(",") if name.strip())
