"""Importance matrices of the embedded models: in parts, killed, merged, and published beside a family."""

from __future__ import annotations

import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import chats
import numpy as np
import pytest
from families import family_of

from ggufrq.base import paths, proc
from ggufrq.base.errors import ModelError, ToolError
from ggufrq.build.project import Build
from ggufrq.ggufs import imatrix
from ggufrq.ggufs.header import read_header
from ggufrq.make import matrix, mix
from ggufrq.make.family import parse_wants, plan_family
from ggufrq.make.plan import Family, Request
from ggufrq.models import hub
from ggufrq.tools import imatrix as tool

pytestmark = [pytest.mark.build]

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrix, "PART", tool.TOGETHER)
    monkeypatch.setattr(matrix, "CHUNKS", 8)
    monkeypatch.setattr(matrix, "CHUNK_SIZE", 64)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="module")
def model(families: dict[str, Family]) -> Path:
    return families[DENSE].folder / f"{DENSE}-BF16.gguf"


def text_of(folder: Path, characters: int, *, skip: int = 0) -> Path:
    whole = (paths.data_dir("texts") / "calibration.txt").read_text(encoding="utf-8")
    path = folder / f"text {skip}.txt"
    path.write_text(whole[skip : skip + characters], encoding="utf-8")
    return path


def equal(a: imatrix.Matrix, b: imatrix.Matrix) -> bool:
    return a.entries.keys() == b.entries.keys() and all(
        np.array_equal(entry.sums, b.entries[name].sums)
        and np.array_equal(entry.counts, b.entries[name].counts)
        for name, entry in a.entries.items()
    )


def test_parts_are_what_one_go_gives(llama_build: Build, model: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path, 8_000)
    made = matrix.make_alone(model, tmp_path / "parts.gguf", [text], llama_build, chunks=12)
    args = tool.arguments(model, text, tmp_path / "one.gguf", n_ctx=64, chunks=12)
    proc.run([llama_build.tool("llama-imatrix"), *args])
    parts, one = imatrix.read(made), imatrix.read(tmp_path / "one.gguf")
    assert equal(parts, one)
    assert (parts.chunks, one.chunks, parts.datasets) == (12, 12, (text.name,))
    assert not list((paths.cache_dir() / "imatrix").glob("*/"))

    shown = [llama_build.tool("llama-imatrix"), "-m", model, "--show-statistics", "--in-file", made]
    done = proc.run(shown)
    log = done.stdout + done.stderr
    rows = {row.tensor: row for row in imatrix.statistics(parts)}
    seen = 0
    for line in re.findall(r"^.* I +(\d+)\t(\w+) *\t *([\d.]+)\t *[\d.]+\t *([\d.]+)\t(.*)$", log, re.M):
        row = rows[f"blk.{line[0]}.{line[1]}.weight"]
        assert row.total == pytest.approx(float(line[2]), abs=0.02)
        assert row.largest == pytest.approx(float(line[3]), abs=0.001)
        rest = [float(number) for number in re.findall(r"[\d.]+", line[4])]
        assert [row.mean, row.deviation] == pytest.approx(rest[:2], abs=0.02)
        assert 100 * row.active == pytest.approx(rest[2], abs=0.01)
        assert 100 * row.entropy == pytest.approx(rest[5], abs=0.05)
        seen += 1
    assert seen > 30


