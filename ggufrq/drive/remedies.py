"""What to do about a reason that a program of llama.cpp gave for its end."""

from __future__ import annotations

import re
from pathlib import Path

from ggufrq.tools.logs import is_of_heads


def remedy(message: str, log_path: Path) -> str:
    """The remedy for a reason: what to pass or to do, else where the log is."""
    if "exceeds the available context size" in message or "prompt is too long" in message:
        return "a larger context: -c N"
    if is_of_heads(message):
        return _instead(message)
    if "does not divide n_embd_head" in message:  # upstream's own words
        return "--kv f16"
    if "is not within the file bounds" in message:
        return "download or copy it again: the end of the file is missing"
    if "does not support different K" in message:
        return "one type for K and V: --kv q8_0"
    if "cannot have types of their own" in message:
        return "one type for all layers: --kv q8_0"
    if re.search("requires flash[ _]att", message):
        return "V as it is: --kv q8_0/f16"
    if "the profile" in message:
        return "ggufrq calibrate with this model, or --kv-profile weights"
    if "layers of the KV cache:" in message:
        return '--kv with layers that the model has, as in "iso3; 0-1,-1:q8_0"'
    return f"see {log_path}"


def _instead(message: str) -> str:
    """The types that a reason says can be used in place of another."""
    said = re.search(r"\buse ((?:[a-z]\w+(?: \([\d.]+\))?(?: or )?)+) instead", message)
    names = re.findall(r"\b[a-z]+\d\w*", said[1]) if said is not None else []
    return " or ".join(f"--kv {name}" for name in names or ["q8_0"])
