"""The wheel of llama-cpp-python from made-up files, and our module in it beside a fake of the others."""

from __future__ import annotations

import base64
import contextlib
import csv
import ctypes
import hashlib
import importlib.util
import io
import json
import os
import platform
import sys
import tarfile
import types
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from email.parser import Parser
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from packaging.tags import sys_tags
from packaging.utils import parse_wheel_filename

from ggufrq import cli
from ggufrq.base import paths
from ggufrq.base.errors import BuildError, SourceError, UsageError
from ggufrq.build import builds
from ggufrq.build.project import Build
from ggufrq.flows import wheels
from ggufrq.flows.llama_cpp_python import edits, job
from ggufrq.models import names
from ggufrq.source.bindings import python_files
from ggufrq.source.pin import Pin, load_pin

PIN = load_pin()
assert PIN.sdist is not None
RELEASE = PIN.sdist.version
LIBRARIES = ("llama", "mtmd", "ggml", "ggml-base", "ggml-cpu", "ggml-rpc", "llama-common")


def write_files(folder: Path) -> Path:
    """What of an sdist is kept, with the places that are edited and nothing else."""
    for edit in edits.edits(RELEASE, ""):
        path = folder / "llama_cpp" / edit.file
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            file.write(edit.old + "\n")
    (folder / "llama_cpp" / "py.typed").touch()
    (folder / "LICENSE.md").write_text("theirs\n")
    (folder / "PKG-INFO").write_text(
        f"Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: {RELEASE}\nRequires-Dist: numpy>=1\n"
        "\nwörds\n",
        encoding="utf-8",
    )
    return folder


def write_library(folder: Path, name: str, *links: str) -> None:
    (folder / name).write_bytes(name.encode())
    for link in links:
        (folder / link).symlink_to(name)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    return write_files(tmp_path / "files")


@pytest.fixture
def build(tmp_path: Path) -> Build:
    root = tmp_path / "a build"
    folder, source = root / "obj" / "bin", root / "src"
    (source / "licenses").mkdir(parents=True)
    folder.mkdir(parents=True)
    for name in LIBRARIES:
        write_library(folder, f"lib{name}.so.0.5.0", f"lib{name}.so.0", f"lib{name}.so")
    (folder / "llama-cli").write_text("a program")
    (source / "LICENSE").write_text("llama.cpp's\n")
    (source / "licenses" / "LICENSE-x").write_text("x's\n")
    return Build(
        "key", root, folder, source, {"native": True, "backend": "cpu", "patch_set": "0123456789abcdef"}
    )


def test_a_wheel_holds_what_belongs_in_it(build: Build, files: Path, tmp_path: Path) -> None:
    path = job.make_from(build, files, PIN, tmp_path / "out")
    name, version, _, tags = parse_wheel_filename(path.name)
    assert (name, str(version)) == ("llama-cpp-python", f"{RELEASE}+rq01234567.cpu.native")
    assert tags & set(sys_tags())
    wheel = zipfile.ZipFile(path)
    held = wheel.namelist()
    assert {one.removeprefix("llama_cpp/lib/") for one in held if "/lib/" in one} == {
        f"lib{one}.so.0" for one in LIBRARIES if one != "llama-common"
    }
    assert wheel.read("llama_cpp/lib/libggml.so.0") == b"libggml.so.0.5.0"
    assert wheel.read("llama_cpp/_ggufrq_names.py") == Path(names.__file__).read_bytes()
    assert f'__version__ = "{version}"' in wheel.read("llama_cpp/__init__.py").decode()
    facts = json.loads(wheel.read("llama_cpp/_ggufrq.json"))
    assert facts["types"]["iso3"] == 116 and facts["types"]["iq4_nl"] == 20 and len(facts["ours"]) == 12
    info = f"llama_cpp_python-{version}.dist-info"
    said = Parser().parsestr(wheel.read(f"{info}/METADATA").decode())
    assert said["Version"] == str(version) and said["Requires-Dist"] == "numpy>=1"
    assert str(said.get_payload()).endswith("wörds\n")
    texts = [wheel.read(f"{info}/licenses/{one}").decode() for one in said.get_all("License-File", [])]
    assert sorted(texts) == [paths.licence().read_text(), "llama.cpp's\n", "theirs\n", "x's\n"]
    tag = wheel.read(f"{info}/WHEEL").decode().partition("Tag: ")[2].strip()
    assert path.name.endswith(f"-{tag}.whl")


