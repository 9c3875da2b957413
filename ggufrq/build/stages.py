"""The stages of a build: source, configure, compile. Each leaves a stamp; a killed run goes on after it."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

from ggufrq.base import log, machine, paths, proc
from ggufrq.base.errors import BuildError
from ggufrq.base.paths import read_json
from ggufrq.base.progress import progress
from ggufrq.base.trees import tree_hash
from ggufrq.build import compile_log, toolchain
from ggufrq.build.project import BuildOptions, Project, definitions
from ggufrq.patchset import patches
from ggufrq.source import obtain
from ggufrq.source.origins import NO_OUTER_REPOSITORY

LOG = "build.log"


def source_stage(root: Path, project: Project, where: str) -> None:
    """``src``: the pristine tree, patched. Made beside and renamed; the stamp tells what it holds."""
    src, stamp = root / "src", root / "src.json"
    facts = {"commit": project.pin.commit, "patches": project.patch_set.hash}
    have = read_json(stamp)
    if have is not None and src.is_dir() and {name: have.get(name) for name in facts} == facts:
        if tree_hash(src, ignore=("__pycache__",)) == have.get("tree"):
            return
        aside = root / f"src.edited-{time.strftime('%Y%m%d-%H%M%S')}"
        src.replace(aside)
        log.say(f"files in {src} were changed; they are kept in {aside} and the source is made anew")
    tree = obtain.pristine(project.pin, where)
    for left in (root / "src.tmp", src, root / "obj"):
        paths.remove_tree(left)
    stamp.unlink(missing_ok=True)
    log.say(
        f"patching llama.cpp {project.pin.short}: {len(project.patch_set.patches)} patches, "
        f"{len(project.patch_set.overlay)} files of ours"
    )
    fresh = root / "src.tmp"
    shutil.copytree(tree, fresh, symlinks=True, ignore=shutil.ignore_patterns(".git"))
    patches.apply(project.patch_set, fresh, what=f"llama.cpp {project.pin.short}")
    facts["tree"] = tree_hash(fresh)
    fresh.replace(src)
    paths.atomic_write(stamp, json.dumps(facts) + "\n")


def configure_stage(root: Path, project: Project, options: BuildOptions, busy: int | None) -> None:
    """``obj`` configured by CMake; the stamp holds the command, so another CMake or Ninja configures
    again.
    """
    obj, stamp = root / "obj", root / "obj" / "configured.json"
    cmake, ninja = toolchain.cmake(), toolchain.ninja()
    assert cmake is not None and ninja is not None  # _require_programs
    defined = {**definitions(project, options), "CMAKE_MAKE_PROGRAM": os.fspath(ninja.path)}
    if options.base is not None:
        defined |= options.base.definitions(root)
    ccache = toolchain.ccache()
    if ccache is not None:
        own = [language for language in ("CUDA", "HIP") if f"CMAKE_{language}_COMPILER" in defined]
        languages = ("C", "CXX", *own)
        defined |= {f"CMAKE_{language}_COMPILER_LAUNCHER": os.fspath(ccache.path) for language in languages}
    command = [os.fspath(cmake.path), "-G", "Ninja", "-S", os.fspath(root / "src"), "-B", os.fspath(obj)]
    command += [f"-D{name}={value}" for name, value in sorted(defined.items())] + list(options.cmake_args)
    have = read_json(stamp)
    if have is not None and have.get("command") == command and have.get("cmake") == cmake.version:
        return
    if have is None:
        paths.remove_tree(obj)
    stamp.unlink(missing_ok=True)
    if options.base is not None:
        options.base.prepare(root)
    with progress("Configuring") as bar:
        completed = proc.run(
            command,
            env=_environment(root),
            log=root / LOG,
            check=False,
            on_stdout=lambda text: bar.update(0, text.strip().rpartition("\n")[2].removeprefix("-- ")),
            pass_fds=() if busy is None else (busy,),
        )
    if completed.rc != 0:
        raise _failed(completed, root, "CMake could not configure llama.cpp")
    paths.atomic_write(stamp, json.dumps({"command": command, "cmake": cmake.version}) + "\n")


def compile_stage(root: Path, options: BuildOptions, targets: tuple[str, ...], busy: int | None) -> None:
    """``obj`` built by Ninja, which has its own records of what is done."""
    ninja = toolchain.ninja()
    assert ninja is not None
    jobs = options.jobs or machine.compile_jobs()
    parser = compile_log.NinjaProgress()
    with progress("Compiling", unit="files") as bar:

        def show(text: str) -> None:
            for done, total, what in parser.feed(text):
                bar.update(done, what, total=total)

        completed = proc.run(
            [ninja.path, "-C", root / "obj", "-j", str(jobs), *targets],
            env=_environment(root),
            log=root / LOG,
            check=False,
            on_stdout=show,
            pass_fds=() if busy is None else (busy,),
        )
        if completed.rc != 0:
            raise _failed(completed, root, "llama.cpp could not be compiled")


def _failed(completed: proc.Completed, root: Path, what: str) -> BuildError:
    output = completed.stdout + completed.stderr
    if "No space left on device" in output:
        return disk_full(root)
    failure = compile_log.first_failure(output)
    shown = "\n".join(f"  {line}" for line in failure.lines)
    file = failure.file.removeprefix(f"{root / 'src'}{os.sep}")
    message = f"{what}{': ' + file if file else ''}\n{shown}\n  whole log: {root / LOG}"
    if failure.out_of_memory:
        return BuildError(message, remedy="ggufrq build --jobs 1 (the compiler ran out of memory)")
    return BuildError(
        message, remedy="ggufrq doctor tells whether the compiler is fit; then ggufrq build goes on from here"
    )


def _environment(root: Path) -> dict[str, str | None]:
    return {
        **NO_OUTER_REPOSITORY,
        "GIT_CEILING_DIRECTORIES": os.fspath(
            root
        ),  # CMake asks git for a commit; not that of a repository around us
        "CCACHE_BASEDIR": os.fspath(root),
        "CCACHE_NOHASHDIR": "1",
        "CLICOLOR_FORCE": None,
        "MAKEFLAGS": None,  # of a make around us, whose job server is not ours
        "LC_ALL": "C",
        "NINJA_STATUS": "[%f/%t] ",
    }


def disk_full(root: Path) -> BuildError:
    """The error to raise when there is no room for a build."""
    free = machine.free_disk(paths.builds_dir()) / 1e9
    return BuildError(
        f"the disk that holds {root.parent} is full "
        f"({free:.1f} GB free, a build and its source take about 0.5 GB)",
        remedy=f"free some space, or set {paths.CACHE_VARIABLE} to a folder on a larger disk",
    )
