"""Rotated KV caches in llama-cpp-python: types by name, profiles of K, newest and first tokens in f16.

ggufrq puts this file into the wheels that it makes, where llama.py calls it. It needs nothing else of ggufrq:
only a profile that has to be made is asked of the program ``ggufrq``.

SPDX-License-Identifier: MIT
Copyright (c) 2026 The ggufrq authors
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, SupportsIndex

import llama_cpp._internals as internals
import llama_cpp.llama_cpp as llama_cpp
from llama_cpp._ggufrq_names import names_beside

#: What ggufrq knows: types, and how many tokens are kept in f16 unless told otherwise and at most.
FACTS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
#: Numbers of the types that K and V can have, by their names.
TYPES: dict[str, int] = FACTS["types"]

_LAYERS, _PROFILE, _CALIBRATION = "LLAMA_RQ_LAYERS", "LLAMA_RQ_PROFILE", "LLAMA_RQ_CALIB"
_RECENT, _FIRST = "LLAMA_RQ_RECENT", "LLAMA_RQ_FIRST"
_PLAIN = ("f32", "f16", "bf16")
_ERROR, _CONTINUED = 4, 5  # enum ggml_log_level
_NOT_HELD = re.compile(r"llama_rq: (the newest \d+ and first \d+ tokens) are not held in f16: (.*)")
#: What stands before the reason in an error of llama.cpp.
_BEFORE = re.compile(r"^(?:\w+: )?(?:failed to initialize the context: |error loading state: )?")
#: Options of llama.cpp's programs that its errors name, as they are called here.
_OPTIONS = {
    "-fa on": "flash_attn=True",
    "--kv-profile none": 'kv_profile="none"',
    "--no-kv-offload": "offload_kqv=False",
    "--split-mode layer": "split_mode=1",
    "--split-mode tensor": "split_mode=3",
}
#: The environment and the log are the process's.
_LOCK = threading.RLock()


class CacheError(ValueError, RuntimeError):
    """A cache that cannot be as it was asked for, or a state that cannot be read: why, and what to do."""


def _library(name: str, result: Any, *arguments: Any) -> Any:
    """A function of ggml, which libllama brings along."""
    return ctypes.CFUNCTYPE(result, *arguments)((name, llama_cpp._lib))


def _load_backends() -> None:
    """Load the code for this processor, where the wheel holds some for each kind. Where not, ggml does so by
    itself, and later: a driver of GPUs is not for every process that imports this."""
    folder = Path(llama_cpp._base_path)
    if any(folder.glob("*ggml-cpu-*")):
        with _heard(pass_on=False):  # it names each on stderr
            _library("ggml_backend_load_all_from_path", None, ctypes.c_char_p)(os.fsencode(folder))


class Cache:
    """What a ``Llama`` keeps K and V in; sets the types in ``params``.

    Raises CacheError for a name that is none, V in blocks without flash attention, a profile that is missing
    or cannot be made, and tokens in f16 or a profile beside no type of ours.
    """

    def __init__(
        self,
        model: str,
        params: Any,
        type_k: SupportsIndex | str | None,
        type_v: SupportsIndex | str | None,
        layers: str | None = None,
        profile: str | None = None,
        recent: int | None = None,
        first: int | None = None,
    ) -> None:
        self.asked = {"kv_layers": layers, "kv_profile": profile, "kv_recent": recent, "kv_first": first}
        if type_k is not None:
            params.type_k = _number("type_k", type_k)
        if type_v is not None:
            params.type_v = _number("type_v", type_v)
        spec = os.environ.get(_LAYERS, "") if layers is None else layers
        apart = _pairs(spec)
        k_types = [_name(params.type_k), *(pair[0] for pair in apart)]
        v_types = [_name(params.type_v), *(pair[1] for pair in apart)]
        if params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED:
            blocks = [name for name in v_types if name not in _PLAIN]
            if blocks:
                raise CacheError(f"V in {blocks[0]} takes flash attention: Llama(…, flash_attn=True)")
        k_ours = any(name in FACTS["ours"] for name in k_types)
        rotated = k_ours or any(name in FACTS["ours"] for name in v_types)
        #: What llama.cpp reads while it makes a context; None removes a variable.
        self.environment: dict[str, str | None] = {} if layers is None else {_LAYERS: layers or None}
        self._wanted = bool(recent or first)  # else they are left out where a device cannot hold them
        quantized = any(name not in _PLAIN for name in (*k_types, *v_types))
        if not quantized and self._wanted:
            raise CacheError(
                "kv_recent and kv_first keep tokens in f16 beside a quantized type, and K is in "
                f'{k_types[0]}, V in {v_types[0]}: without them, or type_k="iso3"'
            )
        if profile not in (None, "none") and not k_ours:
            raise CacheError(
                f"a profile is for K in a type of ours, and K is in {k_types[0]}: without kv_profile, or "
                'type_k="iso3"'
            )
        if rotated or (quantized and self._wanted):
            usual = (FACTS["recent"], FACTS["first"]) if rotated else (0, 0)
            self.environment[_RECENT] = _tokens("kv_recent", recent, _RECENT, usual[0])
            self.environment[_FIRST] = _tokens("kv_first", first, _FIRST, usual[1])
        if k_ours and Path(model).exists():
            self._take_profile(model, profile, params.n_ctx)

    def context(self, **arguments: Any) -> Any:
        """A ``LlamaContext`` with such a cache. Raises CacheError with llama.cpp's own reason."""
        with _LOCK, _variables(self.environment), _heard() as said:
            try:
                made = internals.LlamaContext(**arguments)
            except ValueError as error:
                raise CacheError(said.reason() or str(error)) from None
        left = _NOT_HELD.search(said.text)
        if left and self._wanted:
            made.close()
            why = _in_words(left[2])
            raise CacheError(f"{left[1]} cannot be held in f16: {why}; or without kv_recent and kv_first")
        return made

    def _take_profile(self, model: str, wish: str | None, n_ctx: int) -> None:
        """Raises CacheError for a file that is missing, and for one from the weights that was asked for and
        cannot be made."""
        if wish is None and any(os.environ.get(name) for name in (_PROFILE, _CALIBRATION)):
            return
        found: Path | None = None
        if wish in (None, "weights"):
            found, why = (_beside(model) if wish is None else None), ""
            if found is None:
                found, why = _made(model, n_ctx, by_weights=wish is not None)
            if found is None and wish is not None:
                raise CacheError(f"no profile from the weights: {why}")
            if found is None:
                beside = next(names_beside(Path(model)))
                why = f"{beside} is not beside the model, and {why}"
                warnings.warn(f"K is kept without a profile: {why}", stacklevel=4)
        elif wish != "none":
            found = Path(str(wish))
            if not found.is_file():
                raise CacheError(f'the profile {found} is missing: a file, or kv_profile="weights" or "none"')
        # llama.cpp does not warn of what was said
        self.environment[_PROFILE] = "none" if found is None else str(found)
        self.environment[_CALIBRATION] = None


