"""Models for mlx with quantized weights: mlx-lm's own codes, in the same bits throughout or by a recipe."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model, save

from ggufrq import __version__
from ggufrq.base import paths
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.results import file_sha256
from ggufrq.make.recipe import Recipe
from ggufrq.make.record import require_free
from ggufrq.mlx.models import config_of
from ggufrq.models import as_gguf
from ggufrq.models.resolve import resolve

GROUP = 64
BITS = (2, 3, 4, 5, 6, 8)
#: Types of recipes as bits of mlx-lm's affine code; None: as it is.
TYPES = {
    "q8_0": 8,
    "q6_k": 6,
    "q5_k": 5,
    "q4_k": 4,
    "q3_k": 3,
    "q2_k": 2,
    "bf16": None,
    "f16": None,
    "f32": None,
}
#: Classes of recipes by the end of a module's path.
CLASSES = {
    "embed_tokens": "token_embd",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "linear_attn.in_proj_qkv": "linear_qkv",
    "linear_attn.in_proj_qkvz": "linear_qkv",
    "linear_attn.in_proj_z": "linear_gate",
    "linear_attn.in_proj_a": "linear_alpha_beta",
    "linear_attn.in_proj_b": "linear_alpha_beta",
    "linear_attn.in_proj_ba": "linear_alpha_beta",
    "linear_attn.out_proj": "linear_out",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    **{f"switch_mlp.{part}_proj": f"experts_{part}" for part in ("gate", "up", "down")},
    **{f"shared_expert.{part}_proj": f"shared_{part}" for part in ("gate", "up", "down")},
}
#: What chooses experts stays as it is, as it does in GGUF files.
ROUTERS = ("mlp.gate", "mlp.shared_expert_gate")
MANIFEST = "ggufrq.json"
#: Tokens of the check against the model as it was, and of the text that is generated.
CHECKED, GENERATED = 256, 16


@dataclass(frozen=True)
class Plan:
    """What a model will be: ``modules`` counts by bits, 16 those that stay; ``bytes`` are those of all
    tensors, to which files add their headers; ``weights`` is the number of weights before."""

    source: str
    what: str
    modules: dict[int, int]
    bytes: int
    weights: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.bytes / self.weights


@dataclass(frozen=True)
class Made:
    """A model that was made, or was there already; ``kld`` is the mean divergence of its predictions from
    those of the model as it was, ``text`` what it wrote."""

    plan: Plan
    folder: Path
    kld: float
    text: str
    fresh: bool


def quantize(model: str, out: Path, what: int | Recipe) -> Made:
    """Write ``model`` (a name, folder or id on the Hub) in so many bits, or by a recipe, into the folder
    ``out``, loaded and compared with the model as it was before it gets its name.

    A folder that this made of the same is kept. Raises UsageError when the folder is another one or the wish
    cannot be had, ModelError when the model cannot be read or what was made does not work.
    """
    folder = _folder(model)
    wish = _wish(folder, what)
    kept = paths.read_json(out / MANIFEST)
    if kept is not None and kept.get("wish") == wish and _whole(out, kept["files"]):
        return Made(Plan(**kept["plan"]), out, kept["kld"], kept["text"], fresh=False)
    if out.exists():
        raise UsageError(f"{out} exists, and holds something else", remedy="another folder by -o")
    found, tokenizer, config, plan = _quantized(folder, what)
    out.parent.mkdir(parents=True, exist_ok=True)
    require_free(out.parent, plan.bytes, out.name)
    with TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as temporary:
        made = Path(temporary) / out.name
        save(made, folder, found, tokenizer, config)
        kld, text = _check(folder, made)
        files = {
            path.name: {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
            for path in sorted(made.iterdir())
        }
        versions = {"ggufrq": __version__, "mlx": version("mlx"), "mlx-lm": version("mlx-lm")}
        facts = {"wish": wish, "plan": asdict(plan), "kld": kld, "text": text, "made_by": versions}
        (made / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=2) + "\n", encoding="utf-8")
        made.rename(out)
    return Made(plan, out, kld, text, fresh=True)


def plan(model: str, what: int | Recipe) -> Plan:
    """What ``quantize`` would make; weights are not read. Raises as it does."""
    return _quantized(_folder(model), what)[3]


def _folder(model: str) -> Path:
    source = as_gguf.find(resolve(model), None, as_gguf.Options())
    if source.hf is None:
        raise ModelError(f"{model} is a GGUF file, which mlx-lm does not read", remedy="the model's folder")
    return source.hf.folder


def _wish(folder: Path, what: int | Recipe) -> dict[str, Any]:
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise ModelError(f"{folder} holds no model*.safetensors, which mlx-lm reads")
    facts = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in weights}
    chosen = what if isinstance(what, int) else {**asdict(what)}
    return {"weights": facts, "config": file_sha256(folder / "config.json"), "what": chosen}


def _whole(out: Path, files: dict[str, Any]) -> bool:
    return all(
        (out / name).is_file() and (out / name).stat().st_size == facts["bytes"]
        for name, facts in files.items()
    )


def _quantized(folder: Path, what: int | Recipe) -> tuple[Any, Any, dict[str, Any], Plan]:
    """The model, nothing of it computed yet, its tokenizer and configuration, and what it will be."""
    config = config_of(folder)
    if "quantization" in config or "quantization_config" in config:
        raise ModelError(f"{folder} is quantized already", remedy="the model that it was made of")
    found, tokenizer, config = mlx_lm.load(str(folder), model_config=config, lazy=True, return_config=True)
    weights = sum(x.size for _, x in tree_flatten(found.parameters()))
    counts: Counter[int] = Counter()
    usual = getattr(found, "quant_predicate", None)
    rule = (lambda path, module: True) if usual is None else usual
    if isinstance(what, int):
        if what not in BITS:
            raise UsageError(f"mlx has no code of {what} bits", remedy=f"one of {', '.join(map(str, BITS))}")
        bits = what
    else:
        bits, rule = (
            8,
            _by_recipe(what, tied=not any(path.endswith("lm_head") for path, _ in found.named_modules())),
        )

    def counted(path: str, module: Any) -> Any:
        chosen = rule(path, module)
        counts[chosen["bits"] if isinstance(chosen, dict) else bits if chosen else 16] += 1
        return chosen

    with redirect_stdout(StringIO()):  # it prints
        found, config = quantize_model(found, config, GROUP, bits, quant_predicate=counted)
    size = sum(x.nbytes for _, x in tree_flatten(found.parameters()))
    name = f"{what} bits" if isinstance(what, int) else what.name
    return found, tokenizer, config, Plan(folder.name, name, dict(sorted(counts.items())), size, weights)


def _by_recipe(recipe: Recipe, *, tied: bool) -> Callable[[str, Any], Any]:
    """What mlx-lm asks about each module that it can quantize."""
    if recipe.tensors or recipe.imatrix:
        raise UsageError(
            f"recipe {recipe.name} is for GGUF files: it names their tensors, or wants an importance matrix",
            remedy="a recipe with classes alone",
        )
    rules = {**recipe.where_present, **recipe.classes}

    def rule(path: str, module: Any) -> Any:
        parts = path.split(".")
        ends = [".".join(parts[-2:]), parts[-1]]
        if ends[0] in ROUTERS:
            return False
        group = next((CLASSES[end] for end in ends if end in CLASSES), None)
        if group == "token_embd" and tied and "output" in rules:
            group = "output"  # the output is computed by the embedding
        if group is None or group not in rules:
            raise UsageError(f"recipe {recipe.name} has no rule for {path}", remedy="--bits")
        wanted = rules[group].lower()
        if wanted not in TYPES:
            raise UsageError(
                f"recipe {recipe.name} wants {wanted}, for which mlx has no code", remedy=", ".join(TYPES)
            )
        bits = TYPES[wanted]
        return bits is not None and {"group_size": GROUP, "bits": bits, "mode": "affine"}

    return rule


def _check(folder: Path, made: Path) -> tuple[float, str]:
    """Mean divergence from the model as it was, and a text. Raises ModelError when a figure is none."""
    text = (paths.data_dir("texts") / "heldout.txt").read_text(encoding="utf-8")[: 16 * CHECKED]
    before, tokenizer = mlx_lm.load(str(folder), model_config=config_of(folder))[:2]
    after = mlx_lm.load(str(made))[0]
    ids = mx.array(tokenizer.encode(text)[:CHECKED])[None]

    def predictions(model: Any) -> Any:
        logits = model(ids, cache=make_prompt_cache(model))[0].astype(mx.float32)
        return logits - mx.logsumexp(logits, axis=-1, keepdims=True)

    old, new = predictions(before), predictions(after)
    kld = float((mx.exp(old) * (old - new)).sum(axis=-1).mean().item())
    if not -0.01 < kld < float("inf"):
        raise ModelError(f"the model that was made does not predict: its divergence is {kld}")
    return kld, mlx_lm.generate(after, tokenizer, text[:200], max_tokens=GENERATED)
