"""What this machine has for ggufrq, what it lacks, and the command that mends it."""

from __future__ import annotations

import importlib.util
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ggufrq.base import machine, paths, proc
from ggufrq.base.errors import GgufrqError, ModelError, ToolError
from ggufrq.build import (
    backends,
    builds,
    cuda_toolkit,
    hip_toolkit,
    manifest,
    prebuilt,
    toolchain,
    vulkan_toolkit,
)
from ggufrq.cache.kv import DEFAULT_KV, kv_types, parse_plan
from ggufrq.ggufs.heads import Heads
from ggufrq.patchset.series import load, problems
from ggufrq.source import obtain
from ggufrq.source.pin import load_pin

#: ``missing`` is required; ``todo`` is a step not yet taken; ``optional`` is something one can do without.
State = Literal["ok", "missing", "todo", "optional"]

#: Modules that llama.cpp's converter imports.
CONVERSION = ("torch", "transformers", "safetensors", "sentencepiece")


@dataclass(frozen=True)
class Check:
    """One line of the report: what, how it stands, what was found, and the command that mends it."""

    name: str
    state: State
    found: str
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """As an object for ``--json``."""
        return asdict(self)


def examine() -> list[Check]:
    """Look at everything; runs a few ``--version`` commands and touches no network."""
    programs = _build()
    # who has programs that were built elsewhere needs nothing to build others
    lack: State = "optional" if programs.state == "ok" else "missing"
    return [
        _python(),
        _program("C++ compiler", toolchain.compiler(), toolchain.remedy("compiler"), lack),
        _program("git", toolchain.git(), toolchain.remedy("git"), lack),
        _program("cmake", toolchain.cmake(), f"{sys.executable} -m pip install cmake", lack),
        _program("ninja", toolchain.ninja(), f"{sys.executable} -m pip install ninja", lack),
        _program("ccache", toolchain.ccache(), toolchain.remedy("ccache"), otherwise="optional"),
        _processor(),
        _gpu(),
        _amd_gpu(),
        _vulkan(),
        _memory(),
        _disk(),
        _patches(),
        _source("optional" if programs.state == "ok" else "todo"),
        programs,
        _conversion(),
        _models(),
    ]


def of_model(name: str, values: Mapping[str, Any], *, gpu: bool) -> Check:
    """Whether K and V of the model with this metadata can be kept in what ``run`` takes by itself, and in
    what else. ``gpu``: on one."""
    title = f"cache of {name}"
    try:
        heads = Heads.of_metadata(values)
    except ModelError as error:
        return Check(title, "optional", error.message, error.remedy or "")
    if not heads.layers:
        return Check(title, "ok", "keeps no K and V")
    holding = [kind for kind in kv_types() if heads.why_not(parse_plan(kind), gpu=gpu) is None]
    why = heads.why_not(parse_plan(DEFAULT_KV), gpu=gpu)
    if why is None:
        return Check(title, "ok", f"can be in {', '.join(holding)}")
    best = next((kind for kind in ("q8_0", "q4_0") if kind in holding), "f16")
    return Check(title, "optional", why, f"ggufrq run {name} --kv {best}")


def healthy(checks: list[Check]) -> bool:
    """Whether nothing that is required is missing."""
    return all(check.state != "missing" for check in checks)


def _python() -> Check:
    found = f"{platform.python_version()} ({sys.executable})"
    good = sys.version_info >= (3, 10)
    return Check("Python", "ok" if good else "missing", found, "" if good else "install Python 3.10 or newer")


def _program(
    name: str, program: toolchain.Program | None, remedy: str, otherwise: State = "missing"
) -> Check:
    if program is None:
        return Check(name, otherwise, "not found", remedy)
    return Check(name, "ok", f"{program.version} ({program.path})")


def _processor() -> Check:
    processor = machine.processor()
    return Check(
        "processor",
        "ok",
        f"{processor.name or processor.arch}, {machine.cores()} cores, {processor.simd}",
    )


def _gpu() -> Check:
    cards = cuda_toolkit.cards()
    if not cards:
        return Check("NVIDIA GPU", "ok", "none that nvidia-smi shows")
    found = ", ".join(f"{card.name} ({card.memory / 1024:.0f} GiB)" for card in cards)
    lacks = cuda_toolkit.missing()
    if lacks:
        return Check("NVIDIA GPU", "optional", f"{found}, but {lacks[0].what}", lacks[0].remedy)
    return Check("NVIDIA GPU", "ok", f"{found}, driver {cards[0].driver}")


def _amd_gpu() -> Check:
    cards, hip = hip_toolkit.cards(), hip_toolkit.toolkit()
    if not cards and hip is None:
        return Check("AMD GPU", "ok", "none that rocm_agent_enumerator shows, and no HIP")
    found = ", ".join(cards) or "no card"
    lacks = hip_toolkit.missing()
    if lacks:
        return Check("AMD GPU", "optional", f"{found}, and {lacks[0].what}", lacks[0].remedy)
    assert hip is not None
    return Check("AMD GPU", "ok", f"{found}, HIP {hip.version} ({hip.root}), for: ggufrq build --backend hip")


