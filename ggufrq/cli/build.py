"""``ggufrq build``: options and rendering only, the work is in ``build.builds``."""

from __future__ import annotations

import json
from pathlib import Path

import click
from click.core import ParameterSource

from ggufrq.base import log, paths
from ggufrq.base.errors import PatchError, SourceError, UsageError
from ggufrq.base.progress import clock
from ggufrq.base.trees import tree_hash
from ggufrq.build import backends, builds, prebuilt
from ggufrq.build.project import Build, BuildOptions
from ggufrq.patchset import compat
from ggufrq.patchset.patches import require_applies
from ggufrq.patchset.series import PatchSet, default_patch_set, problems
from ggufrq.source import obtain
from ggufrq.source.origins import checkout_commit
from ggufrq.source.pin import load_pin


@click.command()
@click.option(
    "--source",
    "where",
    default="auto",
    show_default=True,
    metavar="auto|git|pypi|DIR",
    help="Where llama.cpp comes from. auto: git if it answers within 8 s, else PyPI. DIR: a checkout, a "
    "plain copy or an sdist file. All are verified against the pinned commit.",
)
@click.option(
    "--backend",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", *backends.BACKENDS]),
    help=f"auto: ${backends.VARIABLE}, else the GPU that is here, else cpu.",
)
@click.option(
    "--cuda-arch",
    metavar="ARCH",
    help="With cuda: what to generate code for, as CMake names it (90, '86;89'). Default: the cards present.",
)
@click.option(
    "--hip-arch",
    metavar="ARCH",
    help="With hip: what to generate code for (gfx1100, 'gfx90a;gfx942'). Default: the cards present.",
)
@click.option(
    "--native/--no-native", default=True, show_default=True, help="Compile for just this processor."
)
@click.option(
    "--portable",
    is_flag=True,
    help="Compile for all processors of this architecture: code for each kind, of which the best is loaded.",
)
@click.option(
    "--python",
    is_flag=True,
    help="Then make a wheel of llama-cpp-python over the build, which is printed.",
)
@click.option(
    "--install",
    metavar="[PYTHON]",
    is_flag=False,
    flag_value="",
    help="And put it into an environment: its Python, or its folder; unless given, that of `python`.",
)
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the wheel.  [default: in the build]",
)
@click.option("--tests", is_flag=True, help="Build llama.cpp's tests of types and operations too.")
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="Compilers at once; by cores and memory.")
@click.option("--target", "targets", multiple=True, help="Build only this CMake target (may be repeated).")
@click.option("--cmake-arg", "cmake_args", multiple=True, metavar="ARG", help="Passed to CMake, e.g. -DX=Y.")
@click.option("--check", is_flag=True, help="Only tell whether the patch set applies; builds nothing.")
@click.option("--prune", is_flag=True, help="Afterwards remove all other builds from the cache.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
def build(
    where: str,
    backend: str,
    cuda_arch: str | None,
    hip_arch: str | None,
    native: bool,
    portable: bool,
    python: bool,
    install: str | None,
    out: Path | None,
    tests: bool,
    jobs: int | None,
    targets: tuple[str, ...],
    cmake_args: tuple[str, ...],
    check: bool,
    prune: bool,
    as_json: bool,
) -> None:
    """Build llama.cpp with the ggufrq cache types: get the pinned source, patch it, compile it.

    Builds are kept in the cache by what went into them, so a second run takes no time. A run that was
    interrupted goes on where it was.

    \b
    Examples:
      ggufrq build
      ggufrq build --source ~/src/llama.cpp
      ggufrq build --check --source ~/src/llama.cpp
      ggufrq build --python --install .venv
      ggufrq build --python --portable -o dist
    """
    if check:
        _require_alone()
        _check(where, as_json)
        return
    wheel_wanted = python or install is not None
    if out is not None and not wheel_wanted:
        raise UsageError(
            "-o says where a wheel goes, and none is made", remedy=f"ggufrq build --python -o {out}"
        )
    for language, architecture in (("CUDA", cuda_arch), ("HIP", hip_arch)):
        if architecture:
            cmake_args += (f"-DCMAKE_{language}_ARCHITECTURES={architecture}",)
    chosen = backends.default() if backend == "auto" else backend
    if portable:
        if chosen != "cpu":
            raise UsageError(
                f"a portable build is for processors, and this one for {chosen}", remedy="--backend cpu"
            )
        options = BuildOptions.portable(chosen, tests=tests, jobs=jobs, cmake_args=cmake_args)
    else:
        options = BuildOptions(chosen, native, tests, jobs, cmake_args)
    before = builds.find_build(options, targets=targets)
    other = builds.usable_build() if before is None else None
    if other is not None and prebuilt.is_one(other):
        log.say(f"{prebuilt.named(other)} is used so far; {prebuilt.gain(other)}")
    made = builds.ensure_build(options, source=where, targets=targets)
    if prune:
        for gone in builds.prune(made):
            log.say(f"removed {gone}")
    files: dict[str, str] = {}
    if wheel_wanted:
        from ggufrq.flows.llama_cpp_python import job

        wheel = job.make(made, out, source=where)
        files["wheel"] = str(wheel)
        if install is not None:
            files["installed"] = job.install(wheel, install or None)
    if as_json:
        facts = {"bin": str(made.bin), "source": str(made.source), **files, **made.manifest}
        click.echo(json.dumps(facts, indent=2))
        return
    _render(made, files.get("wheel"), new=before is None)


def _render(made: Build, wheel: str | None, *, new: bool) -> None:
    manifest = made.manifest
    seconds = clock(manifest["seconds"])
    state = f"built in {seconds}" if new else f"up to date (built {manifest['date'][:10]} in {seconds})"
    log.say(
        f"llama.cpp {manifest['llama_cpp']['commit'][:9]}, patch set {manifest['patch_set'][:8]}, "
        f"{manifest['backend']} backend: {state}"
    )
    click.echo(wheel or made.bin)


def _require_alone() -> None:
    """Raise UsageError when an option of builds is beside ``--check``."""
    context = click.get_current_context()
    for option in context.command.params:
        given = context.get_parameter_source(option.name or "") is ParameterSource.COMMANDLINE
        if given and option.name not in ("check", "where", "as_json"):
            raise UsageError(
                f"--check builds nothing, and {option.opts[-1]} is for a build",
                remedy="one without the other",
            )


def _check(where: str, as_json: bool) -> None:
    """Tell whether the patch set is well-formed and applies; a folder may be at any commit here."""
    root = paths.data_dir("patches")
    wrong = problems(root) + compat.problems(root)
    if wrong:
        listing = "\n".join(f"  {problem}" for problem in wrong)
        raise PatchError(f"the patch set in {root} is not in order:\n{listing}")
    pin = load_pin()
    if where in obtain.NETWORK or paths.expanded(where).is_file():
        tree, what, commit = obtain.pristine(pin, where), f"llama.cpp {pin.commit}", pin.commit
    else:
        tree = paths.expanded(where)
        if not tree.is_dir():
            raise SourceError(
                f"the source '{where}' is neither a folder nor one of auto, git, pypi",
                remedy="ggufrq build --check --source auto",
            )
        commit = checkout_commit(tree) or ""
        known = f"commit {commit}" if commit else f"tree {tree_hash(tree)}"
        pinned = known.split()[1] in (pin.commit, pin.tree)
        what = (
            f"{tree} ({known}{', the pinned one' if pinned else f'; the patches are made for {pin.commit}'})"
        )
    patch_set = compat.load(root, commit) if commit else default_patch_set()
    found = require_applies(patch_set, tree, what=what)
    for moved in found.moved:
        log.say(f"moved: {moved}")
    if as_json:
        click.echo(json.dumps({**_facts(patch_set, commit), "moved": list(found.moved)}, indent=2))
    else:
        click.echo(
            f"the patch set applies to {what}: {len(patch_set.patches)} patches, {patch_set.hunks} hunks in "
            f"{len(patch_set.files)} files, {len(patch_set.overlay)} files of ours"
            + (f"; {len(found.moved)} hunks fit at other lines than recorded" if found.moved else "")
        )


def _facts(patch_set: PatchSet, commit: str) -> dict[str, object]:
    return {
        "applies": True,
        "commit": commit or None,
        "patch_set": patch_set.hash,
        "patches": [patch.name for patch in patch_set.patches],
        "hunks": patch_set.hunks,
        "files": patch_set.files,
        "overlay": list(patch_set.overlay),
    }
