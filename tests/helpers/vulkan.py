"""Vulkan without a GPU: Mesa's lavapipe, which computes on the processor, and glslc, unpacked into the
cache; and upstream's backend with our shaders as a module that any build loads (GGML_BACKEND_PATH).

Of upstream's eleven hundred shaders those are compiled that our types, those beside them and a small model
take; the others are empty, so that a module is made in minutes. What glslc made is kept by flags and text.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ggufrq.base import paths, proc
from ggufrq.build import toolchain
from ggufrq.build.debian import Unreachable, unpack
from ggufrq.build.project import Build

#: Debian 12 has glslc and what lavapipe needs, its backports a new lavapipe, Debian 13 the headers.
OWN = [
    "glslc",
    "libvulkan1",
    "vulkan-validationlayers",
    "libllvm15",
    "libwayland-client0",
    "libx11-xcb1",
    "libxshmfence1",
]
OWN += [f"libxcb-{name}" for name in ("dri3-0", "present0", "randr0", "shm0", "sync1", "xfixes0")]
DRIVER = ["mesa-vulkan-drivers", "libdrm2", "libdrm-amdgpu1"]
HEADERS = ["libvulkan-dev", "spirv-headers"]
#: Of a release whose glslc compiles all of upstream's shaders.
NEWEST = ("forky", ["glslc", "libvulkan1", "mesa-vulkan-drivers"])

#: Types of weights that shaders are compiled for, beside our own.
_TYPES = "|".join(f"-DDATA_A_{name}=*" for name in ("F32", "F16", "BF16", "Q8_0", "Q4_0", "IQ4_NL"))
#: Sources of operations that neither our types nor a small model take.
_LEFT_OUT = (
    "argsort* col2im* conv* count_* cross_* cumsum* dsv4* flash_attn_sparse* gated_delta* geglu* gla.comp "
    "group_norm* im2col* l2_norm* lightning* opt_step* out_prod* pad* pool* reglu* roll* snake* solve_tri* "
    "ssm_* timestep* topk* upscale* wkv* *_back.comp"
)

_WRAPPER = """\
#!/bin/sh
# glslc as upstream's generator calls it
out='' flags='' source='' depends='' previous='' empty=''
for word; do
    case $previous in
        -o) out=$word ;;
        -MF) depends=$word ;;
        *) case $word in
            -o|-MD|-MF) ;;
            *.comp) source=$word ;;
            {types}) flags="$flags $word" ;;
            -DDATA_A_*|-DMUL_MAT_ID*|-DDOT2_F16*) empty=1 ;;
            *) flags="$flags $word" ;;
        esac ;;
    esac
    previous=$word
