"""Results kept by all that they depend on, so that nothing is measured twice and a stopped run goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufrq.base import paths

Facts = Mapping[str, Any]


class ResultStore:
    """A folder of results as JSON, each named by the hash of the facts that it depends on."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, facts: Facts) -> Path:
        """Where the result that depends on these facts is, or will be."""
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"

    def get(self, facts: Facts) -> dict[str, Any] | None:
        """The result, or None when there is none or it cannot be read."""
        try:
            stored = json.loads(self.path(facts).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        row = stored.get("row") if isinstance(stored, dict) else None
        return row if isinstance(row, dict) else None

    def put(self, facts: Facts, row: Mapping[str, Any], log: Path | None = None) -> None:
        """Keep a result, and with it a copy of the log of the run that gave it."""
        path = self.path(facts)
        if log is not None and log.is_file():
            with paths.atomic_path(path.with_suffix(".log")) as temporary:
                shutil.copyfile(log, temporary)
        paths.atomic_write(path, json.dumps({"row": row}, indent=1) + "\n")

    def log(self, facts: Facts) -> Path | None:
        """The log that is kept beside a result, or None."""
        path = self.path(facts).with_suffix(".log")
        return path if path.is_file() else None


def results_dir() -> Path:
    """Where results are kept."""
    return paths.own_dir("measurements")


def file_sha256(path: Path) -> str:
    """The hash of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
