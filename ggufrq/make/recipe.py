"""Recipes: which type each class of tensors gets, as TOML data, and what that means for a model's tensors.

    name = "mine"
    imatrix = true     # its types are made with an importance matrix even if none needs one; may be left out
    [classes]          # class -> type; each must match a tensor
    token_embd = "q8_0"
    [where-present]    # class -> type; for classes that not every architecture has
    ffn_up = "q5_K"
    [tensors]          # name or pattern with * -> type; goes before the classes, each must match a tensor
    "blk.0.*.weight" = "q8_0"

Classes are defined in ``tensor-classes.toml``. A plan is complete: each tensor that is quantized gets exactly
one rule. Without ``output.weight`` the embedding computes the output and follows the rule for ``output``.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from ggufrq.base import paths, texts
from ggufrq.base.errors import UsageError
from ggufrq.base.toml import tomllib
from ggufrq.ggufs import tensors
from ggufrq.ggufs.tensors import Inventory, Tensor

_SECTIONS = ("classes", "where-present", "tensors")
_KEYS = {"name", "description", "imatrix", *_SECTIONS}
_NAME = re.compile(r"^[a-z0-9.-]+$")
_TENSOR = re.compile(r"^(?:blk\.\d+\.)?(.+)\.weight$")


@dataclass(frozen=True)
class Recipe:
    """``classes`` (each must match), ``where_present`` (may match nothing) and ``tensors`` (names or
    patterns, which go first) map to types, names of ggml in lower case. ``imatrix`` asks for an importance
    matrix even where no type needs it."""

    name: str
    description: str = ""
    classes: Mapping[str, str] = field(default_factory=dict)
    where_present: Mapping[str, str] = field(default_factory=dict)
    tensors: Mapping[str, str] = field(default_factory=dict)
    imatrix: bool = False

    def wanted(self, model: Inventory) -> dict[str, str]:
        """Type that the rules ask for, by name, for each tensor that is quantized.

        Raises UsageError when a tensor has no rule or two, and when a rule that must match matches nothing.
        """
        used: set[str] = set()
        found: dict[str, str] = {}
        tied = all(tensor.name != "output.weight" for tensor in model)
        for tensor in model.quantizable:
            patterns = [pattern for pattern in self.tensors if fnmatch.fnmatchcase(tensor.name, pattern)]
            if tensor.name in patterns:
                patterns = [tensor.name]
            if len(patterns) > 1:
                raise UsageError(
                    f"recipe {self.name}: two rules for {tensor.name}: '{patterns[0]}', '{patterns[1]}'"
                )
            if patterns:
                used.add(patterns[0])
                found[tensor.name] = self.tensors[patterns[0]]
                continue
            group = self._class_of(tensor, model.architecture)
            used.add(group)
            rules = {**self.where_present, **self.classes}
            # A model without output.weight computes its output by the embedding.
            found[tensor.name] = rules.get(
                "output" if tied and group == "token_embd" else group, rules[group]
            )
        # what is quantized already stays as it is, and the rules for it are no mistake
        used |= {class_of(t.name, model.architecture) or "" for t in model if t.is_kept_code}
        unused = [rule for rule in (*self.classes, *self.tensors) if rule not in used]
        if unused:
            raise UsageError(
                f"recipe {self.name}: the rule '{unused[0]}' matches no tensor of this model "
                f"({model.architecture})",
                remedy="put classes that only some architectures have into [where-present]",
            )
        return found

    def plan(self, model: Inventory) -> dict[str, str]:
        """Type of every tensor of the model by name: those that are not quantized keep theirs, and rows that
        the type asked for cannot hold get the one that llama.cpp falls back to. Raises as ``wanted``."""
        wanted = self.wanted(model)
        return {
            tensor.name: tensors.fallback(wanted[tensor.name], tensor.shape[0])
            if tensor.name in wanted
            else tensor.type
            for tensor in model
        }

    def _class_of(self, tensor: Tensor, architecture: str) -> str:
        group = class_of(tensor.name, architecture)
        if group is None:
            raise UsageError(
                f"recipe {self.name}: {tensor.name} belongs to no class of tensors that ggufrq knows for "
                f"{architecture}",
                remedy=f'add a rule to the recipe: [tensors] "{re.sub("[0-9]+", "*", tensor.name)}" = "q8_0"',
            )
        if group not in self.classes and group not in self.where_present:
            raise UsageError(
                f"recipe {self.name} has no rule for {tensor.name} (class {group})",
                remedy=f'add {group} = "q8_0" to [where-present] of the recipe',
            )
        return group


def shipped() -> dict[str, Path]:
    """Recipes that come with ggufrq: name -> file."""
    return {path.stem: path for path in sorted(paths.data_dir("recipes").glob("*.toml"))}


def load(name: str | Path) -> Recipe:
    """The recipe with this name, or in this file. Raises UsageError when there is none or it is wrong."""
    path = shipped().get(str(name), Path(name))
    if not path.is_file():
        what = "file" if path.suffix == ".toml" else "recipe"
        raise UsageError(
            f"there is no {what} '{name}'",
            remedy=f"one of {', '.join(shipped())}, or a .toml file as `ggufrq sensitivity` writes it",
        )
    try:
        data = tomllib.loads(texts.read(path))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{path} is no valid TOML: {error}") from None
    return parse(data, path.stem, str(path))


def parse(data: dict[str, Any], name: str, where: str = "the recipe") -> Recipe:
    """A recipe from its data; ``name`` where the data give none. Raises UsageError that names the mistake."""
    unknown = [key for key in data if key not in _KEYS]
    if unknown:
        raise UsageError(f"{where}: a recipe has {', '.join(_SECTIONS)}, but no '{unknown[0]}'")
    name = str(data.get("name", name)).lower()
    if not _NAME.match(name):
        raise UsageError(f"{where}: the name '{name}' has more than letters, digits, dots and dashes")
    if not name[0].isalpha():
        raise UsageError(
            f"{where}: the name '{name}' does not begin with a letter; llama.cpp's -hf would take its file "
            "for the plain one",
            remedy=f'name = "r{name}" in the recipe',
        )
    sections: dict[str, dict[str, str]] = {}
    for section in _SECTIONS:
        rules = data.get(section, {})
        if not isinstance(rules, dict):
            raise UsageError(f"{where}: [{section}] must be a table of types")
        sections[section] = {str(rule): tensors.check_type(str(kind)) for rule, kind in rules.items()}
    twice = sections["classes"].keys() & sections["where-present"].keys()
    if twice:
        raise UsageError(f"{where}: '{min(twice)}' has two rules")
    wrong = [group for part in _SECTIONS[:2] for group in sections[part] if group not in known_classes()]
    if wrong:
        raise UsageError(
            f"{where}: there is no class '{wrong[0]}'; there are {', '.join(known_classes())}",
            remedy="single tensors go into [tensors]",
        )
    if not any(sections.values()):
        raise UsageError(f"{where} has no rules")
    imatrix = data.get("imatrix", False)
    if not isinstance(imatrix, bool):
        raise UsageError(f"{where}: imatrix is true or false, not {imatrix!r}")
    classes, where_present, named = (sections[section] for section in _SECTIONS)
    return Recipe(name, str(data.get("description", "")), classes, where_present, named, imatrix)


def dump(recipe: Recipe) -> str:
    """The recipe as TOML text that ``load`` reads."""
    lines = [f"name = {json.dumps(recipe.name)}", f"description = {json.dumps(recipe.description)}"]
    if recipe.imatrix:
        lines.append("imatrix = true")
    for section, rules in zip(_SECTIONS, (recipe.classes, recipe.where_present, recipe.tensors), strict=True):
        if rules:
            lines += [
                "",
                f"[{section}]",
                *(f"{json.dumps(rule)} = {json.dumps(t)}" for rule, t in rules.items()),
            ]
    return "\n".join(lines) + "\n"


@cache
def _class_tables() -> tuple[dict[str, str], dict[str, dict[str, str]]]:
    """Class by short name: for all architectures, and for those that differ."""
    data = tomllib.loads(Path(__file__).with_name("tensor-classes.toml").read_text(encoding="utf-8"))
    common = _inverted(data.pop("classes"))
    special = {
        architecture: _inverted(section["classes"])
        for section in data.values()
        for architecture in section["architectures"]
    }
    return common, special


def _inverted(classes: dict[str, list[str]]) -> dict[str, str]:
    return {name: group for group, names in classes.items() for name in names}


def known_classes() -> list[str]:
    """Names of all classes."""
    common, special = _class_tables()
    return list(dict.fromkeys(group for table in (common, *special.values()) for group in table.values()))


def class_of(name: str, architecture: str) -> str | None:
    """The class of a tensor of this architecture, None when it is in none."""
    found = _TENSOR.match(name)
    if found is None:
        return None
    common, special = _class_tables()
    return special.get(architecture, {}).get(found[1]) or common.get(found[1])


def classes(model: Inventory) -> dict[str, list[Tensor]]:
    """The tensors that are quantized, by class, in the order of the model. Those in no class are under their
    own names."""
    found: dict[str, list[Tensor]] = {}
    for tensor in model.quantizable:
        found.setdefault(class_of(tensor.name, model.architecture) or tensor.name, []).append(tensor)
    return found
