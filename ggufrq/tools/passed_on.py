"""Options and variables of the user's that llama.cpp's programs get as they are, and those that they must not
get: these would change what stands in the arguments of ours, or where and in which form an answer comes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence

from ggufrq.base import environment, log
from ggufrq.base.errors import UsageError

_MODEL = "the model is named by MODEL"
_LOG = "the server's log is read, to see how its cache is kept"
_ENDS = "it prints something and ends; ask the program itself: $(ggufrq where bin)/llama-server"
#: What may not be passed on: the names of an option, its variable without LLAMA_ARG_, and why not or what
#: says it instead.
_SETTLED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("-m", "--model"), "MODEL", _MODEL),
    (("-mu", "--model-url"), "MODEL_URL", _MODEL),
    (("-hf", "-hfr", "--hf-repo"), "HF_REPO", _MODEL),
    (("-hff", "--hf-file"), "HF_FILE", _MODEL),
    (("-dr", "--docker-repo"), "DOCKER_REPO", _MODEL),
    (("--host",), "HOST", "--host of ggufrq says it"),
    (("--port",), "PORT", "--port of ggufrq says it"),
    (("-c", "--ctx-size"), "CTX_SIZE", "-c of ggufrq says it"),
    (("-np", "--parallel"), "N_PARALLEL", "--parallel of ggufrq says it"),
    (("-ctk", "--cache-type-k"), "CACHE_TYPE_K", "--kv of ggufrq says it"),
    (("-ctv", "--cache-type-v"), "CACHE_TYPE_V", "--kv of ggufrq says it"),
    (("--kv-layers",), "", "--kv of ggufrq says it"),
    (("--kv-profile", "--kv-calib"), "", "--kv-profile of ggufrq says it"),
    (("--kv-recent",), "", "--kv-recent of ggufrq says it"),
    (("--kv-first",), "", "--kv-first of ggufrq says it"),
    (("-lv", "--verbosity", "--log-verbosity"), "LOG_VERBOSITY", _LOG),
    (("--log-disable",), "", _LOG),
    (("--log-jsonl", "--no-log-jsonl"), "LOG_JSONL", _LOG),
    (("--log-colors",), "LOG_COLORS", _LOG),
    (("--log-prefix", "--no-log-prefix"), "LOG_PREFIX", _LOG),
    (("--log-timestamps", "--no-log-timestamps"), "LOG_TIMESTAMPS", _LOG),
    (("--ssl-key-file",), "SSL_KEY_FILE", "ggufrq asks by http whether it is ready"),
    (("--ssl-cert-file",), "SSL_CERT_FILE", "ggufrq asks by http whether it is ready"),
    (
        ("-h", "--help", "--usage", "--version", "--license", "-cl", "--cache-list", "--list-devices"),
        "",
        _ENDS,
    ),
)
#: Options that stand for a model of their own, with a port and a context.
_PRESET = re.compile(r"--(?!spec-default$).+-default|--fim-.+-spec")
#: Options of all programs that say on which devices and in whose memory a model lies: how many values follow.
PLACES = {
    **dict.fromkeys(("-ngl", "--gpu-layers", "--n-gpu-layers", "-dev", "--device", "--rpc"), 1),
    **dict.fromkeys(("-sm", "--split-mode", "-ts", "--tensor-split", "-mg", "--main-gpu"), 1),
    **dict.fromkeys(("-ot", "--override-tensor", "-ncmoe", "--n-cpu-moe", "-ncffn", "--n-cpu-ffn"), 1),
    **dict.fromkeys(("-fit", "--fit", "-fitt", "--fit-target"), 1),
    **dict.fromkeys(("-cmoe", "--cpu-moe", "-kvo", "--kv-offload", "-nkvo", "--no-kv-offload"), 0),
}
_PREFIX, _PREFIX_VARIABLE = "--api-prefix", "LLAMA_ARG_API_PREFIX"


def check(options: Sequence[str]) -> None:
    """Raise UsageError for the first option that may not be passed on."""
    for option in map(_normal, options):
        reasons = [why for names, _, why in _SETTLED if option in names]
        if _PRESET.fullmatch(option):
            reasons.append(_MODEL)
        if reasons:
            raise UsageError(
                f"{option} cannot be passed on to llama-server: {reasons[0]}", remedy=f"without {option}"
            )


def check_places(options: Sequence[str]) -> None:
    """Raise UsageError unless all options are such as ``places`` finds, with their values."""
    taken = places(options)
    if taken != tuple(options):
        other = next((one for one in options if one not in taken), options[-1])
        raise UsageError(
            f"'{other}' is not passed on: behind -- ggufrq run takes where the model is to lie, as -ngl 0, "
            "-dev none, -ot REGEX=CPU",
            remedy="-p TEXT for the prompt; ggufrq serve MODEL -- passes all options on",
        )


def variables() -> dict[str, str]:
    """The user's variables that stand for options of llama.cpp, for ``run`` and ``serve``; says which ones
    are not passed on."""
    settled = {f"LLAMA_ARG_{name}": why for _, name, why in _SETTLED if name}
    found = environment.kept_out()
    for name in sorted(found.keys() & settled.keys()):
        log.say(f"{name} is not passed on: {settled[name]}")
    return {name: value for name, value in found.items() if name not in settled}


def api_prefix(options: Sequence[str], env: environment.Environment | None = None) -> str:
    """The path below which a server with these options and variables answers, empty or as ``/x``."""
    found = (env or {}).get(_PREFIX_VARIABLE) or ""
    for option, value in itertools.pairwise(options):
        found = value if _normal(option) == _PREFIX else found
    return found


def places(options: Sequence[str]) -> tuple[str, ...]:
    """Those of the options that say on which devices and in whose memory the model lies, with their values,
    for other programs that load it as well. Their variables reach these anyway (``environment``)."""
    found: list[str] = []
    for i, option in enumerate(options):
        values = PLACES.get(_normal(option))
        if values is not None:
            found += options[i : i + 1 + values]
    return tuple(found)


def _normal(option: str) -> str:
    """An option as llama.cpp takes it: with - for _."""
    return option.replace("_", "-") if option.startswith("--") else option
