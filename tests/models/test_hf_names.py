"""What llama.cpp's ``-hf`` fetches of a family from a Hub on the loopback interface: the names decide."""

from __future__ import annotations

import subprocess
from pathlib import Path
from types import ModuleType

import hubs
import pytest

from ggufrq.build.project import Build
from ggufrq.models import tags

REPO = "somebody/X-GGUF"
#: A family as ``quantize`` names it, and names that shadow others.
NAMES = [
    *("X-BF16.gguf", "X-Q4_K_M.gguf", "X-Q5_K_M.gguf", "X-Q8_0-00001-of-00002.gguf", "X-kv.gguf"),
    *("X-Q8_0-00002-of-00002.gguf", "X-awq-Q4_K_M.gguf", "X-proposal-c-Q5_K_M.gguf", "X-imatrix.gguf"),
    *("mmproj-X-F16.gguf", "mtp-X-BF16.gguf", "mtp-X-Q8_0.gguf"),
]
ODD = ["X-mine-Q5_K_M.gguf", "X-kv.gguf", "X-4bit-Q5_K_M.gguf", "X-Q5_K_M.gguf", "X-F16.gguf", "X-BF16.gguf"]


@pytest.mark.parametrize(
    ("names", "tag", "head"),
    [
        *[(NAMES, tag, False) for tag in (None, "q5_k_m", "Q8_0", "awq-Q4_K_M", "proposal-c")],
        *[(NAMES, tag, True) for tag in ("Q4_K_M", "Q8_0", "BF16")],
        *[(ODD, tag, False) for tag in ("Q5_K_M", "F16")],
        (["X-mine-Q6_K.gguf", "X-kv.gguf"], None, False),
    ],
)
def test_what_is_fetched_for_a_tag(
    llama_build: Build,
    fake_hub: ModuleType,
    tmp_path: Path,
    names: list[str],
    tag: str | None,
    head: bool,
) -> None:
    """Just what ``ggufrq.models.tags`` foretells; the files are none, so that llama.cpp gives up then."""
    model = tags.taken(names, tag)
    assert model is not None
    shards = [name for name in names if name.startswith(model.partition("-00001-of-")[0] + "-0")]
    expected = {model, *shards}
    if "mmproj-X-F16.gguf" in names:
        expected |= {tags.companion(names, model, "mmproj", tag)}
    if head:
        expected |= {tags.companion(names, model, "mtp-", tag)}
    with fake_hub.fake_hub({REPO: {name: name.encode() for name in names}}) as hub:
        subprocess.run(
            [
                llama_build.tool("llama-server"),
                *("-hf", REPO + (f":{tag}" if tag else ""), "--port", "0"),
                *(("--spec-type", "draft-mtp") if head else ()),
            ],
            env=hubs.environment(hub.url, tmp_path, token=None),
            capture_output=True,
            timeout=60,
            check=False,
        )
        assert {name.rpartition("/")[2] for name in hub.fetched} == expected
