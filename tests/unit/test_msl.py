"""How Metal sources become C++; what is made of them is tested in tests/metal."""

from __future__ import annotations

import sys
from pathlib import Path

import msl
import pytest

SOURCE = """\
constant bool FC_flag [[function_constant(FC_BASE + 3)]];

template <typename T>
kernel void kernel_fill(
        constant args_t & args,
        device       T * dst,
        threadgroup half * memory [[threadgroup(0)]],
        uint3  tgpig[[threadgroup_position_in_grid]],
        ushort tiisg[[thread_index_in_simdgroup]]) {
    dst[tgpig.x] = args.value%args.ne31;
}

typedef decltype(kernel_fill<float>) fill_t;

template [[host_name("kernel_fill_f32" )]] kernel fill_t kernel_fill<float>;
template [[host_name("kernel_fill_i32")]]  kernel fill_t kernel_fill<int>;

kernel void kernel_plain(device float * x) { x[0] = 0; }
"""


def test_names_are_those_of_instances_and_plain_kernels() -> None:
    assert msl.kernel_names(SOURCE) == ["kernel_plain", "kernel_fill_f32", "kernel_fill_i32"]


def test_arguments_come_from_where_their_attributes_say() -> None:
    text = msl.translate(SOURCE, "fill", lambda name: name != "kernel_fill_i32")
    call = text[text.index("launch_kernel_fill(") :].split("\n")[0]
    assert "*(args_t" in call and "pointer{ memory }" in call and "lanes::self.group[0]" in call
    assert "{FC_BASE + 3, [](int64_t v) { FC_flag = (bool) v; }}" in text
    assert '"kernel_fill_f32"' in text and '"kernel_plain"' in text and '"kernel_fill_i32"' not in text
    # an instance that is not compiled is checked for its type all the same
    assert text.count("static_assert(is_same<fill_t") == 2


def test_without_a_clang_both_ways_to_one_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "ziglang", None)
    with pytest.raises(LookupError, match=r"clang\+\+ 15 or newer.*pip install ziglang"):
        msl.clang()
    for version, found in (("Debian clang version 14.0.6", False), ("clang version 19.1.0", True)):
        script = tmp_path / "clang++"
        script.write_text(f"#!/bin/sh\necho {version}\n")
        script.chmod(0o755)
        if found:
            assert msl.clang() == ["clang++"]
        else:
            with pytest.raises(LookupError):
                msl.clang()
