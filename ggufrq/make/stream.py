"""A family of a model that is larger than the disk: its shards are fetched, converted, quantized and deleted,
a piece of the model at a time.

The converter and llama-quantize run over each piece, a GGUF with all metadata and some of the tensors, and
what they make of a tensor does not depend on the others once its type is settled: that is done beforehand, on
the headers of the model. The data go to their places in the files, whose headers are llama-quantize's with
the list of all tensors, so that the files come out byte for byte as of the whole model. On the disk are, at
most, these files, two shards (more only where a tensor is made of more), and a piece in 16 bits with what is
made of it.

After each piece the state is written, so that a run that was killed goes on with the piece that it was at.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from ggufrq.base import log, paths
from ggufrq.base.errors import GgufrqError
from ggufrq.base.progress import Listener, progress
from ggufrq.ggufs.files import GgufFacts, read_gguf, verify_types
from ggufrq.ggufs.header import Header, pad, read_header
from ggufrq.ggufs.tensors import type_bytes, type_number
from ggufrq.make import profile as profiles
from ggufrq.make import quantizer
from ggufrq.make.pieces import SHARDS, Piece
from ggufrq.make.plan import Family, Made, Output
from ggufrq.make.planner import Planner
from ggufrq.make.quantizer import Forecast, Job
from ggufrq.make.record import require_free
from ggufrq.make.work import Work
from ggufrq.models import convert, hub, sound
from ggufrq.models.as_gguf import Source

_COPY = 1 << 24


class Stream(Work):
    """Makes what a planner plans, of a model on the Hub, without ever having it whole."""

    def __init__(self, planner: Planner) -> None:
        super().__init__(planner)
        self._streamed = self.folder / f".{planner.base}.stream"

    def make(self) -> Family:
        """Make what is not there yet. Raises UsageError, before anything is fetched but headers, for what
        takes the whole model."""
        self.record.clean()
        found = self.planner.find(weights=False)
        assert found.hf is not None
        self.record.data["source"] = found.identity
        self.record.data["llama_cpp"] = self.build.manifest.get("llama_cpp", {}).get("commit", "")
        with self.planner.header(found) as gguf:
            plan = self.planner.plan(found, gguf)
            profiles.refuse(self.record, self._profile_base, gguf, force=self.request.force)
            if self.make_matrix(plan, found):
                plan = self.planner.plan(found, gguf)
            todo = [output for output in plan.outputs if not output.kept]
            self.record.refuse_foreign([output.name for output in todo], force=self.request.force)
            if todo:
                # What an earlier run has of them is there already
                parts = [path for path in map(self._part, todo) if path.is_file()]
                fetched = [path for path in self._shards.rglob("*") if path.is_file()]
                there = sum(path.stat().st_blocks * 512 for path in (*parts, *fetched))
                names = ", ".join(output.name for output in todo)
                require_free(self.folder, plan.disk_needed - there, names)
                assert plan.pieces is not None
                for line in plan.told:
                    log.say(line)
                # What was asked for, not what is left of it: a run that was killed later on goes on, too
                made_from = [(one.name, dict(one.made_from), one.forecast.types) for one in plan.outputs]
                self._fill_all(todo, found, plan.pieces.every, read_header(gguf), made_from)
                paths.remove_tree(self._shards)
        files = []
        for output in plan.outputs:
            files.append(self._quantize(output))
            self._part(output).unlink(missing_ok=True)  # the file may have been split into others
        best = max(files, key=lambda made: made.bits)
        profile = self._profile(found, best.path, files)
        paths.remove_tree(self._streamed)
        self.record.clean()
        return Family(plan.base, self.folder, found.identity, tuple(files), profile)

    def _part(self, output: Output) -> Path:
        return self._streamed / output.name

    def _fill(self, job: Job, output: Output, out: Path, listener: Listener) -> GgufFacts:
        """Give ``out`` what the pieces made of the output; it stays where it is until the file is entered."""
        try:
            os.link(self._part(output), out)
        except OSError:  # a file system without links
            self._part(output).replace(out)
        facts = read_gguf(out)
        verify_types(facts, output.forecast.types, job.type_name)
        return facts

    def _fill_all(
        self,
        outputs: Sequence[Output],
        found: Source,
        every: Sequence[Piece],
        header: Header,
        made_from: object,
    ) -> None:
        """Make outputs, from the piece on that an earlier run was at, which is known by what all of them are
        ``made_from``. ``header`` is that of the converted model."""
        shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        facts = [found.key, self.build.key, made_from, [piece.names for piece in every]]
        key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        done = self._resume(key, outputs)
        with progress("Pieces of the model", len(every), unit="pieces") as bar:
            for number, piece in enumerate(every):
                if number < done:
                    bar.update(number + 1)
                    continue
                self._fetch(piece, every[number + 1 :], found)
                self._make_piece(piece, outputs, found, shapes)
                paths.atomic_write(self._state, json.dumps({"key": key, "done": number + 1}))
                bar.update(number + 1)

    @property
    def _state(self) -> Path:
        return self._streamed / "state.json"

    @property
    def _shards(self) -> Path:
        return self._streamed / "shards"

    def _resume(self, key: str, outputs: Sequence[Output]) -> int:
        """Pieces that an earlier run of the same has made."""
        try:
            state = json.loads(self._state.read_text(encoding="utf-8"))
            if state["key"] == key and all(self._part(output).is_file() for output in outputs):
                return int(state["done"])
        except (OSError, ValueError, KeyError, TypeError):
            pass
        self._streamed.mkdir(exist_ok=True)
        self._state.unlink(missing_ok=True)
        for path in self._streamed.glob("*.gguf"):
            path.unlink()
        paths.remove_tree(self._shards)  # they may be of another revision, under the same names
        return 0

    def _fetch(self, piece: Piece, later: Sequence[Piece], found: Source) -> None:
        """Have the shards of a piece, and of others those that are needed soonest."""
        there = {path.name for path in self._shards.glob("*.safetensors")}
        use = {name: i for i, one in reversed(list(enumerate(later))) for name in one.files}
        others = sorted((name for name in there - piece.files if name in use), key=lambda name: use[name])
        kept = piece.files | set(others[: max(0, SHARDS - len(piece.files))])
        for name in there - kept:
            (self._shards / name).unlink()
        repo, sha = str(found.identity["repo"]), str(found.identity["revision"])
        for name in sorted(piece.files - there):
            hub.fetch_file(repo, name, sha, self._shards)

    def _make_piece(
        self, piece: Piece, outputs: Sequence[Output], found: Source, shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        """Convert and quantize a piece, and put its tensors into the files of the outputs."""
        assert found.hf is not None
        names = self._streamed / "names.json"
        names.write_text(json.dumps(piece.names), encoding="utf-8")
        with self.record.making(self.planner.base) as work:
            work.mkdir()
            source = work / "piece.gguf"
            model = work / "model"
            model.mkdir()
            for path in found.hf.folder.iterdir():
                shard = self._shards / path.name
                here = shard if path.name in piece.files else path
                (model / path.name).symlink_to(here.absolute())
            hf = replace(found.hf, folder=model, name=found.hf.called)
            convert.convert_to(
                source,
                hf,
                self.build.source,
                pre_tokenizer=self.request.pre_tokenizer,
                mtp=self.planner.options.mtp,
                what=f"only:{names.absolute()}",
                log=self.log,
            )
            sound.require_numbers(source, hf, hf.kind)
            for output in outputs:
                out = work / "out.gguf"
                types = {name: output.forecast.types[name] for name in piece.names}
                job = replace(output.job, source=source, types=types)
                quantizer.make(job, out, self.build, types, log=self.log)
                put(out, self._part(output), output.forecast, shapes)
                out.unlink()

    def _profile(self, found: Source, gguf: Path, files: Sequence[Made]) -> Path | None:
        """The profile of K from the best of the files, since the model itself is nowhere."""
        made_from = {"source": found.key, "fold": "", "streamed": "1"}
        build = self.build if self.request.run else None
        force = self.request.force
        return profiles.keep(self.record, self._profile_base, gguf, made_from, build, force=force)


def put(piece: Path, whole: Path, forecast: Forecast, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Put the tensors of a quantized piece into the file ``whole``, which is begun with the piece's metadata
    and the list of all tensors where it is not there. ``shapes`` are those of all tensors by name. Raises
    GgufrqError when the file would not be the one that was foretold."""
    if not whole.is_file():
        with paths.atomic_path(whole) as temporary:
            temporary.write_bytes(_beginning(piece, forecast.types, shapes))
            os.truncate(temporary, forecast.file_bytes)
    here, there = read_header(piece), read_header(whole)
    places = {tensor.name: tensor for tensor in there.tensors}
    with piece.open("rb") as source, whole.open("r+b") as out:
        for tensor in here.tensors:
            place = places[tensor.name]
            if (tensor.shape, tensor.type) != (place.shape, place.type):
                raise GgufrqError(f"{tensor.name} is {tensor.shape}, where {place.shape} was foretold")
            source.seek(here.data_offset + tensor.offset)
            out.seek(there.data_offset + place.offset)
            left = _bytes(forecast.types[tensor.name], tensor.shape)
            while left:
                data = source.read(min(left, _COPY))
                if not data:
                    raise GgufrqError(f"{piece} ends within {tensor.name}")
                out.write(data)
                left -= len(data)
        out.flush()
        os.fsync(out.fileno())


def _beginning(piece: Path, types: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    """All of a file before its data: the metadata of a piece, and the list of all tensors as llama-quantize
    writes it."""
    header = read_header(piece)
    with piece.open("rb") as file:
        start = file.read(24)
        values = file.read(sum(header.value_bytes.values()))
    infos, offset = [], 0
    for name, kind in types.items():
        shape = shapes[name]
        while len(shape) > 1 and shape[-1] == 1:  # ggml does not count these
            shape = shape[:-1]
        text = name.encode()
        infos.append(struct.pack("<Q", len(text)) + text + struct.pack("<I", len(shape)))
        infos.append(struct.pack(f"<{len(shape)}QIQ", *shape, type_number(kind), offset))
        offset += pad(_bytes(kind, shape))
    whole = b"".join([start[:8], struct.pack("<Q", len(types)), start[16:], values, *infos])
    return whole.ljust(pad(len(whole)), b"\0")


def _bytes(kind: str, shape: tuple[int, ...]) -> int:
    return type_bytes(kind, math.prod(shape), shape[0])
