"""Models whose weights come as codes already, and what llama.cpp's converter makes of them (``dequant_model``
and ``prepare_tensors`` in conversion/base.py, and the models that have ways of their own)."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ggufrq.base.paths import read_json

#: Floats that stay what they are, by safetensors' names, and the ones in 8 bits.
FLOATS = {"F64": "f32", "F32": "f32", "F16": "f16", "BF16": "bf16"}
_FLOATS_8 = ("F8_E4M3", "F8_E5M2")
#: Types of values that the converter reads.
_READ = {*FLOATS, *_FLOATS_8, "I64", "I32", "I16", "I8", "U8", "BOOL"}
_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "mxfp4": "MXFP4",
    "hqq": "HQQ",
    "torchao": "torchao",
    "quanto": "quanto",
    "modelopt": "ModelOpt",
}
#: Architectures with a converter of their own for codes.
_GPT_OSS, _KIMI, _MIMO, _DEEPSEEK = "GptOss", "KimiK3", "MiMoV2", "DeepseekV4"
_MODELOPT = ("FP8", "NVFP4", "W4A16_NVFP4", "MIXED_PRECISION")
#: What lies beside codes, by the ends of names, and which of it the converter reads by the way of quantizing.
_BESIDE = re.compile(
    r"(?:[._](?:input|weight|output|activation)_(?:global_)?scale(?:_2|_inv)?|\.[kv]_scale"
    r"|\.(?:qweight|qzeros|scales|g_idx|absmax|quant_map|nested_absmax|nested_quant_map|SCB|weight_format"
    r"|weight_packed|weight_shape|weight_zero_point|weight_g_idx|qscale_weight|qscale_act)"
    r"|\.quant_state\.[\w.]+)$"
)
_TAKEN = {
    "bitnet": (".weight_scale",),
    "fp8": ("_scale_inv", "activation_scale", ".qscale_weight", ".qscale_act"),
    "gptq": (".g_idx", ".qzeros", ".qweight", ".scales"),
    "compressed-tensors": (".weight_scale",),
    "pack-quantized": ("_packed", "_shape", "_scale", "_zero_point"),
    "modelopt": (".weight_scale", ".input_scale", ".k_scale", ".v_scale"),
    "NVFP4": (
        *(".weight_scale", ".weight_scale_2", ".input_scale", ".k_scale", ".v_scale"),
        *(".weight_packed", ".weight_global_scale", ".input_global_scale"),
    ),
}


class Stored(Protocol):
    """A tensor as it is stored: safetensors' name of its type, and its shape."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


Tensors = Mapping[str, Stored]


def codes(tensors: Tensors) -> dict[str, Stored]:
    """The tensors that are matrices and no floats of 16 bits or more."""
    return {name: t for name, t in tensors.items() if len(t.shape) > 1 and t.dtype not in FLOATS}