done
case ${{source##*/}} in {left_out}) empty=1 ;; {only}) ;; *) empty=1 ;; esac
if [ -n "$empty" ]; then
    [ -z "$depends" ] || echo "$out: $source" > "$depends"
    exec cp {folder}/empty.spv "$out"
fi
text=$({glslc} -E $(for word in $flags; do [ "$word" = -O ] || echo "$word"; done) "$source") || exit
if [ -n "$depends" ]; then
    included=$(printf '%s\\n' "$text" | sed -n 's/^#line [0-9]* "\\(.*\\)"/\\1/p' | sort -u | tr '\\n' ' ')
    echo "$out: $included $source" > "$depends"
fi
kept={folder}/$( {{ echo "$flags"; printf '%s\\n' "$text" | sed '/^#line/d'; }} | sha256sum | cut -c1-32).spv
if ! cp "$kept" "$out" 2> /dev/null; then
    {glslc} $flags "$source" -o "$out" || exit
    cp "$out" "$kept.$$" && mv "$kept.$$" "$kept"
fi
"""


@dataclass(frozen=True)
class Vulkan:
    """Where glslc, headers and the loader are, and the environment in which programs find lavapipe."""

    glslc: Path
    include: Path
    loader: Path
    environment: dict[str, str]
    starts: tuple[str, ...] = ()  # what programs are started by that take another C library


def bring() -> Vulkan:
    """Debian's packages, unpacked into the cache once. Raises Unreachable."""
    codename = (
        platform.freedesktop_os_release().get("VERSION_CODENAME") if platform.system() == "Linux" else None
    )
    if codename != "bookworm":
        raise Unreachable("the packages are chosen for Debian 12")
    names = " ".join([*OWN, *DRIVER, *HEADERS, platform.machine()])
    root = paths.cache_dir() / f"vulkan-debian-{hashlib.sha256(names.encode()).hexdigest()[:12]}"
    if not root.is_dir():
        with paths.atomic_path(root) as making:
            unpack(making / "run", OWN, release="bookworm-backports", alone=DRIVER)
            unpack(making / "headers", release="trixie", alone=HEADERS)
    libraries = root / "run" / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    driver = str(root / "run" / "usr" / "share" / "vulkan" / "icd.d" / "lvp_icd.json")
    environment = {
        "LD_LIBRARY_PATH": str(libraries),
        "VK_DRIVER_FILES": driver,
        "VK_ICD_FILENAMES": driver,  # as older loaders call it
        "GGML_VK_VISIBLE_DEVICES": "0",  # llama.cpp passes over processors unless told so
    }
    glslc = root / "run" / "usr" / "bin" / "glslc"
    return Vulkan(glslc, root / "headers" / "usr" / "include", libraries / "libvulkan.so.1", environment)


def bring_newest() -> Vulkan:
    """The same of a newer Debian, with its C library. Raises Unreachable."""
    older = bring()
    release, names = NEWEST
    key = hashlib.sha256(" ".join([release, *names, platform.machine()]).encode()).hexdigest()[:12]
    root = paths.cache_dir() / f"vulkan-{release}-{key}"
    if not root.is_dir():
        with paths.atomic_path(root) as making:
            unpack(making, release=release, whole=names)
    libraries = root / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    driver = str(root / "usr" / "share" / "vulkan" / "icd.d" / "lvp_icd.json")
    environment = {"VK_DRIVER_FILES": driver, "GGML_VK_VISIBLE_DEVICES": "0"}
    (linker,) = libraries.glob("ld-linux-*")
    starts = (str(linker), "--library-path", str(libraries))
    return Vulkan(root / "usr" / "bin" / "glslc", older.include, older.loader, environment, starts)


def mirror(build: Build, folder: Path) -> None:
    """The sources of the backend in ``folder``/ggml-vulkan, those written anew that differ."""
    source = build.source / "ggml" / "src" / "ggml-vulkan"
    for path in sorted(path for path in source.rglob("*") if path.is_file()):
        target = folder / "ggml-vulkan" / path.relative_to(source)
        if not target.is_file() or target.read_bytes() != path.read_bytes():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def module(
    vulkan: Vulkan, build: Build, folder: Path, *, only: str = "*", features: Sequence[str] = ()
) -> Path:
    """libggml-vulkan.so for a build, made in ``folder`` of the sources in ``folder``/ggml-vulkan (see
    ``mirror``); only what has changed since is made anew. Raises ToolError where something does not compile.

    ``only``: patterns of the sources of shaders that are not left empty, with ``|`` between them.
    ``features``: what upstream's CMake finds that glslc compiles (``COOPMAT``).
    """
    sources = Path("ggml-vulkan")
    kept = paths.cache_dir() / ("vulkan-shaders-newest" if vulkan.starts else "vulkan-shaders")
    shaders = sources / "vulkan-shaders"
    for needed in (folder / "spv", kept):
        needed.mkdir(parents=True, exist_ok=True)
    glslc = _wrapper(vulkan, kept, folder, only)
    supported = " ".join(f"-DGGML_VULKAN_{name}_GLSLC_SUPPORT" for name in features)
    ccache, ninja = toolchain.ccache(), toolchain.ninja()
    assert ninja is not None
    compiler = (
        f"{ccache.path if ccache else ''} {os.environ.get('CXX') or shutil.which('c++') or 'g++'}".strip()
    )
    for name, place in (
        ("ggml", build.source / "ggml"),
        ("bin", build.bin),
    ):  # what ccache sees stays the same
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(place)
    include = f"-I. -I{sources} -Iggml/include -Iggml/src -I{vulkan.include}"
    defined = "-DGGML_BACKEND_DL -DGGML_BACKEND_BUILD -DGGML_BACKEND_SHARED -DGGML_SHARED -DNDEBUG"
    defined += f" {supported}"
    lines = [
        f"rule c\n  command = {compiler} -std=c++17 -O1 -w -fPIC {defined} {include}"
        " -MD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        f"rule generator\n  command = {compiler} -std=c++17 -O0 -w -pthread {supported} $in -o $out",
        "rule names\n  command = ./generator --output-dir spv --target-hpp $out",
        f"rule shader\n  command = ./generator --glslc ./{glslc} --source $in --output-dir spv "
        "--target-hpp ggml-vulkan-shaders.hpp --target-cpp $out",
        "  depfile = $out.d",
        f"rule link\n  command = {compiler} -shared $in -Lbin -lggml-base {vulkan.loader} -pthread -o $out",
        f"build generator: generator {shaders / 'vulkan-shaders-gen.cpp'} | {shaders / 'rq-shaders.h'}",
        "build ggml-vulkan-shaders.hpp: names | generator",
    ]
    objects = []
    for path in sorted((folder / shaders).glob("*.comp")):
        needs = f"generator {glslc} || ggml-vulkan-shaders.hpp"
        lines.append(f"build {path.name}.cpp: shader {shaders / path.name} | {needs}")
        lines.append(f"build {path.name}.o: c {path.name}.cpp")
        objects.append(f"{path.name}.o")
    for path in sorted((folder / sources).glob("*.cpp")):
        lines.append(f"build {path.stem}.o: c {sources / path.name} || ggml-vulkan-shaders.hpp")
        objects.append(f"{path.stem}.o")
    lines.append(f"build libggml-vulkan.so: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    proc.run(
        [ninja.path, "-j2", "libggml-vulkan.so"], cwd=folder, env={"CCACHE_NOHASHDIR": "1"}, timeout=3000
    )
    return folder / "libggml-vulkan.so"


def _wrapper(vulkan: Vulkan, kept: Path, folder: Path, only: str) -> str:
    """What upstream's generator calls for glslc; it finds the libraries of Debian's."""
    starts = vulkan.starts or ("env", f"LD_LIBRARY_PATH={vulkan.environment['LD_LIBRARY_PATH']}")
    real = " ".join([*starts, str(vulkan.glslc)])
    left_out = _LEFT_OUT.replace(" ", "|")
    text = _WRAPPER.format(types=_TYPES, left_out=left_out, only=only, glslc=real, folder=kept)
    script = folder / "glslc"
    if not script.is_file() or script.read_text(encoding="utf-8") != text:
        script.write_text(text, encoding="utf-8")
        script.chmod(0o755)
    if not (kept / "empty.spv").is_file():
        empty = kept / "empty.comp"
        empty.write_text("#version 450\nvoid main() {}\n", encoding="utf-8")
        proc.run([*real.split(), "-fshader-stage=compute", empty, "-o", kept / "empty.spv"])
    return script.name
