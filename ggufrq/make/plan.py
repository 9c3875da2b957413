"""What a run is asked for, what it will make, and what it needs: worked out before anything is written."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ggufrq.base import machine
from ggufrq.ggufs.tensors import Inventory, type_bytes
from ggufrq.make.fold.facts import KEY as FOLD_KEY
from ggufrq.make.pieces import Pieces
from ggufrq.make.quantizer import Forecast, Job
from ggufrq.make.recipe import Recipe
from ggufrq.models.names import PROFILE_END
from ggufrq.models.tags import shadowed
from ggufrq.tools.quantize import BUFFER_MIB

#: Types that are not made without an importance matrix: llama.cpp refuses some, the others lose too much.
NEEDS_IMATRIX = ("IQ1_", "IQ2_", "IQ3_", "Q2_K", "Q3_K")
#: Memory of the converter (Python, torch), and how often it holds the largest tensor, in 32 bits.
_CONVERTER_BYTES = 350 << 20
_CONVERTER_COPIES = 3
_QUANTIZER_BYTES = 100 << 20
#: Memory of folding, which does not depend on the size of the model (measured: 253 MB, docs/families.md).
_FOLD_BYTES = 300 << 20


@dataclass(frozen=True)
class Want:
    """One file that is asked for: a type of llama-quantize, or a recipe."""

    label: str
    recipe: Recipe | None = None


@dataclass(frozen=True)
class Request:
    """All that a run is asked for: files of ``model`` (see ``models.resolve``), one for each of ``wants``, in
    the folder ``out``.

    The importance matrices ``imatrix``, merged when there are several, are used for all types, or one made
    from the texts ``calibrate``; without either, the types that need it get one made from the mix that comes
    with ggufrq. The matrix is kept beside the files. Files larger than ``split_size`` bytes are split.
    ``mmproj`` makes the vision projector, too; ``mtp`` is one of ``family.MTP``. ``force`` replaces files
    that ggufrq did not make; without ``run`` new files are not run for a few tokens. ``fold`` is one of
    ``fold_file.KINDS``: every file is made from a folded copy of the model. ``stream``: of a model on the
    Hub the files are made piece by piece, without ever having the whole.
    """

    model: str
    wants: tuple[Want, ...]
    out: Path | None = None
    imatrix: tuple[Path, ...] = ()
    calibrate: tuple[Path, ...] = ()
    split_size: int | None = None
    mmproj: bool = False
    mtp: str = "keep"
    pre_tokenizer: str | None = None
    revision: str | None = None
    requantize: bool = False
    force: bool = False
    run: bool = True
    fold: str | None = None
    stream: bool = False


@dataclass(frozen=True)
class Output:
    """A file to make: its name, the job that makes it, what it will be, and the types that its recipe asked
    for. ``made_from`` tells it from other files of this name; ``kept`` whether it is there; ``codes`` are the
    tensors that are quantized in the source already and stay so, with their types; ``unweighted`` counts
    those of a head for further tokens, which no importance matrix knows."""

    want: Want
    name: str
    job: Job
    forecast: Forecast
    made_from: Mapping[str, str]
    wanted: Mapping[str, str] = field(default_factory=dict)
    kept: bool = False
    codes: Mapping[str, str] = field(default_factory=dict)
    unweighted: int = 0

    @property
    def fold(self) -> str:
        """How the model is folded that it is made from; empty when it is not."""
        return self.job.metadata.get(FOLD_KEY, "")

    @property
    def fallbacks(self) -> dict[str, tuple[str, str]]:
        """Tensors whose rows cannot hold the type that the recipe asked for: that type, and what they get."""
        return {
            name: (kind, self.forecast.types[name])
            for name, kind in self.wanted.items()
            if self.forecast.types[name] != kind
        }


@dataclass(frozen=True)
class Conversion:
    """A file that the converter makes: the model in 16 bits, its projector, or its head for further tokens.
    ``bytes`` is 0 where they were not asked for (``Planner.conversions``); ``quantized_by`` is how the
    source's weights are quantized, empty where they are floats."""

    name: str
    part: str
    type: str
    made_from: Mapping[str, str]
    bytes: int = 0
    kept: bool = False
    quantized_by: str = ""


