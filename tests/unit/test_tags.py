"""Which file llama.cpp's ``-hf`` takes for a tag; ``models/test_hf_names.py`` asks llama.cpp itself."""

from __future__ import annotations

import pytest

from ggufrq.models import hub, tags

FAMILY = [
    *("X-BF16.gguf", "X-IQ4_XS.gguf", "X-Q4_K_M.gguf", "X-Q5_K_M.gguf", "X-Q8_0-00001-of-00002.gguf"),
    *("X-Q8_0-00002-of-00002.gguf", "X-awq-Q4_K_M.gguf", "X-awq-Q5_K_M.gguf", "X-proposal-c-Q5_K_M.gguf"),
    *("X-kv.gguf", "X-awq-kv.gguf", "X-imatrix.gguf", "mmproj-X-F16.gguf", "mtp-X-BF16.gguf", "README.md"),
]


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        (None, "X-Q4_K_M.gguf"),
        ("Q5_K_M", "X-Q5_K_M.gguf"),
        ("q4_k_m", "X-Q4_K_M.gguf"),
        ("Q8_0", "X-Q8_0-00001-of-00002.gguf"),
        ("BF16", "X-BF16.gguf"),
        ("awq-Q5_K_M", "X-awq-Q5_K_M.gguf"),
        ("proposal-c", "X-proposal-c-Q5_K_M.gguf"),
        ("proposal-c-Q5_K_M", "X-proposal-c-Q5_K_M.gguf"),
    ],
)
def test_a_tag_means_one_file_for_both(tag: str | None, name: str) -> None:
    assert tags.taken(FAMILY, tag) == name
    assert hub.choose_gguf("me/X-GGUF", FAMILY, tag)[0] == name


@pytest.mark.parametrize(
    ("what", "tag", "name"),
    [
        ("mtp-", "Q4_K_M", "mtp-X-Q4_K_M.gguf"),
        ("mtp-", "Q5_K_M", "mtp-X-Q4_K_M.gguf"),
        ("mtp-", "BF16", "mtp-X-BF16.gguf"),
        ("mmproj", None, "mmproj-X-F16.gguf"),
        ("eagle3-", None, None),
    ],
)
def test_the_companion_of_a_model(what: str, tag: str | None, name: str | None) -> None:
    files = [*FAMILY, "mtp-X-Q4_K_M.gguf"]
    assert tags.companion(files, tags.taken(files, tag) or "", what, tag) == name


def test_a_family_has_no_shadows() -> None:
    assert tags.shadowed(FAMILY, "X") == []


@pytest.mark.parametrize(
    ("base", "names", "said"),
    [
        # a model's own name has a type in it
        (
            "g-qat-q4_0-it",
            ["BF16", "Q4_0"],
            ["takes g-qat-q4_0-it-BF16.gguf for :Q4_0, and not g-qat-q4_0-it-Q4_0.gguf"],
        ),
        ("X", ["BF16", "F16"], ["takes X-BF16.gguf for :F16, and not X-F16.gguf"]),
        ("X-mtp-2", ["Q4_K_M"], ["takes no file for :Q4_K_M, and not X-mtp-2-Q4_K_M.gguf"]),
        ("X", ["mine-Q5_K_M", "kv"], ["without a tag takes X-kv.gguf, which is no model: name a tag"]),
        ("X", ["mine-Q5_K_M", "Q6_K", "kv"], []),
        ("eagle3-X", ["BF16", "Q8_0"], []),  # drafts are not taken by tags
    ],
)
def test_names_that_shadow_others(base: str, names: list[str], said: list[str]) -> None:
    files = [f"{base}-{name}.gguf" for name in names]
    assert tags.shadowed(files, base) == [f"llama.cpp's -hf {line}" for line in said]
