"""Small models of random weights that are quantized already, one for each way that the Hub has, and what
their weights are as numbers, decoded by numpy alone."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import sources

from ggufrq.models.resolve import embedded_models

EMBD, FF, HEADS, KV_HEADS, DIM, VOCAB, EXPERTS = 256, 192, 2, 1, 128, 4096, 4
#: The tokenizer of the embedded model, and what declares it.
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "ggufrq.json")
#: Values of four bits, and the bits of a float in 8 by a byte's.
E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)

Matrix = tuple[int, int]
#: Linear layers of a model of one layer, by their Hub names: rows, columns.
LINEAR: dict[str, Matrix] = {
    "model.layers.0.self_attn.q_proj": (HEADS * DIM, EMBD),
    "model.layers.0.self_attn.k_proj": (KV_HEADS * DIM, EMBD),
    "model.layers.0.self_attn.v_proj": (KV_HEADS * DIM, EMBD),
    "model.layers.0.self_attn.o_proj": (EMBD, HEADS * DIM),
    "model.layers.0.mlp.gate_proj": (FF, EMBD),
    "model.layers.0.mlp.up_proj": (FF, EMBD),
    "model.layers.0.mlp.down_proj": (EMBD, FF),
}
#: The same in a GGUF.
GGUF = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@dataclass
class Packed:
    """``tensors`` as they are stored, ``kinds`` the types that numpy has no name for, and ``values`` of each
    matrix in numbers, by its name in a GGUF."""

    settings: dict[str, Any]
    tensors: dict[str, np.ndarray] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    values: dict[str, np.ndarray] = field(default_factory=dict)
    apart: dict[str, Any] | None = None  # hf_quant_config.json

    def write(self, folder: Path, **config: Any) -> Path:
        """The model as the Hub has it, Qwen3 unless ``config`` says otherwise."""
        folder.mkdir(parents=True)
        for name in _TOKENIZER:
            shutil.copyfile(embedded_models()[sources.DENSE] / name, folder / name)
        facts = _CONFIG | config
        if self.settings:
            facts["quantization_config"] = self.settings
        (folder / "config.json").write_text(json.dumps(facts))
        if self.apart is not None:
            (folder / "hf_quant_config.json").write_text(json.dumps(self.apart))
        sources.write(folder / "model.safetensors", self.tensors, self.kinds)
        return folder


_CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": VOCAB,
    "hidden_size": EMBD,
    "intermediate_size": FF,
    "num_hidden_layers": 1,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}


def rounded(values: np.ndarray) -> np.ndarray:
    """The nearest numbers that BF16 has, to even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    near = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16 << 16
    return near.astype(np.uint32).view(np.float32)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """Floats in 8 bits with four of the exponent, as numbers."""
    exponent, mantissa = (codes >> 3 & 15).astype(np.int32), (codes & 7).astype(np.float32)
    size = np.where(
        exponent == 0, mantissa / 8 * 2.0**-6, (1 + mantissa / 8) * np.exp2((exponent - 7).astype(np.float32))
    )
    return (np.where(codes & 0x80, -size, size)).astype(np.float32)


def _gguf(name: str) -> str:
    return "blk.0." + GGUF[name.removeprefix("model.layers.0.")] + ".weight"


def _frame(made: Packed, rng: np.random.Generator) -> None:
    """What is in floats in all of them: embedding and norms."""
    made.tensors["model.embed_tokens.weight"] = sources.bf16(rng.standard_normal((VOCAB, EMBD)) / 16)
    for name, size in (("input_layernorm", EMBD), ("post_attention_layernorm", EMBD)):
        made.tensors[f"model.layers.0.{name}.weight"] = sources.bf16(np.ones(size))
    for name in ("q_norm", "k_norm"):
        made.tensors[f"model.layers.0.self_attn.{name}.weight"] = sources.bf16(np.ones(DIM))
    made.tensors["model.norm.weight"] = sources.bf16(np.ones(EMBD))


Code = Callable[[Packed, str, Matrix, np.random.Generator], np.ndarray]


def dense(settings: dict[str, Any], code: Code, seed: int = 1, apart: dict[str, Any] | None = None) -> Packed:
    """A Qwen3 of one layer; ``code`` stores one linear layer and returns its values."""
    rng = np.random.default_rng(seed)
    made = Packed(settings, apart=apart)
    _frame(made, rng)
    for name, shape in LINEAR.items():
        made.values[_gguf(name)] = code(made, name, shape, rng)
    return made


