"""What Ninja and the compilers print: progress, and the first thing that failed."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_STATUS = re.compile(r"^\[(\d+)/(\d+)\] (.*)$")
_OBJECT = re.compile(
    r"(?:Building|Linking) \w+ (?:object|static library|shared library|shared module|executable) (\S+)"
)
_FAILED = re.compile(r"^FAILED: (?:\[code=\d+\] )?(\S+)")
#: GCC and Clang say file:line[:column]: error: text; MSVC says file(line): error C1234: text.
_ERROR = re.compile(
    r"^(?:[^\s:][^:]*:\d+(?::\d+)?: (?:fatal )?error: .*|"
    r".+\(\d+(?:,\d+)?\)\s*: (?:fatal )?error \w+\s*: .*)$"
)
_UNDEFINED = re.compile(r"undefined reference to|undefined symbols?|cannot find -l|unresolved external")
_LINK_ERROR = re.compile(
    r"ld: |ld\.\w+: error|LNK\d+|collect2: error|clang.*: error: |^\S+: error: |^ninja: (?:error|fatal): "
)
_OUT_OF_MEMORY = re.compile(
    r"Killed signal terminated program|virtual memory exhausted|out of memory|Cannot allocate memory|"
    r"signal: killed|internal compiler error: Killed|fatal error C1060"
)
_SHOWN = 4


@dataclass(frozen=True)
class Failure:
    """The first failure of a build: the source file (empty when unknown), the lines that say why, and whether
    memory ran out.
    """

    file: str
    lines: tuple[str, ...]
    out_of_memory: bool = False


class NinjaProgress:
    """Turns Ninja's output, in chunks as it comes, into (done, total, what)."""

    def __init__(self) -> None:
        self._rest = ""

    def feed(self, text: str) -> Iterator[tuple[int, int, str]]:
        """Take a chunk; yield one item per finished status line in it."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            match = _STATUS.match(line.rstrip("\r"))
            if match:
                what = _OBJECT.search(match[3])
                yield int(match[1]), int(match[2]), _short(what[1] if what else match[3])


def first_failure(output: str) -> Failure:
    """Find the first failure in the output of CMake or Ninja; the last lines of it when none is
    recognised.
    """
    lines = output.replace("\r\n", "\n").split("\n")
    out_of_memory = bool(_OUT_OF_MEMORY.search(output))
    failed = next((index for index, line in enumerate(lines) if _FAILED.match(line)), None)
    if failed is not None:
        end = next((i for i in range(failed + 1, len(lines)) if _STATUS.match(lines[i])), len(lines))
        block = lines[failed + 1 : end]
        match = _FAILED.match(lines[failed])
        assert match is not None
        patterns = (_ERROR, _OUT_OF_MEMORY, _UNDEFINED, _LINK_ERROR)
        wanted = next((found for pattern in patterns if (found := _quoted(block, pattern))), [])
        # The first line after FAILED is the command itself, long and of no help here.
        said = (
            wanted or [line for line in block[1:] if line.strip() and not line.startswith("ninja: ")][:_SHOWN]
        )
        return Failure(_source_of(match[1], block[0] if block else ""), tuple(said), out_of_memory)
    at = next((index for index, line in enumerate(lines) if line.startswith("CMake Error")), None)
    if at is not None:
        place = re.match(r"CMake Error at (\S+?):(\d+)", lines[at])
        said = [line.strip() for line in lines[at : at + 8] if line.strip()][:_SHOWN]
        return Failure(f"{place[1]}:{place[2]}" if place else "", tuple(said), out_of_memory)
    said = [line for line in lines if _LINK_ERROR.search(line)][:_SHOWN] or [
        line for line in lines if line.strip()
    ][-_SHOWN:]
    return Failure("", tuple(said), out_of_memory)


def _quoted(lines: list[str], pattern: re.Pattern[str]) -> list[str]:
    """The first line of ``lines`` that matches, with the source excerpt that a compiler prints below it."""
    for index, line in enumerate(lines):
        if pattern.search(line):
            rest = []
            for follow in lines[index + 1 : index + _SHOWN]:
                if not re.match(r"^\s*(?:\d+ )?\s*\|", follow):
                    break
                rest.append(follow.rstrip())
            return [line.rstrip(), *rest]
    return []


def _source_of(output: str, command: str) -> str:
    """The source file of a failed compile, from its command (``-c FILE`` at the end), else the output's
    name.
    """
    match = re.search(r"""\s[-/]c (?:"([^"]+)"|'([^']+)'|((?:\\ |\S)+))\s*$""", command)
    return (match[1] or match[2] or match[3].replace("\\ ", " ")) if match else output


def _short(name: str) -> str:
    """``src/CMakeFiles/llama.dir/models/qwen3.cpp.o`` -> ``models/qwen3.cpp``."""
    name = re.sub(r"^.*\.dir/", "", name)
    return re.sub(r"\.(?:o|obj)$", "", name)
