"""Count the instructions that decoding K or V takes in upstream's attention shader on Vulkan; no GPU needed.

A table in Markdown: per cache type the instructions of a thread that decodes four values, as attention asks
for them, by kind, the place in the block and the way out included. They are SPIR-V's, of the shader's own
functions specialised for the type and optimized; what a driver makes of them is not known. An estimate, not a
measurement.

    python bench/vulkan_instructions.py

It takes a build, glslc, and spirv-opt and spirv-dis of spirv-tools (apt-get install glslc spirv-tools).
"""

from __future__ import annotations

import re
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

from kvlab.markdown import table

from ggufrq.base import proc
from ggufrq.base.errors import GgufrqError, UsageError
from ggufrq.build import builds
from ggufrq.codec import tables

#: As upstream compiles attention for GPUs with f16, in upstream's vulkan-shaders-gen.cpp.
DEFINES = {
    "FLOAT16": "1",
    "FLOAT_TYPE": "float16_t",
    "FLOAT_TYPEV2": "f16vec2",
    "FLOAT_TYPEV4": "f16vec4",
    "ACC_TYPE": "float",
    "ACC_TYPEV2": "vec2",
    "ACC_TYPEV4": "vec4",
    "DATA_A_IQ4_NL": "1",
    "Q_TYPE": "float",
    "D_TYPE": "float",
    "D_TYPEV4": "vec4",
}

#: Four values of K by upstream's functions, at the place that its loops compute.
SHADER = """\
#version 450
#extension GL_EXT_control_flow_attributes : enable
#extension GL_EXT_shader_16bit_storage : require
#extension GL_EXT_shader_explicit_arithmetic_types_int32 : require
#extension GL_EXT_shader_explicit_arithmetic_types_float16 : require
#include "types.glsl"
#include "flash_attn_base.glsl"
#include "flash_attn_dequant.glsl"

void main() {
    const uint coord = gl_WorkGroupID.x*p.nb11*BLOCK_SIZE_K + 4*gl_LocalInvocationID.x;
    data_ov4[gl_GlobalInvocationID.x] =
        vec4(dequantize4(coord / BLOCK_SIZE_K, coord % BLOCK_SIZE_K, p.nb12, BINDING_IDX_K));
}
"""

#: GGML's ids of upstream's types; those of ours are in tables.json.
TYPES = {"f32": 0, "q8_0": 8, "q4_0": 2, "q5_0": 6}

KINDS = {
    "loads": r"Load",
    "integer": r"I(Add|Sub|Mul)|U(Div|Mod)|SMod|Shift\w+|Bitwise\w+|Not|BitField\w+",
    "choice": r"Select|I(Not)?Equal|U(Less|Greater)\w+|Logical\w+|Phi",
    "conversion": r"[SUF]Convert|Convert\w+|UnpackHalf2x16",
    "float": r"F(Add|Sub|Mul|Negate)|VectorTimesScalar",
}
INSTRUCTION = re.compile(r"^ *%\w+ = Op(?:ExtInst (%\w+) %\w+ (\w+)|(\w+) (%\w+))", re.MULTILINE)


def listing(shaders: Path, folder: Path, kind: int) -> str:
    """The shader for a type, as spirv-dis shows it."""
    source, raw, final = (folder / name for name in ("four.comp", "four.spv", "final.spv"))
    source.write_text(SHADER, encoding="utf-8")
    defines = [f"-D{name}={value}" for name, value in DEFINES.items()]
    proc.run(["glslc", "--target-env=vulkan1.2", "-O", f"-I{shaders}", *defines, source, "-o", raw])
    chosen = f"--set-spec-const-default-value=12:{kind} 13:{kind}"
    specialised = [chosen, "--freeze-spec-const", "--fold-spec-const-op-composite"]
    proc.run(["spirv-opt", *specialised, "-O", "--loop-unroll", "-O", raw, "-o", final])
    return proc.run(["spirv-dis", "--no-color", final]).stdout


def counted(text: str) -> Counter[str]:
    """Instructions by kind in what spirv-dis printed, those of vectors as often as these have components;
    addresses and stores are none of them. Raises UsageError where a loop is left, of which the passes are not
    known.
    """
    body = text[text.index(" OpFunction ") :]
    if "OpLoopMerge" in body:
        raise UsageError("a loop is left in the shader", remedy="a newer spirv-opt")
    found: Counter[str] = Counter()
    for extended, extended_name, name, plain in INSTRUCTION.findall(body):
        width = re.match(r"%v(\d)", extended or plain)
        for kind, pattern in KINDS.items():
            if re.fullmatch(pattern, extended_name or name):
                found[kind] += int(width[1]) if width else 1
    return found


def main() -> int:
    for name in ("glslc", "spirv-opt", "spirv-dis"):
        if shutil.which(name) is None:
            raise UsageError(f"{name} was not found", remedy="apt-get install glslc spirv-tools")
    shaders = builds.require_build().source / "ggml" / "src" / "ggml-vulkan" / "vulkan-shaders"
    kinds = dict(TYPES)
    for name in ("iso2", "iso3", "iso4", "iso5"):
        kinds[name] = next(t.id for t in tables.cache_types() if t.name == name)
    with tempfile.TemporaryDirectory() as made:
        found = {name: counted(listing(shaders, Path(made), kind)) for name, kind in kinds.items()}
    rows = []
    for name, counts in found.items():
        own = [counts[kind] for kind in KINDS]
        rows.append([name, *map(str, own), str(sum(own)), f"{sum(own) / 4:.1f}"])
    print(table(["type", *KINDS, "all", "per value"], rows))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GgufrqError as error:
        print(f"error: {error.message}\n  try: {error.remedy}", file=sys.stderr)
        sys.exit(1)