def call(function: Callable[..., int], *arguments: Any) -> int:
    """What a function of llama.cpp returns. Raises CacheError with its reason where that is 0 and it says
    one."""
    with _LOCK, _heard() as said:
        result = function(*arguments)
    reason = "" if result else said.reason()
    if reason:
        raise CacheError(reason)
    return result


def _number(argument: str, kind: SupportsIndex | str) -> int:
    """The number of a type by its name, or as it is: an integer of Python or numpy."""
    if isinstance(kind, SupportsIndex):
        return operator.index(kind)
    name = str(kind).strip().lower()
    if name.isdigit():
        return int(name)
    if name not in TYPES:
        raise CacheError(f'there is no cache type "{kind}" for {argument}; there are {", ".join(TYPES)}')
    return TYPES[name]


def _name(number: int) -> str:
    return next((name for name, one in TYPES.items() if one == number), f"type {number}")


def _pairs(spec: str) -> list[tuple[str, str]]:
    """The types of K and V in a specification of layers; llama.cpp says what is wrong with one."""
    pairs = []
    for entry in spec.replace(" ", "").split(";"):
        names = entry.partition(":")[2].split("/")
        pairs += [(names[0], names[-1])] if names[0] else []
    return pairs


def _tokens(argument: str, wish: int | None, variable: str, usual: int) -> str:
    """How many tokens are kept in f16, as the variable says it."""
    if wish is None:
        return os.environ.get(variable) or str(usual)
    if not 0 <= wish <= FACTS["most"]:
        raise CacheError(f"{argument}={wish}: 0 to {FACTS['most']} tokens can be kept in f16")
    return str(wish)


