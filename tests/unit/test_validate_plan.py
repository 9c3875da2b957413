from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ggufrq.base.errors import UsageError
from ggufrq.measure.validate.plan import QUICK, SECTIONS, USUAL, make_plan, within


def test_usual() -> None:
    plan = make_plan("m")
    assert [case.name for case in plan.cases] == ["f16", "q8_0", "q4_0", "iso4", "iso3"]
    assert plan.base.name == "f16"
    assert plan.sections == SECTIONS
    assert plan.settings == USUAL
    assert plan.settings.ctx == (8192,)
    assert plan.text.name == "heldout.txt"


def test_base_is_measured_once_and_first() -> None:
    plan = make_plan("m", kv="iso3,q8_0,iso3", against="q8_0")
    assert [case.name for case in plan.cases] == ["q8_0", "iso3"]


def test_options() -> None:
    plan = make_plan(
        "m", kv="iso3:block", ctx=[512, 1024, 512], chunks=3, sections=["speed", "check"], seed=7, threads=2,
        quick=True, depths=[0, 16384, 0],
    )  # fmt: skip
    assert plan.sections == ("check", "speed")
    assert plan.settings.ctx == plan.settings.needle_ctx == (512, 1024)
    assert plan.settings.retrieval_ctx == 1024
    assert plan.settings.speed_depths == (0, 16384)
    assert (plan.settings.chunks, plan.settings.seed, plan.settings.threads) == (3, 7, 2)
    assert plan.settings.greedy_tokens == QUICK.greedy_tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sections": ["quality", "looks"]}, "no section 'looks'"),
        ({"kv": "iso3:sideways"}, "'sideways' is no rotation mode"),
        ({"kv": "iso3:full/sideways"}, "no rotation mode"),
        ({"against": "iso9"}, "no cache type 'iso9'"),
        ({"ctx": [100]}, "too short to score"),
    ],
)
def test_nonsense(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message) as error:
        make_plan("m", **options)
    assert error.value.remedy


def test_no_longer_than_the_model() -> None:
    plan = within(make_plan("m"), 2048)
    settings = plan.settings
    assert settings.ctx == (2048,)
    assert settings.needle_ctx == (1024, 2048)
    assert max(settings.speed_depths) + settings.speed_prompt <= 2048
    assert settings.server_ctx == 2048
    assert within(make_plan("m"), None).settings == USUAL
    assert within(make_plan("m", ctx=[1024]), 1024).settings.ctx == (1024,)


def test_a_context_that_was_asked_for_is_not_cut() -> None:
    with pytest.raises(UsageError, match="contexts of 2048 tokens, not of 4096") as error:
        within(make_plan("m", ctx=[512, 4096]), 2048)
    assert error.value.remedy == "--ctx 2048"


def test_context_of_the_server_holds_everything() -> None:
    settings = make_plan("m", quick=True, text=Path(__file__)).settings
    assert settings.server_ctx % 256 == 0
    assert settings.server_ctx >= max(*settings.needle_ctx, settings.retrieval_ctx)
    assert settings.server_ctx >= settings.greedy_prompt_tokens + settings.greedy_tokens