@dataclass(frozen=True)
class FamilyPlan:
    """The files of a run in the order in which they are made, and what it needs: bytes of disk beyond what is
    there, and of memory at its peak. ``folded_bytes`` is what the folded copy takes that each file is made
    from; there is one at a time. ``pieces`` are those of a model that is streamed; ``loses_head``: the source
    has a head for further tokens that the converter leaves out."""

    base: str
    folder: Path
    source: dict[str, Any]
    model: Inventory
    conversions: tuple[Conversion, ...]
    outputs: tuple[Output, ...]
    split_size: int | None = None
    folded_bytes: int = 0
    pieces: Pieces | None = None
    loses_head: bool = False
    strangers: tuple[str, ...] = ()

    @property
    def told(self) -> list[str]:
        """What people should know before the work: what stays or is left out, and files that llama.cpp's
        ``-hf`` would not take by their tags."""
        said = []
        if self.loses_head:
            said.append("the head for further tokens is left out: llama.cpp's converter does not take it")
        for output in self.outputs:
            if output.codes:
                stay = ", ".join(sorted(set(output.codes.values())))
                said.append(f"{output.name}: {len(output.codes)} tensors stay {stay}, as in the source")
            if output.unweighted:
                said.append(
                    f"{output.name}: {output.unweighted} tensors of the head for further tokens are "
                    "quantized without the importance matrix, as no text runs through them"
                )
        if self.strangers:
            said.append(
                f"{', '.join(self.strangers)}: made from another version of the model (its files, "
                "--revision, --mtp, --pre-tokenizer), and not made anew by this command"
            )
        names = [*(part.name for part in self.conversions), *(output.name for output in self.outputs)]
        fold = next((output.fold for output in self.outputs if output.fold), "")
        profile = f"{self.base}{f'-{fold}' if fold else ''}{PROFILE_END}"
        return said + shadowed([*names, profile], self.base)

    @property
    def disk_needed(self) -> int:
        """Bytes that the files take that are still to be made, with the largest twice while it is split, and
        one folded copy of the model, or what streaming it takes."""
        new = [output.forecast.file_bytes for output in self.outputs if not output.kept]
        split = [size for size in new if self.split_size is not None and size > self.split_size]
        converted = sum(part.bytes for part in self.conversions if not part.kept)
        beside = self.folded_bytes + (self.pieces.disk if self.pieces is not None else 0)
        return converted + sum(new) + max(split, default=0) + (beside if new else 0)

    @property
    def disk_free(self) -> int:
        """Free bytes where the files go."""
        folder = self.folder.absolute()
        while not folder.is_dir():
            folder = folder.parent
        return shutil.disk_usage(folder).free

    @property
    def memory_needed(self) -> int:
        """Bytes of memory at the peak, without pages of files, which the system takes back when it must."""
        largest = max((tensor.values for tensor in self.model), default=0)
        peak = _QUANTIZER_BYTES + min(BUFFER_MIB << 20, 12 * largest)
        if self.pieces is not None or any(not part.kept for part in self.conversions):
            peak = max(peak, _CONVERTER_BYTES + _CONVERTER_COPIES * type_bytes("f32", largest, largest or 1))
        if self.folded_bytes and any(not output.kept for output in self.outputs):
            peak = max(peak, _FOLD_BYTES)
        return peak

    @property
    def memory(self) -> tuple[int, int] | None:
        """Bytes of memory of this machine, all and available."""
        return machine.memory()


@dataclass(frozen=True)
class Made:
    """One file of a family. ``imatrix`` tells whether an importance matrix was used, ``fresh`` whether this
    run made it; ``fallbacks`` counts tensors that could not take the type asked for, ``codes`` those that
    stayed in the codes of the source; ``parts`` are its shards when it is split, the file itself
    otherwise."""

    name: str
    type: str
    path: Path
    bytes: int
    bits: float
    imatrix: bool
    fresh: bool
    fallbacks: int = 0
    recipe: str = ""
    fold: str = ""
    codes: int = 0
    sha256: tuple[str, ...] = ()
    parts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """Files made from one model, where they came from, and the profile of the KV cache that lies beside them,
    None where the model can have none."""

    base: str
    folder: Path
    source: dict[str, Any]
    files: tuple[Made, ...]
    profile: Path | None = None

    def file(self, type_name: str) -> Path:
        """Path of the file with this type or recipe. KeyError when it is not in the family."""
        return {made.recipe or made.type: made.path for made in self.files}[type_name]


def needs_imatrix(types: Mapping[str, str] | str) -> bool:
    """Whether a type, or any of the types of tensors by name, is only made with an importance matrix."""
    if isinstance(types, str):
        return types.upper().startswith(NEEDS_IMATRIX)
    return any(needs_imatrix(kind) for kind in types.values())
