"""What one type is chosen for (a class of tensors, a class in a range of layers, or a tensor), and the types
that it may get."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ggufrq.base.errors import UsageError
from ggufrq.ggufs.tensors import Inventory, Tensor, check_type, fallback, is_float
from ggufrq.make.recipe import Recipe, classes

BY = ("class", "layer", "tensor")
#: Types to choose from unless said otherwise, beside the one that the model has.
DEFAULT_TYPES = ("q2_k", "q3_k", "iq4_xs", "q4_k", "q5_k", "q6_k", "q8_0")
#: Types of ggml that no weights are kept in.
_NOT_FOR_WEIGHTS = ("f64", "i8", "i16", "i32", "i64", "q8_1", "q8_k")
_LAYER = re.compile(r"^blk\.(\d+)\.")


@dataclass(frozen=True)
class Option:
    """A type that a unit may get: ``types`` by name of the tensor (rows that cannot hold ``kind`` have
    another one), ``sizes`` in bytes of the tensors. ``exact``: nothing is changed."""

    kind: str
    types: Mapping[str, str]
    sizes: tuple[int, ...]
    exact: bool


@dataclass(frozen=True, eq=False)
class Unit:
    """Tensors that get one type together, and their options, the smallest first."""

    name: str
    tensors: tuple[Tensor, ...]
    options: tuple[Option, ...]

    @property
    def values(self) -> int:
        """How many weights it has."""
        return sum(tensor.values for tensor in self.tensors)


def parse_types(text: str) -> tuple[str, ...]:
    """Types with commas between, as ggml calls them, each once. Raises UsageError."""
    types = tuple(dict.fromkeys(check_type(part) for part in text.split(",") if part.strip()))
    unfit = [name for name in types if name in _NOT_FOR_WEIGHTS]
    if unfit:
        raise UsageError(f"no weights are kept in {unfit[0]}", remedy=f"--types {','.join(DEFAULT_TYPES)}")
    if len(types) < 2:
        raise UsageError(
            "it takes two types or more to choose from", remedy=f"--types {','.join(DEFAULT_TYPES)}"
        )
    return types


def default_types(model: Inventory) -> tuple[str, ...]:
    """The default types, the one that most of the model's weights have, which costs nothing but size, and
    bf16 where that is larger."""
    weights: Counter[str] = Counter()
    for tensor in model.quantizable:
        weights[tensor.type] += tensor.values
    own = max(weights, key=lambda kind: weights[kind])
    return tuple(dict.fromkeys((*DEFAULT_TYPES, *(("bf16",) if own == "f32" else ()), own)))


def units(model: Inventory, types: Sequence[str], by: str, ranges: int) -> list[Unit]:
    """The model's units, with ``by`` one of ``BY``; for ``layer`` the layers are cut into so many ranges."""
    if by not in BY:
        raise UsageError(f"--by is {', '.join(BY)}; not '{by}'")
    groups: dict[str, list[Tensor]] = {}
    for group, tensors in classes(model).items():
        if by == "class":
            groups[group] = tensors
        elif by == "tensor":
            groups |= {tensor.name.removesuffix(".weight"): [tensor] for tensor in tensors}
        else:
            for name, part in _ranges(group, tensors, layers(model), ranges).items():
                groups[name] = part
    return [Unit(name, tuple(part), tuple(_options(part, types))) for name, part in groups.items()]


def layers(model: Inventory) -> int:
    """How many layers the model has."""
    found = [_LAYER.match(tensor.name) for tensor in model]
    return 1 + max((int(match[1]) for match in found if match), default=-1)


def _ranges(group: str, tensors: Sequence[Tensor], count: int, ranges: int) -> dict[str, list[Tensor]]:
    """The tensors of a class by range of layers; those of no layer under the name of the class."""
    if ranges < 1:
        raise UsageError("--ranges is 1 or more")
    ranges = min(ranges, max(1, count))
    first = [-(-i * count // ranges) for i in range(ranges + 1)]
    found: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        match = _LAYER.match(tensor.name)
        name = group
        if match:
            part = int(match[1]) * ranges // count
            last = first[part + 1] - 1
            name = f"{group} {first[part]}" + (f"-{last}" if last > first[part] else "")
        found.setdefault(name, []).append(tensor)
    return found


def _options(tensors: Sequence[Tensor], types: Iterable[str]) -> list[Option]:
    """Each type that makes the tensors smaller, or leaves them as they are, the smallest first; as they are
    when there is none."""
    found: dict[tuple[str, ...], Option] = {}
    as_is = _option(tensors[0].type, tensors, {tensor.name: tensor.type for tensor in tensors})
    for kind in types:
        option = _option(kind, tensors, {tensor.name: fallback(kind, tensor.shape[0]) for tensor in tensors})
        if option.exact or sum(option.sizes) < sum(as_is.sizes):
            found.setdefault(tuple(option.types.values()), option)
    return sorted(found.values(), key=lambda option: sum(option.sizes)) or [as_is]


def _option(kind: str, tensors: Sequence[Tensor], types: Mapping[str, str]) -> Option:
    sizes = tuple(tensor.bytes_as(types[tensor.name]) for tensor in tensors)
    return Option(kind, types, sizes, all(types[tensor.name] == tensor.type for tensor in tensors))


def as_recipe(
    name: str, description: str, model: Inventory, types: Mapping[str, str], *, imatrix: bool
) -> Recipe:
    """A recipe that gives every quantized tensor its type: each class the one that most of its weights have,
    tensors with another one, or of no class, their own rules."""
    by_class: dict[str, str] = {}
    by_name: dict[str, str] = {}
    for group, tensors in classes(model).items():
        if group == tensors[0].name:  # in no class
            by_name[group] = types[group]
            continue
        weights: Counter[str] = Counter()
        for tensor in tensors:
            weights[types[tensor.name]] += tensor.values
        by_class[group] = max(weights, key=lambda kind: (weights[kind], is_float(kind), kind))
        by_name |= {
            tensor.name: types[tensor.name] for tensor in tensors if types[tensor.name] != by_class[group]
        }
    return Recipe(name, description, by_class, {}, by_name, imatrix)
