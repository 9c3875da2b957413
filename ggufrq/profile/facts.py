"""What depends on the architecture, as data from ``architectures.toml``, and a model's metadata by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ModelError
from ggufrq.base.toml import tomllib
from ggufrq.profile.rope import Pairing


@dataclass(frozen=True)
class Facts:
    """Metadata of a model, and what its architecture adds to it."""

    values: Mapping[str, Any]

    @property
    def architecture(self) -> str:
        """The architecture's name, as in the metadata."""
        return str(self.values.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """An entry of the architecture's own."""
        return self.values.get(f"{self.architecture}.{key}", default)

    def number(self, key: str, default: float) -> float:
        """A number of the architecture's own; the first one of a list."""
        value = self.get(key, default)
        return float(value[0] if isinstance(value, tuple) else value)

    def rule(self, table: str) -> dict[str, Any]:
        """What ``table`` of the data says about the architecture, nothing when it is not in there."""
        found: dict[str, Any] = _tables()[table].get(self.architecture, {})
        return found

    def listed(self, table: str) -> bool:
        """Whether ``table`` of the data names the architecture."""
        return self.architecture in _tables()[table]["names"]

    @property
    def pairing(self) -> Pairing | None:
        """Which channels RoPE turns together, None when the architecture has no RoPE.

        Raises ModelError for an architecture that is in no list: taken the wrong way a profile would do harm.
        """
        rope = _tables()["rope"]
        sections = self.get("rope.dimension_sections", ())
        if self.architecture in rope["sections"] and sum(section > 0 for section in sections) > 1:
            return "neox"
        kinds: tuple[Pairing, ...] = ("norm", "neox")
        for kind in kinds:
            if self.architecture in rope[kind]:
                return kind
        if self.architecture in rope["none"]:
            return None
        raise ModelError(
            f"it is not known which channels RoPE turns together in {self.architecture or 'this file'}, "
            "so no profile can be made from its weights",
            remedy="run it without a profile: --kv-profile none",
        )

    def mean_is_exact(self, names: Iterable[str]) -> bool:
        """Whether a constant in K changes nothing in a model with these tensors: not with sinks and not where
        scores are capped."""
        capped = self.get("attn_logit_softcapping") or self.listed("capped")
        return not capped and not has_sinks(names)


def has_sinks(names: Iterable[str]) -> bool:
    """Whether a model with these tensors has attention sinks."""
    return any(".attn_sinks" in name for name in names)


@cache
def _tables() -> dict[str, Any]:
    text = Path(__file__).with_name("architectures.toml").read_text(encoding="utf-8")
    found: dict[str, Any] = tomllib.loads(text)
    return found
