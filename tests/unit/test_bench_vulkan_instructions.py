"""How instructions of SPIR-V are counted; the listing is written by hand in spirv-dis' form."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ggufrq.base.errors import UsageError

sys.path.append(str(Path(__file__).resolve().parents[2] / "bench"))

import vulkan_instructions

LISTING = """\
   %v4float = OpTypeVector %float 4
    %uint_2 = OpConstant %uint 2
       %main = OpFunction %void None %4
          %5 = OpLabel
          %6 = OpAccessChain %_ptr_StorageBuffer_ushort %k %uint_0 %9
          %7 = OpLoad %ushort %6
          %8 = OpUConvert %uint %7
          %9 = OpExtInst %v2float %1 UnpackHalf2x16 %8
         %10 = OpIAdd %uint %8 %uint_2
         %11 = OpSelect %uint %true %10 %8
         %12 = OpVectorTimesScalar %v4float %13 %14
               OpStore %15 %12
               OpReturn
"""


def test_vectors_count_as_often_as_they_have_components() -> None:
    found = vulkan_instructions.counted(LISTING)
    assert found == {"loads": 1, "conversion": 3, "integer": 1, "choice": 1, "float": 4}


def test_a_loop_of_unknown_passes_is_told() -> None:
    with pytest.raises(UsageError, match="loop"):
        vulkan_instructions.counted(LISTING.replace("OpReturn", "OpLoopMerge %16 %17 Unroll"))
