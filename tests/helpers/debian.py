"""Packages of Debian unpacked into a folder, nothing installed, from the mirror that this machine uses.

apt fetches and verifies them by the machine's keys, with lists and archives of its own; it needs no root.
"""

from __future__ import annotations

import platform
import re
import shutil
from pathlib import Path

from ggufrq.base import proc
from ggufrq.base.errors import ToolError

#: Packages are amd64 or arm64 alike; of a release that is being made the date of validity may have passed.
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
Debug::NoLocking "true";
"""


class Unreachable(Exception):
    """This is no Debian, or its mirror does not have the packages."""


def codename() -> str:
    """The release of Debian that this machine has; empty where there is none."""
    try:
        return platform.freedesktop_os_release().get("VERSION_CODENAME", "")
    except OSError:
        return ""


def unpack(target: Path, own: list[str], *, release: str, headers: list[str]) -> None:
    """Unpack packages into ``target``: ``own`` of this machine's release with what it lacks of their
    dependencies, and ``headers`` of another ``release`` (a code name) without any.

    Raises Unreachable.
    """
    if shutil.which("apt-get") is None or platform.system() != "Linux":
        raise Unreachable("there is no apt-get")
    here = codename()
    work = target.with_name(target.name + ".apt")
    for folder in ("lists/partial", "archives/partial"):
        (work / folder).mkdir(parents=True)
    try:
        asked = proc.run(["apt-get", "update", "--print-uris"], timeout=60).stdout
        mirror = re.search(rf"^'(\S+)/dists/{here}/InRelease'", asked, re.MULTILINE)
        if mirror is None:
            raise Unreachable(f"apt has no source of {here or 'this system'}")
        lines = [f"deb {mirror[1]} {name} main\n" for name in (here, release)]
        (work / "sources.list").write_text("".join(lines), encoding="utf-8")
        (work / "apt.conf").write_text(_CONFIGURATION.format(folder=work), encoding="utf-8")

        def apt(*arguments: str) -> None:
            environment = {"APT_CONFIG": str(work / "apt.conf"), "DEBIAN_FRONTEND": "noninteractive"}
            proc.run(["apt-get", "-qq", *arguments], cwd=work / "archives", env=environment, timeout=600)

        apt("update")
        # and what they depend on: a newer C library would not go with the loader of this machine
        fetch = ("install", "--yes", "--download-only", "--reinstall", "--target-release", here)
        apt(*fetch, *(f"{name}/{here}" for name in own))
        apt("download", *(f"{name}/{release}" for name in headers))
        archives = sorted((work / "archives").glob("*.deb"))
        for archive in archives:
            proc.run(["dpkg-deb", "-x", archive, target], timeout=600)
    except ToolError as error:
        raise Unreachable(str(error)) from error
    finally:
        shutil.rmtree(work)
