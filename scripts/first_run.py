"""A first run without a compiler: archive and wheel of ``ggufrq bundle`` in a root folder of another release.

    debootstrap --variant=minbase --include=python3,python3-venv trixie ROOT
    python scripts/first_run.py ROOT dist

It takes root (chroot, a mount of /proc while it lasts) and ``ip``. What is installed in ROOT is fetched here,
for its Python; what runs in it has no network and an empty home. ROOT without Python gets the archive alone.
``dist`` holds the archive, the wheel ggufrq-bin and the wheel of ggufrq itself (``make wheel``). It prints
seconds of unpacking and installing, and of each run until its first letter and to its end.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError

PROMPT = "The CREATE TABLE statement"
MODEL = "docs-qwen3-8m"
BUILDERS = ("cc", "gcc", "g++", "c++", "clang", "git", "cmake", "ninja", "make")
_PLACE = "first-run"


def main() -> int:
    """Run all, print what came of it and the seconds that it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("root", type=Path, help="folder of another release, as debootstrap makes it")
    parser.add_argument("dist", type=Path, help="folder of the archive and the wheels")
    parser.add_argument(
        "--python", default="/usr/bin/python3", help="in ROOT, by its path there  [default: %(default)s]"
    )
    args = parser.parse_args()
    archives = [*args.dist.glob("ggufrq-bin-*-linux-x86_64.tar.xz")]
    if len(archives) != 1:
        parser.error(f"{args.dist} holds {len(archives)} archives for Linux on x86-64, and one is tried")
    (archive,) = archives
    place = args.root / _PLACE
    for old in place.glob("*"):
        if old.name != "wheels":  # of others, fetched once
            shutil.rmtree(old)
    (place / "home").mkdir(parents=True, exist_ok=True)
    with _proc(args.root):
        release = _in(args.root, "/", "cat", "/etc/debian_version").stdout.strip()
        libc = _in(args.root, "/", "/usr/bin/ldd", "--version").stdout.splitlines()[0]
        tools = [name for name in BUILDERS if _in(args.root, "/", "which", name, check=False).rc == 0]
        print(f"Debian {release}, {libc}; compilers and the like: {', '.join(tools) or 'none'}")
        taken = proc.run(["tar", "-xf", archive, "-C", place]).seconds
        (folder,) = place.glob("ggufrq-bin-*")
        facts = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        needs = ", ".join(f"{name} {least}" for name, least in facts["needs"].items())
        print(f"{facts['key']}, patch set {facts['patch_set'][:8]}, {facts['tag']}: {needs}")
        print(f"archive: {archive.stat().st_size / 1e6:.1f} MB, unpacked in {taken:.1f} s")
        _archive(args.root, folder)
        if (args.root / args.python.lstrip("/")).exists():
            _wheels(args.root, args.dist, args.python)
            ggufrq = f"/{_PLACE}/env/bin/ggufrq"
            print("doctor:", _line(_in(args.root, "/", ggufrq, "doctor", "--json").stdout, "ggufrq-bin"))
            _run(args.root, "the wheel, first", ggufrq)
            _run(args.root, "the wheel, as a chat", ggufrq, raw=False)
            inside = f"/{folder.relative_to(args.root)}"
            proc.run(["chroot", args.root, f"/{_PLACE}/env/bin/pip", "uninstall", "-q", "-y", "ggufrq-bin"])
            _run(args.root, "the archive", ggufrq, f"GGUFRQ_BIN={inside}")
    return 0


def _archive(root: Path, folder: Path) -> None:
    """The archive alone: whole, and its own programs on the model in it."""
    inside = f"/{folder.relative_to(root)}"
    _in(root, inside, "sha256sum", "--quiet", "-c", "SHA256SUMS")
    words = ["-m", f"models/{MODEL}-Q8_0.gguf", "-ctk", "iso3", "-ctv", "iso3", "-fa", "on"]
    words += ["-n", "16", "--seed", "1", "-no-cnv", "-v", "-p", PROMPT]
    done = _told("llama-completion", root, inside, "bin/llama-completion", *words)
    print(f"  {_line(done.stderr, 'iso3')}")
    print(
        *(f"  {line.strip()}" for line in done.stderr.splitlines() if "load_backend: loaded" in line),
        sep="\n",
    )


