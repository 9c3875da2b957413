"""Files split by size, by llama-gguf-split."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.ggufs.files import read_model, verify_types
from ggufrq.tools.logs import explain


def split(
    whole: Path, name: str, size: int, folder: Path, build: Build, types: Mapping[str, str], log: Path
) -> list[tuple[Path, str]]:
    """Split the file ``whole`` into shards of at most ``size`` bytes in the new folder ``folder``; their
    paths and names, in order. A file that is not larger stays as it is.

    Raises ToolError when the tool fails, ModelError when the shards are not the model.
    """
    if whole.stat().st_size <= size:
        return [(whole, name)]
    folder.mkdir()
    prefix = folder / name.removesuffix(".gguf")
    megabytes = max(1, size // 10**6)
    done = proc.run(
        [
            build.tool("llama-gguf-split"),
            "--split",
            "--split-max-size",
            f"{megabytes}M",
            whole.absolute(),
            prefix.absolute(),
        ],
        log=log,
        check=False,
    )
    made = sorted(folder.glob("*.gguf"))
    if done.rc != 0 or not made:
        raise ToolError(
            f"llama-gguf-split failed: {explain(done.stderr + done.stdout, 'it does not say why')}",
            remedy=f"see {log}",
        )
    verify_types(read_model(made[0]), types)
    return [(path, path.name) for path in made]
