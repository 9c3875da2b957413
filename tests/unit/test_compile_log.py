from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.build.compile_log import NinjaProgress, first_failure

pytestmark = pytest.mark.usefixtures("no_programs")
LOGS = Path(__file__).parent.parent / "logs" / "build"


@pytest.mark.parametrize(
    ("name", "file", "first", "lines"),
    [
        (
            "gcc-error-c",
            "/tmp/tiny/src/sub/part.c",
            "/tmp/tiny/src/sub/part.c:2:16: error: 'undeclared' undeclared",
            3,
        ),
        (
            "gcc-error-in-header",
            "/tmp/tiny/src/hello.cpp",
            "/tmp/tiny/src/hello.h:2:38: error: 'y' was not declared",
            3,
        ),
        (
            "link-error",
            "bin/lonely",
            "lonely.cpp:(.text.startup+0x6): undefined reference to `missing(int)'",
            1,
        ),
        ("cmake-error", "CMakeLists.txt:6", "CMake Error at CMakeLists.txt:6 (find_package):", 4),
    ],
)
def test_first_failure_in_saved_output(name: str, file: str, first: str, lines: int) -> None:
    failure = first_failure((LOGS / f"{name}.txt").read_text())
    assert failure.file == file
    assert failure.lines[0].startswith(first)
    assert len(failure.lines) == lines
    assert not failure.out_of_memory


def test_only_the_first_of_two_failures_counts() -> None:
    text = (LOGS / "gcc-error-c.txt").read_text()
    other = text.replace("part.c", "later.c").replace("[1/1]", "[2/2]")
    assert first_failure(text + other).file == "/tmp/tiny/src/sub/part.c"


def test_a_killed_compiler_is_out_of_memory() -> None:
    text = (
        "[7/9] Building CXX object a.cpp.o\nFAILED: a.cpp.o \n/usr/bin/c++ -o a.cpp.o -c /src/a b.cpp\n"
        "c++: fatal error: Killed signal terminated program cc1plus\ncompilation terminated.\n"
    )
    failure = first_failure(text)
    assert failure.out_of_memory
    assert "Killed" in failure.lines[0]


def test_msvc() -> None:
    text = (
        "FAILED: x.obj \r\ncl.exe /nologo /Fox.obj /c C:\\src\\x.cpp\r\n"
        "C:\\src\\x.cpp(12): error C2065: 'y': undeclared identifier\r\n"
    )
    failure = first_failure(text)
    assert failure.file == "C:\\src\\x.cpp"
    assert failure.lines == ("C:\\src\\x.cpp(12): error C2065: 'y': undeclared identifier",)


def test_unknown_output_shows_its_end() -> None:
    assert first_failure("a\nb\n\nc\nd\ne\n").lines == ("b", "c", "d", "e")
    assert first_failure("").lines == ()
    assert first_failure("ninja: error: unknown target 'x'\n").lines == ("ninja: error: unknown target 'x'",)


def test_progress_from_chunks_that_split_lines() -> None:
    text = (
        "ninja: Entering directory `obj'\n"
        "[1/12] Building CXX object src/CMakeFiles/llama.dir/models/qwen3.cpp.o\n"
        "some warning [3/4] in a line\n[2/12] Linking CXX shared library bin/libllama.so\n"
        "[12/12] Doing this\n[13/"
    )
    expected = [(1, 12, "models/qwen3.cpp"), (2, 12, "bin/libllama.so"), (12, 12, "Doing this")]
    for size in (1, 7, 1000):
        parser = NinjaProgress()
        found = [item for at in range(0, len(text), size) for item in parser.feed(text[at : at + size])]
        assert found == expected
