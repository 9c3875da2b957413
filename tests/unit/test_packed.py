"""Weights that are codes already: which ways of quantizing are read, and the sentence for the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
from packed_models import Packed, compressed, dense

from ggufrq.base.errors import ModelError
from ggufrq.models import convert

Change = Callable[[Packed], None]
LAYER = "model.layers.0.mlp.up_proj"


def without(*ends: str) -> Change:
    def change(made: Packed) -> None:
        made.tensors = {n: t for n, t in made.tensors.items() if not n.endswith(ends)}

    return change


def beside(end: str, shape: tuple[int, ...] = ()) -> Change:
    return lambda made: made.tensors.update({f"{LAYER}.{end}": np.ones(shape, np.float32)})


def said(**settings: Any) -> Change:
    return lambda made: made.settings.update(settings)


def renamed(old: str, new: str) -> Change:
    def change(made: Packed) -> None:
        for part in (made.tensors, made.kinds):
            for name in [name for name in part if name.endswith(old)]:
                part[name.removesuffix(old) + new] = part.pop(name)  # type: ignore[attr-defined]

    return change


def bits_and_bytes(made: Packed, name: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """As bitsandbytes stores four bits: a column of bytes, and what belongs to it."""
    made.tensors |= {
        f"{name}.weight": rng.integers(0, 256, (shape[0] * shape[1] // 2, 1), np.uint8),
        f"{name}.weight.absmax": np.ones(shape[0] * shape[1] // 64, np.float32),
        f"{name}.weight.quant_map": np.ones(16, np.float32),
        f"{name}.weight.quant_state.bitsandbytes__nf4": np.zeros(80, np.uint8),
    }
    return np.zeros(shape)


def awq(made: Packed, name: str, shape: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    packed_models.gptq(made, name, shape, rng)
    del made.tensors[f"{name}.g_idx"]
    return np.zeros(shape)


def fp8() -> Packed:
    return dense(packed_models.FP8, packed_models.fp8_blocks)


def gptq() -> Packed:
    return dense(packed_models.GPTQ, packed_models.gptq)


def rows(form: str = "float-quantized", **weights: Any) -> Packed:
    return dense(compressed(form, **{"strategy": "channel"} | weights), packed_models.fp8_rows)


def groups() -> Packed:
    return dense(packed_models.INT4, packed_models.int4_groups)


def nvfp4() -> Packed:
    return dense(packed_models.NVFP4, packed_models.nvfp4)


def modelopt() -> Packed:
    return dense({"quant_method": "modelopt", "quant_algo": "FP8"}, packed_models.fp8_whole)


REFUSED: dict[str, tuple[Callable[[], Packed], Change, str]] = {
    "bitsandbytes": (lambda: dense({"quant_method": "bitsandbytes"}, bits_and_bytes), said(), "bitsandbytes"),
    "bitsandbytes, undeclared": (
        lambda: dense({}, bits_and_bytes),
        said(),
        "a way that config.json does not",
    ),
    "awq": (lambda: dense({"quant_method": "awq", "bits": 4}, awq), said(), "AWQ"),
    "auto-round": (gptq, said(quant_method="auto-round"), "auto-round"),
    "fbgemm": (modelopt, said(quant_method="fbgemm_fp8"), "fbgemm_fp8"),
    "gptq of 3 bits": (gptq, said(bits=3), "GPTQ of 3 bits"),
    "gptq of two widths": (gptq, said(bits=8), r"GPTQ of several widths \(.*qweight\)"),
    "gptq of Marlin": (gptq, said(checkpoint_format="marlin"), "GPTQ in the form marlin"),
    "gptq without groups": (gptq, without("up_proj.g_idx"), r"GPTQ without g_idx \(.*up_proj.qweight\)"),
    "fp8 by vLLM": (fp8, renamed("weight_scale_inv", "weight_scale"), "FP8 in blocks .* with weight_scale"),
    "fp8 with an input's scale": (
        fp8,
        beside("input_scale"),
        r"FP8 .* with input_scale \(model.layers.0.mlp",
    ),
    "fp8 of other blocks": (fp8, said(weight_block_size=[64, 64]), "FP8 whose scales do not fit"),
    "fp8 of no blocks": (fp8, said(weight_block_size=None), "FP8 whose scales do not fit"),
    "e8m0": (
        fp8,
        lambda made: (
            made.kinds.update({f"{LAYER}.weight_scale_inv": "F8_E8M0"})
            or made.tensors.update({f"{LAYER}.weight_scale_inv": np.ones((2, 2), np.uint8)})
        ),
        "FP8 .*, with .*up_proj.weight_scale_inv in the type F8_E8M0",
    ),
    "one scale": (lambda: rows(strategy="tensor"), said(), r".*\(float-quantized\) with scales by tensor"),
    "groups of floats": (lambda: rows(group_size=64), said(), ".* with scales by channel"),
    "blocks unknown": (lambda: rows(strategy="block"), said(), ".* in blocks of None"),
    "sparse": (lambda: rows("marlin-24"), said(), r"compressed-tensors \(marlin-24\)"),
    "two groups": (
        groups,
        lambda made: made.settings["config_groups"].update(more=made.settings["config_groups"]["group_0"]),
        r"compressed-tensors \(pack-quantized\) in 2 groups",
    ),
    "rows of codes": (
        lambda: dense(compressed("pack-quantized", strategy="channel"), packed_models.int4_groups),
        said(),
        ".* with scales by channel",
    ),
    "ordered by activations": (groups, beside("weight_g_idx", (4,)), r".* with weight_g_idx \("),
    "mxfp4 elsewhere": (fp8, said(quant_method="mxfp4"), "MXFP4 in the architecture Qwen3ForCausalLM"),
    "mxfp4 by compressed-tensors": (
        groups,
        said(format="mxfp4-pack-quantized"),
        r"compressed-tensors \(mxfp4-pack-quantized\)",
    ),
    "modelopt in blocks": (modelopt, beside("weight_scale", (2, 2)), "FP8 of ModelOpt in blocks"),
    "modelopt otherwise": (modelopt, said(quant_algo="W4A8_AWQ"), "W4A8_AWQ of ModelOpt"),
    "nvfp4 in short rows": (
        nvfp4,
        lambda made: made.tensors.update({f"{LAYER}.weight_scale": np.ones((192, 15), np.uint8)}),
        r"NVFP4 in rows that are no multiple of 64 \(.*up_proj.weight\)",
    ),
    "nvfp4 with more": (nvfp4, beside("weight_zero_point", (2, 2)), "NVFP4 with weight_zero_point"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_not_read(kind: str, tmp_path: Path) -> None:
    make, change, words = REFUSED[kind]
    made = json_apart(make())
    change(made)
    found = convert.inspect(made.write(tmp_path / "Packed"))
    with pytest.raises(ModelError, match=f"weights of Packed are quantized by {words}") as caught:
        convert.require_readable(found)
    assert caught.value.message.endswith("which llama.cpp's converter does not read")
    assert "in 16 bits" in str(caught.value.remedy)


def json_apart(made: Packed) -> Packed:
    """With settings of its own, which a test may change."""
    made.settings = json.loads(json.dumps(made.settings))
    return made


READ = {
    **{told: (make, "BF16") for told, make in packed_models.DECODED.items()},
    "NVFP4": (nvfp4, "NVFP4"),
    "MXFP4": (packed_models.gpt_oss, "MXFP4_MOE"),
}


@pytest.mark.parametrize("told", READ)
def test_what_is_read(told: str, tmp_path: Path) -> None:
    make, kind = READ[told]
    more = packed_models.GPT_OSS if told == "MXFP4" else {}
    found = convert.inspect(make().write(tmp_path / "Packed", **more))
    convert.require_readable(found)
    assert (found.quantized_by, found.kind) == (told, kind)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (packed_models.MIXED, {}),
        (compressed("mixed-precision") | {"config_groups": {"a": {"format": "nvfp4-pack-quantized"}}}, {}),
        (
            {"quant_method": "fp8", "store_dtype": "mxfp4"},
            {"architectures": ["MiMoV2FlashForCausalLM"]},
        ),
        (
            {"quant_method": "compressed-tensors", "format": "mxfp4-pack-quantized"},
            {"architectures": ["KimiK3ForConditionalGeneration"]},
        ),
        (packed_models.FP8, {"architectures": ["DeepseekV4ForCausalLM"]}),
    ],
)
def test_codes_that_stay_by_the_converters_own_ways(
    settings: dict[str, Any], more: dict[str, Any], tmp_path: Path
) -> None:
    """However the configuration calls them: nothing is named BF16 that is not."""
    made = fp8()
    made.settings = settings
    assert convert.inspect(made.write(tmp_path / "Packed", **more)).kind in ("NVFP4", "MXFP4_MOE")


def test_a_head_in_codes_is_called_by_them(tmp_path: Path) -> None:
    """A head apart, too, is not called BF16 when codes stay in it."""
    made = nvfp4()
    model = convert.inspect(made.write(tmp_path / "Plain", num_nextn_predict_layers=1))
    assert (model.has_mtp, convert.part_kind(model, "mtp")) == (False, "BF16")
    made.tensors["model.layers.1.eh_proj.weight"] = np.zeros((8, 8), np.uint8)
    model = convert.inspect(made.write(tmp_path / "Headed", num_nextn_predict_layers=1))
    assert (model.has_mtp, convert.part_kind(model, "mtp")) == (True, "NVFP4")


def test_floats_beside_whole_numbers_are_floats(tmp_path: Path) -> None:
    """Positions and masks of a model in 16 bits are no codes."""
    made = dense({}, packed_models.int8_rows)
    made.tensors = {n: t for n, t in made.tensors.items() if "norm" in n or "embed" in n}
    made.tensors["vision.position_ids"] = np.arange(4)
    found = convert.inspect(made.write(tmp_path / "Plain"))
    convert.require_readable(found)
    assert (found.quantized_by, found.has_codes) == ("", False)


def test_plain_floats_in_8_bits_are_values(tmp_path: Path) -> None:
    made = fp8()
    made.settings = {}
    without("scale_inv")(made)
    found = convert.inspect(made.write(tmp_path / "Eight"))
    convert.require_readable(found)
    assert found.kind == "BF16"


def test_a_file_that_would_be_called_what_it_is_not(tmp_path: Path) -> None:
    """Whatever the converter does: a file with codes in it is not named BF16."""
    import gguf

    found = convert.inspect(fp8().write(tmp_path / "Eight"))
    writer = gguf.GGUFWriter(tmp_path / "made.gguf", "qwen3")
    writer.add_tensor("a.weight", np.zeros((2, 34), np.uint8), raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r"Eight would be called BF16, but the converter made of it Q8_0"):
        convert.require_kind(tmp_path / "made.gguf", found)