def _vulkan() -> Check:
    devices = vulkan_toolkit.devices()
    none = "GPU that vulkaninfo shows" if shutil.which("vulkaninfo") else "vulkaninfo (vulkan-tools) to ask"
    found = ", ".join(devices) or f"no {none}"
    lacks = vulkan_toolkit.missing()
    if lacks:
        return Check("Vulkan", "optional", f"{found}, and {lacks[0].what}", lacks[0].remedy)
    kit = vulkan_toolkit.find()
    told = f"{found}, headers {kit.headers}, glslc {kit.version} ({kit.glslc})"
    if devices and backends.default() == "vulkan":
        return Check("Vulkan", "ok", f"{told}, taken by itself; {backends.caution('vulkan')}")
    return Check("Vulkan", "ok", f"{told}, for: ggufrq build --backend vulkan")


def _memory() -> Check:
    found = machine.memory()
    if found is None:
        return Check("memory", "ok", "unknown")
    total, available = found
    text = f"{available / machine.GIB:.1f} of {total / machine.GIB:.1f} GiB free, "
    text += f"enough for {machine.compile_jobs()} compilers at once"
    enough = available >= machine.BYTES_PER_JOB
    remedy = "close programs, or build with: ggufrq build --jobs 1"
    return Check("memory", "ok" if enough else "todo", text, "" if enough else remedy)


def _disk() -> Check:
    try:
        cache = paths.cache_dir()
        builds.require_place(cache)
    except GgufrqError as error:
        return Check("disk", "missing", error.message, error.remedy or "")
    free = machine.free_disk(cache)
    enough = free >= builds.NEEDED_DISK
    text = f"{free / 1e9:.1f} GB free for {cache}"
    remedy = f"free 1 GB, or set {paths.CACHE_VARIABLE} to a folder on a larger disk"
    return Check("disk", "ok" if enough else "missing", text, "" if enough else remedy)


def _patches() -> Check:
    try:
        root = paths.data_dir("patches")
        wrong = problems(root)
        if wrong:
            return Check("patch set", "missing", wrong[0], f"git checkout {root}")
        loaded = load(root)
    except GgufrqError as error:
        return Check("patch set", "missing", error.message, error.remedy or "")
    return Check(
        "patch set",
        "ok",
        f"{loaded.hash[:8]}: {len(loaded.patches)} patches, {len(loaded.overlay)} files of ours",
    )


def _source(otherwise: State) -> Check:
    pin = load_pin()
    tree = obtain.cached(pin)
    if tree is None:
        remedy = "ggufrq build" if otherwise == "todo" else ""
        return Check("llama.cpp source", otherwise, f"{pin.short} is not cached", remedy)
    return Check("llama.cpp source", "ok", f"{pin.short} of {pin.date} ({tree})")


def _build() -> Check:
    try:
        found = None if prebuilt.chosen() else builds.find_build()
        other = None if found else prebuilt.find()
    except GgufrqError as error:
        return Check("build", "missing", error.message, error.remedy or "")
    if other is not None:
        try:
            proc.run([other.tool("llama-cli"), "--version"], timeout=60)
        except ToolError as error:
            text = f"{prebuilt.named(other)} does not run: {error.message}"
            return Check("build", "missing", text, "ggufrq build, which compiles for this machine")
        text = f"{prebuilt.named(other)} is used ({other.key}); {prebuilt.gain(other)}"
        more = (prebuilt.not_loaded(other), prebuilt.caution(other))
        return Check("build", "ok", "; ".join(filter(None, [text, *more])))
    if found is None:
        cache = paths.find_cache()
        others = len(list(cache.glob(f"builds/*/{manifest.MANIFEST}"))) if cache is not None else 0
        text = f"none for this patch set and processor ({others} for others)" if others else "none"
        if toolchain.compiler() is None and platform.system() == "Linux":
            return Check("build", "todo", f"{text}; the wheel takes no compiler", prebuilt.INSTALL)
        return Check("build", "todo", text, "ggufrq build")
    try:
        proc.run([found.tool("llama-cli"), "--version"], timeout=60)
    except ToolError as error:
        text = f"{found.key} does not run: {error.message}"
        return Check("build", "missing", text, f"remove {found.root}, then: ggufrq build")
    return Check("build", "ok", f"{found.key} of {found.manifest['date'][:10]} ({found.bin})")


def _conversion() -> Check:
    absent = [name for name in CONVERSION if importlib.util.find_spec(name) is None]
    if not absent:
        return Check("conversion", "ok", ", ".join(CONVERSION))
    return Check(
        "conversion",
        "optional",
        f"no {', '.join(absent)}: safetensors models cannot be converted, GGUF files can be used",
        f"{sys.executable} -m pip install {_requirement()}",
    )


def _requirement() -> str:
    checkout = paths.checkout_dir()
    return f"-e '{checkout}[convert]'" if (checkout / "pyproject.toml").is_file() else "'ggufrq[convert]'"


def _models() -> Check:
    try:
        root = paths.data_dir("models")
    except GgufrqError as error:
        return Check("embedded models", "missing", error.message, error.remedy or "")
    names = sorted(folder.parent.name for folder in root.glob("*/config.json"))
    whole = [name for name in names if any((root / name).glob("*.safetensors"))]
    if not whole:
        return Check("embedded models", "missing", f"none in {root}", "reinstall ggufrq, or clone it again")
    return Check("embedded models", "ok", ", ".join(whole))