def test_the_record_names_every_file_and_its_hash(build: Build, files: Path) -> None:
    path = job.make_from(build, files, PIN)
    assert path.is_relative_to(build.root)
    wheel = zipfile.ZipFile(path)
    (record,) = [one for one in wheel.namelist() if one.endswith("/RECORD")]
    rows = list(csv.reader(io.StringIO(wheel.read(record).decode())))
    assert sorted(row[0] for row in rows) == sorted(wheel.namelist())
    for inside, digest, size in rows:
        data = wheel.read(inside)
        hashed = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).decode().rstrip("=")
        wanted = ["", ""] if inside == record else [f"sha256={hashed}", str(len(data))]
        assert [digest, size] == wanted
        mode = wheel.getinfo(inside).external_attr >> 16
        assert bool(mode & 0o111) == ("/lib/" in inside) and mode & 0o444 == 0o444


def test_the_same_content_makes_the_same_bytes(build: Build, files: Path, tmp_path: Path) -> None:
    first = job.make_from(build, files, PIN, tmp_path / "a")
    for path in files.rglob("*"):
        os.utime(path, (1, 1))
    (files / "llama_cpp" / "__pycache__").mkdir()
    (files / "llama_cpp" / "__pycache__" / "x.pyc").write_bytes(b"left by a run")
    assert job.make_from(build, files, PIN, tmp_path / "b").read_bytes() == first.read_bytes()


@pytest.mark.parametrize(
    ("native", "variants", "kind"), [(1, 0, "native"), (0, 1, "portable"), (0, 0, "generic")]
)
def test_the_label_says_what_it_runs_on(build: Build, native: int, variants: int, kind: str) -> None:
    build.manifest["native"] = bool(native)
    if variants:
        for path in build.bin.glob("libggml-cpu.*"):
            path.unlink()
        write_library(build.bin, "libggml-cpu-haswell.so")
        write_library(build.bin, "libggml-cpu-x64.so")
        assert "libggml-cpu-x64.so" in job.libraries(build.bin)
    assert job.label(build) == f"rq01234567.cpu.{kind}"


def test_libraries_of_a_mac(tmp_path: Path) -> None:
    for name in LIBRARIES:
        write_library(tmp_path, f"lib{name}.0.5.0.dylib", f"lib{name}.0.dylib", f"lib{name}.dylib")
    found = job.libraries(tmp_path)
    assert set(found) == {f"lib{name}.0.dylib" for name in LIBRARIES if name != "llama-common"}


@pytest.mark.parametrize("name", ["mtmd", "ggml-cpu"])
def test_a_build_without_a_library(build: Build, files: Path, name: str) -> None:
    for path in build.bin.glob(f"lib{name}.*"):
        path.unlink()
    with pytest.raises(BuildError, match=f"lacks the library {name}"):
        job.make_from(build, files, PIN)
    assert not list(build.root.rglob("*.whl"))


@pytest.mark.parametrize("text", ["", "two"])
def test_a_release_of_another_form_is_refused(build: Build, files: Path, text: str) -> None:
    edit = edits.edits(RELEASE, "")[4]
    path = files / "llama_cpp" / edit.file
    path.write_text(path.read_text().replace(edit.old, 2 * edit.old if text else ""))
    with pytest.raises(
        SourceError, match=rf"{edit.file} has not once '.*Optional\[int\]|{edit.file} has not once"
    ):
        job.make_from(build, files, PIN)