def settings(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """How the weights are quantized, as the converter reads it: ``quantization_config``, and what ModelOpt
    writes into a file of its own."""
    found: dict[str, Any] = {}
    for place in (config, config.get("text_config")):
        said = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(said, Mapping):
            found = dict(said)
            break
    more = read_json(folder / "hf_quant_config.json") or {}
    theirs = more.get("quantization")
    if isinstance(theirs, Mapping) and not (found.get("quant_algo") and found.get("quantized_layers")):
        producer = more.get("producer")
        name = producer.get("name") if isinstance(producer, Mapping) else None
        if "quant_method" not in found and name:
            found["quant_method"] = str(name).lower()
        for key in ("quant_algo", "quant_method", "format", "config_groups", "quantized_layers"):
            if key in theirs:
                found[key] = theirs[key]
    return found


def _architecture(config: Mapping[str, Any]) -> str:
    names = config.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def _groups(said: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    groups = said.get("config_groups")
    return [g for g in groups.values() if isinstance(g, Mapping)] if isinstance(groups, Mapping) else []


def _is_nvfp4(said: Mapping[str, Any]) -> bool:
    layers = said.get("quantized_layers")
    entries = layers.values() if isinstance(layers, Mapping) else ()
    groups, form = _groups(said), said.get("format")
    compressed = form == "nvfp4-pack-quantized" or (
        form == "mixed-precision"
        and bool(groups)
        and all(group.get("format") == "nvfp4-pack-quantized" for group in groups)
    )
    return (
        said.get("quant_algo") in ("NVFP4", "W4A16_NVFP4")
        or any(isinstance(e, Mapping) and str(e.get("quant_algo")).endswith("NVFP4") for e in entries)
        or (compressed and said.get("quant_method") == "compressed-tensors")
    )


def packed_as(config: Mapping[str, Any], folder: Path) -> str | None:
    """The name of a file made of the model of this configuration, where codes pass on as they are
    (``MXFP4_MOE``, ``NVFP4``); None where it gets floats."""
    said, model = settings(config, folder), _architecture(config)
    if _is_nvfp4(said):
        return "NVFP4"
    mxfp4 = (
        said.get("quant_method") == "mxfp4"
        or (model.startswith(_KIMI) and said.get("format") == "mxfp4-pack-quantized")
        or (model.startswith(_MIMO) and said.get("store_dtype") == "mxfp4")
        or model.startswith(_DEEPSEEK)
    )
    return "MXFP4_MOE" if mxfp4 else None


def told(config: Mapping[str, Any], folder: Path) -> str:
    """What the weights are quantized by, for people: ``FP8 in blocks of 128x128``, ``GPTQ of 4 bits``."""
    said = settings(config, folder)
    method = str(said.get("quant_method") or "codes")
    name = _NAMES.get(method, method)
    kept = packed_as(config, folder)
    if kept:
        return {"NVFP4": "NVFP4", "MXFP4_MOE": "MXFP4"}[kept]
    block = said.get("weight_block_size")
    if method == "fp8" and isinstance(block, list):
        return f"{name} in blocks of {'x'.join(map(str, block))}"
    if method == "gptq":
        return f"{name} of {said.get('bits')} bits"
    if method == "compressed-tensors":
        return f"{name} ({said.get('format')})"
    return f"{said['quant_algo']} of {name}" if method == "modelopt" and said.get("quant_algo") else name


def not_read(config: Mapping[str, Any], folder: Path, tensors: Tensors) -> str | None:
    """The way in which the weights are quantized, in words, where the converter cannot read it; None where it
    can, or where they are floats and nothing else is said."""
    said, model = settings(config, folder), _architecture(config)
    method = str(said.get("quant_method") or "")
    found = codes(tensors)
    if not found:
        return told(config, folder) if method and method not in (*_TAKEN, "") else None
    if model.startswith((_KIMI, _MIMO, _DEEPSEEK)):
        return None
    strange = next((name for name, t in found.items() if t.dtype not in _READ), None)
    if strange is not None:
        return f"{told(config, folder)}, with {strange} in the type {found[strange].dtype}"
    if _is_nvfp4(said):
        return next(_nvfp4(said, tensors), None)
    if method == "mxfp4" and model.startswith(_GPT_OSS):
        return None
    if method == "mxfp4":
        return f"MXFP4 in the architecture {model}"
    ways = {
        "": _undeclared,
        "bitnet": lambda *_: iter(()),
        "fp8": _fp8,
        "gptq": _gptq,
        "compressed-tensors": _compressed,
        "modelopt": _modelopt,
    }
    if method not in ways:
        return _NAMES.get(method, method)
    way = next(ways[method](said, tensors), None)
    if way is not None or not method:
        return way
    taken = _TAKEN["pack-quantized" if said.get("format") == "pack-quantized" else method]
    return next(_left(told(config, folder), tensors, taken), None)


def _left(name: str, tensors: Tensors, taken: Sequence[str]) -> Iterator[str]:
    """What lies beside codes and is not read."""
    for tensor in tensors:
        if _BESIDE.search(tensor) and not tensor.endswith(tuple(taken)):
            yield f"{name} with {tensor.rpartition('.')[2]} ({tensor})"


def _undeclared(said: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    """Codes without a word of the configuration; plain floats of 8 bits are values like others."""
    for name, tensor in tensors.items():
        integers = len(tensor.shape) > 1 and tensor.dtype in ("I8", "U8", "I32") and name.endswith(".weight")
        if integers or (_BESIDE.search(name) and codes(tensors)):
            yield f"a way that config.json does not tell (no quantization_config, and {name})"


def _fp8(said: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    block = said.get("weight_block_size")
    for name, weight in codes(tensors).items():
        scale = tensors.get(f"{name}_scale_inv")
        if scale is None or weight.dtype not in _FLOATS_8:
            continue
        shape = scale.shape
        if block is None:
            fits = math.prod(shape) == 1 or (
                shape[0] == weight.shape[0] and math.prod(shape[1:]) in (1, math.prod(shape))
            )
            fits = fits and len(shape) <= len(weight.shape)
        else:
            sizes = block if isinstance(block, list) and len(block) == 2 else [0, 0]
            want = tuple(
                -(-n // size) if size else 0 for n, size in zip(weight.shape[-2:], sizes, strict=True)
            )
            fits = shape[-2:] == want
        if not fits:
            yield f"FP8 whose scales do not fit ({name}_scale_inv: {shape} for {weight.shape})"


def _gptq(said: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    bits, form = said.get("bits"), said.get("checkpoint_format", "gptq")
    if bits not in (2, 4, 8):
        yield f"GPTQ of {bits} bits"
        return
    if form not in ("gptq", "gptq_v2"):
        yield f"GPTQ in the form {form}"
    for name, weight in tensors.items():
        base = name.removesuffix(".qweight")
        if base == name:
            continue
        if f"{base}.g_idx" not in tensors:
            yield f"GPTQ without g_idx ({name})"
        elif weight.shape[0] * 32 // bits != tensors[f"{base}.g_idx"].shape[0]:
            yield f"GPTQ of several widths ({name})"


def _compressed(said: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    form, groups = said.get("format"), _groups(said)
    what = f"compressed-tensors ({form})"
    if len(groups) != 1:
        yield f"{what} in {len(groups)} groups"
        return
    weights = groups[0].get("weights")
    weights = weights if isinstance(weights, Mapping) else {}
    strategy = weights.get("strategy")
    if form in ("float-quantized", "int-quantized", "naive-quantized"):
        block = weights.get("block_structure")
        if strategy not in ("channel", "block") or weights.get("group_size") is not None:
            yield f"{what} with scales by {strategy}"
        elif strategy == "block" and not isinstance(block, list):
            yield f"{what} in blocks of {block}"
    elif form == "pack-quantized":
        if strategy != "group" or weights.get("type", "int") != "int":
            yield f"{what} with scales by {strategy}"
        elif not isinstance(weights.get("num_bits"), int) or not isinstance(weights.get("group_size"), int):
            yield f"{what} of {weights.get('num_bits')} bits in groups of {weights.get('group_size')}"
    else:
        yield what


def _modelopt(said: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    algo = said.get("quant_algo")
    if algo is not None and algo not in _MODELOPT:
        yield f"{algo} of ModelOpt"
    for name, weight in codes(tensors).items():
        scale = tensors.get(f"{name}_scale")
        if weight.dtype in _FLOATS_8 and scale is not None and len(scale.shape) > 1:
            yield f"{algo} of ModelOpt in blocks ({name}_scale)"


def _nvfp4(said: Mapping[str, Any], tensors: Tensors) -> Iterator[str]:
    layers = said.get("quantized_layers")
    for name, entry in layers.items() if isinstance(layers, Mapping) else ():
        algo = entry.get("quant_algo") if isinstance(entry, Mapping) else None
        if algo not in (*_MODELOPT, None):
            yield f"{algo} of ModelOpt ({name})"
    for name, scale in tensors.items():
        if name.endswith(".weight_scale") and len(scale.shape) > 1 and scale.shape[-1] % 4:
            yield f"NVFP4 in rows that are no multiple of 64 ({name.removesuffix('_scale')})"
    yield from _left("NVFP4", tensors, _TAKEN["NVFP4"])
