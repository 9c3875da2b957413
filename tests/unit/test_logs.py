"""What logs say of layered and calibrated caches, on saved real output; for the rest see test_tools."""

from __future__ import annotations

from pathlib import Path

import pytest

from ggufrq.base.proc import Completed
from ggufrq.cache.kv import parse_kv
from ggufrq.tools.logs import (
    MTP,
    Metric,
    ended,
    error_lines,
    failed_draft,
    parse_context,
    parse_draft,
    uses,
)

LOGS = Path(__file__).resolve().parent.parent / "logs" / "tools"


def saved(name: str) -> str:
    return (LOGS / f"{name}.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize("begun", ["", "0.00.380.123 ", "0.00.380.123 E ", "0.00.380.123 I "])
def test_last_words_in_a_line_that_the_log_had_begun(begun: str) -> None:
    """Two threads print: where one gives up, the other may be between the time and the words of a line."""
    end = {"": "0.00.380.123 E ", "0.00.380.123 ": "E "}.get(begun, "")
    text = f"{begun}/src/ggml-rpc.cpp:566: the server crashed\n{end}send failed (bytes_sent=-1)\n"
    assert error_lines(text)[0] == "the server crashed"


def test_types_by_layer_calibration_and_scale() -> None:
    context = parse_context(saved("completion-layers.err"))
    assert context is not None
    assert context.layers == {
        "K": ("q8_0", "q8_0", "iso3", "iso3", "iso3", "iso4", "iso3", "q8_0"),
        "V": ("q8_0", "q8_0", "planar4", "planar4", "planar4", "f16", "planar4", "q8_0"),
    }
    assert context.profile == Metric("kv-calib.gguf", "means")
    assert context.scale == "norm"
    assert context.rotations["K"].type == "iso3" and context.rotations["V"].family == "planar"
    assert context.kv_bytes is None and context.kv_values is None  # not told by one type
    assert context.kv_mib > 0
    assert not uses(context, parse_kv("iso3/planar4"))


def test_the_context_of_a_draft_is_told_apart() -> None:
    text = saved("server-draft.err")
    context = parse_context(text)
    assert context is not None and uses(context, parse_kv("iso3"))
    found = parse_draft(text)
    assert found is not None and found[0] == "docs-qwen3-8m-IQ4_XS.gguf"
    assert uses(found[1], parse_kv("f16")) and found[1].kv_mib == 4.0
    assert failed_draft(text) is None
    later = text + "0.00.300.000 E srv  operator(): got exception: something else\n"
    assert failed_draft(later) is None  # it was there by then
    again = parse_context(text + text)  # loaded once more, after a while without requests
    assert again == context
    plain = saved("cli-ok.err")
    assert parse_draft(plain) is None and failed_draft(plain) is None


def test_a_draft_that_is_refused_is_named() -> None:
    text = saved("server-mtp-refused.err")
    assert failed_draft(text) == MTP
    assert error_lines(text)[0] == "failed to create MTP context"
    context = parse_context(text)
    assert context is not None and uses(context, parse_kv("iso3")) and context.recurrent_mib == 1.64
    loading = saved("server-draft.err").partition("0.00.175.992")[0]
    refused = "0.00.1.0 E llama_init: failed to initialize the context: iso3 cannot hold this model's heads\n"
    refused = loading + refused
    assert failed_draft(refused) == "docs-qwen3-8m-IQ4_XS.gguf"


def test_a_reason_in_words() -> None:
    assertion = "GGML_ASSERT(id_to_token.size() == token_to_id.size()) failed"
    log = f"0.00.1.1 I load\n../src/src/llama-vocab.cpp:2544: {assertion}\n"
    done = Completed(["/bin/llama-completion"], -6, "", log, 0.1)
    assert ended(done) == (
        "llama-completion was ended by signal SIGABRT: two tokens of the model's vocabulary are equal "
        f"({assertion})"
    )
    log = "terminate called after throwing an instance of 'std::runtime_error'\n  what():  no such thing\n"
    assert error_lines(log)[0] == "no such thing"
    assert ended(Completed(["/bin/x"], 1, "", "a\nb\n", 0.1)) == "x failed with exit status 1\n  a\n  b"


def test_a_plain_cache_names_none_of_them() -> None:
    context = parse_context(saved("cli-ok.err"))
    assert context is not None
    assert (context.layers, context.profile, context.scale) == ({}, None, None)


def test_two_caches_tell_their_layers_apart() -> None:
    """As models with sliding windows do: each names its own, counted over all."""
    lines = saved("completion-layers.err").splitlines()
    (at,) = (i for i, line in enumerate(lines) if "K layers: " in line)
    start = lines[at].split("K layers: ")[0]
    lines[at : at + 1] = [f"{start}K layers: 1 q8_0, 3 iso3", f"{start}K layers: 0 q8_0, 2 f16"]
    context = parse_context("\n".join(lines))
    assert context is not None
    assert context.layers["K"] == ("q8_0", "q8_0", "f16", "iso3")


PROFILE = "llama_rq: profile a b-kv.gguf: from weights, 32768 positions, 8 layers"


@pytest.mark.parametrize("more", ["", ", without means"])
def test_the_profile(more: str) -> None:
    text = saved("completion-layers.err").replace("calibration kv-calib.gguf: 8 layers", PROFILE[10:] + more)
    context = parse_context(text)
    assert context is not None
    assert context.profile == Metric("a b-kv.gguf", "weights", 32768)


def test_every_cache_has_the_profile() -> None:
    lines = saved("completion-layers.err").splitlines()
    (cache,) = (line for line in lines if "llama_kv_cache: size" in line)

    def profile(*others: str) -> Metric | None:
        context = parse_context("\n".join([line for line in lines if "calibration" not in line] + [*others]))
        assert context is not None
        return context.profile

    assert profile() is None
    assert profile(PROFILE) == Metric("a b-kv.gguf", "weights", 32768)
    assert profile(PROFILE, cache) is None
    assert profile(PROFILE, cache, PROFILE.replace("8 layers", "1 layers")) is not None
    assert profile(PROFILE, cache, PROFILE.replace("a b", "c")) is None


def test_tokens_that_are_not_held() -> None:
    text = saved("completion-ok.err")
    why = "that takes flash attention, use -fa on"
    context = parse_context(
        f"{text}\nllama_rq: the newest 32 and first 1 tokens are not held in f16: {why}\n"
    )
    assert context is not None
    assert (context.recent, context.first, context.not_held) == (0, 0, why)


def test_a_cache_without_layers_says_nothing_of_the_model() -> None:
    """Where every layer has a window, that of the others is empty, and holds no tokens in f16."""
    text = saved("completion-ok.err")
    (cache,) = (line for line in text.splitlines() if "llama_kv_cache: size" in line)
    exact = "llama_rq: the newest 32 and first 1 tokens"
    empty = [cache.replace("8 layers", "0 layers"), PROFILE.replace("8 layers", "0 layers")]
    empty.append(f"{exact} are not held in f16: neither K nor V is quantized")
    context = parse_context("\n".join([text, PROFILE, f"{exact} in f16: 34 rows, 17408 bytes", *empty]))
    assert context is not None and context.profile is not None
    assert (context.recent, context.first, context.recent_bytes) == (32, 1, 17408)
    assert context.not_held is None


def test_the_reason_for_a_refused_calibration() -> None:
    reason = "the calibration file other-calib.gguf is for another model: make one with ggufrq calibrate"
    assert error_lines(saved("completion-calib-other.err"))[0] == reason
