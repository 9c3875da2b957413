"""The embedded dense model, its heads cut into smaller ones: for types whose blocks follow the heads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ggufrq.models.resolve import embedded_models

_Q, _KV = 512, 256  # values of all heads


def with_heads_of(size: int, folder: Path) -> Path:
    """A folder in ``folder`` with the model in heads of ``size`` values, as it is converted from."""
    torch_files = pytest.importorskip("safetensors.torch")
    made = folder / f"heads-of-{size}"
    shutil.copytree(embedded_models()["docs-qwen3-8m"], made)
    config: dict[str, Any] = json.loads((made / "config.json").read_text())
    config |= {"head_dim": size, "num_attention_heads": _Q // size, "num_key_value_heads": _KV // size}
    (made / "config.json").write_text(json.dumps(config))
    weights = torch_files.load_file(made / "model.safetensors")
    for name in weights:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            weights[name] = weights[name][:size].contiguous()
    torch_files.save_file(weights, made / "model.safetensors", metadata={"format": "pt"})
    return made
