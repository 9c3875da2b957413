"""The fake Hub, and ggufrq run against it in a process of its own: the address is read on import."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

from loopback import PROXY_VARIABLES

_FILE = Path(__file__).resolve().parent.parent / "unit" / "fake_hub.py"
TOKEN = "hf_abcdefghijklmnopqrstuv"


def fake() -> ModuleType:
    """The module ``fake_hub``."""
    if "fake_hub" not in sys.modules:
        spec = importlib.util.spec_from_file_location("fake_hub", _FILE)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["fake_hub"] = module
        spec.loader.exec_module(module)
    return sys.modules["fake_hub"]


def environment(url: str, home: Path, token: str | None = TOKEN) -> dict[str, str]:
    """Variables of a process that talks to the fake Hub at ``url`` and keeps its things in ``home``."""
    found = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    found |= dict.fromkeys(PROXY_VARIABLES, "")  # which a client of the Hub asks with good reason
    found |= {
        "HF_ENDPOINT": url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "PYTHONPATH": os.pathsep.join([str(_FILE.parent.parent.parent), *sys.path]),
    }
    return {**found, "HF_TOKEN": token} if token is not None else found