def test_platform_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    assert wheels.platform_tag() in {tag.platform for tag in sys_tags()}
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(platform, "mac_ver", lambda: ("14.6.1", ("", "", ""), "arm64"))
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    assert wheels.platform_tag() == "macosx_14_0_arm64"


def sdist_of(folder: Path, files: Path) -> tuple[Path, Pin]:
    path = folder / "made-up.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("llama_cpp", "LICENSE.md", "PKG-INFO", "nothing"):
            if (files / name).exists():
                tar.add(files / name, f"llama_cpp_python-{RELEASE}/{name}")
    assert PIN.sdist is not None
    return path, replace(PIN, sdist=replace(PIN.sdist, sha256=hashlib.sha256(path.read_bytes()).hexdigest()))


def test_python_files_of_an_sdist_are_kept(
    cache: Path, files: Path, tmp_path: Path, no_programs: None
) -> None:
    sdist, pin = sdist_of(tmp_path, files)
    kept = python_files(pin, str(sdist))
    assert {path.name for path in kept.iterdir()} == {"llama_cpp", "LICENSE.md", "PKG-INFO"}
    sdist.rename(tmp_path / "away")
    assert python_files(pin) == kept
    with (kept / "llama_cpp" / "llama.py").open("a") as file:
        file.write("changed\n")
    (tmp_path / "away").rename(sdist)
    assert "changed" not in (python_files(pin, str(sdist)) / "llama_cpp" / "llama.py").read_text()


def test_another_sdist_is_refused_and_not_kept(cache: Path, files: Path, tmp_path: Path) -> None:
    sdist, _ = sdist_of(tmp_path, files)
    with pytest.raises(SourceError, match="damaged or not the pinned release"):
        python_files(PIN, str(sdist))
    (files / "PKG-INFO").unlink()
    sdist, pin = sdist_of(tmp_path, files)
    with pytest.raises(SourceError, match="no folder 'PKG-INFO'"):
        python_files(pin, str(sdist))
    assert not list((cache / "sources").glob("*/*"))


def test_options_that_do_not_go_together(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["build", "-o", "dist"]) == UsageError.exit_code
    assert "try: ggufrq build --python -o dist" in capsys.readouterr().err
    for option in ("--python", "--install", "--out=dist", "--prune", "--tests", "--jobs=1", "--backend=cpu"):
        assert cli.invoke(["build", "--check", option]) == UsageError.exit_code
        name = option.partition("=")[0]
        assert f"--check builds nothing, and {name} is for a build" in capsys.readouterr().err
    assert cli.invoke(["build", "--portable", "--backend", "cuda"]) == UsageError.exit_code
    assert "try: --backend cpu" in capsys.readouterr().err
    with pytest.raises(UsageError, match="neither a Python nor the folder"):
        job.install(Path("x.whl"), "no such place")
    for arguments in (["profile"], ["bin", "model.gguf"], ["cache", "-c", "8"]):
        assert cli.invoke(["where", *arguments]) == UsageError.exit_code


