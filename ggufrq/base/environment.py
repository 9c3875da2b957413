"""The environment that programs get. What is asked of llama.cpp's stands in their arguments; nothing that
a shell happens to hold changes it.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

import ggufrq

Environment = Mapping[str, str | None]

#: Names of llama.cpp's programs.
_PROGRAM = re.compile(r"(?:llama|ggml|test)-[\w-]+(?:\.exe)?")
#: Variables of theirs that stand for options, or change what they compute or log.
_OPTION = re.compile(
    r"LLAMA_ARG_(?:NO_)?(?P<option>\w+)|LLAMA_API_KEY|LLAMA_ATTN_ROT_DISABLE|AIP_\w+"
    r"|LLAMA_RQ_(?:LAYERS|PROFILE|CALIB|RECENT|FIRST)"
)
#: The options among them that only say where, and by how many threads, to compute.
_OF_THE_MACHINE = frozenset(
    {
        *("CPU_MOE", "DEVICE", "FIT", "FIT_TARGET", "KV_OFFLOAD", "LAZY_MODE", "LOAD_MODE", "MAIN_GPU"),
        *("N_CPU_FFN", "N_CPU_MOE", "N_GPU_LAYERS", "NUMA", "OVERRIDE_TENSOR", "REPACK", "RPC"),
        *("SPLIT_MODE", "TENSOR_SPLIT", "THREADS"),
    }
)
_LIBRARIES = {"darwin": "DYLD_LIBRARY_PATH", "win32": "PATH"}.get(sys.platform, "LD_LIBRARY_PATH")


def of_program(command: str, added: Environment | None = None) -> dict[str, str]:
    """The environment of a program: this process's, without what must not reach it, with what is ``added`` (a
    value of None removes a variable)."""
    found = dict(os.environ)
    ours = _PROGRAM.fullmatch(Path(command).name) is not None
    if ours:
        for name in kept_out():
            del found[name]
        found |= of_libraries(Path(command).parent)
        # one that gives up would call a debugger, whose words would stand among its own
        found.setdefault("GGML_NO_BACKTRACE", "1")
    for name, value in (added or {}).items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = value
    if ours and not {"LLAMA_RQ_PROFILE", "LLAMA_RQ_CALIB"} & found.keys():
        found["LLAMA_RQ_PROFILE"] = "none"  # else they would take the one beside the model, asked for or not
    return found


def kept_out() -> dict[str, str]:
    """This process's variables that llama.cpp's programs do not get."""
    return {name: value for name, value in os.environ.items() if _is_option(name, of_the_machine=False)}


def of_the_machine() -> dict[str, str]:
    """This process's variables that say where llama.cpp's programs compute, which they get, by name."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if name.endswith("_VISIBLE_DEVICES") or _is_option(name, of_the_machine=True)
    }


def _is_option(name: str, *, of_the_machine: bool) -> bool:
    """Whether a variable stands for such an option of llama.cpp."""
    part = _OPTION.fullmatch(name)
    return part is not None and (part["option"] in _OF_THE_MACHINE) == of_the_machine


def of_libraries(folder: Path) -> dict[str, str]:
    """Variables that let programs and libraries in ``folder`` find their own libraries before any other of
    the same name."""
    if not folder.is_absolute():
        return {}
    own = [str(place) for place in (folder, folder.parent / "lib") if place.is_dir()]
    return {_LIBRARIES: os.pathsep.join([*own, *filter(None, [os.environ.get(_LIBRARIES)])])}


def of_package() -> dict[str, str]:
    """Variables by which another Python finds this package, wherever it lies."""
    folder = Path(ggufrq.__file__).resolve().parent.parent
    return {"PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}
