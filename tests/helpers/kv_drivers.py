"""The programs of tests/cache, and how they are run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from ggufrq.base import proc
from ggufrq.ggufs.fingerprint import fingerprint

HYBRID, DENSE = "docs-qwen3.5-8m", "docs-qwen3-8m"
NARROW = "heads-of-64"  # the dense one, its heads cut
ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def run(
    driver: Path,
    *arguments: str | Path,
    mode: str | None = None,
    layers: str | None = None,
    profile: Path | None = None,
    recent: int | None = None,
    first: int | None = None,
    devices: proc.Environment | None = None,
) -> dict[str, Any]:
    """What the program prints as JSON, with the variables that these options stand for."""
    env = {**ONE_THREAD, "LLAMA_RQ_MODE": mode, "LLAMA_RQ_LAYERS": layers, **(devices or {})}
    env["LLAMA_RQ_RECENT"] = None if recent is None else str(recent)
    env["LLAMA_RQ_FIRST"] = None if first is None else str(first)
    env["LLAMA_RQ_PROFILE"] = None if profile is None else str(profile)
    done = proc.run([driver, *arguments], env=env, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def means(model: Path, out: Path, *, size: float, rotation: str = "iso/full", **change: Any) -> Path:
    """A file of random means, which ggufrq made before profiles: attention does not depend on what they
    are."""
    name = HYBRID if model.stem.startswith(HYBRID) else DENSE
    layers = {DENSE: range(8), HYBRID: (3, 7)}[name]
    head_dim = {DENSE: 128, HYBRID: 256}[name]
    rng = np.random.default_rng(7)
    writer = gguf.GGUFWriter(out, "kv-calib")
    writer.add_type(change.get("type", "kv-calib"))
    writer.add_uint32("rq.calib.version", change.get("version", 1))
    writer.add_string("rq.calib.model", change.get("of", fingerprint(model)))
    writer.add_string("rq.calib.k_rotation", f"{rotation}/{head_dim}")
    for il in list(layers)[change.get("missing", 0) :]:
        values = size * rng.standard_normal((2, change.get("head_dim", head_dim)))
        if change.get("nan"):
            values[1, 5] = np.nan
        writer.add_tensor(f"blk.{il}.k_mean", values.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def metric(model: Path, out: Path, *, spread: float, **change: Any) -> Path:
    """A profile with random means and maps, whose axes are stretched by up to `spread` in either sense; for
    another model than the embedded ones with its `layers`, `heads` and `head_dim`."""
    layers = change.get("layers") or {DENSE: range(8), HYBRID: (3, 7)}[model.stem]
    head_dim = change.get("head_dim") or {DENSE: 128, HYBRID: 256}[model.stem]
    heads = change.get("heads", 2)
    rng = np.random.default_rng(change.get("seed", 7))
    writer = gguf.GGUFWriter(out, "kv-profile")
    writer.add_type("kv-profile")
    writer.add_uint32("rq.profile.version", change.get("version", 1))
    writer.add_string("rq.profile.model", change.get("of", fingerprint(model)))
    writer.add_string("rq.profile.source", "weights")
    writer.add_uint32("rq.profile.n_ctx", 1024)
    for il in list(layers)[change.get("missing", 0) :]:
        axes = np.linalg.qr(rng.standard_normal((heads, head_dim, head_dim)))[0]
        size = spread ** rng.uniform(-1, 1, (heads, 1, head_dim))
        k_map, q_map = (axes * size) @ axes.swapaxes(1, 2), (axes / size) @ axes.swapaxes(1, 2)
        if change.get("nan"):
            k_map[1, 5, 5] = np.nan
        if change.get("mixed_up"):
            q_map = k_map
        writer.add_tensor(f"blk.{il}.k_map", k_map.astype(np.float32))
        writer.add_tensor(f"blk.{il}.q_map", q_map.astype(np.float32))
        if not change.get("no_means"):
            mean = change.get("mean", 1) * rng.standard_normal((heads, head_dim))
            writer.add_tensor(f"blk.{il}.k_mean", mean.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
