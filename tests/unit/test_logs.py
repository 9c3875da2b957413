"""What logs say of layered and calibrated caches, on saved real output; for the rest see test_tools."""

from __future__ import annotations

from pathlib import Path

from ggufrq.cache.kv import parse_kv
from ggufrq.tools.logs import error_lines, parse_context, uses

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"


def saved(name: str) -> str:
    return (LOGS / f"{name}.txt").read_text(encoding="utf-8")


def test_types_by_layer_calibration_and_scale() -> None:
    context = parse_context(saved("completion-layers.err"))
    assert context is not None
    assert context.layers == {
        "K": ("q8_0", "q8_0", "iso3", "iso3", "iso3", "iso4", "iso3", "q8_0"),
        "V": ("q8_0", "q8_0", "planar4", "planar4", "planar4", "f16", "planar4", "q8_0"),
    }
    assert context.calibration == "kv-calib.gguf"
    assert context.scale == "norm"
    assert context.rotations["K"].type == "iso3" and context.rotations["V"].family == "planar"
    assert context.kv_bytes is None and context.kv_values is None  # not told by one type
    assert context.kv_mib > 0
    assert not uses(context, parse_kv("iso3/planar4"))


def test_a_plain_cache_names_none_of_them() -> None:
    context = parse_context(saved("cli-ok.err"))
    assert context is not None
    assert (context.layers, context.calibration, context.scale) == ({}, None, None)


def test_two_caches_tell_their_layers_apart() -> None:
    """As models with sliding windows do: each names its own, counted over all."""
    lines = saved("completion-layers.err").splitlines()
    (at,) = (i for i, line in enumerate(lines) if "K layers: " in line)
    start = lines[at].split("K layers: ")[0]
    lines[at : at + 1] = [f"{start}K layers: 1 q8_0, 3 iso3", f"{start}K layers: 0 q8_0, 2 f16"]
    context = parse_context("\n".join(lines))
    assert context is not None
    assert context.layers["K"] == ("q8_0", "q8_0", "f16", "iso3")


def test_the_reason_for_a_refused_calibration() -> None:
    reason = "the calibration file other-calib.gguf is for another model: make one with ggufrq calibrate"
    assert error_lines(saved("completion-calib-other.err"))[0] == reason