def test_killed_at_any_moment_it_goes_on(
    llama_build: Build, model: Path, tmp_path: Path, command_line: Callable[..., list[str]]
) -> None:
    text = text_of(tmp_path, 16_000)
    smooth = matrix.make_alone(model, tmp_path / "smooth.gguf", [text], llama_build, chunks=24)
    out = tmp_path / "killed.gguf"
    python, flag, program, *arguments = command_line(
        llama_build, "imatrix", "make", str(model), "-o", str(out), "--text", str(text), "--chunks", "24"
    )
    program = program.replace(
        "from ggufrq.cli", "import ggufrq.make.matrix as m; m.PART, m.CHUNK_SIZE = 4, 64\nfrom ggufrq.cli"
    )
    state = paths.cache_dir() / "imatrix"
    rng, kept = random.Random(5), 0
    for _ in range(4):
        with subprocess.Popen([python, flag, program, *arguments], stderr=subprocess.DEVNULL) as running:
            before = {path: path.stat().st_mtime_ns for path in state.glob("*/state.json")}
            deadline = time.monotonic() + 120
            while running.poll() is None and time.monotonic() < deadline:
                now = {path: path.stat().st_mtime_ns for path in state.glob("*/state.json")}
                if now != before:
                    break
                time.sleep(0.02)
            time.sleep(rng.random() / 4)
            kept = max([kept, *(json.loads(path.read_text())["skip"] for path in state.glob("*/state.json"))])
            running.kill()
    assert kept >= 4
    done = proc.run([python, flag, program, *arguments], timeout=300)
    assert out.read_bytes() == smooth.read_bytes()
    assert "24/24 chunks" in done.stderr


def test_a_part_that_was_damaged_is_made_again(llama_build: Build, model: Path, tmp_path: Path) -> None:
    text = text_of(tmp_path, 8_000)
    smooth = matrix.make_alone(model, tmp_path / "smooth.gguf", [text], llama_build)

    def stop(self: object, number: int, skip: int, before: int, file: Path) -> None:
        note(self, number, skip, before, file)
        raise KeyboardInterrupt

    note = matrix._Parts._note
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matrix._Parts, "_note", stop)
        with pytest.raises(KeyboardInterrupt):
            matrix.make_alone(model, tmp_path / "again.gguf", [text], llama_build)
    (part,) = (paths.cache_dir() / "imatrix").glob("*/*.gguf")
    part.write_bytes(part.read_bytes()[:-100])
    again = matrix.make_alone(model, tmp_path / "again.gguf", [text], llama_build)
    assert again.read_bytes() == smooth.read_bytes()


def test_texts_add_up_and_end(llama_build: Build, model: Path, tmp_path: Path) -> None:
    texts = [text_of(tmp_path, 4_000, skip=skip) for skip in (0, 100_000)]
    single = [
        imatrix.read(matrix.make_alone(model, tmp_path / f"{i}.gguf", [text], llama_build))
        for i, text in enumerate(texts)
    ]
    both = imatrix.read(matrix.make_alone(model, tmp_path / "both.gguf", texts, llama_build))
    merged = imatrix.merge(single, ["0", "1"])
    assert both.datasets == merged.datasets == tuple(text.name for text in texts)
    assert both.chunks == merged.chunks == sum(it.chunks for it in single)
    for name, entry in both.entries.items():
        assert np.array_equal(entry.counts, merged.entries[name].counts)
        np.testing.assert_allclose(entry.sums, merged.entries[name].sums, rtol=1e-4)
    short = tmp_path / "short.txt"
    short.write_text("A few words.")
    with pytest.raises(ToolError, match="you need at least 128 tokens"):
        matrix.make_alone(model, tmp_path / "none.gguf", [short], llama_build)
    assert not (tmp_path / "none.gguf").exists()
    # A text that ends within the first part of four chunks of 64 tokens.
    brief = matrix.make_alone(model, tmp_path / "brief.gguf", [text_of(tmp_path, 700)], llama_build)
    assert 2 <= imatrix.read(brief).chunks < 4


