"""scripts/gpu_check.py and gpu_bundle.py without a GPU: `run` by programs that only answer."""

from __future__ import annotations

import importlib.util
import json
import re
import struct
import sys
import tarfile
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gguf import GGUFReader

from ggufrq.base.errors import BuildError
from ggufrq.build.project import llama_project

REPOSITORY = Path(__file__).resolve().parents[2]
LOGS = REPOSITORY / "tests" / "logs" / "tools"
HAPPENED = "happened.txt"

#: Stands for all programs: says which was called how, then what a real one said, or what its orders are.
ANSWER = r"""#!{python} -S
import sys, time, json, pathlib
root = pathlib.Path(__file__).resolve().parents[2]
name, args = pathlib.Path(__file__).name, sys.argv[1:]
with open(root / "happened.txt", "a") as log:
    print(name, *args, file=log)
orders = json.loads((root / "orders.json").read_text()) if (root / "orders.json").is_file() else {{}}
for pattern, order in orders.items():
    if pattern in " ".join([name, *args]):
        if order == "hang":
            time.sleep(60)
        sys.exit("it went wrong")
logs = pathlib.Path("{logs}")
if "--list-ops" in args or "--list-devices" in args:
    pass
elif name == "llama-bench":
    if "-v" in args:
        why = "are not held in f16: layer 0 is elsewhere"
        print("llama_rq: the newest 32 and first 0 tokens", why, file=sys.stderr)
    depth = int(args[args.index("-d") + 1])
    rows = json.loads((logs / "bench.out.txt").read_text())
    print(json.dumps([{{**row, "n_depth": depth}} for row in rows]))
elif name == "llama-perplexity":
    kind = "ppl-kld" if "--kl-divergence" in args else "ppl-base"
    print((logs / f"{{kind}}.out.txt").read_text())
    print((logs / f"{{kind}}.err.txt").read_text(), file=sys.stderr)
elif args[0] == "perf":
    print((logs / "backend-ops-perf.txt").read_text())
else:
    print((logs / "backend-ops-test.txt").read_text())
"""


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "scripts" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check() -> ModuleType:
    return load("gpu_check")


@pytest.fixture(scope="module")
def bundle() -> ModuleType:
    return load("gpu_bundle")


class Clock:
    """Stands for the time as `run` sees it: goes on only when it is told."""

    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(check, "monotonic", made)
    return made


def make_run(check: ModuleType, folder: Path, *, budget: float = 500.0, patch_set: str = "abc") -> Any:
    """A run over a bundle of programs that answer: one cache of ours at two depths, few operations."""
    root = folder / "gpu-check"
    (root / "bin").mkdir(parents=True, exist_ok=True)
    (root / "bundle.json").write_text(json.dumps({"patch_set": patch_set, "models": ["small"]}))
    for name in ("test-backend-ops", "llama-bench", "llama-perplexity"):
        program = root / "bin" / name
        program.write_text(ANSWER.format(python=sys.executable, logs=LOGS))
        program.chmod(0o755)
    full = check.FULL
    (folder / f"{full.shape.name}.gguf").touch()  # it is written where there is none
    few = replace(
        full,
        depths=(0, 131072),
        ops=("set_rows",),
        attention=full.attention[:1],
        types=("f16", "iso3"),
        kld=("iso3",),
    )
    return check.Run(folder, folder / "results", budget, sizes=few)


def steps_with_a_card(check: ModuleType) -> tuple[Any, ...]:
    """All steps, of which the first asks a program in place of the driver, and the last has no profiler."""

    def card(run: Any) -> Iterator[Any]:
        def measure() -> dict[str, Any]:
            run.tool("test-backend-ops", "--list-ops")
            return {"name": "NVIDIA H200", "driver": "580.1", "copy": 4000.0}

        yield check.Unit("card", 1, measure)

    return (check.Step("device", 20, card), *check.STEPS[1:-1])


