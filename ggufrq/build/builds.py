"""Builds of the patched llama.cpp, kept by the hash of what went into them.

A build is a folder ``<cache>/builds/<key>`` with ``src`` (patched source), ``obj`` (objects and programs),
``build.log`` and ``manifest.json``. The manifest is written last, by rename, and is the only thing that is
trusted; every stage before it leaves a stamp of its own, so that a killed run goes on where the last finished
stage ended.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from filelock import FileLock, Timeout

from ggufrq.base import log, machine, paths
from ggufrq.base.errors import BuildError, GgufrqError, UsageError
from ggufrq.base.locks import locked
from ggufrq.build import backends, manifest, prebuilt, stages, toolchain
from ggufrq.build.project import Build, BuildOptions, Project, build_key, llama_project, wanted_targets
from ggufrq.source import obtain as pristine_source

#: Free disk that a build is not begun without, in bytes: sdist, source and objects take about that.
NEEDED_DISK = 600 << 20
_BUSY_SECONDS = 900.0
_ELSEWHERE = re.compile(
    r"-[GSBPENHh]"
    r"|--(?:build|install|open|preset|list-presets|workflow|find-package|system-information|help|version)"
    r"|-D ?(?:CMAKE_(?:(?:RUNTIME|LIBRARY)_OUTPUT_DIRECTORY|MAKE_PROGRAM|GENERATOR|EXECUTABLE_SUFFIX)"
    r"|(?:EXECUTABLE|LIBRARY)_OUTPUT_PATH)"
)
#: What stands for something else in the files of CMake, Ninja and ccache.
_NOT_IN_PATHS = ';"\\|<>$'


def find_build(
    options: BuildOptions | None = None,
    *,
    targets: Sequence[str] | None = None,
    project: Project | None = None,
) -> Build | None:
    """The complete and unchanged build for these options, or None. Costs a few milliseconds, touches no
    network.
    """
    options = options or BuildOptions()
    project = project or llama_project()
    key = build_key(project, options)
    cache = paths.find_cache()
    if cache is None:
        return None
    root = cache / "builds" / key
    found = manifest.read(root)
    wanted = set(wanted_targets(project, options, targets))
    if found is None or not wanted <= set(found["targets"]) or manifest.changed_programs(root, found):
        return None
    return Build(key, root, root / "obj" / "bin", root / "src", found)


def require_build() -> Build:
    """The build to use: that in the folder ``$GGUFRQ_BIN``, the one made here, or that of the wheel
    ggufrq-bin. Raises BuildError when there is none, or only such as cannot be used here."""
    found = (None if prebuilt.chosen() else find_build()) or prebuilt.find()
    if found is None:
        wheel = f"ggufrq build, with a compiler; or {prebuilt.INSTALL}, the wheel of `ggufrq bundle`"
        raise BuildError(
            "llama.cpp with the ggufrq cache types has not been built yet, or the patches have changed since",
            remedy="ggufrq build" if toolchain.names_compiler() else wheel,
        )
    return found


def usable_build() -> Build | None:
    """As ``require_build``, None where that raises."""
    try:
        return require_build()
    except GgufrqError:
        return None


def ensure_build(
    options: BuildOptions | None = None,
    *,
    source: str = "auto",
    targets: Sequence[str] | None = None,
    project: Project | None = None,
) -> Build:
    """The build for these options, made now if it is not there. ``source`` is as in ``obtain.pristine``.

    ``targets`` replaces the usual targets. A second call at the same time waits for the first and takes its
    result. Raises SourceError, PatchError or BuildError; what was finished by then is kept and used by the
    next call.
    """
    options = options or BuildOptions()
    project = project or llama_project()
    if backends.sources(options.backend) in project.patch_set.without:
        raise BuildError(
            f"the cache types do not run on {options.backend} with llama.cpp {project.pin.short}: the patch "
            "set leaves that backend out there",
            remedy="--backend cpu",
        )
    root = paths.builds_dir() / build_key(project, options)
    with _full_disk_explained(root):
        if source not in pristine_source.NETWORK:
            pristine_source.pristine(project.pin, source)  # a wrong folder is told even if it is not needed
        found = find_build(options, targets=targets, project=project)
        if found is not None:
            return found
        _require_programs(options)
        require_place(root)
        _require_arguments(options)
        with locked(_lock_file(root), "the same build is being made by another ggufrq"):
            found = find_build(options, targets=targets, project=project)
            if found is not None:
                return found
            _make(root, project, options, source, wanted_targets(project, options, targets))
    found = find_build(options, targets=targets, project=project)
    if found is None:
        raise BuildError(f"the build in {root} was changed while it was made", remedy="ggufrq build")
    return found


def prune(keep: Build) -> list[Path]:
    """Remove all builds but ``keep`` and those being made right now; returns the folders removed."""
    removed = []
    for root in sorted(path for path in paths.builds_dir().iterdir() if path.is_dir() and path != keep.root):
        try:
            with FileLock(_lock_file(root), timeout=0):
                (root / manifest.MANIFEST).unlink(missing_ok=True)  # first, lest half a build be trusted
                paths.remove_tree(root)
                removed.append(root)
        except Timeout:
            log.say(f"{root} is being built and stays")
        except PermissionError:
            log.say(f"{root} belongs to another user and stays")
    return removed


def log_path(options: BuildOptions | None = None, project: Project | None = None) -> Path:
    """Where the log of the build for these options is or will be."""
    return paths.builds_dir() / build_key(project or llama_project(), options or BuildOptions()) / stages.LOG


def _make(root: Path, project: Project, options: BuildOptions, where: str, targets: tuple[str, ...]) -> None:
    started = time.monotonic()
    old = manifest.read(root)
    if old is None and machine.free_disk(paths.builds_dir()) < NEEDED_DISK:
        raise stages.disk_full(root)
    root.mkdir(exist_ok=True)
    caution = backends.caution(options.backend)
    if caution is not None:
        log.say(caution)
    with _nobody_compiles(root) as busy:
        stages.source_stage(root, project, where)
        stages.configure_stage(root, project, options, busy)
        if old is not None:
            for name in manifest.changed_programs(root, old):
                (root / "obj" / "bin" / name).unlink(missing_ok=True)  # ninja goes by time alone
        stages.compile_stage(root, options, targets, busy)
    every = sorted(set(targets) | set(old["targets"] if old else ()))
    seconds = time.monotonic() - started + (old["seconds"] if old else 0)
    manifest.write(root, project, options, every, seconds)


@contextlib.contextmanager
def _full_disk_explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise stages.disk_full(root) from error


def _lock_file(root: Path) -> Path:
    return root.with_name(root.name + ".lock")


@contextlib.contextmanager
def _nobody_compiles(root: Path) -> Iterator[int | None]:
    """Hold a second lock whose descriptor CMake and Ninja inherit: when ggufrq alone was killed (kill -9), it
    stays held until their last compiler has ended, so that two of them never write the same objects."""
    if os.name != "posix":
        yield None
        return
    import fcntl

    with root.with_name(root.name + ".busy").open("w") as file:
        deadline = time.monotonic() + _BUSY_SECONDS
        said = False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"compilers of an earlier run still work in {root}",
                        remedy="end them, then: ggufrq build",
                    ) from error
            if not said:
                log.say("compilers of a run that was killed are still finishing; waiting for them")
                said = True
            time.sleep(0.2)
        yield file.fileno()


def not_in_paths(root: PurePath) -> list[str]:
    """The letters of a folder's name that CMake, Ninja or ccache take for something else."""
    return sorted({one for one in root.as_posix() if one in _NOT_IN_PATHS or one < " "})


