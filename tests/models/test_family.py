"""Families of the embedded models: made, checked, kept, and made whole again after a kill."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from click.testing import CliRunner

from ggufrq import quantize
from ggufrq.build import Build
from ggufrq.cli.quantize import quantize as command
from ggufrq.errors import GgufrqError, ModelError, UsageError
from ggufrq.gguf_file import read_gguf
from ggufrq.quantize import Family, make_family
from ggufrq.resolve import embedded_models

MODELS = ("docs-qwen3-8m", "docs-qwen3.5-8m")
# Bits per weight of a large model; the small ones keep more of their tensors in larger types.
BITS = {
    "IQ4_XS": (4.25, 4.8),
    "Q4_K_M": (4.5, 5.3),
    "Q5_K_M": (5.5, 6.0),
    "Q6_K": (6.5, 6.7),
    "Q8_0": (8.5, 8.6),
}


@pytest.mark.parametrize("name", MODELS)
def test_family(families: dict[str, Family], name: str) -> None:
    family = families[name]
    assert [made.type for made in family.files] == list(BITS)
    tensors = read_gguf(family.folder / f"{name}-BF16.gguf").tensors
    for made in family.files:
        facts = read_gguf(made.path)
        assert made.path.name == f"{name}-{made.type}.gguf"
        assert (facts.tensors, facts.file_type) == (tensors, made.type)
        low, high = BITS[made.type]
        assert low <= facts.bits <= high and facts.bits == made.bits
        assert made.fresh and not made.imatrix and made.fallbacks == 0
    assert not list(family.folder.glob(".*"))
    assert not [path for path in family.folder.glob("*.gguf") if "imatrix" in path.name]


def test_a_second_time_nothing_is_made(families: dict[str, Family], llama_build: Build) -> None:
    folder = families[MODELS[0]].folder
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("*.gguf")}
    again = make_family(MODELS[0], list(BITS), llama_build, out=folder)
    assert not any(made.fresh for made in again.files)
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("*.gguf")} == before


@pytest.fixture
def copy(families: dict[str, Family], tmp_path: Path) -> Path:
    """A folder with the 16-bit file and Q8_0 of the dense model, that a test may spoil."""
    folder = tmp_path / "family"
    shutil.copytree(families[MODELS[0]].folder, folder)
    for path in folder.glob("*.gguf"):
        if not path.stem.endswith(("BF16", "Q8_0")):
            path.unlink()
    return folder


def _cut(path: Path) -> None:
    facts = path.stat()
    path.write_bytes(path.read_bytes()[:-1000])
    os.utime(path, ns=(facts.st_atime_ns, facts.st_mtime_ns))


def _touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize("spoil", [_cut, _touch, Path.unlink])
def test_a_file_that_changed_is_made_anew(
    copy: Path, llama_build: Build, spoil: Callable[[Path], None]
) -> None:
    path = copy / f"{MODELS[0]}-Q8_0.gguf"
    whole = path.stat().st_size
    spoil(path)
    family = make_family(MODELS[0], ["Q8_0"], llama_build, out=copy)
    assert [made.fresh for made in family.files] == [True]
    assert path.stat().st_size == whole
    read_gguf(path)


def test_files_of_others_are_not_replaced(copy: Path, llama_build: Build) -> None:
    path = copy / f"{MODELS[0]}-Q4_0.gguf"
    path.write_bytes(b"GGUF precious")
    with pytest.raises(UsageError, match="was not made by ggufrq here") as caught:
        make_family(MODELS[0], ["Q8_0", "Q4_0"], llama_build, out=copy)
    assert "--force" in str(caught.value.remedy)
    assert path.read_bytes() == b"GGUF precious"
    make_family(MODELS[0], ["Q4_0"], llama_build, out=copy, force=True)
    read_gguf(path)


def test_imatrix_only_where_it_is_needed(
    copy: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "IMATRIX_CHUNKS", 6)
    family = make_family(MODELS[0], ["Q2_K", "Q3_K_M", "IQ2_XXS", "Q8_0"], llama_build, out=copy)
    assert {made.type: made.imatrix for made in family.files} == {
        "Q2_K": True,
        "Q3_K_M": True,
        "IQ2_XXS": True,
        "Q8_0": False,
    }
    assert family.files[-1].fresh is False
    matrix = copy / f"{MODELS[0]}-imatrix.gguf"
    made_at = matrix.stat().st_mtime_ns
    assert all(read_gguf(made.path).bits < 4.6 for made in family.files[:3])
    # a given one is used for all types, and makes other files
    given = make_family(MODELS[0], ["Q8_0"], llama_build, out=copy, imatrix=matrix)
    assert given.files[0].imatrix and given.files[0].fresh
    assert matrix.stat().st_mtime_ns == made_at


def test_from_gguf(families: dict[str, Family], llama_build: Build, tmp_path: Path) -> None:
    source = families[MODELS[0]].folder
    family = make_family(str(source / f"{MODELS[0]}-BF16.gguf"), ["Q4_K_M"], llama_build, out=tmp_path)
    assert family.file("Q4_K_M") == tmp_path / f"{MODELS[0]}-Q4_K_M.gguf"
    assert family.file("Q4_K_M").read_bytes() == families[MODELS[0]].file("Q4_K_M").read_bytes()
    with pytest.raises(ModelError, match=r"quantized already \(Q8_0\)"):
        make_family(str(source / f"{MODELS[0]}-Q8_0.gguf"), ["Q4_K_M"], llama_build, out=tmp_path)
    again = make_family(
        str(source / f"{MODELS[0]}-Q8_0.gguf"), ["IQ4_XS"], llama_build, out=tmp_path, requantize=True
    )
    assert read_gguf(again.file("IQ4_XS")).file_type == "IQ4_XS"


def test_full_disk_is_noticed_before_anything_is_made(
    copy: Path, llama_build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(copy)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=66 << 20))
    before = sorted(path.name for path in copy.iterdir())
    with pytest.raises(
        GgufrqError, match=r"Q4_K_M, Q6_K of docs-qwen3-8m takes 0\.01 GB, and .* has 0\.07 GB free"
    ):
        make_family(MODELS[0], ["Q4_K_M", "Q6_K"], llama_build, out=copy)
    assert sorted(path.name for path in copy.iterdir()) == before


def test_unknown_type(llama_build: Build) -> None:
    with pytest.raises(UsageError, match=r"no quantization type 'Q9_K'; it has .*Q4_K_M") as caught:
        quantize.parse_types("Q8_0,q9_k", llama_build)
    assert "--types IQ4_XS" in str(caught.value.remedy)
    assert quantize.parse_types("q4_k, Q4_K_M,q8_0", llama_build) == ("Q4_K_M", "Q8_0")


def test_command(copy: Path) -> None:
    result = CliRunner().invoke(command, [MODELS[0], "--types", "q8_0,Q6_K", "-o", str(copy)])
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert re.fullmatch(r"docs-qwen3-8m-Q8_0\.gguf +Q8_0 +8\.0 MB +8\.52 +kept", lines[1])
    assert re.fullmatch(r"docs-qwen3-8m-Q6_K\.gguf +Q6_K +6\.\d MB +6\.\d\d", lines[2])
    result = CliRunner().invoke(command, [MODELS[0], "--types", "Q8_0", "-o", str(copy), "--json"])
    told = json.loads(result.stdout)
    assert told["base"] == MODELS[0]
    assert told["files"][0]["bytes"] == (copy / f"{MODELS[0]}-Q8_0.gguf").stat().st_size


@pytest.mark.skipif(os.name != "posix", reason="kills a process group")
@pytest.mark.parametrize(
    "after", ["docs-qwen3-8m-BF16.gguf", "docs-qwen3-8m-Q4_K_M.gguf", ".docs-qwen3-8m-Q5_K_M"]
)
def test_killed_and_run_again(
    llama_build: Build, command_line: Callable[..., list[str]], tmp_path: Path, after: str
) -> None:
    types = ["Q4_K_M", "Q5_K_M", "Q6_K"]
    arguments = ["quantize", MODELS[0], "--types", ",".join(types), "-o", str(tmp_path)]
    process = subprocess.Popen(
        command_line(llama_build, *arguments),
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not any(path.name.startswith(after) for path in tmp_path.iterdir()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.gguf")}
    family = make_family(MODELS[0], types, llama_build, out=tmp_path)
    for made in family.files:
        assert read_gguf(made.path).file_type == made.type
        assert made.fresh == (made.path.name not in kept)
    for name, when in kept.items():
        assert (tmp_path / name).stat().st_mtime_ns == when, f"{name} was finished and yet made again"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_from_the_hub(
    llama_build: Build, command_line: Callable[..., list[str]], fake_hub: ModuleType, tmp_path: Path
) -> None:
    folder = embedded_models()[MODELS[1]]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with fake_hub.fake_hub({"somebody/Docs-8M": {**files, "pytorch_model.bin": b"unwanted"}}) as hub:
        done = subprocess.run(
            command_line(llama_build, "quantize", "somebody/Docs-8M", "--types", "Q8_0", "--json"),
            cwd=tmp_path,
            env={
                **os.environ,
                "HF_ENDPOINT": hub.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
                "no_proxy": "127.0.0.1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            },
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr
        assert not any("pytorch" in name for name in hub.fetched)
    told = json.loads(done.stdout)
    assert told["source"]["repo"] == "somebody/Docs-8M"
    assert told["source"]["revision"] == fake_hub.SHA
    assert (tmp_path / "Docs-8M-GGUF" / "Docs-8M-Q8_0.gguf").is_file()
    assert "fetching somebody/Docs-8M at 0123456789ab" in done.stderr
