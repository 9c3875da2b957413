"""The threads of the shim wait for each other; a kernel in which some would wait for ever is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from fake_metal import HERE, compiler

from ggufrq.base import proc
from ggufrq.base.proc import Completed

pytestmark = [pytest.mark.native]

PROGRAM = """
#include "lanes.h"
#include <cstdio>
#include <cstdlib>
#include <cstring>

static const char * what;
static int result[96];

static void sum(void ** data) {
    int total = 0;
    for (int l = 0; l < lanes::WIDTH; l++) total += data[l] ? *(int *) data[l] : 0;
    for (int l = 0; l < lanes::WIDTH; l++) if (data[l]) *(int *) data[l] = total;
}

static void other(void **) {}

static void run(void *, void * memory) {
    const int i = (int) lanes::self.index;
    int * shared = (int *) memory;
    int x = i;
    if (!strcmp(what, "sum")) {           // each simdgroup sums its own, the last one has half of its lanes
        lanes::meet(sum, &x);
    } else if (!strcmp(what, "barrier")) { // from the neighbour, which is another simdgroup's at the ends
        shared[i] = i;
        lanes::barrier();
        x = shared[(i + 1) % 80];
    } else if (!strcmp(what, "return")) { // lanes that have returned are not waited for
        if (i % 2) return;
        lanes::meet(sum, &x);
        lanes::barrier();
    } else if (!strcmp(what, "functions")) {
        lanes::meet(i % 2 ? sum : other, &x);
    } else if (!strcmp(what, "deadlock")) {
        if (i % 2) lanes::barrier(); else lanes::meet(sum, &x);
    }
    result[i] = x;
}

int main(int, char ** argv) {
    what = argv[1];
    lanes::run({ { 2, 1, 1 }, { 40, 2, 1 } }, 96*sizeof(int), run, nullptr);
    printf("%d %d %d %d\\n", result[0], result[31], result[32], result[79]);
}
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lanes")
    (folder / "lanes_test.cpp").write_text(PROGRAM)
    sources = [folder / "lanes_test.cpp", HERE / "shim" / "lanes.cpp"]
    flags = ["-std=c++17", "-O2", "-Wno-deprecated-declarations", f"-I{HERE / 'shim'}"]
    proc.run([compiler(), *flags, *sources, "-o", folder / "lanes_test"])
    return folder / "lanes_test"


def run(program: Path, what: str) -> Completed:
    return proc.run([program, what], check=False, timeout=20)


@pytest.mark.parametrize(
    ("what", "expected"),
    [
        ("sum", [sum(range(32)), sum(range(32)), sum(range(32, 64)), sum(range(64, 80))]),
        ("barrier", [1, 32, 33, 0]),
        ("return", [sum(range(0, 32, 2)), 0, sum(range(32, 64, 2)), 0]),
    ],
)
def test_threads_meet(program: Path, what: str, expected: list[int]) -> None:
    assert list(map(int, run(program, what).stdout.split())) == expected


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("functions", "lanes of one simdgroup meet in different simd functions"),
        ("deadlock", "some threads wait in a simd function for others that wait at a barrier"),
    ],
)
def test_threads_that_cannot_meet_are_told(program: Path, what: str, message: str) -> None:
    done = run(program, what)
    assert done.rc != 0 and message in done.stderr
