"""A project that goes through every stage of a build in two seconds, with places to stop it in the middle:
each writes the file that a variable names and goes on when that is removed, or after a minute.

Run as a program it builds the project made in the folder given: ``python tiny.py BASE [target ...]``.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from ggufrq.base.trees import tree_hash
from ggufrq.build import builds
from ggufrq.build.project import Project
from ggufrq.patchset.series import load
from ggufrq.source.pin import Pin

CMAKE = """\
cmake_minimum_required(VERSION 3.14)
project(tiny C)
set(CMAKE_RUNTIME_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/bin)
if(DEFINED ENV{TINY_STOP_CONFIGURE})
    execute_process(COMMAND sh "${CMAKE_SOURCE_DIR}/stop.sh" "$ENV{TINY_STOP_CONFIGURE}")
endif()
add_custom_command(OUTPUT slow.h COMMAND sh "${CMAKE_SOURCE_DIR}/slow.sh" slow.h VERBATIM)
add_executable(hello hello.c other.c added.c ${CMAKE_BINARY_DIR}/slow.h)
target_include_directories(hello PRIVATE ${CMAKE_BINARY_DIR})
add_executable(test-hello EXCLUDE_FROM_ALL hello.c other.c added.c)
"""
SLOW = """\
echo '#define SLOW 1' > $1.half
if [ -n "$TINY_STOP_COMPILE" ]; then sh "${0%slow.sh}stop.sh" "$TINY_STOP_COMPILE"; fi
mv $1.half $1
"""
STOP = """\
echo $$ > "$1.new"
mv "$1.new" "$1"
for i in $(seq 600); do [ -e "$1" ] || exit 0; sleep 0.1; done
"""
HELLO = """\
#include <stdio.h>
int other(void);
int added(void);
int main(void) {
    printf("%d\\n", other() + added());
    return 0;
}
"""
PATCH = """\
Call our own file, which upstream has no idea of.

--- a/other.c
+++ b/other.c
@@ -1,3 +1,3 @@
 int other(void) {
-    return 1;
+    return 2;
 }
"""


def make(base: Path) -> None:
    """Write the upstream tree and the patch set into ``base``."""
    upstream, patch_set = base / "upstream", base / "patches"
    upstream.mkdir(parents=True)
    (upstream / "CMakeLists.txt").write_text(CMAKE)
    (upstream / "slow.sh").write_text(SLOW)
    (upstream / "stop.sh").write_text(STOP)
    (upstream / "hello.c").write_text(HELLO)
    (upstream / "other.c").write_text("int other(void) {\n    return 1;\n}\n")
    (patch_set / "overlay").mkdir(parents=True)
    (patch_set / "series").write_text("other.patch\n")
    (patch_set / "other.patch").write_text(PATCH)
    (patch_set / "overlay" / "added.c").write_text("int added(void) { return 40; }\n")


def project(base: Path) -> Project:
    """The project made in ``base``; its program prints 42."""
    pin = Pin("file:///nowhere", "abcdef0123" * 4, tree_hash(base / "upstream"), "2026-01-01")
    return Project(pin, load(base / "patches"), ("hello",), ("test-hello",), {"CMAKE_BUILD_TYPE": "Release"})


def _stop_in_copy(marker: Path) -> None:
    """Make the copy of the source stop after its first file."""

    whole = shutil.copytree

    def half(source_folder: Path, target: Path, **options: Any) -> None:
        if target.name != "src.tmp":
            whole(source_folder, target, **options)
            return
        target.mkdir()
        (target / "hello.c").write_text(HELLO)
        marker.write_text("here")
        time.sleep(60)

    shutil.copytree = half  # type: ignore[assignment]


if __name__ == "__main__":
    if stop := os.environ.get("TINY_STOP_COPY"):
        _stop_in_copy(Path(stop))
    base = Path(sys.argv[1])
    made = builds.ensure_build(
        project=project(base), source=str(base / "upstream"), targets=sys.argv[2:] or None
    )
    print(made.bin)
