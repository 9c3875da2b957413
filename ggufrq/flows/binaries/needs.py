"""What the files of a build ask of the system, and the tag of a wheel that says so."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from ggufrq.build.elf import version_key
from ggufrq.build.systems import LINUX, Binary, System

#: CUDA's libraries that NVIDIA has as wheels, by the beginning of the wheel's name.
_OF_WHEELS = {
    "libcudart": "nvidia-cuda-runtime",
    "libcublas": "nvidia-cublas",
    "libcublasLt": "nvidia-cublas",
}
#: The newest versions of symbols by the tag's glibc, as auditwheel 6.8 has them for both processors.
_TAGS = (
    ("2.17", "3.4.19", "1.3.7", "4.7.0"),
    ("2.28", "3.4.24", "1.3.11", "7.0.0"),
    ("2.31", "3.4.28", "1.3.12", "7.0.0"),
    ("2.34", "3.4.29", "1.3.13", "7.0.0"),
    ("2.35", "3.4.30", "1.3.13", "11.0"),
    ("2.36", "3.4.30", "1.3.13", "11.0"),
    ("2.38", "3.4.30", "1.3.13", "11.0"),
    ("2.39", "3.4.33", "1.3.15", "14.0.0"),
    ("2.40", "3.4.33", "1.3.15", "14.0.0"),
    ("2.41", "3.4.33", "1.3.15", "14.0.0"),
)
_NAMES = ("GLIBC", "GLIBCXX", "CXXABI", "GCC")


@dataclass(frozen=True)
class Needs:
    """The newest version of each name of the system's symbols (``GLIBC`` → ``2.31``) or of the system
    (``macOS`` → ``15.0``), and libraries that are neither the system's nor in the bundle, each with the file
    that asks for it."""

    versions: dict[str, str]
    outside: dict[str, str]

    def tag(self, arch: str) -> str:
        """The platform of a wheel: the oldest ``manylinux`` that it is for, ``linux`` where there is none; of
        macOS, which pip knows by whole numbers, the first that is new enough."""
        if "macOS" in self.versions:
            number, _, rest = self.versions["macOS"].partition(".")
            return f"macosx_{int(number) + (rest != '0')}_0_{arch}"
        for row in _TAGS:
            most = dict(zip(_NAMES, row, strict=True))
            if not self.outside and all(
                name in most and version_key(version) <= version_key(most[name])
                for name, version in self.versions.items()
            ):
                return f"manylinux_{row[0].replace('.', '_')}_{arch}"
        return f"linux_{arch}"

    @property
    def wheels(self) -> dict[str, str]:
        """What pip brings of ``outside``: wheels of NVIDIA's, as one asks for them, by library. From CUDA 13
        on their names have no version."""
        found = {}
        for library in self.outside:
            name, _, major = library.partition(".so.")
            if name in _OF_WHEELS and re.fullmatch(r"\d+", major):
                least, below = f"{major}.0", int(major) + 1
                asked = f">={least},<{below}" if int(major) >= 13 else f"-cu{major}"
                found[library] = _OF_WHEELS[name] + asked
        return found


def of(files: Mapping[str, Binary], system: System = LINUX) -> Needs:
    """What files for a system, by their names in one folder, ask for beyond each other."""
    newest: dict[str, str] = {}
    outside: dict[str, str] = {}
    for file, asked in files.items():
        for library in asked.needed:
            if library not in files and not system.has(library):
                outside.setdefault(library, file)
        for library, versions in asked.versions.items():
            if system.has(library):
                _raise(newest, versions)
    return Needs(dict(sorted(newest.items())), dict(sorted(outside.items())))


def _raise(newest: dict[str, str], versions: Iterable[str]) -> None:
    for text in versions:
        name, _, version = text.rpartition("_")
        if version_key(version) > version_key(newest.get(name, "")):
            newest[name] = version
