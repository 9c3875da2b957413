"""The wheel of llama-cpp-python in an empty environment: text as llama-completion's, states, errors."""

from __future__ import annotations

import json
import os
import re
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
import random_models

from ggufrq.base import paths, proc
from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.cache.kv import KvPlan, parse_plan
from ggufrq.drive import run
from ggufrq.drive.cache_check import as_asked
from ggufrq.flows.llama_cpp_python import job
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.kv_shape import kv_shape
from ggufrq.make.plan import Family
from ggufrq.models.names import names_beside
from ggufrq.tools.logs import parse_context
from ggufrq.tools.programs import Programs

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[2]
TOKENS, CONTEXT = 24, 512
HELPERS = """
import json, sys, warnings
from llama_cpp import Llama
warnings.simplefilter("error", UserWarning)

def load(model, **arguments):
    usual = {"n_ctx": 512, "n_threads": 1, "n_threads_batch": 1, "flash_attn": True, "verbose": False}
    return Llama(model, **{**usual, **arguments})

def refused(model, **arguments):
    try:
        load(model, **arguments)
    except ValueError as error:
        return str(error)
"""

Python = Any  # a function, with the log of its last call


@pytest.fixture(scope="module")
def python(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Python:
    """Run a script after HELPERS in an environment that has the wheel alone; the JSON that it prints."""
    folder = tmp_path_factory.mktemp("python")
    venv.create(folder / "env", with_pip=False, symlinks=os.name != "nt")
    wheel = job.make(llama_build, folder)
    program = folder / "env" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    try:
        job.install(wheel, str(folder / "env"))
    except ToolError as error:
        if "No matching distribution" in error.message:
            pytest.skip("PyPI, where diskcache is from, cannot be reached")
        raise

    def call(script: str, *arguments: str | Path, cwd: Path = folder, **env: str) -> Any:
        done = proc.run(
            [program, "-c", HELPERS + script, *arguments], cwd=cwd, env={"OMP_NUM_THREADS": "1", **env}
        )
        call.log = done.stderr  # type: ignore[attr-defined]
        return json.loads(done.stdout)

    return call


@pytest.fixture
def dense(families: dict[str, Family]) -> Path:
    return families["docs-qwen3-8m"].file("Q8_0")


@pytest.mark.parametrize("name", ["docs-qwen3-8m", "docs-qwen3.5-8m"])
def test_text_is_that_of_llama_completion(
    name: str, python: Python, families: dict[str, Family], programs: Programs
) -> None:
    model = families[name].file("Q8_0")
    beside = next(file for one in names_beside(model) if (file := model.parent / one).is_file())
    prompt = (paths.data_dir("texts") / "heldout.txt").read_text(encoding="utf-8")[100:500]
    ours = parse_plan("iso3/iso4; 0:q8_0")
    plans: list[tuple[KvPlan, dict[str, Any]]] = [
        (parse_plan("f16"), {}),
        # the profile beside the model and the usual tokens in f16 are found by themselves
        (
            ours.with_profile(beside).with_exact(32, 1),
            {"type_k": "iso3", "type_v": "iso4", "kv_layers": "0:q8_0"},
        ),
        (
            parse_plan("planar2"),
            {"type_k": 112, "type_v": "planar2", "kv_profile": "none", "kv_recent": 0, "kv_first": 0},
        ),
    ]
    script = """
texts = []
for case in json.loads(sys.argv[3]):
    print("begins", file=sys.stderr, flush=True)
    said = load(sys.argv[1], verbose=True, **case)(sys.argv[2], max_tokens=24, temperature=0)
    texts.append(said["choices"][0]["text"])
print(json.dumps(texts))
"""
    said = python(script, model, prompt, json.dumps([arguments for _, arguments in plans]))
    for (plan, _), text, log in zip(plans, said, python.log.split("begins\n")[1:], strict=True):
        context = parse_context(log)
        assert context is not None and as_asked(context, plan), plan.title
        wanted = run.generate(
            model, prompt, plan, programs, tokens=TOKENS, n_ctx=CONTEXT, raw=True, threads=1, temperature=0
        )
        assert text.strip() == wanted.text.strip() and len(text) > 20, plan.title


def test_states_hold_the_blocks(python: Python, dense: Path) -> None:
    script = """
text, found = "CREATE TABLE creates a table, and DROP TABLE", {}
for kind in ("f16", "iso3"):
    more = {} if kind == "f16" else {"kv_recent": 0, "kv_first": 0}
    both = [load(sys.argv[1], type_k=kind, type_v=kind, kv_profile="none", **more) for _ in range(2)]
    both[0].eval(both[0].tokenize(text.encode()))
    state = both[0].save_state()
    both[1].load_state(state)
    said = [llm(text + " is", max_tokens=12, temperature=0)["choices"][0]["text"] for llm in both]
    found[kind] = [state.n_tokens, len(state.llama_state), *said]
other = load(sys.argv[1], type_k="iso4", type_v="iso3", kv_profile="none")
try:
    other.load_state(state)
except RuntimeError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""
    found = python(script, dense)
    shape = kv_shape(dense)
    for kind in ("f16", "iso3"):
        tokens, size, first, second = found[kind]
        # what is beside K and V: positions, sequences, sizes, the tag
        assert 0 < size - parse_plan(kind).bytes_for(shape, tokens) < 64 * tokens
        assert first == second
    assert found["iso3"][1] < found["f16"][1] / 4.5
    assert found["refused"] == "the state was saved with another cache type, rotation mode or profile"


def test_what_cannot_be_is_said(python: Python, dense: Path, tmp_path: Path) -> None:
    narrow = random_models.write("llama", tmp_path / "narrow.gguf", read_header(dense).values)
    profile = next(file for one in names_beside(dense) if (file := dense.parent / one).is_file())
    damaged = tmp_path / "damaged.gguf"
    damaged.write_bytes(profile.read_bytes()[:100_000])
    held = "iso3 cannot hold this model's K head_dim of 32 in fewer bits than q4_0: .* use q4_0"
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (dense, {"type_k": "iso6"}, 'no cache type "iso6" for type_k; there are f32, .*, rotor5'),
        (
            dense,
            {"type_v": "iso3", "flash_attn": False},
            "V in iso3 takes flash attention: .*flash_attn=True",
        ),
        (narrow, {}, held),
        (dense, {"kv_profile": str(damaged)}, "the profile .*damaged.gguf cannot be read, .* damaged"),
        (dense, {"kv_profile": str(profile), "type_k": "q8_0"}, "a profile is for K in a type of ours"),
        (dense, {"kv_layers": "9:q8_0"}, "there is no layer 9, the model has 8 with a KV cache"),
        (dense, {"flash_attn": False, "type_v": "f16", "kv_recent": 8}, "held in f16: .*flash_attn=True"),
    ]
    script = (
        "print(json.dumps([refused(model, **{'type_k': 'iso3', 'type_v': 'iso3', **more})"
        " for model, more in json.loads(sys.argv[1])]))"
    )
    handed = [(str(model), {"kv_profile": "none", **more}) for model, more, _ in cases]
    for (_, _, words), sentence in zip(cases, python(script, json.dumps(handed)), strict=True):
        assert sentence is not None and re.search(words, sentence), sentence


def test_a_profile_from_the_weights(python: Python, dense: Path, tmp_path: Path) -> None:
    """ggufrq is not in the environment, but on the PATH."""
    model = tmp_path / "model.gguf"
    model.symlink_to(dense)
    script = "print(json.dumps(load(sys.argv[1], type_k='iso3', type_v='iso3')._kv.environment))"
    found = python(
        script, model, PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    )
    made = found["LLAMA_RQ_PROFILE"]
    assert Path(made).is_relative_to(paths.cache_dir() / "profiles") and found["LLAMA_RQ_RECENT"] == "32"


def test_the_page_and_what_is_loaded(python: Python, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").symlink_to(dense)
    (tmp_path / "model-kv.gguf").symlink_to(next(dense.parent.glob("*-kv.gguf")))
    text = (REPOSITORY / "docs" / "llama-cpp-python.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    script = """
import contextlib, io, importlib.metadata
said = io.StringIO()
with contextlib.redirect_stdout(said):
    exec(sys.argv[1], {})
import llama_cpp, llama_cpp.mtmd_cpp, llama_cpp._ggml
maps = [line.split()[-1] for line in open("/proc/self/maps")] if sys.platform == "linux" else []
loaded = sorted({path for path in maps if "libggml" in path or "libllama" in path or "libmtmd" in path})
installed = importlib.metadata.version("llama_cpp_python")
print(json.dumps([said.getvalue(), llama_cpp.__version__, installed, loaded]))
"""
    said, version, installed, loaded = python(script, "\n".join(blocks), cwd=tmp_path)
    assert version == installed and re.search(r"\+rq[0-9a-f]{8}\.cpu\.native$", version)
    for comment in re.findall(r"print\(error\)  # (.*)", text):
        assert comment in said
    sizes = re.findall(r"^(f16|iso3) (\d+)$", said, re.MULTILINE)
    assert [kind for kind, _ in sizes] == ["f16", "iso3"]
    assert " and ".join(f"{int(size):,}" for _, size in sizes) + " bytes" in text
    if sys.platform != "linux":
        return
    # each library once, and from the wheel
    names = [Path(path).name for path in loaded]
    assert len(names) == len(set(names)) and {"libllama.so.0", "libggml.so.0", "libmtmd.so.0"} <= set(names)
    assert all("site-packages/llama_cpp/lib" in path for path in loaded)