def orders(folder: Path, **what: str) -> None:
    (folder / "orders.json").write_text(json.dumps(what))


def happened(folder: Path) -> list[str]:
    path = folder / HAPPENED
    return path.read_text().splitlines() if path.is_file() else []


def results(folder: Path, step: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results" / f"{step}.json").read_text())["units"]
    return found


def test_all_steps_in_their_order(check: ModuleType, tmp_path: Path) -> None:
    assert check.run_steps(make_run(check, tmp_path), steps_with_a_card(check)) == check.DONE
    calls = happened(tmp_path)
    kinds = [re.sub(r"test-backend-ops (test|perf|--list).*", r"\1", call).split(" ")[0] for call in calls]
    assert list(dict.fromkeys(kinds)) == ["--list", "test", "llama-perplexity", "llama-bench", "perf"]
    # the caches in turns, f16 first; what the card does not hold is asked for once and not measured
    bench = [call.split() for call in calls if call.startswith("llama-bench")][1:]
    order = [(call[call.index("-d") + 1], call[call.index("-ctk") + 1]) for call in bench]
    caches = ["f16", "iso3", "q8_0", "q4_0", "iso4"]
    assert order == [("0", name) for _ in (1, 2) for name in caches] + [
        ("131072", name) for name in (*caches, "f16", "iso3")
    ]
    # fused and not, the card and the CPU
    where = [call for call in calls if call.endswith("none") or call.endswith("-ngl 99")]
    assert [call.endswith("none") for call in where if "--kl-divergence " in call] == [False, True, False]
    assert set(results(tmp_path, "kld")) == {f"small, iso3, {where}" for where in ("cuda", "cpu", "unfused")}


def test_what_is_there_is_not_measured_again(check: ModuleType, tmp_path: Path) -> None:
    (step,) = (step for step in check.STEPS if step.name == "ops")
    assert make_run(check, tmp_path).step(step, 100)
    before = happened(tmp_path)
    assert make_run(check, tmp_path).step(step, 100)
    assert happened(tmp_path) == before != []
    with pytest.raises(SystemExit, match="another folder"):
        make_run(check, tmp_path, patch_set="def").step(step, 100)


def test_a_program_that_does_not_end_is_ended(check: ModuleType, tmp_path: Path) -> None:
    run = make_run(check, tmp_path)
    orders(tmp_path, **{"-o SET_ROWS": "hang"})
    run.limit = time.monotonic() + 0.3
    with pytest.raises(check.Cut):
        run.tool("test-backend-ops", "test", "-o", "SET_ROWS")


def test_the_end_of_the_budget_is_clean_and_the_next_run_goes_on(
    check: ModuleType, tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    def takes(run: Any, seconds: float) -> dict[str, Any]:
        if clock.now + seconds > run.limit:
            clock.now = run.limit
            raise check.Cut
        clock.now += seconds
        return {}

    def units(run: Any) -> Iterator[Any]:
        yield check.Unit("short", 10, lambda: takes(run, 10))
        yield check.Unit("long", 50, lambda: takes(run, 100))
        yield check.Unit("later", 50, lambda: takes(run, 10))

    steps = (check.Step("one", 300, units),)
    began = clock.now
    assert check.run_steps(make_run(check, tmp_path, budget=100), steps) == check.CUT
    assert clock.now - began <= 100
    assert {name: "cut" in unit for name, unit in results(tmp_path, "one").items()} == {
        "short": False,
        "long": True,
    }
    assert "run the same command again" in capsys.readouterr().out
    assert check.run_steps(make_run(check, tmp_path, budget=200), steps) == check.DONE
    assert {name: "cut" in unit for name, unit in results(tmp_path, "one").items()} == dict.fromkeys(
        ("short", "long", "later"), False
    )


def test_what_hangs_takes_four_times_its_guess_and_not_the_time_of_the_rest(
    check: ModuleType, tmp_path: Path, clock: Clock
) -> None:
    def units(run: Any) -> Iterator[Any]:
        def hang() -> dict[str, Any]:
            clock.now = run.limit
            raise check.Cut

        yield check.Unit("hangs", 10, hang)
        yield check.Unit("other", 10, lambda: {})

    assert check.run_steps(make_run(check, tmp_path), (check.Step("one", 300, units),)) == check.WRONG
    found = results(tmp_path, "one")
    assert found["hangs"]["failed"] == "no end after 40.0 s" and "other" in found


def test_what_a_step_cuts_off_comes_again_when_time_is_left(
    check: ModuleType, tmp_path: Path, clock: Clock
) -> None:
    def first(run: Any) -> Iterator[Any]:
        yield check.Unit("small", 1, lambda: {})
        yield check.Unit("large", 30, lambda: {})

    def second(run: Any) -> Iterator[Any]:
        yield check.Unit("other", 1, lambda: {"after": "large" in results(tmp_path, "first")})

    steps = (check.Step("first", 20, first), check.Step("second", 20, second))
    assert check.run_steps(make_run(check, tmp_path, budget=200), steps) == check.DONE
    assert set(results(tmp_path, "first")) == {"small", "large"}
    assert results(tmp_path, "second")["other"]["after"] is False


def test_a_program_that_fails_is_named_and_the_rest_is_measured(
    check: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    orders(tmp_path, **{"llama-perplexity": "fail"})
    assert check.run_steps(make_run(check, tmp_path), steps_with_a_card(check)) == check.WRONG
    failed = results(tmp_path, "kld")["small, iso3, cuda"]["failed"]
    assert "it went wrong" in failed
    assert "small, iso3, cuda" in capsys.readouterr().out
    assert "f16, 0, turn 1" in results(tmp_path, "speed")
    assert f"- kld, small, iso3, cuda: {failed}" in check.report(tmp_path / "results")


def test_without_a_card_it_ends_with_what_the_driver_said(
    check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(check, tmp_path)
    root = tmp_path / "gpu-check"
    facts = {"patch_set": "abc", "models": [], "files": {}, "flags": [], "left": [], "cpu": ""}
    (root / "bundle.json").write_text(json.dumps(facts))
    args = Namespace(
        bundle=tmp_path / "none.tar.xz",
        work=tmp_path,
        results=tmp_path / "results",
        budget=60.0,
        steps="device",
        libraries=[],
        backend="CUDA0",
        rehearse=False,
    )

    def none(run: Any) -> Any:
        def ask() -> dict[str, Any]:
            raise check.NoDevice("the driver shows none")

        yield check.Unit("card", 1, ask)

    monkeypatch.setattr(check, "STEPS", (check.Step("device", 20, none),))
    assert check.start(args) == check.NO_DEVICE == load("gpu_bundle").NO_DEVICE
    assert capsys.readouterr().out == "no device: the driver shows none\n"
    args.steps = "device,sped"
    with pytest.raises(SystemExit, match="no step 'sped'"):
        check.start(args)
    with pytest.raises(SystemExit, match="avx99"):
        check.same_processor({"flags": ["avx99"], "cpu": "another"})
    with pytest.raises(SystemExit, match=r"libcublas\.so\.99 was not found.*\n.*--libraries"):
        check.find_libraries(["libcublas.so.99"], [])
    (tmp_path / "libcublas.so.99").touch()
    assert check.find_libraries(["libcublas.so.99"], [tmp_path]) == [tmp_path]


def test_a_file_of_the_bundle_that_is_not_whole_is_named(check: ModuleType, tmp_path: Path) -> None:
    make_run(check, tmp_path)
    facts = {"files": {"bin/llama-bench": "0" * 64}}
    (tmp_path / "gpu-check" / "bundle.json").write_text(json.dumps(facts))
    with pytest.raises(SystemExit, match="llama-bench is not as it was packed"):
        check.unpack(tmp_path / "none.tar.xz", tmp_path)


def test_another_bundle_is_not_taken_for_the_one_that_was_unpacked(check: ModuleType, tmp_path: Path) -> None:
    work = tmp_path / "work"
    with pytest.raises(SystemExit, match="there is no bundle"):
        check.unpack(tmp_path / "a.tar", work)
    (tmp_path / "bundle.json").write_text('{"files": {}}')
    for name in ("a", "b"):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            tar.add(tmp_path / "bundle.json", "gpu-check/bundle.json")
            tar.add(tmp_path / "bundle.json", f"gpu-check/{name}")
    for _ in range(2):
        check.unpack(tmp_path / "a.tar", work)
    with pytest.raises(SystemExit, match=r"is not of .*b\.tar"):
        check.unpack(tmp_path / "b.tar", work)


# ---- output ----


def test_output_of_perf(check: ModuleType) -> None:
    rows = check.parse_perf((LOGS / "backend-ops-perf.txt").read_text())
    assert [(row["type_K"], row["kv"], row["nr23"]) for row in rows] == [
        ("f16", "4096", "[4,1]"),
        ("iso3", "4096", "[4,1]"),
    ]
    assert rows[1]["us"] == 3642.64


def test_output_of_test(check: ModuleType) -> None:
    found = check.parse_test((LOGS / "backend-ops-test.txt").read_text())
    assert found["passed"] == found["of"] > 0 and found["failures"] == []


def test_output_of_the_profiler(check: ModuleType) -> None:
    text = (
        "==PROF== Connected to process 1\nTesting 1 devices\n"
        '"ID","Kernel Name","gpu__time_duration.sum","launch__registers_per_thread"\n'
        '"","","us","register/thread"\n"0","kernel","42.5","128"\n'
    )
    assert check.parse_ncu(text) == {"time": "42.5 us", "registers": "128 register/thread"}
    assert check.parse_ncu("==ERROR== no permission\n") == {}


def test_models_of_random_weights_are_whole(check: ModuleType, tmp_path: Path) -> None:
    shape = check.Shape("small", "llama", 2, 256, 512, 8, 2, 128, vocabulary=320)
    check.write_model(tmp_path / "small.gguf", shape)
    reader = GGUFReader(tmp_path / "small.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 3 + 2 * 9
    assert tuple(tensors["blk.1.attn_q.weight"].shape) == (256, 1024)
    assert tensors["blk.0.attn_norm.weight"].data[0] == 1.0
    last = reader.tensors[-1]
    assert (tmp_path / "small.gguf").stat().st_size >= last.data_offset + last.n_bytes


# ---- report ----


def test_report_of_some(check: ModuleType, tmp_path: Path) -> None:
    def keep(step: str, units: dict[str, Any]) -> None:
        (tmp_path / f"{step}.json").write_text(json.dumps({"patch_set": "abc", "units": units}))

    keep("device", {"card": {"name": "NVIDIA H200", "driver": "580.1", "copy": 4000.0}})
    speeds = {("f16", 1): 50.0, ("iso3", 1): 100.0, ("f16", 2): 100.0, ("iso3", 2): 100.0}
    runs = {
        f"{cache}, {turn}": {"cache": cache, "turn": turn, "depth": 8192, "decode": value, "prefill": value}
        for (cache, turn), value in speeds.items()
    }
    keep("speed", {"iso3, newest 32: held": {"held": False, "why": "layer 0 is on CUDA0"}, **runs})
    row = {"hsk": "128", "nr23": "[4,1]", "kv": "131072", "nb": "1", "nh": "8"}
    keep(
        "attention",
        {
            "a": {"rows": [{**row, "type_K": "f16", "us": 200.0}, {**row, "type_K": "iso3", "us": 50.0}]},
            "b": {"rows": [{**row, "kv": "32768", "type_K": "f16", "us": 100.0}]},
        },
    )
    keep("ops", {"set_rows": {"passed": 71, "of": 72, "not_supported": 3, "failures": ["x"]}})
    text = check.report(tmp_path)
    # ratios of a turn: 2 and 1
    assert "| decode at depth 8,192, t/s | 75.0 | not measured | not measured | 100.0 (1.50×) |" in text
    assert "not held: layer 0 is on CUDA0" in text
    # 2 * 8 heads * 131072 * 128 values of 3.125 bits in 50 microseconds
    assert "| 2684 (67 %) | not measured | not measured | 2097 (52 %, 4.00×) |" in text
    assert "| attention alone at 32,768, head_dim 128, GB/s of the cache | 1342 (34 %) | not" in text
    assert "| set_rows | 71 of 72 | 3 |" in text
    assert "NVIDIA H200, driver 580.1" in text


def test_the_document_has_the_rows_of_the_report(check: ModuleType, tmp_path: Path) -> None:
    document = (REPOSITORY / "docs" / "cuda.md").read_text()
    for line in check.report(tmp_path).splitlines():
        label = line.split(" | ")[0]
        assert label in document, label
    if "NVIDIA H200, driver" not in document:
        assert check.report(tmp_path) in document


# ---- bundle ----


def fatbin(*entries: tuple[int, int, bytes]) -> bytes:
    """As nvcc lays them out: kind (1 PTX, 2 machine code), architecture, content."""
    parts = b""
    for kind, architecture, content in entries:
        content += bytes(-len(content) % 8)
        head = struct.pack("<HHIQ", kind, 0x101, 64, len(content)).ljust(28, b"\0") + struct.pack(
            "<I", architecture
        )
        parts += head.ljust(64, b"\0") + content
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(parts)) + parts


def elf(section: bytes) -> bytes:
    """A 64-bit ELF file of two sections: names, and .nv_fatbin."""
    names = b"\0.nv_fatbin\0.shstrtab\0"
    body = section + names
    headers = [(0, 0, 0), (1, 64, len(section)), (12, 64 + len(section), len(names))]
    table = b"".join(struct.pack("<IIQQQQIIQQ", n, 1, 0, 0, at, size, 0, 0, 1, 0) for n, at, size in headers)
    start = b"\x7fELF".ljust(0x28, b"\0") + struct.pack("<Q", 64 + len(body)) + bytes(10)
    return start + struct.pack("<HHH", 64, 3, 2) + body + table


def test_ptx_goes_where_machine_code_serves_the_card(bundle: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "libggml-cuda.so"
    two = fatbin((1, 90, b"ptx" * 100), (2, 90, b"sass")) + bytes(8) + fatbin((2, 90, b"more"))
    path.write_bytes(elf(two))
    assert bundle.drop_ptx(path, 90) == 304
    after = path.read_bytes()
    assert after == elf(two.replace(b"ptx", bytes(3)))
    path.write_bytes(elf(fatbin((1, 75, b"ptx"))))
    with pytest.raises(BuildError, match="without machine code for sm_90"):
        bundle.drop_ptx(path, 90)
    path.write_bytes(elf(fatbin((2, 90, b"sass"))[:-8] + bytes(8)).replace(b"\x50\xed\x55\xba", bytes(4)))
    assert bundle.drop_ptx(path, 90) == 0


def test_programs_of_the_bundle_are_those_of_a_build(bundle: ModuleType) -> None:
    assert set(bundle.PROGRAMS) <= {*llama_project().targets, *llama_project().test_targets}


def test_a_build_is_asked_for_where_there_is_none(
    bundle: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GGUFRQ_CACHE", str(tmp_path))
    with pytest.raises(BuildError, match="no build for CUDA") as caught:
        bundle.find_cuda_build("abc")
    assert caught.value.remedy == "ggufrq build --tests --no-native --backend cuda --cuda-arch 90"
