"""Packages of Debian unpacked into a folder, nothing installed, from the mirror that this machine uses.

apt fetches and verifies them by the machine's keys, with lists and archives of its own; it needs no root.
"""

from __future__ import annotations

import platform
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.base.errors import BuildError, ToolError

#: Names of processors in Debian by those of Linux.
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}

#: Of a release that is being made, or no longer kept, the date of validity may have passed.
_CONFIGURATION = """\
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "-";
Dir::State::Lists "{folder}/lists";
Dir::Cache "{folder}";
Dir::Cache::Archives "{folder}/archives";
Acquire::Check-Valid-Until "false";
Acquire::Languages "none";
APT::Sandbox::User "";
APT::Install-Recommends "false";
APT::Architectures {{ {architectures} }};
Debug::NoLocking "true";
"""


class Unreachable(BuildError):
    """This is no Debian, or its mirror does not have the packages."""


def own_release() -> str:
    """The code name of this machine's release; empty where it has none."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def unpack(
    target: Path,
    own: Sequence[str] = (),
    *,
    release: str,
    alone: Sequence[str] = (),
    whole: Sequence[str] = (),
    arch: str | None = None,
) -> dict[str, str]:
    """Unpack packages into ``target``: ``own`` of this machine's release with what it lacks of their
    dependencies, and of another ``release`` (a code name) ``alone`` without any and ``whole`` with all of
    them, the C library too, for the processor ``arch`` (``aarch64``; this one unless given). Returns the
    versions of all by name.

    Raises Unreachable.
    """
    if shutil.which("apt-get") is None or platform.system() != "Linux":
        raise Unreachable("there is no apt-get", remedy="run it on Debian, or in a container of it")
    codename = own_release()
    here = ARCHITECTURES.get(platform.machine(), platform.machine())
    there = ARCHITECTURES.get(arch, arch) if arch else here
    work = target.with_name(target.name + ".apt")
    paths.remove_tree(work)
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    try:
        asked = proc.run(["apt-get", "update", "--print-uris"], timeout=60).stdout
        mirror = re.search(rf"^'(\S+)/dists/{codename}/InRelease'", asked, re.MULTILINE)
        if mirror is None:
            raise Unreachable(f"apt has no source of {codename or 'this system'}")
        lines = [f"deb {mirror[1]} {name} main\n" for name in ([codename] if own else []) + [release]]
        (work / "sources.list").write_text("".join(lines), encoding="utf-8")
        both = " ".join(f'"{name}";' for name in dict.fromkeys((here, there)))
        configuration = _CONFIGURATION.format(folder=work, architectures=both)
        (work / "apt.conf").write_text(configuration, encoding="utf-8")

        def apt(*arguments: str) -> None:
            environment = {"APT_CONFIG": str(work / "apt.conf"), "DEBIAN_FRONTEND": "noninteractive"}
            proc.run(["apt-get", "-qq", *arguments], cwd=work / "archives", env=environment, timeout=600)

        apt("update")
        if own:
            # and what they depend on: a newer C library would not go with the loader of this machine
            names = [f"--target-release={codename}", *(f"{name}/{codename}" for name in own)]
            apt("install", "--yes", "--download-only", "--reinstall", *names)
        if alone:
            apt("download", *(f"{name}:{there}/{release}" for name in alone))
        if whole:
            (work / "status").touch()  # as if nothing were installed
            names = [f"{name}:{there}" for name in whole]
            apt("install", "--yes", "--download-only", f"-oDir::State::status={work / 'status'}", *names)
        versions = {}
        for archive in sorted((work / "archives").glob("*.deb")):
            proc.run(["dpkg-deb", "-x", archive, target], timeout=600)
            name, version = archive.name.split("_")[:2]
            versions[name] = version.replace("%3a", ":")
        return versions
    except ToolError as error:
        raise Unreachable(
            f"packages of Debian's {release} cannot be had: {error.message.strip().splitlines()[-1]}",
            remedy="apt-get update, or a mirror that has that release",
        ) from error
    finally:
        paths.remove_tree(work)
