"""Which module of a model gets how many bits of mlx-lm's affine code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ggufrq.base.errors import UsageError
from ggufrq.make.recipe import Recipe
from ggufrq.mlx import names
from ggufrq.mlx.names import GROUP

BITS = (2, 3, 4, 5, 6, 8)
#: What stays as it is.
WHOLE = 16
#: Types of recipes as bits; None: as it is.
TYPES = {
    "q8_0": 8,
    "q6_k": 6,
    **dict.fromkeys(("q5_k", "q5_0", "q5_1"), 5),
    **dict.fromkeys(("q4_k", "q4_0", "q4_1", "iq4_xs", "iq4_nl"), 4),
    **dict.fromkeys(("q3_k", "iq3_s", "iq3_xxs"), 3),
    "q2_k": 2,
    **dict.fromkeys(("bf16", "f16", "f32"), WHOLE),
}
#: By bits the type that stands for them in a recipe.
OF_BITS = {8: "q8_0", 6: "q6_k", 5: "q5_k", 4: "q4_k", 3: "q3_k", 2: "q2_k", WHOLE: "bf16"}

#: What mlx-lm asks about a module: whether and how it is quantized.
Choice = bool | dict[str, Any]


def in_bits(bits: int) -> dict[str, Any]:
    """The affine code in so many bits, as ``config.json`` has it."""
    return {"group_size": GROUP, "bits": bits, "mode": "affine"}


def choose(model: Any, what: int | Recipe) -> dict[str, Choice]:
    """How each module of a model is quantized, by its path: all alike, but for what mlx-lm itself keeps in
    more bits, or by a recipe. Raises UsageError when the recipe does not fit the model or mlx."""
    paths = {tensor.name for tensor in names.inventory(model) if tensor.quantizable}
    if isinstance(what, Recipe):
        return {path: bits != WHOLE and in_bits(bits) for path, bits in of_recipe(model, what).items()}
    if what not in BITS:
        raise UsageError(f"mlx has no code of {what} bits", remedy=f"one of {', '.join(map(str, BITS))}")
    usual = getattr(model, "quant_predicate", None)
    modules = dict(model.named_modules())
    found = {}
    for name, path in names.modules(model).items():
        fits = hasattr(modules[path], "to_quantized") and modules[path].weight.shape[-1] % GROUP == 0
        wanted = name in paths if usual is None else usual(path, modules[path])
        found[path] = fits and wanted
    return found


def of_recipe(model: Any, recipe: Recipe) -> dict[str, int]:
    """Bits by path of the module. Raises UsageError when the recipe does not fit the model or mlx."""
    if recipe.imatrix:
        raise UsageError(
            f"recipe {recipe.name} wants an importance matrix, which mlx's code does not use",
            remedy="--recipe sensitivity --bpw 5, measured on mlx's own code; or a recipe without",
        )
    types = recipe.wanted(names.inventory(model))
    wrong = [kind for kind in types.values() if kind not in TYPES]
    if wrong:
        raise UsageError(
            f"recipe {recipe.name} wants {wrong[0]}, for which mlx has no code", remedy=", ".join(TYPES)
        )
    return {path: TYPES[kind] for path, kind in names.by_path(model, types).items()}


def bits_of(choice: Choice, usual: int) -> int:
    """The bits of a choice, ``usual`` where it says only that there is one."""
    if isinstance(choice, dict):
        return int(choice["bits"])
    return usual if choice else WHOLE


def counted(bits: Mapping[str, int]) -> dict[int, int]:
    """How many modules have how many bits, the fewest first."""
    return {n: list(bits.values()).count(n) for n in sorted(set(bits.values()))}
