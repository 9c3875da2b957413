"""A family of GGUF files from one model: converted if need be, quantized to each type or recipe, checked, and
resumed.

Each file is made under a temporary name, checked, entered in the family's record, and renamed; a run that was
killed goes on with the first file that the record does not vouch for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import UsageError
from ggufrq.base.locks import locked_folder
from ggufrq.base.toml import tomllib
from ggufrq.build.project import Build
from ggufrq.ggufs.drafts import SIMPLE, draft_kind
from ggufrq.make import recipe
from ggufrq.make.fold.fold_file import KINDS as FOLDS
from ggufrq.make.plan import Family, FamilyPlan, Request, Want
from ggufrq.make.planner import Planner
from ggufrq.make.recipe import Recipe
from ggufrq.make.record import Record
from ggufrq.make.stream import Stream
from ggufrq.make.work import Work
from ggufrq.make.workshop import Workshop
from ggufrq.models.resolve import Model, embedded_folder, resolve
from ggufrq.models.tags import DRAFTS
from ggufrq.tools import quantize as quantize_tool

#: What happens with the head that predicts further tokens: part of the model, left out, or a file of its own.
MTP = ("keep", "drop", "apart")


@dataclass(frozen=True)
class NamedFamily:
    """A family by name: what it is good for, and its types and recipes."""

    name: str
    description: str
    types: tuple[str, ...]


@cache
def families() -> dict[str, NamedFamily]:
    """The families of ``families.toml`` by name."""
    data = tomllib.loads(Path(__file__).with_name("families.toml").read_text(encoding="utf-8"))
    return {
        name: NamedFamily(name, entry["description"], tuple(entry["types"])) for name, entry in data.items()
    }


DEFAULT_TYPES = families()["default"].types


def parse_types(text: str, build: Build) -> tuple[str, ...]:
    """``Q4_K_M,q8_0`` as names that llama-quantize lists; aliases become what they stand for. Raises
    UsageError."""
    known = _known_types(build.tool("llama-quantize"))
    names = [part.strip().upper() for part in text.split(",") if part.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise UsageError(
            f"llama.cpp has no quantization type '{wrong[0] if wrong else text}'; it has {', '.join(known)}",
            remedy=f"--types {','.join(DEFAULT_TYPES)}",
        )
    return tuple(dict.fromkeys(known[name] for name in names))


def parse_wants(names: Sequence[str | Recipe], build: Build) -> tuple[Want, ...]:
    """Types of llama-quantize and recipes (by name, file, or as they are), each once. Raises UsageError."""
    wants: dict[str, Want] = {}
    for name in names:
        if isinstance(name, Recipe):
            want = Want(name.name, name)
        elif name in recipe.shipped() or name.endswith(".toml"):
            found = recipe.load(name)
            want = Want(found.name, found)
        else:
            (label,) = parse_types(name, build)
            want = Want(label)
        if want.label in wants and wants[want.label] != want:
            raise UsageError(f"two recipes have the name '{want.label}'")
        wants[want.label] = want
    if not wants:
        raise UsageError("nothing to make", remedy=f"--types {','.join(DEFAULT_TYPES)}")
    return tuple(wants.values())


def make_family(request: Request, build: Build) -> Family:
    """Make what a request wants, in its folder. Files that are already there and whole are kept.

    Raises ModelError, UsageError, ToolError, or GgufrqError when the disk is too small.
    """
    with _locked(request, build) as planner:
        return (Stream if request.stream else Work)(planner).make()


@contextmanager
def workshop(request: Request, build: Build) -> Iterator[Workshop]:
    """The model of a request as GGUF, converted if need be, and what may be made of it, with its folder
    locked for as long as the context lasts. What ``request`` wants is not made. Raises UsageError for a model
    that is to be streamed."""
    if request.stream:
        raise UsageError(
            "not with --stream: a recipe is found on the whole model", remedy="--recipe FILE, found elsewhere"
        )
    with _locked(request, build) as planner:
        yield Workshop(Work(planner))


def plan_family(request: Request, build: Build) -> FamilyPlan:
    """What a request would make and need. Nothing is written, and of a model that is not there in GGUF only
    headers are read."""
    return _planner(request, *_place(request), build).preview()


def _place(request: Request) -> tuple[Model, Path]:
    """The model of a request and the folder of its family. Raises UsageError for what makes no sense."""
    chosen = resolve(request.model, original=True)
    for files, what in ((request.imatrix, "importance matrix"), (request.calibrate, "text")):
        for path in files:
            if not path.is_file():
                raise UsageError(f"there is no {what} {path}")
    if request.imatrix and request.calibrate:
        raise UsageError("an importance matrix is either given or made", remedy="--imatrix or --calibrate")
    if request.fold is not None and request.fold not in FOLDS:
        raise UsageError(f"--fold is {' or '.join(FOLDS)}; not '{request.fold}'")
    if request.mtp not in MTP:
        raise UsageError(f"--mtp is {', '.join(MTP)}; not '{request.mtp}'")
    folder = request.out or (
        embedded_folder(chosen.name) if chosen.kind == "embedded" else Path(f"{chosen.name}-GGUF")
    )
    return chosen, folder


def _planner(request: Request, model: Model, folder: Path, build: Build) -> Planner:
    # a draft in GGUF goes into the family of its model; of one on the Hub only the name is known yet
    drafts = draft_kind(model.path) != SIMPLE if model.kind == "gguf" and model.path else bool(model.label)
    prefix = next((start for start in DRAFTS if drafts and model.name.startswith(start)), "")
    return Planner(request, model, folder, build, Record(folder, model.name.removeprefix(prefix)))


@cache
def _known_types(tool: Path) -> dict[str, str]:
    completed = proc.run([tool, "--help"], check=False, timeout=60)
    return quantize_tool.parse_types(completed.stdout + completed.stderr)


@contextmanager
def _locked(request: Request, build: Build) -> Iterator[Planner]:
    """The planner of a request, whose folder nobody else writes to for as long as the context lasts: what the
    folder holds is read only then."""
    model, folder = _place(request)
    fresh = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked_folder(folder):
            yield _planner(request, model, folder, build)
    finally:
        if fresh:
            with suppress(OSError):  # a refused run leaves no empty folder
                folder.rmdir()
