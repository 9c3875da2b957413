"""Works out the plan of a request from the source, the folder's record, and llama-quantize's dry runs."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ggufrq import __version__
from ggufrq.base import paths
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.build.project import Build
from ggufrq.ggufs import imatrix
from ggufrq.ggufs.drafts import SIMPLE, draft_kind, has_head
from ggufrq.ggufs.files import read_model
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.tensors import Inventory, is_float
from ggufrq.make import matrix as matrices
from ggufrq.make import quantizer
from ggufrq.make.fold import fold_file as folds
from ggufrq.make.inventory import inventory
from ggufrq.make.pieces import Pieces, cut
from ggufrq.make.plan import Conversion, FamilyPlan, Output, Request, Want, needs_imatrix
from ggufrq.make.quantizer import Job
from ggufrq.make.recipe import dump
from ggufrq.make.record import Record
from ggufrq.make.verify import loads
from ggufrq.models import as_gguf, convert
from ggufrq.models.as_gguf import Source
from ggufrq.models.convert import ANY_TOKENIZER
from ggufrq.models.names import RECIPE
from ggufrq.models.resolve import Model
from ggufrq.tools.quantize import LONGEST_VALUE, requires_matrix

#: Codes in which models are trained: in a GGUF file, too, they are no loss, and stay as they are.
_AS_TRAINED = {"MXFP4", "NVFP4"}
#: What to do about a matrix of a family that does not fit.
_REPLACES = "--imatrix FILE or --calibrate TEXT, which takes its place"


class Planner:
    """Plans of one request over one folder."""

    def __init__(self, request: Request, model: Model, folder: Path, build: Build, record: Record) -> None:
        self.request = request
        self.model = model
        self.base = model.name
        self.folder = folder
        self.build = build
        self.record = record
        self.log = paths.logs_dir() / f"quantize-{self.base}.log"
        self._pieces: Pieces | None = None
        self._part_bytes: dict[str, int] = {}
        self._is_of_model = False
        self.options = as_gguf.Options(request.pre_tokenizer, mtp=request.mtp == "keep")

    def find(self, *, weights: bool = True) -> Source:
        """The source, fetched if need be; without ``weights`` only what a plan takes."""
        if self.request.stream and (self.model.kind != "hub" or self.model.label):
            raise UsageError(
                f"--stream is for models on the Hub in safetensors, which {self.request.model} is not",
                remedy="without --stream",
            )
        found = self._as_converted(
            as_gguf.find(self.model, self.request.revision, self.options, weights=weights)
        )
        said = {
            "--mmproj": self.request.mmproj,
            f"--mtp {self.request.mtp}": self.request.mtp != "keep",
            "--pre-tokenizer": self.request.pre_tokenizer not in (None, ANY_TOKENIZER),
        }
        options = [option for option, given in said.items() if given]
        if found.hf is None and options:
            raise UsageError(
                f"{self.model.name} is a GGUF file; {options[0]} is for the conversion of the original model",
                remedy="name the folder with safetensors, or the Hub id",
            )
        if found.hf is not None:
            convert.require_readable(found.hf)
        if self.request.stream:
            self._refuse_stream(found)
        return found

    def _as_converted(self, found: Source) -> Source:
        """A GGUF that was converted for this family, the model or its head, counts as what it was converted
        from: its matrix and its files are those of the family."""
        if found.gguf is None or found.gguf.resolve().parent != self.folder.resolve():
            return found
        made_from = self.record.files.get(found.gguf.name, {}).get("from", {})
        origin = self.record.data.get("source") or {}
        key = str(made_from.get("source"))
        if made_from.get("part") not in ("model", "mtp") or not key.startswith(str(origin.get("id"))):
            return found
        if self.record.kept(found.gguf.name, made_from) is None:
            return found
        return replace(found, identity=origin, key=key)

    def _refuse_stream(self, found: Source) -> None:
        """Raise UsageError for what cannot be made of a model that is never there as a whole."""
        request, why = self.request, ""
        if request.fold is not None:
            why = "folding looks at all that reads a tensor, and at the importance matrix of the whole"
        elif request.mmproj or request.mtp == "apart":
            why = "projector and head are made of the model's files in one go"
        elif any(want.recipe is None and want.label == found.kind for want in request.wants):
            why = f"{found.kind} is the whole model in 16 bits, which is what does not fit"
        elif found.hf is not None and found.hf.has_codes:
            why = f"its weights are {found.hf.quantized_by}, with scales that may lie in other shards"
        if why:
            raise UsageError(f"not with --stream: {why}", remedy="without --stream, or leave that out")

    def preview(self) -> FamilyPlan:
        """The plan without anything being written, downloaded or converted but headers."""
        found = self.find(weights=False)
        with ExitStack() as stack:
            gguf = self.converted(found) or stack.enter_context(self.header(found))
            return self.plan(found, gguf)

    def plan(self, found: Source, gguf: Path) -> FamilyPlan:
        """The plan for a source that is there as GGUF, if only as a header. Raises ModelError or
        UsageError."""
        facts = read_model(gguf)
        codes = sorted(kind for kind in facts.types if not is_float(kind.lower()))
        stay = bool(codes) and not self.request.requantize
        if stay and found.hf is None and not set(codes) <= _AS_TRAINED:
            raise ModelError(
                f"{gguf.name if found.hf is None else self.model.name} is quantized already "
                f"({facts.file_type or ', '.join(codes)}); doing it once more loses quality",
                remedy="start from the F16 or BF16 file or the original model, or add --requantize",
            )
        head = has_head(facts.tensor_types)
        if found.hf is not None and head and not self.options.mtp:
            raise ModelError(
                f"the head for further tokens of {self.model.name} cannot be left out: llama.cpp's converter "
                "keeps it",
                remedy="--mtp keep",
            )
        loads(gguf, self.build, self.log)
        model = inventory(gguf, self.build, log=self.log)
        if stay:
            model = model.with_codes_kept()
        if self.given is not None:
            matrices.check_entries(self.given.matrix.entries, self.given.files[0], model)
        outputs = tuple(
            self._output(want, found, gguf, model)
            for want in self.request.wants
            if want.recipe is not None or want.label != found.kind or self.request.fold
        )
        conversions = self.conversions(found, facts.file_bytes)
        return FamilyPlan(
            self.base,
            self.folder,
            found.identity,
            model,
            conversions,
            outputs,
            self.request.split_size,
            facts.file_bytes if self.request.fold else 0,
            self._pieces,
            found.hf is not None and found.hf.has_mtp and self.options.mtp and not head,
            self._strangers(found, {part.name for part in conversions} | {output.name for output in outputs}),
        )

    def _strangers(self, found: Source, names: set[str]) -> tuple[str, ...]:
        """Files of the family that were made from another source and are not among ``names``, which are made
        now. The importance matrix and the profile are made anew where they have to be."""
        return tuple(
            name
            for name, entry in self.record.files.items()
            if name not in names
            and name.startswith((f"{self.base}-", f"mtp-{self.base}-"))
            and "bits" in entry
            and entry.get("from", {}).get("source") != found.key
            and (self.folder / entry["parts"][0]["name"]).is_file()
        )

    def conversions(self, found: Source, size: int = 0) -> tuple[Conversion, ...]:
        """What the converter makes, the model of ``size`` bytes first, where it is known with those of the
        others; nothing when the source is a GGUF."""
        if found.hf is None or self.request.stream:
            return ()
        made = []
        for part in ["model", *self._parts]:
            convert.require_part(found.hf, part)
            kind = convert.part_kind(found.hf, part)
            name = f"{'' if part == 'model' else part + '-'}{self.base}-{kind}.gguf"
            key = {"source": found.key, "part": part}
            kept = self.record.kept(name, key) is not None
            bytes_of = size if part == "model" or not size else self._bytes_of(found, part)
            made.append(Conversion(name, part, kind, key, bytes_of, kept, found.hf.quantized_by))
        return tuple(made)

    def _bytes_of(self, found: Source, part: str) -> int:
        """Those of a file beside the model, once it is made."""
        if part not in self._part_bytes:
            with as_gguf.header(found, self.build.source, self.options, self.log, part=part) as header:
                self._part_bytes[part] = read_model(header).file_bytes
        return self._part_bytes[part]

    @property
    def _parts(self) -> list[str]:
        """What is made beside the model."""
        asked = {"mmproj": self.request.mmproj, "mtp": self.request.mtp == "apart"}
        return [part for part, wanted in asked.items() if wanted]

    def converted(self, found: Source) -> Path | None:
        """The model as GGUF, when it is one or was converted before."""
        if found.gguf is not None or self.request.stream:
            return found.gguf
        model = self.conversions(found)[0]
        return self.folder / model.name if model.kept else None

    @contextmanager
    def header(self, found: Source) -> Iterator[Path]:
        """The model as GGUF without its weights, for as long as the context lasts. Of a model that is to be
        streamed it tells the pieces, too."""
        with tempfile.TemporaryDirectory(prefix="ggufrq-") as folder:
            told = Path(folder) / "sources.json" if self.request.stream else None
            with as_gguf.header(found, self.build.source, self.options, self.log, told) as path:
                if told is not None:
                    assert found.hf is not None
                    where = found.hf.folder
                    sizes = {name: (where / name).stat().st_size for name in found.hf.weights.files}
                    self._pieces = cut(json.loads(told.read_text(encoding="utf-8")), sizes)
                yield path

    @property
    def matrix(self) -> Path:
        """Where an importance matrix goes, made or given: beside the files, named so that nobody takes it for
        a model."""
        return self.folder / f"{self.base}-imatrix.gguf"

    @cached_property
    def given(self) -> matrices.Given | None:
        """The matrices that the request gives, as one; told of once when they cannot be used as they are."""
        if not self.request.imatrix:
            return None
        found = matrices.given(self.request.imatrix)
        matrices.tell(found.changes)
        return found

    def matrix_from(self, found: Source) -> dict[str, str]:
        """What tells this run's matrix from others of its name: where none is given and no text named it is
        the one that the family has."""
        if self.given is not None:
            return self.given.key()
        there: dict[str, str] = self.record.files.get(self.matrix.name, {}).get("from", {})
        fits = "given" in there or there.get("source") == found.key
        if not self.request.calibrate and fits and self.record.kept(self.matrix.name, there) is not None:
            return there
        return matrices.made_from(found.key, self.request.calibrate)

    def _require_of_model(self, model: Inventory) -> None:
        """Raise ModelError when the matrix that the family was given is not of this model."""
        if not self._is_of_model:
            matrices.check_entries(imatrix.read(self.matrix).entries, self.matrix, model, _REPLACES)
            self._is_of_model = True

    def _output(self, want: Want, found: Source, gguf: Path, model: Inventory) -> Output:
        wanted: Mapping[str, str] = {}
        types: Mapping[str, str] | None = None
        fold = self.request.fold
        base = f"{self.base}-{fold}" if fold else self.base
        kind, name = want.label, f"{base}-{want.label}.gguf"
        stay = {tensor.name: tensor.type for tensor in model if tensor.is_kept_code}
        asked = False
        if stay and is_float(kind.lower()):
            raise self._no_floats(name, stay, found)
        if want.recipe is not None:
            wanted, types = want.recipe.wanted(model), want.recipe.plan(model)
            values = {tensor.name: tensor.values for tensor in model}
            kind = quantizer.label({n: t for n, t in types.items() if n not in stay}, values)
            name, asked = f"{base}-{want.label}-{kind}.gguf", want.recipe.imatrix
        matrix = self._matrix_for(types if types is not None else kind, asked=asked)
        if matrix is not None and draft_kind(gguf) != SIMPLE:
            given = "--imatrix" if self.request.imatrix else "--calibrate" if self.request.calibrate else ""
            raise ModelError(
                f"{given or want.label} takes an importance matrix, and no text runs through "
                f"{gguf.name if found.hf is None else self.model.name} alone",
                remedy=f"without {given}" if given else "types that need none, as Q4_K_M or IQ4_XS",
            )
        if matrix is not None and self.given is None and "given" in self.matrix_from(found):
            self._require_of_model(model)
        if types is None and stay:
            types = stay  # and llama-quantize chooses the others
        made_from = {
            "source": found.key,
            "imatrix": self._matrix_key(matrix, found),
            "recipe": dump(want.recipe) if want.recipe is not None else "",
            "split": str(self.request.split_size or ""),
        } | ({"codes": "stay"} if stay else {})
        metadata = self._metadata(want, found, matrix)
        if fold:
            # with a text, though no fold takes one any more: so that files folded before are known again
            made_from["fold"] = json.dumps({"kind": folds.identity(fold), "text": ""})
            metadata |= folds.metadata(fold, gguf)
        requantize = self.request.requantize
        with self._present(matrix, model) as there:
            job = Job(gguf, kind, types, there, metadata, requantize)
            forecast = quantizer.forecast(job, self.build, log=self.log)
        if matrix is not None and self.request.stream:
            self._refuse_to_make_matrix(want.label, found)
        missed = 0
        if matrix is not None:
            missed = self._check_matrix(want.label, job, forecast.types, found, model)
        if fold:
            folds.check_types(fold, forecast.types, want.label)
        job = Job(gguf, kind, types, matrix, metadata, requantize)
        kept = self.record.kept(name, made_from) is not None
        return Output(want, name, job, forecast, made_from, wanted, kept, stay, missed)

    def _no_floats(self, name: str, stay: Mapping[str, str], found: Source) -> ModelError:
        """What there is to say of a file of floats, of a model that holds codes."""
        return ModelError(
            f"no file can be called {name}: {len(stay)} tensors of {self.model.name} stay "
            f"{', '.join(sorted(set(stay.values())))}, as in the source",
            remedy=f"{self.base}-{found.kind}.gguf, which is made in any case, has the others in 16 bits"
            if found.hf is not None
            else "--requantize decodes them",
        )

    def _refuse_to_make_matrix(self, name: str, found: Source) -> None:
        if self.given is None and self._entries(found) is None:
            asked, without = f"{name} takes", "types that need none, as Q4_K_M"
            if self.request.calibrate:
                asked, without = "--calibrate makes", "without --calibrate"
            raise UsageError(
                f"{asked} an importance matrix, for which the whole model is run: not with --stream",
                remedy=f"--imatrix FILE, which others may have published, or {without}",
            )

    def _check_matrix(
        self, name: str, job: Job, types: Mapping[str, str], found: Source, model: Inventory
    ) -> int:
        """How many tensors of a head for further tokens are quantized without the matrix. Raises ModelError
        where llama-quantize would in the middle of its work: for a tensor of few bits on which the matrix has
        nothing. One that is still to be made will know what texts run through."""
        missed = 0
        values = read_header(job.source).values
        architecture = values.get("general.architecture", "")
        blocks, apart = (
            values.get(f"{architecture}.{key}", 0) for key in ("block_count", "nextn_predict_layers")
        )
        entries = self._entries(found)
        for tensor in model:
            layer = re.match(r"blk\.(\d+)\.", tensor.name)
            further = bool(apart and layer and int(layer[1]) >= blocks - apart)
            known = tensor.name in entries if entries is not None else not further
            kind = types[tensor.name]
            if known or kind == tensor.type:
                continue
            if not requires_matrix(tensor.name, kind, job.type_name):
                missed += further
                continue
            why = (
                "no text runs through the layers that predict further tokens"
                if further
                else "it has nothing on it"
            )
            remedy = "types of four bits, as Q4_K_M or IQ4_XS"
            if further and found.hf is not None:
                remedy = f"--mtp drop, --mtp apart, or {remedy}"
            raise ModelError(
                f"{name} would give {tensor.name} the type {kind}, which is not made without an importance "
                f"matrix: {why}",
                remedy=remedy,
            )
        return missed

    def _entries(self, found: Source) -> frozenset[str] | None:
        """Names of the tensors that the matrix knows, None while it is still to be made."""
        if self.given is not None:
            return frozenset(self.given.matrix.entries)
        if self.record.kept(self.matrix.name, self.matrix_from(found)) is None:
            return None
        names = (tensor.name for tensor in imatrix.header_of(self.matrix).tensors)
        return frozenset(name.removesuffix(imatrix.SUMS) for name in names if name.endswith(imatrix.SUMS))

    def _metadata(self, want: Want, found: Source, matrix: Path | None) -> dict[str, str]:
        """What the new file says of its making."""
        values = {
            "general.quantized_by": f"ggufrq {__version__}",
            **found.metadata,
            "ggufrq.llama_cpp": str(self.build.manifest.get("llama_cpp", {}).get("commit", "")),
            "ggufrq.patch_set": str(self.build.manifest.get("patch_set", "")),
            RECIPE: want.recipe.name if want.recipe is not None else "",
        }
        if matrix is not None:  # of one that is still to be made the length alone is known
            kept = self.record.kept(matrix.name, self.matrix_from(found))
            values["ggufrq.imatrix.sha256"] = kept["parts"][0]["sha256"] if kept is not None else "0" * 64
        return {key: _shortened(value) for key, value in values.items() if value}

    def _matrix_for(self, types: Mapping[str, str] | str, *, asked: bool) -> Path | None:
        """The matrix for a file of these types, which may still have to be made; ``asked`` by its recipe."""
        asked = asked or self.request.fold == "awq" or bool(self.request.imatrix or self.request.calibrate)
        return self.matrix if asked or needs_imatrix(types) else None

    def _matrix_key(self, matrix: Path | None, found: Source) -> str:
        """What tells files by their matrix: the content of given ones, or how one is made."""
        if matrix is None:
            return ""
        key = self.matrix_from(found)
        return key.get("given") or json.dumps(key, sort_keys=True)

    @contextmanager
    def _present(self, matrix: Path | None, model: Inventory) -> Iterator[Path | None]:
        """The matrix, or one of its name that stands in for it until it is there."""
        if matrix is None or (matrix.is_file() and self.given is None):
            yield matrix
            return
        with tempfile.TemporaryDirectory(prefix="ggufrq-") as folder:
            path = Path(folder) / matrix.name
            if self.given is not None:
                self.given.publish(path)
            else:
                matrices.stand_in(path, self.request.calibrate, model)
            yield path


def _shortened(value: str) -> str:
    """A value that llama-quantize takes: at most so many bytes."""
    return value.encode()[:LONGEST_VALUE].decode(errors="ignore")
