"""What ``ggufrq memory`` computes, against what llama.cpp allocates."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import hollow
import pytest
from click.testing import CliRunner

from ggufrq.base import proc
from ggufrq.base.errors import ModelError
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPlan, kv_types, parse_plan
from ggufrq.cli import cli
from ggufrq.ggufs.header import Header, read_header
from ggufrq.ggufs.heads import Heads
from ggufrq.ggufs.memory_shape import memory_shape
from ggufrq.memory.cells import ContextSettings
from ggufrq.memory.compute import DryRun, estimate
from ggufrq.memory.estimate import Estimate, Memory
from ggufrq.models.convert import ANY_TOKENIZER, convert
from ggufrq.tools.fit_params import arguments, compute_bytes
from ggufrq.tools.logs import parse_context

pytestmark = [pytest.mark.build, pytest.mark.models]

HYBRID, DENSE = "docs-qwen3.5-8m", "docs-qwen3-8m"
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
MIB = 1 << 20
#: Sizes are printed with two decimals.
PRINTED = 0.0051 * MIB
WEIGHTS = re.compile(r"print_info: file size +\S? *= +([\d.]+) MiB")
OUTPUT = re.compile(r"output buffer size = +([\d.]+) MiB")


@pytest.fixture(scope="session")
def memories(llama_build: Build, f16_models: dict[str, Path]) -> Iterator[dict[str, Memory]]:
    """What is computed of them, with dry runs."""
    headers = {name: (read_header(path),) for name, path in f16_models.items()}
    with DryRun(headers[DENSE], llama_build) as dense, DryRun(headers[HYBRID], llama_build) as hybrid:
        yield {
            name: Memory(shape, shape.weight_bytes, dry.buffers)
            for name, dry in ((DENSE, dense), (HYBRID, hybrid))
            for shape in [memory_shape(headers[name])]
        }


def logged(build: Build, model: Path, plan: KvPlan, settings: ContextSettings) -> str:
    """The log of a run that really allocates, for one token."""
    command = [build.tool("llama-completion"), "-m", model, "-c", str(settings.ctx), "-fa", "on"]
    command += [*plan.arguments(), "-lv", "4", "-p", "a", "-n", "1", "-no-cnv", "-t", "1"]
    done = proc.run(command, env=ONE_THREAD, check=False, timeout=120)
    assert done.rc == 0, done.stderr[-2000:]
    return done.stderr


def against(log: str, found: Estimate) -> None:
    """K, V and state to the printed digit, all together within one percent."""
    context = parse_context(log)
    assert context is not None
    caches = len(context.caches)
    assert found.k == pytest.approx(sum(c.k_mib for c in context.caches) * MIB, abs=PRINTED * caches)
    assert found.v == pytest.approx(sum(c.v_mib for c in context.caches) * MIB, abs=PRINTED * caches)
    assert found.state == pytest.approx(context.recurrent_mib * MIB, abs=PRINTED)
    sizes = [float(pattern.findall(log)[-1]) * MIB for pattern in (WEIGHTS, OUTPUT)]
    compute = compute_bytes(log)
    assert found.compute + found.batch_extra == pytest.approx(compute, abs=2 * PRINTED)
    total = sum(sizes) + (context.kv_mib + context.recurrent_mib) * MIB + compute
    assert found.total + found.batch_extra == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("model", [DENSE, HYBRID])
@pytest.mark.parametrize("kind", [*kv_types(), "iso3/planar4", "iso3; 0,-1:q8_0"])
def test_every_type_on_the_embedded_models(
    llama_build: Build, f16_models: dict[str, Path], memories: dict[str, Memory], model: str, kind: str
) -> None:
    plan = parse_plan(kind)
    for ctx in (700, 8192) if kind != "iso3" else (300, 512, 2048, 5000, 8192, 32768):
        settings = ContextSettings(ctx)
        found = memories[model].estimate(plan, settings)
        assert found.exact
        against(logged(llama_build, f16_models[model], plan, settings), found)


@pytest.mark.parametrize("model", [DENSE, HYBRID])
@pytest.mark.parametrize("parallel", [1, 3])
def test_what_a_server_takes(
    llama_build: Build,
    f16_models: dict[str, Path],
    memories: dict[str, Memory],
    tmp_path: Path,
    model: str,
    parallel: int,
) -> None:
    """The server asks for the logits of one token of each sequence: llama-cli is one inside a program."""
    plan, settings = parse_plan("iso3"), ContextSettings(6000, parallel)
    command = [llama_build.tool("llama-server"), "-m", f16_models[model], "-c", "6000", "-np", str(parallel)]
    command += [*plan.arguments(), "-fa", "on", "-lv", "4", "--port", "0", "--no-warmup", "-t", "1"]
    path = tmp_path / "server.log"
    with proc.start(command, log=path, env=ONE_THREAD):
        deadline = time.monotonic() + 60
        while "graph: nodes" not in (log := path.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
    found = memories[model].estimate(plan, settings)
    context = parse_context(log)
    assert context is not None
    assert found.k + found.v == pytest.approx(context.kv_mib * MIB, abs=2 * PRINTED)
    assert found.state == pytest.approx(context.recurrent_mib * MIB, abs=PRINTED)
    # both figures are read from a log, and rounded there
    assert found.compute == pytest.approx(compute_bytes(log), abs=2 * PRINTED)


def test_every_architecture_is_as_computed_or_refused(
    llama_build: Build, tiny_models: dict[str, Path]
) -> None:
    """Caches, recurrent state and compute buffers of dense, compressed, windowed and recurrent models."""
    refused, rough, wrong, estimated = [], {}, [], []
    for name, path in tiny_models.items():
        headers = (read_header(path),)
        try:
            shape = memory_shape(headers)
        except ModelError:
            refused.append(name)
            continue
        settings = ContextSettings(2048)
        plan = next(p for p in map(parse_plan, ("iso3", "q8_0", "f16")) if Heads.of(shape).why_not(p) is None)
        log = logged(llama_build, path, plan, settings)
        with DryRun(headers, llama_build) as dry:
            found = Memory(shape, shape.weight_bytes, dry.buffers).estimate(plan, settings)
        context = parse_context(log)
        kv = context.kv_mib if context is not None else 0.0
        state = context.recurrent_mib if context is not None else 0.0
        index = context.index_mib if context is not None else 0.0
        near = abs(found.k + found.v - kv * MIB) <= 4 * PRINTED and abs(found.state - state * MIB) <= PRINTED
        near = near and abs(found.index - index * MIB) <= PRINTED
        computed = abs(found.compute + found.batch_extra - compute_bytes(log)) <= 2 * PRINTED
        if not near or (found.exact and not computed):
            wrong.append((name, plan.name, kv, (found.k + found.v) / MIB, state, found.state / MIB))
        if not found.exact:
            estimated.append(name)
        rough[name] = estimate(shape, plan, settings).batch / compute_bytes(log)
    assert not wrong
    assert len(estimated) <= 2  # of qwen3tts, whose own code fixes the size of its vocabulary
    assert len(rough) > 120 and refused == ["deepseek4-moe", "glm5-next-moe"]
    # Without dry runs: the tiny models are far from the shapes of real ones.
    assert all(0.5 < ratio < 2 for ratio in rough.values()), rough


@pytest.fixture(scope="session")
def big(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Header:
    """Qwen3.5-27B as far as its headers go."""
    folder = tmp_path_factory.mktemp("27b")
    model = hollow.qwen35(folder / "Qwen3.5-27B", hollow.QWEN35_27B)
    out = folder / "header.gguf"
    convert(model, out, llama_build.source, pre_tokenizer=ANY_TOKENIZER, what="header")
    return read_header(out)


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0", "iso4", "iso3", "iso2", "iso3/planar4; 0,-1:q8_0"])
def test_a_model_of_27b_as_llama_cpp_would_allocate_it(
    llama_build: Build, big: Header, tmp_path: Path, kind: str
) -> None:
    shape, plan = memory_shape([big]), parse_plan(kind)
    with DryRun((big,), llama_build, tmp_path / "log") as dry:
        memory = Memory(shape, shape.weight_bytes, dry.buffers)
        for ctx in (8192, 32768, 131072, 262144):
            settings = ContextSettings(ctx)
            found = memory.estimate(plan, settings)
            args = arguments(dry.whole, plan, n_ctx=ctx)
            log = proc.run([llama_build.tool("llama-fit-params"), *args], env=ONE_THREAD).stderr
            context = parse_context(log)
            assert context is not None
            assert found.k + found.v == pytest.approx(context.kv_mib * MIB, abs=0.1 * MIB)
            assert found.state == pytest.approx(context.recurrent_mib * MIB, abs=PRINTED)
            guess = Memory(shape, shape.weight_bytes).estimate(plan, settings)
            assert not guess.exact
            assert guess.total == pytest.approx(found.total, rel=0.01)


def test_a_folder_of_safetensors(tmp_path: Path) -> None:
    """Headers alone, an unknown tokenizer, and weights in a type that it does not have yet."""
    folder = hollow.qwen35(tmp_path / "Qwen3.5-27B", hollow.QWEN35_27B)
    command = ["memory", str(folder), "--kv", "iso3", "--fits", "24GB", "--weights", "Q4_K_M", "--json"]
    done = CliRunner().invoke(cli, command, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    data = json.loads(done.stdout)
    assert data["model"] == "Qwen3.5-27B, as converted to BF16"
    assert data["weights"] / 1e9 == pytest.approx(16.5, abs=0.05)
    assert data["fits"][0]["ctx"] == 262144 and data["fits"][0]["native"]
    assert any("30 GB" in line for line in data["published"])