def test_what_is_built_and_installed(
    build: Build, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    full = replace(
        build, manifest={**build.manifest, "llama_cpp": {"commit": "c"}, "seconds": 1, "date": "2026-01-01"}
    )
    monkeypatch.setattr(builds, "find_build", lambda *_, **__: full)
    monkeypatch.setattr(builds, "ensure_build", lambda options, **_: asked.append(options) or full)
    monkeypatch.setattr(job, "make", lambda _, out, source: Path(f"{out} {source}"))
    monkeypatch.setattr(job, "install", lambda wheel, python: f"{wheel} into {python}")
    assert cli.invoke(["build", "--backend", "cpu", "--portable", "--json", "--install"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["wheel"] == "None auto" and said["installed"] == "None auto into None"
    assert not asked[0].native
    assert {"-DGGML_BACKEND_DL=ON", "-DGGML_CPU_ALL_VARIANTS=ON"} == set(asked[0].cmake_args)
    assert cli.invoke(["build", "--backend", "cpu", "--python", "-o", "there", "--install", "env"]) == 0
    assert capsys.readouterr().out == "there auto\n"
    assert asked[1].native and not asked[1].cmake_args


# the module in the wheel, beside a fake of llama-cpp-python


@pytest.fixture
def module(
    tmp_path: Path, build: Build, files: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ModuleType]:
    """The module as it lies in a wheel, with a library that has no functions but one of a backend."""
    with zipfile.ZipFile(job.make_from(build, files, PIN, tmp_path)) as wheel:
        for name in ("_ggufrq.py", "_ggufrq.json", "_ggufrq_names.py"):
            wheel.extract(f"llama_cpp/{name}", tmp_path / "site")
    package, inner, internals = (
        types.ModuleType(f"llama_cpp{end}") for end in ("", ".llama_cpp", "._internals")
    )
    package.__path__ = [str(tmp_path / "site" / "llama_cpp")]
    inner.__dict__.update(
        FakeLog().functions(), _lib=None, _base_path=str(build.bin), LLAMA_FLASH_ATTN_TYPE_DISABLED=0
    )
    for one in (package, inner, internals):
        monkeypatch.setitem(sys.modules, one.__name__, one)
    package.llama_cpp, package._internals = inner, internals  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "llama_cpp._ggufrq_names", names)
    for name in ("LAYERS", "PROFILE", "CALIB", "RECENT", "FIRST"):
        monkeypatch.delenv(f"LLAMA_RQ_{name}", raising=False)
    spec = importlib.util.spec_from_file_location(
        "llama_cpp._ggufrq", tmp_path / "site" / "llama_cpp" / "_ggufrq.py"
    )
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    loaded: list[Any] = []
    with monkeypatch.context() as patch:
        patch.setattr(
            ctypes, "CFUNCTYPE", lambda *_: lambda named: lambda *given: loaded.append((named[0], *given))
        )
        spec.loader.exec_module(made)
    made.__dict__["loaded"] = loaded
    made.__dict__["log"] = inner._log  # type: ignore[attr-defined]
    yield made


class FakeLog:
    """llama.cpp's log: a callback that is set and got, and called by ``say``."""

    kind = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)

    def __init__(self) -> None:
        self.before: list[str] = []
        self.first = self.kind(lambda level, text, _: self.before.append(text.decode()))
        self.callback = self.first

    def functions(self) -> dict[str, Any]:
        return {
            "llama_log_callback": self.kind,
            "llama_log_get": lambda callback, _: ctypes.memmove(callback, ctypes.byref(self.callback), 8),
            "llama_log_set": lambda callback, _: setattr(self, "callback", callback),
            "_log": self,
        }

    def say(self, level: int, text: str) -> None:
        self.callback(level, text.encode(), None)


def params(flash: int = 1) -> Any:
    return types.SimpleNamespace(type_k=1, type_v=1, flash_attn_type=flash, n_ctx=0)


@pytest.fixture
def model(tmp_path: Path) -> str:
    path = tmp_path / "Some-8B-Q4_K_M.gguf"
    path.touch()
    return str(path)


def test_code_for_each_processor_is_loaded(
    module: Any, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert module.loaded == []
    monkeypatch.setattr(
        module, "_library", lambda name, *_: lambda *given: module.loaded.append((name, *given))
    )
    module._load_backends()
    assert module.loaded == []
    write_library(build.bin, "libggml-cpu-haswell.so")
    module._load_backends()
    assert module.loaded == [("ggml_backend_load_all_from_path", os.fsencode(build.bin))]


def test_types_by_name_and_number(module: Any, model: str) -> None:
    for kinds in (("iso3", "Planar4"), (116, 114), ("116", "114"), (np.int32(116), np.uint8(114))):
        asked = params()
        cache = module.Cache(model, asked, *kinds, None, "none")
        assert (asked.type_k, asked.type_v) == (116, 114)
        assert type(asked.type_k) is type(asked.type_v) is int  # a field of ctypes takes no other
        assert cache.environment == {
            "LLAMA_RQ_RECENT": "32",
            "LLAMA_RQ_FIRST": "1",
            "LLAMA_RQ_PROFILE": "none",
            "LLAMA_RQ_CALIB": None,
        }
    assert module.Cache(model, params(), None, "q8_0").environment == {}
    beside = module.Cache(model, params(), "q4_0", "q4_0", None, None, 1024).environment
    assert beside == {"LLAMA_RQ_RECENT": "1024", "LLAMA_RQ_FIRST": "0"}
    layered = module.Cache(model, params(), None, None, "0:iso3/f16", "none", 0, 2)
    assert layered.environment["LLAMA_RQ_LAYERS"] == "0:iso3/f16"
    assert layered.environment["LLAMA_RQ_RECENT"] == "0" and layered.environment["LLAMA_RQ_FIRST"] == "2"
    assert layered.asked == {"kv_layers": "0:iso3/f16", "kv_profile": "none", "kv_recent": 0, "kv_first": 2}


def test_variables_of_the_environment_are_the_default(
    module: Any, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_RQ_RECENT", "7")
    monkeypatch.setenv("LLAMA_RQ_PROFILE", "theirs")
    assert module.Cache(model, params(), "iso3", "iso3").environment == {
        "LLAMA_RQ_RECENT": "7",
        "LLAMA_RQ_FIRST": "1",
    }
    found = module.Cache(model, params(), "iso3", "iso3", None, "none", 3).environment
    assert found["LLAMA_RQ_RECENT"] == "3" and found["LLAMA_RQ_PROFILE"] == "none"


@pytest.mark.parametrize(
    ("arguments", "flash", "words"),
    [
        (("iso6", None), 1, 'no cache type "iso6" for type_k; there are f32, .*rotor5'),
        (("iso3", 116.5), 1, 'no cache type "116.5" for type_v'),
        (("iso3", "iso3"), 0, r"V in iso3 takes flash attention: Llama\(…, flash_attn=True\)"),
        (("iso3", None, "0:f16/q8_0"), 0, "V in q8_0 takes flash attention"),
        (("bf16", "f16", None, None, 32), 1, "beside a quantized type, and K is in bf16"),
        (("q8_0", "iso3", None, "weights"), 1, "a profile is for K in a type of ours"),
        (("iso3", "iso3", None, "none", 4097), 1, "kv_recent=4097: 0 to 4096 tokens"),
        (("iso3", "iso3", None, "nowhere.gguf"), 1, "the profile nowhere.gguf is missing"),
    ],
)
def test_what_cannot_be_is_told(
    module: Any, model: str, arguments: tuple[Any, ...], flash: int, words: str
) -> None:
    with pytest.raises(module.CacheError, match=words) as error:
        module.Cache(model, params(flash), *arguments)
    assert isinstance(error.value, ValueError)


def test_a_profile_beside_the_model_is_found(module: Any, model: str) -> None:
    beside = Path(model).parent / "Some-8B-kv.gguf"
    beside.touch()
    assert module.Cache(model, params(), "iso3", "iso3").environment["LLAMA_RQ_PROFILE"] == str(beside)
    # V alone has none, and a model that is not there is for Llama to tell
    assert "LLAMA_RQ_PROFILE" not in module.Cache(model, params(), None, "iso3").environment
    assert "LLAMA_RQ_PROFILE" not in module.Cache("no.gguf", params(), "iso3", "iso3").environment


def program(folder: Path, body: str) -> None:
    path = folder / "ggufrq"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.mark.skipif(os.name == "nt", reason="a script of the shell")
def test_a_profile_is_asked_of_ggufrq(
    module: Any, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.warns(
        UserWarning, match=r"without a profile: Some-8B-kv.gguf is not beside .* nor on the PATH"
    ):
        assert module.Cache(model, params(), "iso3", "iso3").environment["LLAMA_RQ_PROFILE"] == "none"
    with pytest.raises(module.CacheError, match="no profile from the weights: ggufrq, which makes one"):
        module.Cache(model, params(), "iso3", "iso3", None, "weights")
    program(tmp_path, 'echo a note >&2; echo "$*"')
    asked = params()
    asked.n_ctx = 4096
    found = module.Cache(model, asked, "iso3", "iso3").environment["LLAMA_RQ_PROFILE"]
    assert found == f"where profile {model} -c 4096"
    found = module.Cache(model, asked, "iso3", "iso3", None, "weights").environment["LLAMA_RQ_PROFILE"]
    assert found == f"where profile {model} --weights -c 4096"
    program(tmp_path, "echo 'error: no such heads' >&2; exit 7")
    with pytest.warns(UserWarning, match="no such heads"):
        module.Cache(model, params(), "iso3", "iso3")


def test_errors_of_llama_cpp_become_exceptions(module: Any, model: str) -> None:
    log, internals = module.log, sys.modules["llama_cpp._internals"]
    cache = module.Cache(model, params(), "iso3", "iso3", None, "none")

    def failing(*lines: tuple[int, str]) -> Callable[..., Any]:
        def context(**_: Any) -> None:
            assert os.environ["LLAMA_RQ_RECENT"] == "32"
            for level, text in lines:
                log.say(level, text)
            raise ValueError("Failed to create llama_context")

        return context

    initialize = "llama_init_from_model: failed to initialize the context: "
    heads = ((4, "llama_rq: iso3 cannot hold "), (5, "heads of 80: use q8_0\n"))
    cases: list[tuple[tuple[tuple[int, str], ...], str]] = [
        (((4, "gguf: bad\n"), (4, f"{initialize}the profile x is bad\n")), "the profile x is bad"),
        (((2, "fine\n"), *heads, (3, "a warning\n")), "iso3 cannot hold heads of 80: use q8_0"),
        (((4, "llama_rq: V is quantized: use -fa on\n"),), "V is quantized: use flash_attn=True"),
        ((), "Failed to create llama_context"),
    ]
    for lines, sentence in cases:
        internals.LlamaContext = failing(*lines)  # type: ignore[attr-defined]
        with pytest.raises(module.CacheError) as error:
            cache.context(model=None)
        assert str(error.value) == sentence
        assert log.callback is not None and ctypes.cast(log.callback, ctypes.c_void_p).value == (
            ctypes.cast(log.first, ctypes.c_void_p).value
        )
    assert "LLAMA_RQ_RECENT" not in os.environ
    assert "fine\n" in log.before


@pytest.mark.parametrize("wanted", [True, False])
def test_tokens_that_a_device_does_not_hold(module: Any, model: str, wanted: bool) -> None:
    closed = []

    def context(**_: Any) -> Any:
        module.log.say(3, "llama_rq: the newest 4 and first 1 tokens are not held in f16: use -fa on\n")
        return types.SimpleNamespace(close=lambda: closed.append(1))

    sys.modules["llama_cpp._internals"].LlamaContext = context  # type: ignore[attr-defined]
    cache = module.Cache(model, params(), "iso3", "iso3", None, "none", 4 if wanted else None)
    refused = pytest.raises(module.CacheError, match=r"the newest 4 .* use flash_attn=True; or without")
    with refused if wanted else contextlib.nullcontext():
        cache.context()
    assert bool(closed) == wanted


def test_a_state_that_is_refused(module: Any) -> None:
    def refuse(*_: Any) -> int:
        module.log.say(
            4, "state_set_data: error loading state: the state was saved with another cache type\n"
        )
        return 0

    with pytest.raises(RuntimeError, match=r"^the state was saved with another cache type"):
        module.call(refuse, 1, 2)
    assert module.call(lambda size: size, 7) == 7
