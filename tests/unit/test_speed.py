"""Speed against the base: turns, ratios, verdicts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from heard import Heard

from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, parse_cases
from ggufrq.drive.cache_check import CacheError
from ggufrq.measure.validate import speed
from ggufrq.measure.validate.speed import FASTER, SLOWER, SpeedSettings, judge, measure_speed, speed_steps
from ggufrq.measure.verdict import NONE
from ggufrq.tools import bench

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"
SETTINGS = SpeedSettings(depths=(0, 1024), prompt=64, generate=8, rounds=4, threads=1)
BUILD = Build("key", Path("root"), Path("bin"), Path("src"), {})


def saved(name: str) -> str:
    return (LOGS / f"{name}.txt").read_text(encoding="utf-8")


def test_bench_at_several_depths() -> None:
    found = bench.parse_depths(saved("bench-depths.out"), "")
    assert list(found) == [0, 1024, 4096]
    assert found[1024].type_k == found[1024].type_v == "iso3"
    assert (found[0].prefill, found[0].prefill_best) == (1590.711282, 1954.7)
    assert found[4096].decode_best == 74.6646  # other work slowed the first repetition down to 3.6


def test_bench_arguments(tmp_path: Path) -> None:
    case = parse_cases("iso3/planar4")[0]
    args = bench.arguments(tmp_path, case.pair, depth=(0, 512), repetitions=1)
    assert args[args.index("-d") + 1] == "0,512" and "-v" not in args
    assert bench.arguments(tmp_path, case.pair, verbose=True)[-1] == "-v"


def test_bench_that_measured_one_half_at_a_depth() -> None:
    import json

    records = json.loads(saved("bench-depths.out"))
    with pytest.raises(ToolError, match="1 results instead of"):
        bench.parse_depths(json.dumps(records[:-1]), "")


@pytest.mark.parametrize(
    ("ratios", "verdict"),
    [
        ([1.31, 1.28, 1.33, 1.30, 1.29], FASTER),
        ([0.81, 0.83, 0.80, 0.84, 0.82], SLOWER),
        ([1.02, 0.97, 1.01, 1.00, 0.99], NONE),
        (
            [1.30, 1.28, 1.33, 1.30, 0.30],
            NONE,
        ),  # one disturbed round makes the error large, not the verdict wrong
        ([2.0], None),
    ],
)
def test_verdict_only_where_the_spread_allows_one(ratios: list[float], verdict: str | None) -> None:
    assert judge(ratios)[2] == verdict


def test_one_disturbed_round_hardly_moves_the_ratio() -> None:
    assert judge([1.30, 1.28, 1.33, 1.30, 0.30])[0] == 1.30


class Machine:
    """Stands for llama-bench: how fast each case is, and how fast the machine at each call."""

    def __init__(self, speeds: dict[str, float], drift: float = 1.0) -> None:
        self.speeds, self.drift, self.calls = speeds, drift, list[str]()
        self.now = 1.0

    def run(
        self, build: Build, tool: str, args: list[str], parse: Any, **_: Any
    ) -> tuple[dict[int, bench.Speed], float]:
        kind = args[args.index("-ctk") + 1]
        self.calls.append(kind)
        self.now *= self.drift
        like = bench.parse(saved("bench.out"), "")
        tokens = self.speeds[kind] * self.now
        depths = [int(depth) for depth in args[args.index("-d") + 1].split(",")]
        return {d: replace(like, depth=d, prefill_best=tokens, decode_best=2 * tokens) for d in depths}, 0.1


def measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, machine: Machine, kv: str
) -> tuple[dict[str, Any], list[str]]:
    monkeypatch.setattr(speed, "run_tool", machine.run)
    monkeypatch.setattr(speed, "check_cache", lambda *_: None)
    heard = Heard()
    cases = parse_cases(kv)
    found = measure_speed(Path("m.gguf"), cases, BUILD, SETTINGS, log=tmp_path / "log", listener=heard)
    assert len(heard.steps) == heard.done == speed_steps(cases, SETTINGS)
    return found, heard.steps


def test_cases_take_turns_in_alternating_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = Machine({"f16": 100.0, "iso3": 150.0, "q4_0": 50.0})
    found, _ = measured(monkeypatch, tmp_path, machine, "f16,iso3,q4_0")
    assert machine.calls == ["f16", "iso3", "q4_0", "q4_0", "iso3", "f16"] * 2
    assert [point["depth"] for point in found["iso3"]["points"]] == [0, 1024]
    point = found["iso3"]["points"][0]
    assert (point["prefill_tps"], point["decode_tps"], point["prefill_ratio"]) == (150.0, 300.0, 1.5)
    assert (point["verdict_prefill"], found["q4_0"]["points"][1]["verdict_decode"]) == (FASTER, SLOWER)
    assert found["f16"]["points"][0]["verdict_decode"] is None
    assert found["f16"]["points"][0]["decode_ratio"] == 1
    (command,) = found["iso3"]["commands"]
    assert command.startswith("llama-bench -m m.gguf ") and "-ctk iso3" in command


def test_a_machine_that_slows_down_does_not_change_the_ratio(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Every call 10 % slower than the one before: the two types are equally fast all the same."""
    found, _ = measured(monkeypatch, tmp_path, Machine({"f16": 100.0, "iso3": 100.0}, drift=0.9), "f16,iso3")
    point = found["iso3"]["points"][0]
    assert point["prefill_ratio"] == pytest.approx(1, abs=0.02)
    assert point["verdict_prefill"] == NONE
    assert point["prefill_ratio_err"] > 0.03


def test_the_environment_of_a_case_is_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found, _ = measured(monkeypatch, tmp_path, Machine({"f16": 1.0, "iso3": 1.0}), "f16,iso3:block")
    assert found["iso3 block"]["commands"][0].startswith("LLAMA_RQ_MODE=block llama-bench ")


def test_commands_name_no_folders(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "run_tool", Machine({"f16": 1.0, "iso3": 1.0}).run)
    monkeypatch.setattr(speed, "check_cache", lambda *_: None)
    cases = parse_cases("f16,iso3", tmp_path / "m-kv.gguf")
    found = measure_speed(tmp_path / "m.gguf", cases, BUILD, SETTINGS, log=tmp_path / "log")
    (command,) = found[cases[1].name]["commands"]
    assert "LLAMA_RQ_PROFILE=m-kv.gguf" in command and str(tmp_path) not in command


@pytest.mark.parametrize(
    ("spec", "log", "error"),
    [
        ("iso3:block", "", None),
        ("iso3", "", None),
        ("iso3:hadamard", "", CacheError),
        ("iso4", "", CacheError),
        ("iso3:block:norm", "", CacheError),
        ("iso3:block:norm", "llama_rq: scale = norm\n", None),
    ],
)
def test_the_cache_is_looked_at_before_it_is_timed(
    monkeypatch: pytest.MonkeyPatch, spec: str, log: str, error: type[Exception] | None
) -> None:
    (case,) = parse_cases(spec)

    def run(build: Build, tool: str, args: list[str], parse: Any, **_: Any) -> tuple[Any, float]:
        assert "-v" in args
        return parse("[]", saved("bench-block.err") + log), 0.1

    monkeypatch.setattr(speed, "run_tool", run)

    def check(what: Case) -> None:
        speed.check_cache(Path("m.gguf"), what, BUILD, None)

    if error is None:
        check(case)
    else:
        with pytest.raises(error):
            check(case)
