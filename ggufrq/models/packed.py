"""Models whose weights come as codes already, and what llama.cpp's converter makes of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ggufrq.base.paths import read_json

#: Codes that the converter passes on as they are: the name of a file that holds them.
_KEPT = {"MXFP4": "MXFP4_MOE", "NVFP4": "NVFP4"}
#: Ways of quantizing whose codes it turns into floats, at least in some of their forms.
_UNPACKED = ("bitnet", "fp8", "gptq", "compressed-tensors", "modelopt")
_NAMES = {
    "bitsandbytes": "bitsandbytes",
    "awq": "AWQ",
    "gptq": "GPTQ",
    "fp8": "FP8",
    "eetq": "EETQ",
    "aqlm": "AQLM",
    "mxfp4": "MXFP4",
}


def packed_as(config: Mapping[str, Any], folder: Path) -> str | None:
    """The name of a file made of the model of this configuration, where codes pass on as they are
    (``MXFP4_MOE``, ``NVFP4``); None where it gets floats."""
    settings = _settings(config)
    more = read_json(folder / "hf_quant_config.json") or {}
    said = " ".join(
        str(value)
        for value in (
            *(settings.get(key) for key in ("quant_method", "quant_algo", "format")),
            (more.get("quantization") or {}).get("quant_algo")
            if isinstance(more.get("quantization"), dict)
            else "",
        )
    ).upper()
    return next((name for code, name in _KEPT.items() if code in said), None)


def not_read(config: Mapping[str, Any], *, has_codes: bool = True) -> str | None:
    """The way in which the model is quantized, where the converter knows nothing of it, or of weights that
    are no such codes (``has_codes``); else None."""
    method = str(_settings(config).get("quant_method") or "")
    if not method or method in _UNPACKED or (has_codes and method.upper() in _KEPT):
        return None
    return _NAMES.get(method, method)


def _settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    for place in (config, config.get("text_config")):
        found = place.get("quantization_config") if isinstance(place, Mapping) else None
        if isinstance(found, Mapping):
            return found
    return {}
