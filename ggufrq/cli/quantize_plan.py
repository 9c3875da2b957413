"""The plan of ``ggufrq quantize --dry-run`` and ``--list-tensors``: rendering only."""

from __future__ import annotations

from typing import Any

from ggufrq.base import table
from ggufrq.base.sizes import size_text
from ggufrq.make.plan import Conversion, FamilyPlan, Output
from ggufrq.make.recipe import class_of
from ggufrq.make.record import require_room


def render_plan(plan: FamilyPlan) -> str:
    """The files with exact sizes and bits per weight, then what the run needs and what is there."""
    head = ("file", "type", "size", "bits/weight", "")
    rows = [
        (part.name, part.type, size_text(part.bytes) if part.bytes else "", "", _of(part))
        for part in plan.conversions
    ]
    rows += [
        (
            output.name,
            output.job.type_name,
            size_text(output.forecast.file_bytes),
            f"{output.forecast.bits:.2f}",
            _note(output),
        )
        for output in plan.outputs
    ]
    lines = [table.render(head, rows, "llrrl"), f"in {plan.folder}", ""]
    if all(part.kept for part in plan.conversions) and all(output.kept for output in plan.outputs):
        lines.append("all of it is there")
    else:
        free, memory = plan.disk_free, plan.memory
        lines.append(f"disk    {size_text(plan.disk_needed)} needed, {size_text(free)} free")
        there = f", {size_text(memory[1])} of {size_text(memory[0])} free" if memory is not None else ""
        lines.append(f"memory  {size_text(plan.memory_needed)} needed{there}")
    for output in plan.outputs:
        for name, (asked, got) in output.fallbacks.items():
            lines.append(f"{output.name}: {name} has rows that {asked} cannot hold and gets {got}")
    return "\n".join([*lines, *plan.told])


def render_tensors(plan: FamilyPlan) -> str:
    """Every tensor of every file: its class, shape, type in the source, and type in the file."""
    parts = []
    for output in plan.outputs:
        types = output.forecast.types
        rows = [
            (
                tensor.name,
                (class_of(tensor.name, plan.model.architecture) or "") if tensor.quantizable else "",
                " × ".join(map(str, tensor.shape)),
                tensor.type,
                types[tensor.name],
            )
            for tensor in plan.model
        ]
        head = ("tensor", "class", "shape", "from", "to")
        parts.append(f"{output.name}\n{table.render(head, rows, 'llrll')}")
    return "\n\n".join(parts)


def plan_as_json(plan: FamilyPlan) -> dict[str, Any]:
    """The plan as data, every tensor's type included."""
    return {
        "base": plan.base,
        "folder": str(plan.folder),
        "source": plan.source,
        "architecture": plan.model.architecture,
        "told": plan.told,
        "conversions": [
            {"file": part.name, "part": part.part, "bytes": part.bytes, "kept": part.kept}
            for part in plan.conversions
        ],
        "files": [
            {
                "file": output.name,
                "type": output.job.type_name,
                "recipe": output.want.recipe.name if output.want.recipe is not None else None,
                "bytes": output.forecast.file_bytes,
                "bits": output.forecast.bits,
                "kept": output.kept,
                "imatrix": output.job.imatrix is not None,
                "fold": output.fold,
                "codes": dict(output.codes),
                "fallbacks": {name: list(pair) for name, pair in output.fallbacks.items()},
                "tensors": output.forecast.types,
            }
            for output in plan.outputs
        ],
        "disk_needed": plan.disk_needed,
        "disk_free": plan.disk_free,
        "memory_needed": plan.memory_needed,
        "memory": list(plan.memory) if plan.memory is not None else None,
    }


def refuse_what_does_not_fit(plan: FamilyPlan) -> None:
    """Raise GgufrqError when the disk has no room for the files."""
    if plan.disk_needed:
        require_room(plan.folder, plan.disk_free, plan.disk_needed, "this")


def _of(part: Conversion) -> str:
    return ", ".join(
        [*([f"of {part.quantized_by}"] if part.quantized_by else []), *(["kept"] if part.kept else [])]
    )


def larger(count: int) -> str:
    """So many tensors got a larger type than was asked for."""
    return f"{count} larger tensor{'s' if count > 1 else ''}"


def _note(output: Output) -> str:
    notes = [f"{output.fold} folded"] if output.fold else []
    notes += ["imatrix"] if output.job.imatrix is not None else []
    fallbacks = max(len(output.fallbacks), output.forecast.fallbacks)
    notes += [larger(fallbacks)] if fallbacks else []
    notes += ["kept"] if output.kept else []
    return ", ".join(notes)
