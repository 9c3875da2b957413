"""Modules of mlx-lm's models by the names that their weights have in GGUF, by which it is known what class of
tensors they are in and what reads what."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from ggufrq.ggufs.tensors import Inventory, Tensor

#: Values that share a scale in mlx's affine code.
GROUP = 64
#: Architectures of llama.cpp by what mlx-lm calls a model's type; others keep that name.
ARCHITECTURES = {
    "gemma3_text": "gemma3",
    "mistral": "llama",
    "qwen2_moe": "qwen2moe",
    "qwen3_5": "qwen35",
    "qwen3_5_moe": "qwen35moe",
    "qwen3_moe": "qwen3moe",
    "qwen3_next": "qwen3next",
}
_WHOLE = {"embed_tokens": "token_embd", "lm_head": "output"}
_LAYER = {
    "input_layernorm": "attn_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    **{f"self_attn.{part}_proj": f"attn_{part}" for part in ("q", "k", "v", "qkv")},
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_qkvz": "ssm_in",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_ba": "ssm_ba",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    **{f"mlp.{part}_proj": f"ffn_{part}" for part in ("gate", "up", "down")},
    "mlp.gate_up_proj": "ffn_up",
    **{f"mlp.switch_mlp.{part}_proj": f"ffn_{part}_exps" for part in ("gate", "up", "down")},
    **{f"mlp.shared_expert.{part}_proj": f"ffn_{part}_shexp" for part in ("gate", "up", "down")},
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_expert_gate": "ffn_gate_inp_shexp",
}
#: Where the norm behind attention is not called that of the feed-forward part.
_POST_ATTENTION = ("gemma2", "gemma3", "qwen35", "qwen35moe", "qwen3next")
#: What chooses experts stays as it is, as it does in GGUF files.
_ROUTERS = ("ffn_gate_inp", "ffn_gate_inp_shexp")
#: The language model's; towers for pictures have layers, too.
_OF_TEXT = r"^(?:model\.|language_model\.)*"
_PATH = re.compile(_OF_TEXT + r"layers\.(\d+)\.(.+)$")
_OUTSIDE = re.compile(_OF_TEXT + r"(\w+)$")


def architecture(model: Any) -> str:
    """What llama.cpp calls the architecture of a model of mlx-lm."""
    kind = str(model.model_type)
    return ARCHITECTURES.get(kind, kind)


def gguf_name(path: str, architecture: str) -> str:
    """The name in GGUF of the weights of the module at ``path``; the path itself where it is not known."""
    found = _PATH.match(path)
    if found is None:
        outside = _OUTSIDE.match(path)
        return f"{_WHOLE.get(outside[1], path) if outside else path}.weight"
    name = _LAYER.get(found[2])
    if found[2] == "post_attention_layernorm":
        name = "post_attention_norm" if architecture in _POST_ATTENTION else "ffn_norm"
    return f"blk.{found[1]}.{name}.weight" if name is not None else f"{path}.weight"


def modules(model: Any) -> dict[str, str]:
    """Paths of the modules with weights by their names in GGUF."""
    kind = architecture(model)
    return {gguf_name(path, kind): path for path, module in model.named_modules() if "weight" in module}


def inventory(model: Any) -> Inventory:
    """The weights of a model as recipes see them; those of modules that mlx cannot quantize, and what chooses
    experts, stay as they are."""
    kind = architecture(model)

    def tensors() -> Iterator[Tensor]:
        for name, path in modules(model).items():
            module = module_at(model, path)
            shape = tuple(reversed(module.weight.shape))
            fits = hasattr(module, "to_quantized") and shape[0] % GROUP == 0
            routes = name.removesuffix(".weight").rpartition(".")[2] in _ROUTERS
            yield Tensor(name, shape, "bf16", fits and not routes)

    return Inventory(kind, tuple(tensors()))


def module_at(model: Any, path: str) -> Any:
    """The module of a model at a path (``model.layers.3.mlp``)."""
    return dict(model.named_modules())[path]


def by_path(model: Any, named: Mapping[str, Any]) -> dict[str, Any]:
    """What is given by names in GGUF, by paths of modules."""
    paths = modules(model)
    return {paths[name]: value for name, value in named.items()}
