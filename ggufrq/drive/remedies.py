"""What to do about a reason that a program of llama.cpp gave for its end."""

from __future__ import annotations

from pathlib import Path

from ggufrq.tools.logs import is_of_heads


def remedy(message: str, log_path: Path) -> str:
    """The remedy for a reason: what to pass or to do, else where the log is."""
    if "exceeds the available context size" in message or "prompt is too long" in message:
        return "a larger context: -c N"
    if is_of_heads(message):
        return "--kv q8_0"
    if "is not within the file bounds" in message:
        return "download or copy it again: the end of the file is missing"
    if "the profile" in message:
        return "ggufrq calibrate with this model, or --kv-profile weights"
    if "layers of the KV cache:" in message:
        return '--kv with layers that the model has, as in "iso3; 0-1,-1:q8_0"'
    return f"see {log_path}"
