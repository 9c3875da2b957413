"""Which weights lie in the memory of a GPU and which in that of the machine, and the options of llama.cpp
that say so.

With all layers on the GPU llama.cpp keeps there all but the embeddings, which are looked up by the CPU
(LLM_TENSOR_LAYER_INPUT in llama-arch.cpp); where that of the tokens computes the output, too, the GPU has a
copy. ``--n-cpu-moe N`` and ``--n-cpu-ffn N`` of common/arg.cpp keep the experts, or the dense feed-forward
part, of the first N layers with the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

_LAYER = re.compile(r"^blk\.(\d+)\.")
#: The embedding of the tokens, which computes the output in models without ``output.weight``.
EMBEDDING = "token_embd.weight"
#: All of them; that of Gemma 3n and 4 by layers is most of such a model.
EMBEDDINGS = frozenset(
    (EMBEDDING, "per_layer_token_embd.weight", "position_embd.weight", "token_types.weight")
)
#: What may stay with the CPU: upstream's patterns, experts before the dense part.
_EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"
_DENSE = r"\.ffn_(up|down|gate)\."


@dataclass(frozen=True)
class Placement:
    """Bytes of weights in both memories, with those of the first ``layers`` of ``of`` layers that may stay
    with the CPU there; ``experts`` when these are experts."""

    layers: int
    of: int
    vram: int
    ram: int
    experts: bool

    @property
    def option(self) -> str:
        """What llama.cpp calls it; empty when nothing has to stay with the CPU."""
        if not self.layers:
            return ""
        return f"--n-cpu-{'moe' if self.experts else 'ffn'} {self.layers}"

    @property
    def override(self) -> str:
        """The same by names of tensors: the value of ``--override-tensor``; empty as ``option``."""
        if not self.layers:
            return ""
        what = _EXPERTS if self.experts else _DENSE
        where = "" if self.layers == self.of else rf"blk\.({'|'.join(map(str, range(self.layers)))})"
        return f"{where}{what}=CPU"


def movable(names: Iterable[str]) -> dict[str, int]:
    """Tensors that may stay with the CPU, and the layer of each."""
    names = list(names)
    what = _EXPERTS if _has_experts(names) else _DENSE
    found = ((name, _LAYER.match(name)) for name in names if re.search(what, name))
    return {name: int(layer[1]) for name, layer in found if layer}


def _has_experts(names: Iterable[str]) -> bool:
    return any(re.search(_EXPERTS, name) for name in names)


def on_gpu(name: str, *, tied: bool) -> bool:
    """Whether a tensor is on the GPU where all layers are; ``tied``: the embedding computes the output."""
    return name not in EMBEDDINGS or (tied and name == EMBEDDING)


def placements(sizes: Mapping[str, int]) -> list[Placement]:
    """All ways to place a model, from all layers on the GPU to all that may be with the CPU there. ``sizes``
    are bytes of its tensors by name."""
    layers: dict[int, int] = {}
    for name, layer in movable(sizes).items():
        layers[layer] = layers.get(layer, 0) + sizes[name]
    experts = _has_experts(sizes)
    ram, count = sum(sizes.get(name, 0) for name in EMBEDDINGS), 1 + max(layers, default=-1)
    vram = sum(size for name, size in sizes.items() if on_gpu(name, tied="output.weight" not in sizes))
    found = [Placement(0, count, vram, ram, experts)]
    for layer_number in range(count):
        moved = layers.get(layer_number, 0)
        vram, ram = vram - moved, ram + moved
        found.append(Placement(layer_number + 1, count, vram, ram, experts))
    return found


def fitting(sizes: Mapping[str, int], vram: int, ram: int | None) -> Placement | None:
    """The placement with most of the model on the GPU that holds ``vram`` bytes of weights there and ``ram``
    in the machine (None: as many as there are); None when there is none."""
    for placement in placements(sizes):
        if placement.vram <= vram:
            return placement if ram is None or placement.ram <= ram else None
    return None
