"""The head of a card for the Hub, and what of an earlier card is kept: keys that were added to its head, and
the text between two marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ggufrq.base.errors import UsageError

BEGIN = "<!-- own text: what stands from here to the end mark is kept when ggufrq writes this card anew -->"
END = "<!-- end of own text -->"
_BEGIN, _END = (
    re.compile(r"^<!-- own text\b.*-->$", re.MULTILINE),
    re.compile(r"^<!-- end of own text -->$", re.MULTILINE),
)
_HEAD = re.compile(r"\A---\r?\n(.*?)\r?\n---\r?\n", re.DOTALL)


@dataclass(frozen=True)
class Earlier:
    """What is kept of an earlier card: its head and the user's own text."""

    head: dict[str, Any] = field(default_factory=dict)
    own: str = ""


def earlier(text: str, *, force: bool = False) -> Earlier:
    """What to keep of a card. Raises UsageError for one that ggufrq did not write (unless ``force``), with
    marks that do not match, or with a damaged head."""
    import yaml  # type: ignore[import-untyped]

    found = _HEAD.match(text)
    try:
        head = yaml.safe_load(found[1]) if found else {}
    except yaml.YAMLError as error:
        raise UsageError(f"the head of README.md is no YAML: {error}", remedy="mend or remove it") from None
    begins, ends = list(_BEGIN.finditer(text)), list(_END.finditer(text))
    if not begins and not ends and not force:
        raise UsageError(
            "README.md was not written by ggufrq, and would be lost",
            remedy=f"put what is to be kept between '{BEGIN}' and '{END}', or --force",
        )
    own = ""
    if begins or ends:
        if len(begins) != 1 or len(ends) != 1 or begins[0].end() > ends[0].start():
            raise UsageError(
                "the marks of own text in README.md do not match: one begin and one end are needed",
                remedy=f"'{BEGIN}', then '{END}'",
            )
        own = text[begins[0].end() : ends[0].start()].strip("\n")
    return Earlier(head if isinstance(head, dict) else {}, own)


class Known(Protocol):
    """What a head is made from: values by the names that metadata of GGUF files have, and the source."""

    @property
    def values(self) -> Mapping[str, Any]:
        """By name."""

    @property
    def source(self) -> Mapping[str, Any]:
        """``repo`` where it is from the Hub."""


def metadata(
    facts: Known,
    *,
    base_model: str | None = None,
    license: str | None = None,
    quantized_by: str | None = None,
    before: Mapping[str, Any] | None = None,
    library: str = "gguf",
    tags: Sequence[str] = ("gguf", "llama.cpp", "quantized", "kv-cache"),
) -> dict[str, Any]:
    """The head as the Hub knows its keys: what is given, else what the files say, else what stood there
    ``before``. Keys that are not ours stay as they are."""
    values = facts.values
    # Not what the metadata call base_model: that is what the source itself was trained from.
    base = base_model or facts.source.get("repo") or values.get("ggufrq.source.repo")
    tags = [*tags, *(str(tag) for tag in values.get("general.tags") or ())]
    languages = [str(tag) for tag in values.get("general.languages") or ()]
    ours: dict[str, Any] = {
        "base_model": base,
        "base_model_relation": "quantized" if base else None,
        "quantized_by": quantized_by,
        "license": license or values.get("general.license"),
        "license_name": values.get("general.license.name"),
        "license_link": values.get("general.license.link"),
        "language": languages or None,
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": list(dict.fromkeys(tags)),
    }
    known = {key: value for key, value in ours.items() if value is not None}
    if "base_model" not in known and "base_model" in (before or {}):
        known["base_model_relation"] = "quantized"
    kept = {key: value for key, value in (before or {}).items() if key not in known}
    return {**known, **kept}


def render(data: Mapping[str, Any]) -> str:
    """The head as it stands in a card."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**data).to_yaml()}\n---"


def own_text(own: str) -> str:
    """The user's text between its marks."""
    return f"{BEGIN}\n\n{own}\n\n{END}" if own.strip() else f"{BEGIN}\n\n{END}"