def _floats_8(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    codes = rng.integers(0, 0x70, shape, np.uint8) | (rng.integers(0, 2, shape, np.uint8) << 7)
    made.tensors[f"{name}.weight"], made.kinds[f"{name}.weight"] = codes, "F8_E4M3"
    return e4m3(codes)


def _scales(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return (rng.uniform(0.5, 2, shape) / 2048).astype(np.float32)


def fp8_blocks(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """A scale for each 128 × 128 values, as DeepSeek V3 and Qwen3 have them."""
    values = _floats_8(made, name, shape, rng)
    scale = _scales(rng, (-(-shape[0] // 128), -(-shape[1] // 128)))
    made.tensors[f"{name}.weight_scale_inv"] = scale
    return values * scale.repeat(128, 0).repeat(128, 1)[: shape[0], : shape[1]]


def fp8_rows(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """A scale for each row, in BF16, as compressed-tensors has them."""
    values = _floats_8(made, name, shape, rng)
    scale = rounded(_scales(rng, (shape[0], 1)))
    made.tensors[f"{name}.weight_scale"] = sources.bf16(scale)
    return values * scale


def fp8_whole(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """One scale for a tensor, and one for what goes in, as ModelOpt has them."""
    values = _floats_8(made, name, shape, rng)
    scale = _scales(rng, ())
    made.tensors[f"{name}.weight_scale"] = scale
    made.tensors[f"{name}.input_scale"] = np.ones((), np.float32)
    return values * scale


def int8_rows(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """Eight bits and a scale for each row."""
    codes = rng.integers(-127, 128, shape, np.int8)
    scale = rounded(_scales(rng, (shape[0], 1)))
    made.tensors |= {f"{name}.weight": codes, f"{name}.weight_scale": sources.bf16(scale)}
    return codes * scale


def _in_words(codes: np.ndarray, bits: int = 4) -> np.ndarray:
    """Codes of the last axis, several in a word of 32 bits, the first in the lowest bits."""
    parts = codes.reshape(*codes.shape[:-1], -1, 32 // bits).astype(np.uint32)
    return np.bitwise_or.reduce(parts << np.arange(0, 32, bits, dtype=np.uint32), -1).view(np.int32)


def int4_groups(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """Four bits with a scale and a zero for each 64 values of a row."""
    codes, zeros = rng.integers(0, 16, shape), rng.integers(0, 16, (shape[0], shape[1] // 64))
    scale = rounded(_scales(rng, zeros.shape))
    made.tensors |= {
        f"{name}.weight_packed": _in_words(codes),
        f"{name}.weight_scale": sources.bf16(scale),
        f"{name}.weight_shape": np.array(shape, np.int64),
        f"{name}.weight_zero_point": _in_words(zeros.T).T,
    }
    return (codes - zeros.repeat(64, 1)) * scale.repeat(64, 1)


def gptq(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """Four bits in groups of 64 inputs that need not lie together; zeros are stored less one."""
    rows, columns = shape
    groups = rng.permutation(np.arange(columns) // 64).astype(np.int32)
    codes, zeros = rng.integers(0, 16, (columns, rows)), rng.integers(1, 16, (columns // 64, rows))
    scale = _scales(rng, zeros.shape).astype(np.float16)
    made.tensors |= {
        f"{name}.qweight": _in_words(codes.T).T,
        f"{name}.qzeros": _in_words(zeros - 1),
        f"{name}.scales": scale,
        f"{name}.g_idx": groups,
    }
    return (scale.astype(np.float32)[groups] * (codes - zeros[groups])).T


def nvfp4(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """Four bits, a scale of eight for each 16 values, and one for the tensor, as ModelOpt has them."""
    codes = rng.integers(0, 16, shape, np.uint8)
    scales = rng.integers(0x30, 0x60, (shape[0], shape[1] // 16), np.uint8)
    whole = np.float32(2.0**-11)
    made.tensors |= {
        f"{name}.weight": codes[:, ::2] | codes[:, 1::2] << 4,
        f"{name}.weight_scale": scales,
        f"{name}.weight_scale_2": np.array(whole),
        f"{name}.input_scale": np.ones((), np.float32),
    }
    made.kinds[f"{name}.weight_scale"] = "F8_E4M3"
    return E2M1[codes] * e4m3(scales).repeat(16, 1) * whole


def nvfp4_rows(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """The same by compressed-tensors, which stores the tensor's scale as what divides."""
    values = nvfp4(made, name, shape, rng)
    made.tensors[f"{name}.weight_packed"] = made.tensors.pop(f"{name}.weight")
    made.tensors[f"{name}.weight_global_scale"] = 1 / made.tensors.pop(f"{name}.weight_scale_2")
    made.tensors[f"{name}.input_global_scale"] = made.tensors.pop(f"{name}.input_scale")
    return values


def half_nvfp4(made: Packed, name: str, shape: Matrix, rng: np.random.Generator) -> np.ndarray:
    """Feed-forward layers in NVFP4, attention in FP8, as ModelOpt mixes them."""
    return (nvfp4 if ".mlp." in name else fp8_whole)(made, name, shape, rng)


def gpt_oss(seed: int = 1) -> Packed:
    """A gpt-oss of one layer whose experts are MXFP4; the rest is BF16."""
    rng = np.random.default_rng(seed)
    made = Packed({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn"]})
    _frame(made, rng)
    for name in [name for name in made.tensors if "self_attn" in name]:
        del made.tensors[name]
    layer = "model.layers.0."
    for name, shape in LINEAR.items():
        if "self_attn" in name:
            values = sources.bf16(rng.standard_normal(shape) / 16)
            made.tensors |= {f"{name}.weight": values, f"{name}.bias": sources.bf16(np.zeros(shape[0]))}
            made.values[_gguf(name)] = (values.astype(np.uint32) << 16).view(np.float32)
    made.tensors |= {
        f"{layer}self_attn.sinks": sources.bf16(np.zeros(HEADS)),
        f"{layer}mlp.router.weight": sources.bf16(rng.standard_normal((EXPERTS, EMBD)) / 16),
        f"{layer}mlp.router.bias": sources.bf16(np.zeros(EXPERTS)),
        "lm_head.weight": sources.bf16(rng.standard_normal((VOCAB, EMBD)) / 16),
    }
    for name, rows, columns in (("gate_up_proj", 2 * FF, EMBD), ("down_proj", EMBD, FF)):
        codes = rng.integers(0, 16, (EXPERTS, rows, columns), np.uint8)
        scales = rng.integers(119, 123, (EXPERTS, rows, columns // 32), np.uint8)
        values = E2M1[codes] * np.exp2(scales.astype(np.float32) - 127).repeat(32, -1)
        blocks = (codes[..., ::2] | codes[..., 1::2] << 4).reshape(EXPERTS, rows, columns // 32, 16)
        made.tensors |= {
            f"{layer}mlp.experts.{name}_blocks": blocks,
            f"{layer}mlp.experts.{name}_scales": scales,
            f"{layer}mlp.experts.{name}_bias": sources.bf16(np.zeros((EXPERTS, rows))),
        }
        if name == "down_proj":
            made.values["blk.0.ffn_down_exps.weight"] = values
        else:
            made.values["blk.0.ffn_gate_exps.weight"] = values[:, ::2]
            made.values["blk.0.ffn_up_exps.weight"] = values[:, 1::2]
    return made


#: What is special about the configuration of gpt-oss.
GPT_OSS: dict[str, Any] = {
    "architectures": ["GptOssForCausalLM"],
    "model_type": "gpt_oss",
    "num_local_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "sliding_window": 128,
    "tie_word_embeddings": False,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 32.0,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
        "original_max_position_embeddings": 4096,
    },
}


def compressed(form: str, **weights: Any) -> dict[str, Any]:
    """What a configuration says of compressed-tensors."""
    groups = {"group_0": {"weights": weights, "targets": ["Linear"]}}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": groups}


FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": True}
MODELOPT_FP8 = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}
NVFP4 = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
INT4 = compressed("pack-quantized", strategy="group", type="int", num_bits=4, group_size=64)
MIXED = {
    "quant_method": "modelopt",
    "quant_algo": "MIXED_PRECISION",
    "quantized_layers": {name: {"quant_algo": "NVFP4" if ".mlp." in name else "FP8"} for name in LINEAR},
}
#: Those that become BF16, to the bit.
DECODED: dict[str, Callable[[], Packed]] = {
    "FP8 in blocks of 128x128": lambda: dense(FP8, fp8_blocks),
    "compressed-tensors (float-quantized)": lambda: dense(
        compressed("float-quantized", strategy="channel", type="float", num_bits=8), fp8_rows
    ),
    "compressed-tensors (int-quantized)": lambda: dense(
        compressed("int-quantized", strategy="channel", type="int", num_bits=8), int8_rows
    ),
    "compressed-tensors (pack-quantized)": lambda: dense(INT4, int4_groups),
    "GPTQ of 4 bits": lambda: dense(GPTQ, gptq),
    "FP8 of ModelOpt": lambda: dense({}, fp8_whole, apart=MODELOPT_FP8),
}
