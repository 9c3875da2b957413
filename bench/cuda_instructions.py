"""Count the instructions in the loop of the CUDA attention kernel, and what speed they allow; no GPU needed.

A table in Markdown: per pair of types and head_dim the registers, bytes spilled, shared memory, warps per
multiprocessor, instructions of a lane per value of K and V, clocks per pass of the unit that is busiest, and
the speed in bytes of the cache that follows for one card. An upper bound, not a measurement. What is seldom
executed is left out: rescaling, softcap, passes that are not whole.

    python bench/cuda_instructions.py                     # iso3 with itself; --all for every pair
    python bench/cuda_instructions.py --arch 80 --multiprocessors 108 --clock 1.41

The disassembler, nvdisasm, is taken from the toolkit or PATH: pip install nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

from kvlab.markdown import table

from ggufrq.base import proc
from ggufrq.base.errors import GgufrqError, UsageError
from ggufrq.build import cuda_toolkit
from ggufrq.build.project import llama_project
from ggufrq.patchset import patches
from ggufrq.source import obtain

CODES = {"rq2": "ggml_cuda_rq_kv<2, N>", "rq3": "ggml_cuda_rq_kv<3, N>", "rq4": "ggml_cuda_rq_kv<4, N>"}
CODES |= {"f16": "ggml_cuda_rq_kv_f16", "q8_0": "ggml_cuda_rq_kv_q8_0", "q4_0": "ggml_cuda_rq_kv_q4_0"}
BITS = {"rq2": 2, "rq3": 3, "rq4": 4, "f16": 16.0, "q8_0": 8.5, "q4_0": 4.5}


class Heads(NamedTuple):
    """head_dim of K and of V, and whether V is the first values of K."""

    k: int
    v: int
    mla: bool = False


HEADS = (
    *(Heads(size, size) for size in (128, 256, 512, 64)),
    *(Heads(192, 128), Heads(320, 256), Heads(320, 256, mla=True), Heads(576, 512, mla=True)),
)

#: Clocks for which an instruction keeps a unit of one of a multiprocessor's four schedulers busy, at compute
#: capability 8.0 and 9.0: from the lanes per clock in the table of arithmetic throughput of NVIDIA's
#: CUDA C++ Programming Guide; for matrix products the rate of an A100.
UNITS: dict[str, tuple[float, str]] = {
    "integer": (2, r"LOP3|SHF(?!L)|PRMT|IADD3|VIADD|LEA|[IF]SETP|[FVI]+MNMX|F?SEL|PLOP3|I2FP"),
    "multiply": (2, r"IMAD"),
    "exp": (8, r"MUFU|I2F(?!P)|F2I|F2F(?!P)"),
    "memory": (4, r"LD[SG]|STS|SHFL|MOVM"),
    "tensor": (8, r"[IH]MMA"),
}

#: source lines that mark what is seldom executed
SELDOM = ("tanhf(", "exp2f(m[c] - m_new[c])", "*= f;", "rows, false>")

FRAME = re.compile(r'//## File "([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(@!?U?P[\dT]\s+)?([A-Z][\w.]*)(.*);")


@dataclass
class Block:
    """Instructions without a jump in or out: names, whether each is seldom executed, what may follow."""

    names: list[str]
    seldom: list[bool]
    next: list[int]


@dataclass(frozen=True)
class Kernel:
    """What the compiler made of a kernel: rows of a warp per pass, of each of which it has one of ``halves``;
    ``shared`` and ``spilled`` in bytes."""

    registers: int
    spilled: int
    rows: int
    shared: int
    loop: Counter[str]
    halves: int = 1

    @property
    def warps(self) -> int:
        """Warps on a multiprocessor with 64 Ki registers and 228 KiB of shared memory; CUDA blocks have four.

        A block takes 1 KiB beside its own; registers are given out by eight.
        """
        by_registers = 65536 // (128 * (-(-self.registers // 8) * 8))
        return 4 * min(by_registers, 228 * 1024 // (self.shared + 1024))

    def clocks(self) -> dict[str, float]:
        """Clocks per pass for which each unit is busy, the issue of instructions first."""
        busy = {"issue": float(self.loop.total())}
        for unit, (clocks, pattern) in UNITS.items():
            matching = (n for name, n in self.loop.items() if re.match(pattern, name))
            busy[unit] = clocks * sum(matching)
        return busy


@cache
def _lines(path: str) -> list[str]:
    return Path(path).read_text(encoding="utf-8").splitlines()


def _is_seldom(frames: list[tuple[str, int]]) -> bool:
    ours = (_lines(path)[line - 1] for path, line in frames if "/rq-" in path)
    return any(mark in text for text in ours for mark in SELDOM)


def blocks(listing: str) -> list[Block]:
    """The basic blocks of the last function in what ``nvdisasm -c -gi`` printed."""
    found = [Block([], [], [])]
    labels: dict[str, int] = {}
    jumps: dict[int, str] = {}
    frames: list[tuple[str, int]] = []
    fresh = False  # the next frame is the first of a call
    falls = True  # the last instruction may be followed by the next
    for line in listing[listing.rindex(".text.") :].splitlines():
        if frame := FRAME.search(line):
            frames = [*([] if fresh else frames), (frame[1], int(frame[2]))]
            fresh = False
        elif label := re.match(r"(\.L\w+):", line):
            if found[-1].names:
                found[-1].next += [len(found)] if falls else []
                found.append(Block([], [], []))
            labels[label[1]] = len(found) - 1
        elif instruction := INSTRUCTION.match(line):
            condition, name, rest = instruction.groups()
            found[-1].names.append(name)
            found[-1].seldom.append(_is_seldom(frames))
            fresh = falls = True
            if name.split(".")[0] in ("BRA", "EXIT"):
                falls = bool(condition or re.match(r"\s*!?U?P\d", rest) or ".DIV" in name)
                if target := re.search(r"`\((\.L\w+)\)", rest):
                    jumps[len(found) - 1] = target[1]
                found[-1].next += [len(found)] if falls else []
                found.append(Block([], [], []))
    for at, target_label in jumps.items():
        found[at].next.append(labels[target_label])
    return found


def main_loop(listing: str) -> Counter[str]:
    """How often each instruction that is not seldom stands in the loop with the most matrix products."""
    all_blocks = blocks(listing)
    before: dict[int, set[int]] = {at: set() for at in range(len(all_blocks))}
    for at, block in enumerate(all_blocks):
        for after in block.next:
            before[after].add(at)
    loops: dict[int, set[int]] = {}
    for at, block in enumerate(all_blocks):
        for head in (after for after in block.next if after <= at):  # a jump back
            inside, todo = loops.setdefault(head, {head}), [at]
            while todo:
                here = todo.pop()
                if here not in inside:
                    inside.add(here)
                    todo += before[here]
    counts = (Counter(_usual(all_blocks[at] for at in sorted(inside))) for inside in loops.values())
    return max(counts, key=lambda c: (sum(n for name, n in c.items() if "MMA" in name), -c.total()))


def _usual(some: Iterator[Block]) -> Iterator[str]:
    for block in some:
        yield from (name for name, seldom in zip(block.names, block.seldom, strict=True) if not seldom)


def _blocks(heads: Heads) -> tuple[int, int]:
    """Values of a block of K and of V."""
    k, v = (128 if dim % 128 == 0 else 64 for dim in heads[:2])
    return k, k if heads.mla else v


def _bytes(heads: Heads, k: str, v: str) -> float:
    """Bytes of the cache for a row, with those of the scales."""
    sides = list(zip((k, v), heads[:2], _blocks(heads), strict=True))[: 1 if heads.mla else 2]
    return sum(dim * (BITS[kind] + (16 / n if kind.startswith("rq") else 0)) for kind, dim, n in sides) / 8


def compile_kernel(tree: Path, work: Path, nvdisasm: Path, arch: str, heads: Heads, k: str, v: str) -> Kernel:
    """Compile one kernel of a patched tree and count its loop."""
    toolkit = cuda_toolkit.find()
    codes = [CODES[kind].replace("N", str(n)) for kind, n in zip((k, v), _blocks(heads), strict=True)]
    types = f"{heads.k}, {codes[0]}, {codes[1]}, {heads.v}"
    (work / "kernel.cu").write_text(
        '#include "rq-fattn.cuh"\n'
        "template <int rows, int halves, int shared> __global__ void sizes() {}\n"
        f"typedef ggml_cuda_rq_fa<{types}> fa;\n"
        "template __global__ void sizes<fa::rows, fa::halves, fa::nb_shared>();\n"
        f"ggml_cuda_rq_fa_kernel kernel() {{ return ggml_cuda_rq_fa_make<{types}>(); }}\n",
        encoding="utf-8",
    )
    ggml = tree / "ggml"
    include = [toolkit.root / "include", toolkit.root / "include" / "cccl", ggml / "include", ggml / "src"]
    flags = [
        "-O3",
        "-std=c++17",
        "-use_fast_math",
        "-extended-lambda",
        "-lineinfo",
        "-cubin",
        "-Xptxas",
        "-v",
    ]
    flags += [f"--generate-code=arch=compute_{arch},code=sm_{arch}", *(f"-I{folder}" for folder in include)]
    flags.append(f"-I{ggml / 'src' / 'ggml-cuda'}")
    made = proc.run([toolkit.nvcc, *flags, "-o", work / "kernel.cubin", work / "kernel.cu"], timeout=600)
    sizes = re.search(r"5sizesILi(\d+)ELi(\d+)ELi(\d+)E", made.stderr)
    said = r"flash_attn_kernel.*?(\d+) bytes spill stores.*?Used (\d+) registers"
    facts = re.search(said, made.stderr, re.DOTALL)
    if sizes is None or facts is None:
        raise GgufrqError(f"ptxas did not say what it made of {types}", remedy="use nvcc 12 or newer")
    listing = proc.run([nvdisasm, "-c", "-gi", work / "kernel.cubin"]).stdout
    start = listing.index(".text._Z30ggml_cuda_rq_flash_attn_kernel")
    end = listing.find("\n//--------------------- .text", start)
    loop = main_loop(listing[start : end if end > 0 else None])
    return Kernel(int(facts[2]), int(facts[1]), int(sizes[1]), int(sizes[3]), loop, int(sizes[2]))


def row(kernel: Kernel, heads: Heads, k: str, v: str, multiprocessors: int, clock: float) -> list[str]:
    """A line of the table."""
    values = (heads.k + heads.v) * kernel.rows // kernel.halves  # of K and V, in a pass of a warp
    clocks = kernel.clocks()
    unit = max(clocks, key=lambda name: clocks[name])
    nbytes = _bytes(heads, k, v) * kernel.rows / kernel.halves
    speed = 4 * nbytes / clocks[unit] * multiprocessors * clock / 1000
    return [
        f"{k}/{v} {heads.k}" + (f"/{heads.v}" if heads.k != heads.v else "") + " (MLA)" * heads.mla,
        str(kernel.registers),
        str(kernel.spilled),
        f"{kernel.shared / 1024:.0f} KiB",
        str(kernel.warps),
        f"{32 * kernel.loop.total() / values:.2f}",
        f"{clocks[unit]:.0f} ({unit})",
        f"{speed:.1f} TB/s",
    ]


def _nvdisasm(toolkit: cuda_toolkit.Toolkit) -> Path:
    wheels = (Path(folder) / "nvidia" / "cu13" / "bin" / "nvdisasm" for folder in sys.path)
    found = [path for path in (toolkit.root / "bin" / "nvdisasm", *wheels) if path.is_file()]
    if on_path := shutil.which("nvdisasm"):
        found.append(Path(on_path))
    if not found:
        raise UsageError(
            "there is no nvdisasm here", remedy=f"{sys.executable} -m pip install nvidia-cuda-nvdisasm"
        )
    return found[0]


def _pairs(every: bool, heads: Heads) -> Iterator[tuple[str, str]]:
    same_bits = heads.k in (320, 576)
    for k in CODES:
        for v in CODES:
            if same_bits and (k != v or not k.startswith("rq")):
                continue
            mixed = "q4_0" not in (k, v) and {"rq2", "rq3", "rq4"} & {k, v}
            if mixed or k == v != "f16" if every else k == v == "rq3":
                yield k, v


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="90", help="compute capability")
    parser.add_argument("--all", action="store_true", help="every pair of types")
    parser.add_argument("--multiprocessors", type=int, default=132, help="of the card; an H100 SXM has 132")
    parser.add_argument("--clock", type=float, default=1.755, help="of the card, GHz")
    options = parser.parse_args()
    project = llama_project()
    head = [
        "K/V head_dim",
        "registers",
        "spilled",
        "shared memory",
        "warps",
        "per value",
        "clocks",
        "at most",
    ]
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(
            obtain.pristine(project.pin), tree, symlinks=True, ignore=shutil.ignore_patterns(".git")
        )
        patches.apply(project.patch_set, tree, what="llama.cpp")
        nvdisasm = _nvdisasm(cuda_toolkit.find())
        for heads in HEADS:
            for k, v in _pairs(options.all, heads):
                kernel = compile_kernel(tree, Path(folder), nvdisasm, options.arch, heads, k, v)
                lines.append(row(kernel, heads, k, v, options.multiprocessors, options.clock))
    print(table(head, lines))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GgufrqError as error:
        sys.exit(str(error))
