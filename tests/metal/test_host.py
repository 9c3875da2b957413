"""What the host side looks up is there, is built, and operations are refused where it is not."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msl
import pytest
from fake_metal import Driver

from ggufrq.base import proc

pytestmark = [pytest.mark.build, pytest.mark.slow]


def test_every_kernel_that_is_looked_up_exists(driver: Driver, embedded: dict[str, str]) -> None:
    """For all types, head sizes and choices of the vector kernel that supports_op lets through."""
    names = [name for source in embedded.values() for name in msl.kernel_names(source)]
    looked_up = driver("names")
    assert "kernel_flash_attn_ext_vec_rq3_dk256_dv256" in looked_up
    assert set(looked_up) <= set(names)
    # ours are there once each, and none in vain
    ours = sorted(name for name in names if "rq" in name)
    assert ours == sorted(name for name in looked_up if "rq" in name)


def test_every_library_is_in_all_lists(metal: Path, embedded: dict[str, str]) -> None:
    """ggml-metal-device.m looks for what CMake embeds: the files in kernels/ that nothing includes."""
    code = (metal / "ggml-metal-device.m").read_text()
    start = code.index("#define GGML_METAL_LIBS")
    listed = re.findall(r"X\(\w+,\s*(\w+)\)", code[start : code.index("enum ggml_metal_lib_kind", start)])
    files = {path.stem for path in (metal / "kernels").glob("*.metal")} - {"fa_common", "fa_vec_common"}
    assert sorted(listed) == sorted(embedded) == sorted(files)


def test_embedded_sources_stand_alone(embedded: dict[str, str]) -> None:
    """What is embedded is compiled from memory, where no file can be included."""
    for name, source in embedded.items():
        left = [line for line in source.splitlines() if re.match(r'\s*#include "', line)]
        # this one is in the branch that is not taken: GGML_METAL_EMBED_LIBRARY is defined
        assert set(left) <= {'#include "ggml-common.h"'}, name
        assert "\n#pragma once" not in source, name


@pytest.mark.parametrize("library", ["rq", "fa_rq", "fa_vec_rq"])
def test_sources_compile_from_the_folder_of_a_build(
    clang: list[str], metal: Path, tmp_path: Path, library: str
) -> None:
    """Without the embedded library upstream copies sources beside the programs and compiles them there."""
    cmake = (metal / "CMakeLists.txt").read_text()
    shared = cmake[cmake.index("set(METALLIB_KERNELS_FA_SHARED") :].split(")")[0]
    kernels = tmp_path / "kernels"
    kernels.mkdir()
    for name in re.findall(r"METALLIB_\w+", shared)[1:]:
        path = re.search(rf'set\({name}\s+"\${{CMAKE_CURRENT_SOURCE_DIR}}/(.*)"\)', cmake)
        assert path, name
        (kernels / Path(path[1]).name).write_text((metal / path[1]).read_text())
    for name in ("common.h", "dequantize.h", f"{library}.metal"):
        (kernels / name).write_text((metal / "kernels" / name).read_text())
    (tmp_path / "ggml-metal-impl.h").write_text((metal / "ggml-metal-impl.h").read_text())
    (tmp_path / "ggml-common.h").write_text((metal.parent / "ggml-common.h").read_text())
    source = msl.flatten(kernels / f"{library}.metal", [kernels, tmp_path])
    text = msl.translate(source, library, lambda _: False)
    msl.compile_kernels(clang, text, tmp_path / f"{library}.o", "-UGGML_METAL_EMBED_LIBRARY")


def test_what_objective_c_includes_of_ours_is_plain_c(metal: Path, tmp_path: Path) -> None:
    """ggml-metal-device.m cannot be compiled here; the hook in its supports_op is two lines."""
    source = tmp_path / "hook.c"
    source.write_text(
        '#include "ggml-metal-rq.h"\n'
        "bool hook(struct ggml_metal_device * dev, const struct ggml_tensor * op);\n"
        "bool hook(struct ggml_metal_device * dev, const struct ggml_tensor * op) {\n"
        "    bool supported;\n"
        "    return ggml_metal_rq_supports_op(dev, op, true, true, &supported) && supported;\n"
        "}\n"
    )
    include = [f"-I{path}" for path in (metal, metal.parent, metal.parent.parent / "include")]
    strict = ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-Wno-unused-const-variable"]
    proc.run([os.environ.get("CC", "cc"), *strict, *include, "-fsyntax-only", source])


def test_what_is_not_there_is_refused(driver: Driver) -> None:
    """Nothing on our types is left to upstream's lists, some of which end in "yes"."""
    found = driver("supports")
    width = {"planar3": 3, "iso3": 3, "rotor4": 4}
    for k in ("f16", "q8_0", *width):
        for v in ("f16", "q8_0", *width):
            ours = k in width or v in width
            expected = "upstream" if not ours else "yes" if width.get(k) == width.get(v) else "no"
            assert found.pop(f"flash_attn {k}/{v}") == expected, (k, v)
    answers = {
        answer: {what for what in found if found[what] == answer} for answer in ("yes", "no", "upstream")
    }
    assert answers["yes"] == {
        "flash_attn head 256",
        "flash_attn head 512",
        "flash_attn V in K 576/512",
        "flash_attn V in K 320/256",
        "flash_attn rq3_64/rq3_64 64",
        "flash_attn rq3_64/iso3 192/128",
        "flash_attn rq4_64/iso4 320/256",
        "set_rows rq3_64",
        "get_rows rq3_64",
        "cpy f32 -> rq3_64",
        "cpy rq3_64 -> f16",
        "set_rows",
        "get_rows",
        "cpy f32 -> ours",
        "cpy ours -> f32",
        "cpy ours -> f16",
        "recent iso3/iso3 128",
        "recent iso3/planar3 256",
        "recent rq3_64/iso3 192/128",
        "recent iso3/iso3 512",
        "recent q8_0/q8_0 128",
        "recent q4_0/q4_0 512",
        "recent f16/f16 80",
    }
    assert answers["upstream"] == {
        "set_rows f32",
        "get_rows f32",
        "cpy f32 -> f16",
        "mul_mat f32",
        "view",
        "permute",
    }


def test_a_scale_that_the_encoder_has_not_is_refused(driver: Driver) -> None:
    for scale, expected in {"norm": "no", "lsq": "no", "inner": "yes", "": "yes"}.items():
        found = driver("supports", env={"LLAMA_RQ_SCALE": scale})
        assert found["set_rows"] == found["cpy f32 -> ours"] == expected, scale
        assert found["get_rows"] == "yes"


def test_what_leads_to_a_store_takes_no_launch_of_its_own(driver: Driver) -> None:
    """But where other nodes read what would not be written, or write over what is read later than it was."""
    found = driver("launches")
    for what, apart in {"rotation": 3, "profile": 4}.items():
        alone = {
            beside: found[f"{what}, {beside}"] for beside in ("1 token", "32 tokens", "33 tokens", "over")
        }
        assert alone == {"1 token": 1, "32 tokens": 1, "33 tokens": apart, "over": apart}, what
        for beside in ("mean", "product", "result", "reused", "mean later"):
            assert found[f"{what}, {beside}"] == apart + 1, (what, beside)
        assert found[f"{what}, later"] == 2
    assert found["rotation, output"] == 1  # the result, which is written
    assert found["profile, output"] == 4
