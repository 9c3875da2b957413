"""The embedded models, quantized once per session by the real build."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import hubs
import loopback
import pytest
from families import family_of

from ggufrq.build.project import Build
from ggufrq.cli import COMMANDS
from ggufrq.make.plan import Family
from ggufrq.tools.programs import Programs

MODELS = ("docs-qwen3-8m", "docs-qwen3.5-8m")
TYPES = ("IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.models)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, llama_build: Build) -> Iterator[None]:
    """Nothing but the build comes from the user's cache: its lookup is done, then the cache moves. There are
    proxies, in which requests to our own servers would be lost."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUFRQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        loopback.proxies_lead_nowhere(patch)
        commands = [target.partition(":")[0] for target in COMMANDS.values()]
        for name in ("ggufrq.build.builds", "ggufrq.make.ready", *commands):
            module = importlib.import_module(name)
            for function in ("require_build", "usable_build", "find_build", "ensure_build"):
                if hasattr(module, function):
                    patch.setattr(module, function, lambda *_, **__: llama_build)
        yield


@pytest.fixture(scope="session")
def families(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Family]:
    folder = tmp_path_factory.mktemp("families")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUFRQ_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        return {name: family_of(name, TYPES, llama_build, out=folder / name) for name in MODELS}


@pytest.fixture(scope="session")
def programs(llama_build: Build) -> Programs:
    return Programs.of_build(llama_build)


@pytest.fixture(scope="session")
def fake_hub() -> ModuleType:
    return hubs.fake()


@pytest.fixture(scope="session")
def command_line() -> Callable[..., list[str]]:
    """A command line that runs ggufrq with the build of this session, whatever the cache holds."""

    def make(build: Build, *arguments: str) -> list[str]:
        program = (
            "import pathlib, ggufrq.build.builds as b\n"
            f"folders = map(pathlib.Path, {[str(build.root), str(build.bin), str(build.source)]!r})\n"
            f"build = b.Build({build.key!r}, *folders, {{}})\n"
            "b.require_build = b.usable_build = b.find_build = b.ensure_build = lambda *_, **__: build\n"
            "from ggufrq.cli import main\n"
            "main()\n"
        )
        return [sys.executable, "-c", program, *arguments]

    return make
