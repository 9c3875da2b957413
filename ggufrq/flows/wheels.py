"""A wheel as a file: names, metadata and RECORD, the same bytes for the same content.

https://packaging.python.org/en/latest/specifications/binary-distribution-format/
"""

from __future__ import annotations

import base64
import hashlib
import platform
import re
import sysconfig
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path

from ggufrq import __version__
from ggufrq.base import paths

#: 1980, the oldest time that a zip can hold, in seconds since 1970; in place of that of each file.
_OLDEST = 315_532_800
_LIBRARY = re.compile(r"\.(?:so(?:\.\d+)*|dylib|dll)$")


def platform_tag() -> str:
    """The platform of what is compiled here: ``linux_x86_64``, ``macosx_14_0_arm64``, ``win_amd64``."""
    name = sysconfig.get_platform()
    if platform.system() == "Darwin":  # that of Python may be older, and for two processors
        name = f"macosx-{platform.mac_ver()[0].split('.')[0]}.0-{platform.machine()}"
    return re.sub(r"[-.]", "_", name)


def file_name(name: str, version: str, tag: str) -> str:
    """The name of a wheel; ``tag`` as ``py3-none-linux_x86_64``."""
    return f"{_escaped(name)}-{version}-{tag}.whl"


def dist_info(name: str, version: str) -> str:
    """The folder of its metadata."""
    return f"{_escaped(name)}-{version}.dist-info"


def write(
    path: Path, name: str, version: str, tag: str, files: Mapping[str, bytes | Path], programs: str = "/"
) -> None:
    """Write the wheel with these files, by their names in it, and the two that describe it: WHEEL and RECORD.
    METADATA is among ``files``. Those in the folder ``programs`` (``package/bin/``) can be run."""
    info = dist_info(name, version)
    wheel = f"Wheel-Version: 1.0\nGenerator: ggufrq {__version__}\nRoot-Is-Purelib: false\nTag: {tag}\n"
    content = {**files, f"{info}/WHEEL": wheel.encode()}
    record = []
    with (
        paths.atomic_path(path) as temporary,
        zipfile.ZipFile(temporary, "w") as archive,
    ):
        # metadata at the end, as the format advises
        for inside in sorted(content, key=lambda one: (one.startswith(f"{info}/"), one)):
            data = data_of(content[inside])
            digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
            record.append(f"{inside},sha256={digest},{len(data)}\n")
            add(archive, inside, data, inside.startswith(programs))
        add(archive, f"{info}/RECORD", "".join([*record, f"{info}/RECORD,,\n"]).encode())


def data_of(held: bytes | Path) -> bytes:
    """What is to lie in an archive: itself, or what a file holds."""
    return held if isinstance(held, bytes) else held.read_bytes()


def add(
    archive: zipfile.ZipFile, inside: str, data: bytes, program: bool = False, epoch: int = _OLDEST
) -> None:
    """Add a file to a zip, with the mode of a ``program`` or a library where it is one, and a time in seconds
    since 1970."""
    entry = zipfile.ZipInfo(inside, time.gmtime(max(epoch, _OLDEST))[:6])
    entry.compress_type = zipfile.ZIP_DEFLATED
    entry.create_system = 3  # Unix, for the mode
    entry.external_attr = (0o100755 if program or _LIBRARY.search(inside) else 0o100644) << 16
    archive.writestr(entry, data, compresslevel=9)


def _escaped(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()
