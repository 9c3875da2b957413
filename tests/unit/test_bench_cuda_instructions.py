"""bench/cuda_instructions.py: what it makes of a disassembler's output."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import cuda_instructions
from cuda_instructions import Heads

#: as nvdisasm -c -gi prints it: a loop before the main one, a part that is seldom executed, inlined functions
LISTING = """
.text._Z6kernelv:
	//## File "{source}", line 1
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;
        /*0020*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0030*/                   LDS R4, [R2] ;
        /*0040*/                   IMMA.16832.S8.S8 R8, R4.ROW, R6.COL, RZ ;
        /*0050*/              @!P1 BRA `(.L_x_3) ;
	//## File "/usr/include/math.hpp", line 7 inlined at "{source}", line 2
	//## File "{source}", line 2
        /*0060*/                   MUFU.TANH R9, R8 ;
        /*0070*/                   FMUL.FTZ R9, R9, R3 ;
.L_x_3:
	//## File "/usr/include/math.hpp", line 7 inlined at "{source}", line 1
	//## File "{source}", line 1
        /*0080*/              @!PT LDS RZ, [RZ] ;
        /*0090*/                   IMAD.SHL.U32 R8, R8, 0x100, RZ ;
        /*00a0*/                   BRA.DIV UR4, `(.L_x_5) ;
        /*00b0*/                   SHFL.BFLY PT, R3, R2, 0x4, 0x1f ;
.L_x_4:
        /*00c0*/                   BRA P2, `(.L_x_2) ;
        /*00d0*/                   EXIT ;
.L_x_5:
        /*00e0*/                   WARPSYNC R5 ;
        /*00f0*/                   BRA `(.L_x_4) ;
.L_x_6:
        /*0100*/                   BRA `(.L_x_6) ;
        /*0110*/                   NOP ;
"""


def _loop(tmp_path: Path) -> Counter[str]:
    text = tmp_path / "rq-kernel.cuh"
    text.write_text("usual();\ns = tanhf(s);\n", encoding="utf-8")
    return cuda_instructions.main_loop(LISTING.format(source=text))


def test_the_loop_is_found_and_what_is_seldom_left_out(tmp_path: Path) -> None:
    usual = {"LDS": 2, "IMMA.16832.S8.S8": 1, "IMAD.SHL.U32": 1, "SHFL.BFLY": 1, "BRA": 2, "BRA.DIV": 1}
    aside = {"WARPSYNC": 1}  # where lanes have parted
    assert _loop(tmp_path) == Counter(usual | aside) + Counter({"BRA": 1})


def test_units(tmp_path: Path) -> None:
    kernel = cuda_instructions.Kernel(128, 0, 64, 43184, _loop(tmp_path))
    assert kernel.warps == 16
    assert kernel.clocks() == {"issue": 10, "integer": 0, "multiply": 2, "exp": 0, "memory": 12, "tensor": 8}
    line = cuda_instructions.row(kernel, Heads(128, 128), "rq3", "q8_0", 100, 1.0)
    assert line[0] == "rq3/q8_0 128"
    assert line[5:7] == [f"{32 * 10 / (256 * 64):.2f}", "12 (memory)"]
    # K in blocks of 64 with 3.25 bits, V in blocks of 128 with 4.125
    line = cuda_instructions.row(kernel, Heads(192, 128), "rq3", "rq4", 100, 1.0)
    nbytes = 64 * (192 * 3.25 + 128 * 4.125) / 8
    assert line[0] == "rq3/rq4 192/128" and line[7] == f"{4 * nbytes / 12 * 100 / 1000:.1f} TB/s"


def test_of_a_row_that_two_warps_share_each_has_a_half(tmp_path: Path) -> None:
    kernel = cuda_instructions.Kernel(168, 8, 32, 45184, _loop(tmp_path), halves=2)
    line = cuda_instructions.row(kernel, Heads(512, 512), "rq3", "rq3", 100, 1.0)
    assert line[5] == f"{32 * 10 / (512 * 32):.2f}"
    assert line[7] == f"{4 * 32 * 512 * 3.125 / 8 / 12 * 100 / 1000:.1f} TB/s"
    # MLA: V is in K, in whose blocks of 64
    line = cuda_instructions.row(kernel, Heads(576, 512, True), "rq3", "rq3", 100, 1.0)
    assert line[0] == "rq3/rq3 576/512 (MLA)"
    assert line[7] == f"{4 * 16 * 576 * 3.25 / 8 / 12 * 100 / 1000:.1f} TB/s"
