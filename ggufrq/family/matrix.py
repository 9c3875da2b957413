"""The importance matrix of a family: one that is given, or one that is made and kept beside the files."""

from __future__ import annotations

from pathlib import Path

from ggufrq import paths, proc
from ggufrq.build import Build
from ggufrq.errors import ModelError
from ggufrq.gguf_file import read_gguf
from ggufrq.gguf_header import read_header
from ggufrq.progress import progress
from ggufrq.resolve import is_gguf
from ggufrq.tensors import Inventory
from ggufrq.tools import imatrix as tool
from ggufrq.tools.logs import retried
from ggufrq.trees import file_hash

#: Chunks of 512 tokens of the calibration text that a matrix is made from.
CHUNKS = 100
_SUMS, _COUNTS = ".in_sum2", ".counts"


def default_text() -> Path:
    """The calibration text that comes with ggufrq."""
    return paths.data_dir("texts") / "calibration.txt"


def made_from(source_key: str, text: Path) -> dict[str, str]:
    """What tells a matrix from others of the same name."""
    return {"source": source_key, "text": file_hash(text), "chunks": str(CHUNKS)}


def make(model: Path, text: Path, out: Path, build: Build, log: Path) -> None:
    """Write the importance matrix of ``model`` over ``text`` straight into ``out``. Raises ToolError."""
    output = {"out": ""}
    with progress("Importance matrix", unit="chunks") as bar:

        def on_stdout(chunk: str) -> None:
            output["out"] += chunk
            bar.update(tool.chunks_done(output["out"]))

        def on_stderr(line: str) -> None:
            total = tool.chunks_planned(line)
            if total:
                bar.update(0, total=total)

        # The name of the text is written into the matrix as it is given here: it must not be a path.
        args = tool.arguments(model.absolute(), Path(text.name), out.absolute(), chunks=CHUNKS)

        def attempt() -> None:
            output["out"] = ""
            done = proc.run(
                [build.tool("llama-imatrix"), *args],
                cwd=text.absolute().parent,
                log=log,
                check=False,
                on_stdout=on_stdout,
                on_stderr=on_stderr,
            )
            tool.check(done.stdout, done.stderr)

        retried(attempt)


def check(path: Path, model: Inventory) -> None:
    """Raise ModelError when a matrix is damaged, or was made for another model: each of its entries must be a
    tensor of this one, with as many columns and experts."""
    if not is_gguf(path):
        raise ModelError(
            f"{path} is no importance matrix in GGUF form",
            remedy=f"llama-imatrix --in-file {path.name} -o {path.stem}.gguf turns an old one into it",
        )
    read_gguf(path)
    header = read_header(path)
    if header.values.get("general.type") != "imatrix":
        raise ModelError(f"{path} is no importance matrix", remedy="a file that llama-imatrix wrote")
    shapes = {tensor.name: (*tensor.shape, 1, 1) for tensor in model}
    entries = {t.name.removesuffix(_SUMS): (*t.shape, 1) for t in header.tensors if t.name.endswith(_SUMS)}
    other = f"{path} was made for another model"
    remedy = "leave out --imatrix, and ggufrq makes one; or --calibrate TEXT"
    for name, shape in entries.items():
        found = shapes.get(name)
        if found is None:
            raise ModelError(f"{other}: this one has no tensor {name}", remedy=remedy)
        if shape[:2] != (found[0], found[2]):
            raise ModelError(
                f"{other}: {name} has {shape[0]} columns there and {found[0]} here", remedy=remedy
            )
    if not entries.keys() & {tensor.name for tensor in model.quantizable}:
        raise ModelError(f"{path} has nothing on the tensors of this model", remedy=remedy)


def stand_in(path: Path, text: Path, model: Inventory) -> Path:
    """A matrix with one entry, for dry runs before the real one is made: llama-quantize chooses some types by
    whether there is a matrix at all."""
    import gguf
    import numpy as np

    tensor = model.quantizable[0]
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text.name])
    writer.add_uint32("imatrix.chunk_count", CHUNKS)
    writer.add_uint32("imatrix.chunk_size", 512)
    writer.add_tensor(tensor.name + _SUMS, np.ones((1, tensor.shape[0]), np.float32))
    writer.add_tensor(tensor.name + _COUNTS, np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