def _wheels(root: Path, dist: Path, python: str) -> None:
    """ggufrq and its programs in an environment of the root, from files that are fetched here."""
    version = _in(root, "/", python, "-c", "import sys; print('%d.%d' % sys.version_info[:2])").stdout.strip()
    house = root / _PLACE / "wheels"
    wanted = [*dist.glob("ggufrq-[0-9]*.whl"), *dist.glob("ggufrq_bin-*x86_64.whl")]
    command: list[str | Path] = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", house]
    command += ["--only-binary", ":all:"]
    command += ["--python-version", version, "--find-links", dist]
    for glibc in range(17, 42):
        command += ["--platform", f"manylinux_2_{glibc}_x86_64"]
    if not house.is_dir():
        # the latter is of wheels with a GPU's module
        command += ["--platform", "manylinux2014_x86_64", "--platform", "linux_x86_64"]
        proc.run([*command, *wanted], timeout=1200)
    for old in house.glob("ggufrq*.whl"):
        old.unlink()
    for wheel in wanted:
        shutil.copy(wheel, house)
    _in(root, "/", python, "-m", "venv", f"/{_PLACE}/env")
    pip = [f"/{_PLACE}/env/bin/pip", "install", "--quiet", "--no-index", "--find-links", f"/{_PLACE}/wheels"]
    taken = _in(root, "/", *pip, "ggufrq[bin]").seconds
    sizes = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in wanted)
    print(f"{sizes}; Python {version}, installed in {taken:.1f} s")


def _run(root: Path, name: str, ggufrq: str, *variables: str, raw: bool = True) -> None:
    words = [
        "run",
        MODEL,
        "-p",
        PROMPT,
        *(["--raw"] if raw else []),
        "--kv",
        "iso3",
        "-n",
        "16",
        "--seed",
        "1",
    ]
    done = _told(f"ggufrq run by {name}", root, "/", "env", *variables, ggufrq, *words)
    print(f"  {_line(done.stderr, 'cache ')}")


def _told(name: str, root: Path, folder: str, *command: str) -> proc.Completed:
    """Run a program that writes text, print the text and when it came."""
    started = time.monotonic()
    came: list[float] = []

    def note(text: str) -> None:
        if text.strip():
            came.append(time.monotonic() - started)

    done = _in(root, folder, *command, on_stdout=note)
    if not came:
        raise ToolError(f"{name} wrote nothing; it said: {done.stderr.strip()[-500:]}")
    print(
        f"{name}: {done.stdout.strip()!r}, first text after {came[0]:.1f} s, end after {done.seconds:.1f} s"
    )
    return done


def _in(
    root: Path,
    folder: str,
    *command: str,
    check: bool = True,
    on_stdout: Callable[[str], None] | None = None,
) -> proc.Completed:
    """Run a program in the root, with no network but itself, a bare environment and a home of its own."""
    bare = ["env", "-i", f"HOME=/{_PLACE}/home", "LC_ALL=C.UTF-8", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"]
    script = ["/bin/sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", folder, *command]
    alone = ["unshare", "--net", "/bin/sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    whole = [*alone, "chroot", str(root), *bare, "OMP_WAIT_POLICY=passive", *script]
    return proc.run(whole, check=check, timeout=1200, on_stdout=on_stdout)


def _line(text: str, part: str) -> str:
    return next((line.strip() for line in text.splitlines() if part in line), f"(nothing of {part})")


@contextmanager
def _proc(root: Path) -> Iterator[None]:
    """/proc of the root, by which programs find their own folder."""
    proc.run(["mount", "-t", "proc", "proc", root / "proc"])
    try:
        yield
    finally:
        proc.run(["umount", root / "proc"])


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ToolError as error:
        sys.exit(f"error: {error}")