def require_place(root: Path) -> None:
    """Raise BuildError for a folder that CMake, Ninja or ccache cannot write into their files."""
    wrong = not_in_paths(root)
    if wrong:
        raise BuildError(
            f"llama.cpp cannot be built in {root}: CMake and Ninja do not take "
            f"{' '.join(map(repr, wrong))} in the name of a folder",
            remedy=f"set {paths.CACHE_VARIABLE} to another folder",
        )


def _require_arguments(options: BuildOptions) -> None:
    """Raise UsageError for an argument of CMake that would put the build elsewhere, or make none."""
    before = ""
    for argument in options.cmake_args:
        whole = before + argument
        before = argument if argument == "-D" else ""  # its value is the next one
        if _ELSEWHERE.match(whole):
            raise UsageError(
                f"{argument} cannot be passed on to CMake: where and by what is built ggufrq says itself",
                remedy=f"without --cmake-arg {argument}; GGUFRQ_CACHE says where builds are",
            )


def _require_programs(options: BuildOptions) -> None:
    missing = backends.get(options.backend).missing()
    if toolchain.git() is None:
        missing.append(toolchain.Missing("git was not found", toolchain.remedy("git")))
    for name, probe in (("cmake", toolchain.cmake), ("ninja", toolchain.ninja)):
        if probe() is None:
            missing.append(toolchain.Missing(f"{name} was not found", f"python -m pip install {name}"))
    if missing:
        raise BuildError(
            "llama.cpp cannot be built here: " + ", ".join(one.what for one in missing),
            remedy=" && ".join(dict.fromkeys(one.remedy for one in missing)),
        )