def _beside(model: str) -> Path | None:
    path = Path(model)
    files = (path.parent / name for name in names_beside(path))
    return next((file for file in files if file.is_file()), None)


def _made(model: str, n_ctx: int, *, by_weights: bool) -> tuple[Path | None, str]:
    """The profile that ggufrq makes or has kept from before, or just that from the weights; None, and why."""
    if importlib.util.find_spec("ggufrq") is not None:
        program = [sys.executable, "-m", "ggufrq"]
    else:
        on_path = shutil.which("ggufrq")
        if on_path is None:
            return None, "ggufrq, which makes one, is neither installed here nor on the PATH"
        program = [on_path]
    command = [*program, "where", "profile", model, *(["--weights"] if by_weights else [])]
    command += ["-c", str(n_ctx)] if n_ctx else []
    done = subprocess.run(command, capture_output=True, encoding="utf-8")
    if done.returncode == 0:
        return Path(done.stdout.strip()), ""
    said = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return None, said[0][len("error: ") :] if said else f"`{' '.join(command)}` failed"


class _Said:
    """What llama.cpp said meanwhile: levels and lines."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, str]] = []

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(text for _, text in self.lines)

    def reason(self) -> str:
        """The last error, which names what was asked for: without the function that it is from, and in the
        words of Python."""
        text = ""
        for level, part in self.lines:
            text += part if level == _ERROR or (level == _CONTINUED and text) else ""
        lines = text.strip().splitlines()
        return _in_words(_BEFORE.sub("", lines[-1]).strip()) if lines else ""


def _in_words(line: str) -> str:
    """A sentence of llama.cpp with arguments of ``Llama`` in place of options."""
    for option, argument in _OPTIONS.items():
        line = line.replace(option, argument)
    return line


@contextlib.contextmanager
def _heard(*, pass_on: bool = True) -> Iterator[_Said]:
    """Hear the log of llama.cpp, which goes on to where it went unless told otherwise."""
    said = _Said()
    before, data = llama_cpp.llama_log_callback(), ctypes.c_void_p()
    llama_cpp.llama_log_get(ctypes.byref(before), ctypes.byref(data))

    @llama_cpp.llama_log_callback  # type: ignore[untyped-decorator]
    def hear(level: int, text: bytes, _: Any) -> None:
        said.lines.append((level, text.decode("utf-8", errors="replace")))
        if pass_on:
            before(level, text, data)

    llama_cpp.llama_log_set(hear, ctypes.c_void_p())
    try:
        yield said
    finally:
        llama_cpp.llama_log_set(before, data)


@contextlib.contextmanager
def _variables(values: dict[str, str | None]) -> Iterator[None]:
    """These variables of the environment; None removes one."""
    before = {name: os.environ.get(name) for name in values}

    def put(those: dict[str, str | None]) -> None:
        for name, value in those.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value

    put(values)
    try:
        yield
    finally:
        put(before)


_load_backends()
