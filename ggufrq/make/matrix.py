"""The importance matrix of a family: one that is given, merged of several, or made, kept beside the files."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from ggufrq.base import log, paths, proc
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.locks import locked
from ggufrq.base.progress import progress
from ggufrq.base.results import file_sha256
from ggufrq.build.project import Build
from ggufrq.ggufs import imatrix
from ggufrq.ggufs.imatrix import COUNTS, SUMS
from ggufrq.ggufs.tensors import Inventory
from ggufrq.ggufs.values import DAMAGED, require_numbers
from ggufrq.make import mix
from ggufrq.make.inventory import inventory
from ggufrq.models import as_gguf
from ggufrq.models.resolve import Model
from ggufrq.tools import imatrix as tool
from ggufrq.tools.logs import retried

#: Chunks of so many tokens of each calibration text that a matrix is made from, at most.
CHUNKS, CHUNK_SIZE = 100, 512
#: Chunks of a part: what a run that is killed loses at most. As passes of the tool are not torn apart, parts
#: add up to what one go gives, to the bit.
PART = 5 * tool.TOGETHER
#: Tensors that are named when a matrix had to be changed.
_TOLD = 8


def made_from(source_key: str, texts: Sequence[Path], chunks: int | None = None) -> dict[str, str]:
    """What tells a matrix from others of the same name. Without texts it is made from the mix that comes with
    ggufrq."""
    text = "+".join(map(file_sha256, texts)) if texts else f"mix {mix.digest()}"
    return {"source": source_key, "text": text, "chunks": str(chunks or CHUNKS)}


@dataclass(frozen=True)
class Given:
    """Importance matrices that are given, as one: as they can be used, and what had to be changed for that, a
    line for each tensor (see ``imatrix.mended``)."""

    files: tuple[Path, ...]
    matrix: imatrix.Matrix
    changes: tuple[str, ...]

    def key(self) -> dict[str, str]:
        """What tells them from others, as ``made_from``."""
        return {"given": "+".join(map(file_sha256, self.files)) + ("+mended" if self.changes else "")}

    def publish(self, out: Path) -> None:
        """Put them at ``out``: a copy where one is used as it is."""
        if len(self.files) == 1 and not self.changes:
            shutil.copyfile(self.files[0], out)
        else:
            imatrix.write(self.matrix, out)


def given(files: Sequence[Path]) -> Given:
    """Matrices that are given. Raises ModelError when one is damaged, or they are of different models."""
    whole = imatrix.merge([imatrix.read(path) for path in files], [path.name for path in files])
    return Given(tuple(files), *imatrix.mended(whole))


def make(
    model: Path,
    texts: Sequence[Path],
    out: Path,
    build: Build,
    log: Path,
    key: Mapping[str, str],
    chunks: int | None = None,
) -> None:
    """Write the importance matrix of ``model`` over the texts, or the mix, to ``out``.

    It is made in parts that are kept in the cache under ``key`` (see ``made_from``) until the whole is there:
    a run that was killed goes on with the part that it was at, and the result is the same to the bit. At the
    end of a text up to two chunks may be left out, which the tool does not take alone. Raises ToolError.
    """
    chunks = chunks or CHUNKS
    with TemporaryDirectory(prefix="ggufrq-") as temporary:
        texts = texts or [mix.write(model, Path(temporary) / mix.NAME)]
        facts = {**key, "texts": [file_sha256(text) for text in texts], "part": PART, "build": build.key}
        name = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        folder = paths.own_dir("imatrix") / name
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder.with_suffix(".lock"), "another ggufrq makes the same importance matrix"):
            with progress("Importance matrix", chunks * len(texts), unit="chunks") as bar:
                made = _Parts(model, folder, build, log, bar, chunks).over(texts)
            whole, changes = imatrix.mended(imatrix.read(made))
            tell(changes)
            imatrix.write(replace(whole, datasets=tuple(text.name for text in texts)), out)
            paths.remove_tree(folder)


def make_alone(
    model: Path, out: Path, texts: Sequence[Path], build: Build, chunks: int | None = None
) -> Path:
    """Make a matrix of a GGUF model that goes into no family. Raises ModelError, UsageError for a text that
    is not there, ToolError."""
    for text in texts:
        if not text.is_file():
            raise UsageError(f"there is no text {text}")
    log = paths.logs_dir() / "imatrix.log"
    key = made_from(
        as_gguf.find(Model("gguf", model.stem, model), None, as_gguf.Options()).key, texts, chunks
    )
    require_numbers(model, model.name, remedy=DAMAGED)
    with paths.atomic_path(out) as temporary:
        make(model, texts, temporary, build, log, key, chunks)
        check(temporary, inventory(model, build, log=log))
    return out


@dataclass
class _Parts:
    """The parts of one matrix, in a folder with the last one and a note of how far it goes."""

    model: Path
    folder: Path
    build: Build
    log: Path
    bar: progress
    chunks: int

    def over(self, texts: Sequence[Path]) -> Path:
        """The matrix over all texts, from where an earlier run stopped."""
        number, skip, before, last = self._resume()
        for i in range(number, len(texts)):
            while skip < self.chunks:
                self.bar.update(before + skip, texts[i].name, total=before + self.chunks * (len(texts) - i))
                wanted = min(PART, self.chunks - skip)
                done, made = self._part(texts[i], i, skip, wanted, before, last)
                skip += done
                if made is not None:
                    self._note(i, skip, before, made)
                    if last is not None:
                        last.unlink(missing_ok=True)
                    last = made
                if done < wanted:
                    break
            before, skip = before + skip, 0
        self.bar.update(before, total=before)
        assert last is not None
        return last

    def _part(
        self, text: Path, number: int, skip: int, chunks: int, before: int, onto: Path | None
    ) -> tuple[int, Path | None]:
        """Add one part; how many chunks it had, and the new matrix. None when the text was at its end."""
        out = self.folder / f"{number}-{skip + chunks:05d}.gguf"
        # The name of the text is written into the matrix as it is given here: it must not be a path.
        args = tool.arguments(
            self.model.absolute(),
            Path(text.name),
            out.absolute(),
            n_ctx=CHUNK_SIZE,
            chunks=chunks,
            skip=skip,
            onto=onto.absolute() if onto is not None else None,
        )
        output = {"out": ""}

        def on_stdout(chunk: str) -> None:
            output["out"] += chunk
            self.bar.update(before + skip + tool.chunks_done(output["out"]))

        def attempt() -> int:
            output["out"] = ""
            done = proc.run(
                [self.build.tool("llama-imatrix"), *args],
                cwd=text.absolute().parent,
                log=self.log,
                check=False,
                on_stdout=on_stdout,
            )
            if skip and tool.at_end(done.stderr):
                return 0
            return tool.check(done.stdout, done.stderr)

        count = retried(attempt)
        return count, out if count else None

    def _note(self, number: int, skip: int, before: int, file: Path) -> None:
        facts = {
            "text": number,
            "skip": skip,
            "before": before,
            "file": file.name,
            "sha256": file_sha256(file),
        }
        paths.atomic_write(self.folder / "state.json", json.dumps(facts))

    def _resume(self) -> tuple[int, int, int, Path | None]:
        """Where an earlier run stopped: the text, chunks of it that are done, chunks of those before, and the
        matrix so far."""
        try:
            facts = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
            file = self.folder / str(facts["file"])
            if file_sha256(file) == facts["sha256"]:
                return int(facts["text"]), int(facts["skip"]), int(facts["before"]), file
        except (OSError, ValueError, KeyError, TypeError):
            pass
        return 0, 0, 0, None


def tell(changes: Sequence[str]) -> None:
    """Say what was changed of a matrix."""
    for line in changes[:_TOLD]:
        log.say(f"importance matrix: {line}")
    if changes[_TOLD:]:
        log.say(f"importance matrix: and {len(changes) - _TOLD} tensors more")


def check(path: Path, model: Inventory) -> None:
    """Raise ModelError when a matrix is damaged, or was made for another model: each of its entries must be a
    tensor of this one, with as many columns and experts."""
    check_entries(imatrix.read(path).entries, path, model)


def check_entries(
    entries: Mapping[str, imatrix.Entry],
    path: Path,
    model: Inventory,
    remedy: str = "leave out --imatrix, and ggufrq makes one; or --calibrate TEXT",
) -> None:
    """As ``check``, of the entries of a matrix that was read from ``path``."""
    shapes = {tensor.name: (*tensor.shape, 1, 1) for tensor in model}
    other = f"{path} was made for another model"
    for name, entry in entries.items():
        found = shapes.get(name)
        if found is None:
            raise ModelError(f"{other}: this one has no tensor {name}", remedy=remedy)
        experts, columns = entry.sums.shape
        if (columns, experts) != (found[0], found[2]):
            raise ModelError(
                f"{other}: {name} has {columns} columns there and {found[0]} here", remedy=remedy
            )
    if not entries.keys() & {tensor.name for tensor in model.quantizable}:
        raise ModelError(f"{path} has nothing on the tensors of this model", remedy=remedy)


def stand_in(path: Path, texts: Sequence[Path], model: Inventory) -> Path:
    """A matrix with one entry, for dry runs before the real one is made: llama-quantize chooses some types by
    whether there is a matrix at all."""
    import gguf
    import numpy as np

    tensor = model.quantizable[0]
    writer = gguf.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [text.name for text in texts] or [mix.NAME])
    writer.add_uint32("imatrix.chunk_count", CHUNKS)
    writer.add_uint32("imatrix.chunk_size", CHUNK_SIZE)
    writer.add_tensor(tensor.name + SUMS, np.ones((1, tensor.shape[0]), np.float32))
    writer.add_tensor(tensor.name + COUNTS, np.ones((1, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
