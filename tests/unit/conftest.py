"""Unit tests never see the user's cache, and any proxy leads nowhere."""

from __future__ import annotations

from pathlib import Path

import loopback
import pytest


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path / "cache"))
    loopback.proxies_lead_nowhere(monkeypatch)
