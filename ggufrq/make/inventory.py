"""The tensors of a model as llama-quantize lists them, and which of them it quantizes."""

from __future__ import annotations

from pathlib import Path

from ggufrq.base import proc
from ggufrq.build.project import Build
from ggufrq.ggufs.files import model_header
from ggufrq.ggufs.tensors import Inventory, Tensor, type_name
from ggufrq.tools import quantize as tool

#: Types to ask with which tensors are quantized: one that the model does not have yet tells.
_PROBES = ("Q8_0", "Q4_0", "Q5_0", "Q4_1", "Q5_1")


def inventory(model: Path, build: Build, *, log: Path | None = None) -> Inventory:
    """The tensors of a GGUF model (of all its shards, when it is the first of several). Which of them are
    quantized is llama-quantize's own answer, from a dry run.

    Raises ModelError for a damaged file and ToolError when the dry run fails.
    """
    header = model_header(model)
    have = {type_name(tensor.type) for tensor in header.tensors}
    probe = next((name for name in _PROBES if name.lower() not in have), _PROBES[0])
    args = tool.arguments(model, None, probe, dry_run=True, pure=True, requantize=True)
    done = proc.run([build.tool("llama-quantize"), *args], log=log, check=False)
    tool.parse(done.rc, done.stderr + done.stdout)
    tensors = tuple(
        Tensor(line.name, line.shape, line.type, line.target != line.type)
        for line in tool.parse_tensors(done.stderr + done.stdout)
    )
    return Inventory(str(header.values.get("general.architecture", "")), tensors)
