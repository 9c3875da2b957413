"""Which types the cache of a model can be kept in: what ``memory``, ``advise``, ``fallback``, ``card`` and
``doctor`` say from its header, against llama.cpp itself and what ``run`` makes of its refusal."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import head_models
import pytest
from kv_drivers import ONE_THREAD

from ggufrq.base import proc
from ggufrq.base.errors import ModelError
from ggufrq.build import doctor
from ggufrq.build.project import Build
from ggufrq.cache.kv import kv_type, parse_plan
from ggufrq.card.facts import Facts
from ggufrq.drive.remedies import remedy
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.heads import Heads
from ggufrq.ggufs.memory_shape import memory_shape
from ggufrq.memory.cells import ContextSettings
from ggufrq.memory.estimate import Memory
from ggufrq.runtimes.fallback import fits
from ggufrq.tools.logs import error_lines

pytestmark = [pytest.mark.build, pytest.mark.models]

#: Heads by models of ours, and of upstream's those whose attention is of another kind.
OURS: dict[str, Callable[[Path], Path]] = {
    **{str(n): partial(head_models.ordinary, size=n) for n in (16, 32, 40, 80, 96, 128)},
    "192/128": lambda path: head_models.expanded(path, 128, 64, 128),
    "96/64": lambda path: head_models.expanded(path, 64, 32, 64),
    "64/80": lambda path: head_models.expanded(path, 32, 32, 80),
    "MLA 576/512": head_models.latent,
    "MLA 608/512": lambda path: head_models.latent(path, 512, 96),
}
UPSTREAM = (
    "deepseek32-moe", "deepseek4-moe", "gemma2-dense", "glm5-next-moe", "gpt-oss-moe", "grok-moe",
    "kimi-linear-moe", "laguna-moe", "minimax-m3-moe", "qwen4exp-moe",
)  # fmt: skip
PLANS = ("q8_0", "iso2", "iso3", "iso4", "iso3/f16", "f16/iso4", "f16; 0:iso3")


def refused(build: Build, model: Path, kv: str) -> str | None:
    """Why llama.cpp does not make a context with such a cache, by its log."""
    command = [build.tool("llama-fit-params"), "-m", model, "-c", "512", *parse_plan(kv).arguments()]
    log = proc.run([*command, "-lv", "4"], env=ONE_THREAD, check=False, timeout=60).stderr
    return error_lines(log)[0] if "failed to create llama_context" in log else None


def told(build: Build, model: Path, kv: str) -> str | None:
    """Why not, by every command that says so; they must agree."""
    header, plan = read_header(model), parse_plan(kv)
    why = Heads.of_metadata(header.values).why_not(plan)
    assert fits(header.values, kv) is (why is None), "fallback, and run's word of warning"
    checked = doctor.of_model(model.name, header.values, gpu=False)
    if kv == "iso3":
        assert (checked.state == "ok") is (why is None) and (why is None or checked.found == why)
    if "/" not in kv and ";" not in kv:
        assert (kv in checked.found.split("can be in ")[-1].split(", ")) is (
            why is None
        ) or checked.state != "ok"
        card = SimpleNamespace(values=header.values)
        assert Facts.takes(card, kv_type(kv)) is (why is None)
        assert Facts.why_not(card, kv_type(kv)) == why
    try:
        shape = memory_shape([header])
    except ModelError as error:  # deepseek4, glm5-next: what is kept is not computed, but what works is said
        assert "--kv q8_0" in str(error.remedy)
        return why
    estimate = Memory(shape, 0).estimate(plan, ContextSettings(512))  # advise, too, asks it
    assert estimate.why_not == why
    return why


def test_all_commands_agree_with_llama_cpp(
    llama_build: Build, tiny_models: dict[str, Path], tmp_path: Path
) -> None:
    models = {name: make(tmp_path / f"{i}.gguf") for i, (name, make) in enumerate(OURS.items())}
    models |= {name: tiny_models[name] for name in UPSTREAM}
    wrong, suggested = [], set()
    for name, model in models.items():
        for kv in PLANS:
            by_llama_cpp, by_us = refused(llama_build, model, kv), told(llama_build, model, kv)
            if (by_llama_cpp is None) != (by_us is None):
                wrong.append((name, kv, by_llama_cpp, by_us))
            words = [] if by_us is None else re.findall(r"; (.*) can be used", by_us)
            suggested |= {(name, kind) for said in words for kind in said.split(" or ")}
            advice = "" if by_llama_cpp is None else remedy(by_llama_cpp, Path("log"))
            suggested |= {(name, kind) for kind in re.findall(r"--kv ([\w/]+)", advice)}
            assert by_llama_cpp is None or "--kv" in advice, (name, kv, by_llama_cpp)
    assert not wrong
    assert len(suggested) > 20
    assert not [(name, kv) for name, kv in suggested if refused(llama_build, models[name], kv) is not None]
