"""The options of CMake in ``cmake/*.cmake``, which are the same for who builds by hand with ``cmake -C``."""

from __future__ import annotations

import platform
import re

from ggufrq.base import paths

_LINE = re.compile(
    r"set\((?P<name>\w+) (?P<value>\S+) CACHE (?:BOOL|STRING) \"[^\"]*\"\)"
    r"|if\(CMAKE_HOST_(?P<system>APPLE|LINUX)\)|(?P<end>endif\(\))|include\(\$\{CMAKE_CURRENT_LIST_DIR\}/\w+\.cmake\)"
)

_SYSTEMS = {"APPLE": "Darwin", "LINUX": "Linux"}


def options(name: str) -> dict[str, str]:
    """What ``cmake/NAME.cmake`` itself sets on this system, without the files that it includes.

    Raises ValueError for a line of another form than these files have.
    """
    found: dict[str, str] = {}
    here = True
    for line in (paths.data_dir("cmake") / f"{name}.cmake").read_text(encoding="utf-8").splitlines():
        text = line.strip()
        if not text or text.startswith("#"):
            continue
        part = _LINE.fullmatch(text)
        if part is None:
            raise ValueError(f"cmake/{name}.cmake: {text}")
        if part["system"] or part["end"]:
            here = bool(part["end"]) or platform.system() == _SYSTEMS[part["system"]]
        elif part["name"] and here:
            found.setdefault(part["name"], part["value"])  # as in CMake's cache, the first one counts
    return found
