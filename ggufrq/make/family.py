"""A family of GGUF files from one model: converted if need be, quantized to each type or recipe, checked, and
resumed.

Each file is made under a temporary name, checked, entered in the family's record, and renamed; a run that was
killed goes on with the first file that the record does not vouch for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from filelock import FileLock, Timeout

from ggufrq.base import log, paths, proc
from ggufrq.base.errors import UsageError
from ggufrq.base.toml import tomllib
from ggufrq.build.project import Build
from ggufrq.make import recipe
from ggufrq.make.fold.fold_file import KINDS as FOLDS
from ggufrq.make.plan import Family, FamilyPlan, Request, Want
from ggufrq.make.planner import Planner
from ggufrq.make.recipe import Recipe
from ggufrq.make.record import Record
from ggufrq.make.work import Work
from ggufrq.make.workshop import Workshop
from ggufrq.models.resolve import embedded_folder, resolve
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


def make_family(
    model: str,
    types: Sequence[str | Recipe],
    build: Build,
    *,
    out: Path | None = None,
    imatrix: Path | Sequence[Path] = (),
    calibrate: Path | Sequence[Path] = (),
    split_size: int | None = None,
    mmproj: bool = False,
    mtp: str = "keep",
    pre_tokenizer: str | None = None,
    revision: str | None = None,
    requantize: bool = False,
    force: bool = False,
    run: bool = True,
    fold: str | None = None,
) -> Family:
    """Quantize ``model`` (see ``resolve``) to each of ``types`` (see ``parse_wants``) in the folder ``out``.

    Files that are already there and whole are kept. The importance matrices ``imatrix``, merged when there
    are several, are used for all types, or one made from the texts ``calibrate``; without either, the types
    that need it get one made from the mix that comes with ggufrq. The matrix is kept beside the files. Files
    larger than ``split_size`` bytes are split. ``mmproj`` makes the vision projector, too; ``mtp`` is one of
    ``MTP``. ``force`` replaces files that ggufrq did not make; without ``run`` new files are not run for a
    few tokens. ``fold`` is one of ``FOLDS``: every file is made from a folded copy of the model. Raises
    ModelError, UsageError, ToolError, or GgufrqError when the disk is too small.
    """
    request = Request(
        model,
        parse_wants(types, build),
        out,
        (imatrix,) if isinstance(imatrix, Path) else tuple(imatrix),
        (calibrate,) if isinstance(calibrate, Path) else tuple(calibrate),
        split_size,
        mmproj,
        mtp,
        pre_tokenizer,
        revision,
        requantize,
        force,
        run,
        fold,
    )
    return make(request, build)


def make(request: Request, build: Build) -> Family:
    """As ``make_family``, from a request."""
    folder = _planner(request, build).folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        return Work(_planner(request, build)).make()


@contextmanager
def workshop(request: Request, build: Build) -> Iterator[Workshop]:
    """The model of a request as GGUF, converted if need be, and what may be made of it, with its folder
    locked for as long as the context lasts. What ``request`` wants is not made."""
    folder = _planner(request, build).folder
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        yield Workshop(Work(_planner(request, build)))


def plan_family(request: Request, build: Build) -> FamilyPlan:
    """What a request would make and need. Nothing is written, and of a model that is not there in GGUF only
    headers are read."""
    return _planner(request, build).preview()


def _planner(request: Request, build: Build) -> Planner:
    chosen = resolve(request.model)
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
    return Planner(request, chosen, folder, build, Record(folder, chosen.name))


@cache
def _known_types(tool: Path) -> dict[str, str]:
    completed = proc.run([tool, "--help"], check=False, timeout=60)
    return quantize_tool.parse_types(completed.stdout + completed.stderr)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    locks = paths.cache_dir() / "locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{name}.lock")
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        log.say(f"another ggufrq works in {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
