"""The instrument on builds of llama.cpp with a fault in them: each has to be reported, and a right build
not.

One tree is compiled apart from the real build; each fault is then a change of one file in it, compiled anew.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from families import family_of

from ggufrq.build import manifest, stages
from ggufrq.build.project import Build, BuildOptions, llama_project
from ggufrq.measure.validate.assemble import failed
from ggufrq.measure.validate.plan import make_plan
from ggufrq.measure.validate.validation import validate
from ggufrq.report import html, terminal

pytestmark = [pytest.mark.build, pytest.mark.thorough]

MODEL = "docs-qwen3-8m"
TARGETS = ("llama-perplexity",)
OPTIONS = BuildOptions()


@dataclass(frozen=True)
class Fault:
    """Replacements in files of the source tree; each old text stands there once, or once behind a text that
    comes before it (``after``)."""

    changes: tuple[tuple[str, str, str, str], ...]  # file, after, old, new


#: The log tells the size that K would have in the type that was asked for.
FAKED_SIZE = (
    "src/llama-kv-cache.cpp",
    "",
    "        const size_t memory_size_k = size_k_bytes();",
    "        size_t memory_size_k = 0;\n"
    "        for (const auto & layer : layers) {\n"
    "            memory_size_k += ggml_row_size(type_k, ggml_nelements(layer.k));\n"
    "        }",
)

FAULTS = {
    # The attention's output stays in the rotated basis.
    "V is not rotated back": Fault(
        (
            (
                "src/llama-graph.cpp",
                "llm_graph_input_attn_kv * inp,",
                "        cur = llama_mul_mat_hadamard(ctx0, cur, inp->self_v_rot);",
                "        (void) cur; // a planted fault",
            ),
        )
    ),
    # 37 instead of 45 of 128 for one of eight indices, in the attention's own table for K and nowhere else.
    "a wrong centroid of K": Fault(
        (
            (
                "ggml/src/ggml-cpu/rq-fattn.cpp",
                "static void rq_unpack_k(",
                "    const rq_vec table = rq_make_table(BITS, RQ_K_BIAS);",
                "    int8_t planted[16] = { 0 };\n"
                "    for (int i = 0; i < 1 << BITS; ++i) {\n"
                "        planted[i] = (int8_t) (uint8_t) (rq_centroids(BITS)[i] + RQ_K_BIAS"
                " - (BITS == 3 && i == 5 ? 8 : 0));\n"
                "    }\n"
                "    const rq_vec table = rq_table(planted);",
            ),
        )
    ),
    # All quantized types, upstream's too.
    "every K is kept in f16": Fault(
        (
            (
                "src/llama-kv-cache.cpp",
                "",
                "ggml_new_tensor_3d(ctx, type_k, n_embd_k_gqa, kv_size, n_stream)",
                "ggml_new_tensor_3d(ctx, ggml_is_quantized(type_k) ? GGML_TYPE_F16 : type_k, n_embd_k_gqa, "
                "kv_size, n_stream)",
            ),
            FAKED_SIZE,
        )
    ),
    # Only our types, and silently: the log names the type asked for, and the size that it would have.
    "K is kept in f16": Fault(
        (
            (
                "src/llama-kv-cache.cpp",
                "",
                "ggml_new_tensor_3d(ctx, type_k, n_embd_k_gqa, kv_size, n_stream)",
                "ggml_new_tensor_3d(ctx, type_k >= GGML_TYPE_PLANAR2 ? GGML_TYPE_F16 : type_k, n_embd_k_gqa, "
                "kv_size, n_stream)",
            ),
            FAKED_SIZE,
        )
    ),
}


class Tree:
    """A source tree of its own that is compiled in place."""

    def __init__(self, root: Path, source: Path) -> None:
        self.root = root
        shutil.copytree(source, root / "src", symlinks=True)
        stages.configure_stage(root, llama_project(), OPTIONS, None)
        self.compile()

    def compile(self) -> None:
        stages.compile_stage(self.root, OPTIONS, TARGETS, None)

    def build(self, name: str, like: Build) -> Build:
        """What was compiled, under a key of its own so that no results are mixed up."""
        return Build(name, self.root, self.root / "obj" / "bin", self.root / "src", like.manifest)

    def plant(self, fault: Fault) -> None:
        for file, after, old, new in fault.changes:
            path = self.root / "src" / file
            text = path.read_text(encoding="utf-8")
            start = text.index(after)
            assert text.count(old, start) == 1 or after, f"{file} has changed: plant this fault anew"
            at = text.index(old, start)
            path.write_text(text[:at] + new + text[at + len(old) :], encoding="utf-8")
        self.compile()

    def mend(self, fault: Fault, source: Path) -> None:
        for file in {file for file, *_ in fault.changes}:
            shutil.copyfile(source / file, self.root / "src" / file)


@pytest.fixture(scope="module")
def tree(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tree]:
    root = tmp_path_factory.mktemp("faulty")
    yield Tree(root, llama_build.source)
    shutil.rmtree(root)


@pytest.fixture(scope="module")
def model(llama_build: Build, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The embedded model; results and logs go to a cache of the tests' own."""
    folder = tmp_path_factory.mktemp("model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GGUFRQ_CACHE", str(folder / "cache"))
        yield family_of(MODEL, ("Q8_0",), llama_build, out=folder / MODEL).file("Q8_0")


def run(model: Path, build: Build, folder: Path) -> dict[str, Any]:
    plan = make_plan(str(model), kv="iso3", sections=("check", "quality"), quick=True)
    return validate(plan, build, out=folder)


def wrong_checks(result: dict[str, Any]) -> set[str]:
    return {check["check"] for check in result["checks"] if not check["ok"]}


def test_a_right_build_is_not_accused(tree: Tree, llama_build: Build, model: Path, tmp_path: Path) -> None:
    before = manifest.changed_programs(llama_build.root, llama_build.manifest)
    result = run(model, tree.build("right", llama_build), tmp_path)
    assert failed(result) == [] and result["checks"]
    assert "faulty" not in html.render(result) and "FAILED" not in terminal.render(result)
    assert before == manifest.changed_programs(llama_build.root, llama_build.manifest) == []


@pytest.mark.parametrize(
    ("name", "checks", "spared"),
    [
        ("V is not rotated back", {"v_alone", "loss"}, {"code", "attention", "k_alone"}),
        ("a wrong centroid of K", {"attention"}, {"code", "v_alone"}),
        ("K is kept in f16", {"k_alone"}, {"code", "attention", "v_alone", "reference"}),
        ("every K is kept in f16", {"reference"}, {"code", "attention", "v_alone"}),
    ],
)
def test_a_fault_is_reported(
    tree: Tree,
    llama_build: Build,
    model: Path,
    tmp_path: Path,
    name: str,
    checks: set[str],
    spared: set[str],
) -> None:
    fault = FAULTS[name]
    try:
        tree.plant(fault)
        result = run(model, tree.build(name, llama_build), tmp_path)
    finally:
        tree.mend(fault, llama_build.source)
    for check in result["checks"]:
        if check["check"] in ("k_alone", "v_alone", "loss") or not check["ok"]:
            print(check)
    found = wrong_checks(result)
    assert checks <= found and not spared & found
    assert failed(result)
    assert "This build of llama.cpp is faulty" in html.render(result)
    assert "FAILED" in terminal.render(result)