def test_given_ones_are_merged_and_published(
    llama_build: Build, model: Path, families: dict[str, Family], tmp_path: Path
) -> None:
    texts = [text_of(tmp_path, 4_000, skip=skip) for skip in (0, 100_000)]
    given = [
        matrix.make_alone(model, tmp_path / f"{i}.gguf", [text], llama_build, chunks=4)
        for i, text in enumerate(texts)
    ]
    out = tmp_path / "family"
    request = Request(str(model), parse_wants(["Q2_K"], llama_build), out, tuple(given))
    planned = plan_family(request, llama_build).outputs[0].forecast.file_bytes
    family = family_of(str(model), ["Q2_K"], llama_build, out=out, imatrix=given, run=False)
    published = out / f"{DENSE}-imatrix.gguf"
    assert imatrix.read(published).chunks == 8
    record = json.loads((out / f"{DENSE}.ggufrq.json").read_text())
    entry = record["files"][published.name]
    assert entry["type"] == "imatrix"
    values = read_header(family.file("Q2_K")).values
    assert values["ggufrq.imatrix.sha256"] == entry["parts"][0]["sha256"]
    assert family.file("Q2_K").stat().st_size == planned
    # nobody who looks for a model takes it for one
    assert hub.choose_gguf("me/it", [path.name for path in out.glob("*.gguf")], None) == [
        f"{DENSE}-Q2_K.gguf"
    ]
    again = family_of(str(model), ["Q2_K"], llama_build, out=out, imatrix=given, run=False)
    assert not again.files[0].fresh
    other = family_of(str(model), ["Q2_K"], llama_build, out=out, imatrix=given[:1], run=False)
    assert other.files[0].fresh and published.read_bytes() == given[0].read_bytes()
    stranger = tmp_path / f"{DENSE}-BF16.gguf"  # of the same name
    stranger.symlink_to(families[HYBRID].folder / f"{HYBRID}-BF16.gguf")
    with pytest.raises(ModelError, match="was made for another model") as caught:
        family_of(str(stranger), ["IQ2_M"], llama_build, out=out, run=False)
    assert caught.value.remedy == "--imatrix FILE or --calibrate TEXT, which takes its place"


def test_the_mix_is_the_default(llama_build: Build, families: dict[str, Family], tmp_path: Path) -> None:
    source = families[HYBRID].folder / f"{HYBRID}-BF16.gguf"
    family_of(str(source), ["Q2_K"], llama_build, out=tmp_path, run=False)
    found = imatrix.read(tmp_path / f"{HYBRID}-imatrix.gguf")
    assert (found.datasets, found.chunks) == ((mix.NAME,), 8)
    with pytest.raises(ModelError, match="was made for another model"):
        family_of(
            str(families[DENSE].folder / f"{DENSE}-BF16.gguf"),
            ["Q2_K"],
            llama_build,
            out=tmp_path / "other",
            imatrix=tmp_path / f"{HYBRID}-imatrix.gguf",
        )


#: Real templates that take all conversations of the mix, though some want calls one by one or no system.
REAL = (
    *("Qwen-Qwen3-0.6B", "Qwen3-Coder", "Qwen3.5-4B", "Qwen-Qwen2.5-7B-Instruct", "GLM-4.6"),
    *("meta-llama-Llama-3.1-8B-Instruct", "meta-llama-Llama-3.2-3B-Instruct", "google-gemma-4-31B-it"),
    *("mistralai-Mistral-Nemo-Instruct-2407", "Mistral-Small-3.2-24B-Instruct-2506", "Kimi-K3"),
    *("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", "deepseek-ai-DeepSeek-V3.1", "openai-gpt-oss-120b"),
    *("ibm-granite-granite-4.0", "MiniMax-M2", "NVIDIA-Nemotron-Nano-v2", "upstage-Solar-Open-100B"),
)


#: Those that do not: no calls of tools, or calls in a form of their own.
PARTLY = (
    "google-gemma-2-2b-it",
    "HuggingFaceTB-SmolLM3-3B",
    "microsoft-Phi-3.5-mini-instruct",
    "Kimi-K2-Instruct",
)


def test_the_templates_of_real_models(llama_build: Build, capsys: pytest.CaptureFixture[str]) -> None:
    """As ``apply_chat_template`` writes them; where not, a line says why."""
    every = chats.conversations()
    tools = [c for c in every if "tools" in c]
    double = [c for c in tools if any(len(m.get("tool_calls", ())) > 1 for m in c["messages"])]
    system = [c for c in every if c["messages"][0]["role"] == "system"]
    some = [*every[:2], system[0], tools[0], double[0]]
    for name in (*REAL, *PARTLY):
        path = llama_build.source / "models" / "templates" / f"{name}.jinja"
        same, told = chats.alike(path.read_text(encoding="utf-8"), some, capsys)
        assert (same == len(some)) == (name in REAL), (name, told)
