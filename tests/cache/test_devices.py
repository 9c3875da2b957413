"""The cache types on two devices: RPC servers, or such as count as GPUs and compute on the CPU (twins.cpp).
Each has memory of its own, and what is not moved there is not found there."""

from __future__ import annotations

import os
import random
import re
import signal
import struct
from pathlib import Path
from typing import Any

import head_models
import pytest
from kv_drivers import DENSE, HYBRID, NARROW, ONE_THREAD, means, metric, run
from loopback import changing, rpc_server, rpc_servers

from ggufrq.base import paths, proc
from ggufrq.build.project import Build
from ggufrq.tools.logs import explain
from ggufrq.tools.perplexity import parse_perplexity

pytestmark = [pytest.mark.build, pytest.mark.models]

TEXT = paths.data_dir("texts") / "heldout.txt"


def on_twins(twins: Path, mode: str) -> dict[str, str]:
    return {"GGML_BACKEND_PATH": str(twins), "LLAMA_ARG_SPLIT_MODE": mode}


CACHES: list[tuple[str, str, str, dict[str, Any]]] = [
    (DENSE, "iso3", "planar4", {}),
    (DENSE, "f16", "rotor3", {}),
    (DENSE, "iso3", "iso3", {"profile": True}),
    (DENSE, "iso3", "q8_0", {"layers": "0,-1:q8_0;1:iso4/f16"}),
    (HYBRID, "iso3", "planar4", {}),
    (HYBRID, "iso3", "iso3", {"profile": True}),
]


@pytest.mark.parametrize(("model", "k", "v", "options"), CACHES)
def test_what_a_cache_survives_it_survives_on_two_devices(
    driver: Path,
    twins: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    model: str,
    k: str,
    v: str,
    options: dict[str, Any],
) -> None:
    """Sequences, shifted positions, states. Split by layers every figure is that of the CPU. Split by heads,
    sums are made of two parts, which moves their last bits: errors against f16 are as large, not the same."""
    if options.get("profile"):
        options = {"profile": means(f16_models[model], tmp_path / "calib.gguf", size=0.3)}
    arguments = (f16_models[model], TEXT, k, v, "1", tmp_path / "state.bin")
    want = run(driver, *arguments, "write", **options)

    assert run(driver, *arguments, "write", **options, devices=on_twins(twins, "layer")) == want
    got = run(driver, *arguments, "write", **options, devices=on_twins(twins, "tensor"))
    assert got.keys() == want.keys()
    assert got["plain"] != want["plain"]
    for step in ("plain", "next", "shifted"):
        assert step not in want or 0.5 * want[step] < got[step] < 2 * want[step], (step, got, want)
    assert max(got[step] for step in got if step[0] in "sc" and step != "shifted") < want["plain"], (
        got,
        want,
    )
    restored = run(driver, *arguments, "read", **options, devices=on_twins(twins, "tensor"))
    assert restored == {"restored": True, "state": pytest.approx(0, abs=1e-7)}


def test_a_profile_on_two_devices(
    driver: Path, twins: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    """Its matrices are where the layer is, or each where its head is."""
    profile = metric(f16_models[DENSE], tmp_path / "kv.gguf", spread=1.3)
    arguments = (f16_models[DENSE], TEXT, "iso3", "iso3", "1", tmp_path / "state.bin", "write")
    want = run(driver, *arguments, profile=profile)
    assert run(driver, *arguments, profile=profile, devices=on_twins(twins, "layer")) == want
    got = run(driver, *arguments, profile=profile, devices=on_twins(twins, "tensor"))
    assert got.keys() == want.keys() and got["plain"] != want["plain"]
    for step in ("plain", "next", "shifted"):
        assert 0.5 * want[step] < got[step] < 2 * want[step], (step, got, want)


@pytest.mark.parametrize(
    ("model", "kind", "newest"), [(DENSE, "iso3", 32), (HYBRID, "iso3", 32), (DENSE, "q4_0", 100)]
)
def test_newest_tokens_on_devices(
    driver: Path, twins: Path, f16_models: dict[str, Path], tmp_path: Path, model: str, kind: str, newest: int
) -> None:
    """The rows are where the layers are, and so are the masks and the attention to them: on one device, on
    two, and on two with the first layers on the CPU."""
    arguments = (f16_models[model], TEXT, kind, kind, "1", tmp_path / "state.bin", "write")
    want = run(driver, *arguments, recent=newest, first=1)
    assert want["plain"] < run(driver, *arguments)["plain"]
    few = {"LLAMA_ARG_N_GPU_LAYERS": "6"}
    for where in (on_twins(twins, "none"), on_twins(twins, "layer"), on_twins(twins, "layer") | few):
        assert run(driver, *arguments, recent=newest, first=1, devices=where) == want, where


def test_where_newest_tokens_cannot_be_held_the_device_is_named(
    llama_build: Build, twins: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    """A device without such an attention, one behind RPC, and a split by heads; also with q8_0, which any
    device knows. Layers on several devices, or some of them on the CPU, are none of these."""
    local: proc.Environment = {"GGML_BACKEND_PATH": str(twins)}
    sentence = "layer 0 is on Twin0, which cannot attend to them with K in {0} and V in {0} at head_dim 128"
    newest, here = ("--kv-recent", "32"), ("--device", "Twin0,Twin1")
    for kind in ("iso3", "q8_0"):
        given = (llama_build, f16_models[DENSE], *types(kind, kind), *newest)
        done = perplexity(*given, *here, env={**local, "GGUFRQ_TWINS_LACK": "recent"})
        assert f"the newest 32 and first 0 tokens are not held in f16: {sentence.format(kind)}" in done.stderr
        assert figure(done) == figure(perplexity(*given[:-2]))
        want = figure(perplexity(*given))
        for where in (("--device", "Twin0"), here, (*here, "-ngl", "3")):
            held = perplexity(*given, *where, env=local)
            assert "newest 32 and first 0 tokens in f16: " in held.stderr
            assert figure(held) == want, where
    split = perplexity(*given, *here, "-sm", "tensor", env=local)
    assert "split by heads among devices, which cannot attend to them so" in split.stderr
    figure(split)
    with rpc_server(llama_build, tmp_path / "rpc.log") as (address, _):
        done = perplexity(*given, "--rpc", address)
        assert "is on RPC0, which cannot attend to them with K in q8_0" in done.stderr
        figure(done)


def perplexity(
    build: Build, model: Path, *options: str, env: proc.Environment | None = None
) -> proc.Completed:
    command = [
        build.tool("llama-perplexity"),
        "-m",
        model,
        "-f",
        TEXT,
        "-c",
        "256",
        "--chunks",
        "2",
        "-t",
        "1",
    ]
    return proc.run(
        [*command, "-lv", "4", *options], env={**ONE_THREAD, **(env or {})}, check=False, timeout=120
    )


def figure(done: proc.Completed) -> float:
    assert done.rc == 0, done.stderr[-2000:]
    return parse_perplexity(done.stdout, done.stderr).ppl


def types(k: str, v: str) -> tuple[str, ...]:
    return ("-ctk", k, "-ctv", v)


@pytest.mark.parametrize("model", [DENSE, HYBRID])
def test_rpc_servers_compute_the_same(
    llama_build: Build, f16_models: dict[str, Path], tmp_path: Path, model: str
) -> None:
    given = (llama_build, f16_models[model], *types("iso3", "planar4"))
    want = figure(perplexity(*given))
    with rpc_servers(llama_build, tmp_path) as servers:
        there = perplexity(*given, "--rpc", servers)
        assert figure(there) == want
        for address in servers.split(","):
            size = re.findall(rf"RPC\d\[{address}\] KV buffer size = +([\d.]+)", there.stderr)
            assert float(size[-1]) > 0, there.stderr
        assert figure(perplexity(*given, "--rpc", servers, "--no-kv-offload")) == want
        assert figure(perplexity(*given, "--rpc", servers, "-sm", "none")) == want
        if model == DENSE:  # the server aborts at upstream's recurrent layers, whatever the cache type
            assert figure(perplexity(*given, "--rpc", servers, "-sm", "tensor")) == pytest.approx(
                want, rel=0.02
            )


def test_an_rpc_server_of_another_build_is_refused(
    llama_build: Build, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    """Such a server does not answer that it knows our types: here the answer is taken out on its way. With
    types of upstream's it does its work."""
    known = struct.pack("<Q", 0x5251000300000001)  # GGML_RPC_RQ_YES in ggml-rpc-rq.h
    model = f16_models[DENSE]
    with (
        rpc_server(llama_build, tmp_path / "rpc.log") as (address, _),
        changing(address, known, struct.pack("<Q", 34)) as foreign,
    ):
        for where in ((), ("--no-kv-offload",), ("-sm", "tensor")):
            done = perplexity(llama_build, model, *types("iso3", "iso3"), "--rpc", foreign, *where)
            assert done.rc == 1
            said = explain(done.stderr, "nothing")
            assert "which layer 0 is on, does not know iso3: run ggml-rpc-server of this build there" in said
            assert f"RPC0 ({foreign})" in said or "tensor" in where
        figure(perplexity(llama_build, model, *types("q8_0", "q8_0"), "--rpc", foreign))
        figure(perplexity(llama_build, model, *types("iso3", "iso3"), "--rpc", address))


LACKS = [
    ("pairs", ("iso3", "q4_0"), "has no attention kernel for K in iso3 and V in q4_0 at head_dim 128"),
    ("set_rows", ("iso3", "iso3"), "cannot store rows of iso3"),
]


@pytest.mark.parametrize(("lack", "pair", "sentence"), LACKS)
def test_what_a_device_lacks_is_refused(
    llama_build: Build,
    twins: Path,
    f16_models: dict[str, Path],
    tmp_path: Path,
    lack: str,
    pair: tuple[str, str],
    sentence: str,
) -> None:
    """On a device of this machine, on one behind an RPC server, which has to be asked, and on all of a split
    by heads. Where the cache stays on the CPU, so does its attention."""
    lacking = {"GGML_BACKEND_PATH": str(twins), "GGUFRQ_TWINS_LACK": lack}
    given = (llama_build, f16_models[DENSE], *types(*pair))
    local = ("--device", "Twin0,Twin1")
    with rpc_server(llama_build, tmp_path / "rpc.log", "-d", "Twin0", env=lacking) as (address, _):
        ways: list[tuple[tuple[str, ...], proc.Environment]] = [
            (local, lacking),
            ((*local, "-sm", "tensor"), lacking),
            (("--rpc", address), {}),
        ]
        for options, env in ways:
            done = perplexity(*given, *options, env=env)
            assert done.rc == 1
            assert sentence in explain(done.stderr, "nothing"), options
        want = figure(perplexity(*given))
        assert figure(perplexity(*given, *local, "--no-kv-offload", env=lacking)) == want
        assert figure(perplexity(*given, "--rpc", address, "--no-kv-offload")) == want


def test_heads_of_64_on_a_device(llama_build: Build, twins: Path, f16_models: dict[str, Path]) -> None:
    """They are stored in types of other names, which nobody typed and nobody is told."""
    given = (llama_build, f16_models[NARROW], *types("iso3", "planar4"), "--device", "Twin0,Twin1")
    here = {"GGML_BACKEND_PATH": str(twins)}
    assert figure(perplexity(*given, env=here)) == figure(perplexity(*given[:-2]))
    done = perplexity(*given, env={**here, "GGUFRQ_TWINS_LACK": "siblings"})
    assert done.rc == 1
    said = explain(done.stderr, "nothing")
    assert "which layer 0 is on, cannot store rows of iso3 at head_dim 64: take other cache types" in said


def test_latent_keys_on_a_device(llama_build: Build, twins: Path, tmp_path: Path) -> None:
    """With MLA a device is asked for attention to V as a view of K, in blocks that both are made up of."""
    for size, rope in ((512, 64), (512, 128)):
        model = head_models.latent(tmp_path / f"{size + rope}.gguf", size, rope)
        given = (llama_build, model, *types("iso3", "iso3"), "--device", "Twin0,Twin1")
        here = {"GGML_BACKEND_PATH": str(twins)}
        there = perplexity(*given, env=here)
        assert figure(there) == figure(perplexity(*given[:-2]))
        assert re.search(r"Twin[01] KV buffer size = +[\d.]+ MiB", there.stderr)
        exact = ("--kv-recent", "32", "--kv-first", "1")
        there = perplexity(*given, *exact, env=here)
        assert "newest 32 and first 1 tokens in f16: " in there.stderr
        assert figure(there) == figure(perplexity(*given[:-2], *exact))
        done = perplexity(*given, env={**here, "GGUFRQ_TWINS_LACK": "latent"})
        assert done.rc == 1
        said = explain(done.stderr, "nothing")
        assert "has no attention kernel for K in iso3, of which V is a view (MLA)," in said
        assert f"at head_dim {size + rope}/{size}" in said


def test_an_rpc_client_keeps_room_for_the_layers_that_take_most(
    llama_build: Build, twins: Path, f16_models: dict[str, Path], tmp_path: Path
) -> None:
    """Attention over a layer in f16 takes less than over one in iso3, which is converted beside the result;
    upstream's client would take what the first layer takes for all."""

    def buffer(*options: str) -> float:
        given = (llama_build, f16_models[DENSE], *types("iso3", "iso3"), "--rpc", address)
        done = perplexity(*given, "-c", "4096", "--chunks", "1", "-b", "512", *options)
        figure(done)
        return float(re.findall(r"RPC0\[.*\] compute buffer size = +([\d.]+)", done.stderr)[-1])

    env = {"GGML_BACKEND_PATH": str(twins)}
    with rpc_server(llama_build, tmp_path / "rpc.log", "-d", "Twin0", env=env) as (address, _):
        assert buffer("--kv-layers", "0:f16") == buffer() > buffer("--kv-layers", "0--1:f16")


def test_a_split_by_heads_needs_the_cache_on_the_devices(
    llama_build: Build, twins: Path, f16_models: dict[str, Path]
) -> None:
    """Upstream aborts there, whatever the cache type."""
    options = (*types("iso3", "iso3"), "--device", "Twin0,Twin1", "-sm", "tensor", "--no-kv-offload")
    done = perplexity(llama_build, f16_models[DENSE], *options, env={"GGML_BACKEND_PATH": str(twins)})
    assert done.rc == 1
    assert "use --split-mode layer with --no-kv-offload" in explain(done.stderr, "nothing")


@pytest.mark.parametrize("count", [1, 4, 16])
def test_a_server_that_dies_ends_the_program_with_a_reason(
    llama_build: Build, f16_models: dict[str, Path], tmp_path: Path, count: int
) -> None:
    """As soon as the program has printed so often, whether it is reading or writing then, which upstream
    would end without a word (SIGPIPE)."""
    printed = 0
    with rpc_server(llama_build, tmp_path / "rpc.log") as (address, server):
        command = [llama_build.tool("llama-completion"), "-m", f16_models[DENSE], "-no-cnv", "-p", "CREATE"]
        command += [*types("iso3", "iso3"), "-n", "100000", "-c", "2048", "--ignore-eos", "--rpc", address]

        def kill(_: str) -> None:
            nonlocal printed
            printed += 1
            if printed == count:
                os.kill(server.pid, signal.SIGKILL)

        done = proc.run(command, env=ONE_THREAD, check=False, timeout=60, on_stdout=kill)
    assert printed >= count, done.stderr
    assert done.rc != 0
    reason = "Remote RPC server crashed or returned malformed response"
    assert explain(done.stderr, "nothing") == reason, done.stderr


@pytest.mark.parametrize("name", ["gemma2-dense", "gemma3-dense", "gpt-oss-moe"])
def test_sliding_windows_on_two_devices(
    llama_build: Build, twins: Path, tiny_models: dict[str, Path], tmp_path: Path, name: str
) -> None:
    """Windows of 32 tokens, capped scores, sinks, in models of random weights."""
    rng = random.Random(1)
    text = tmp_path / "text"
    text.write_text(" ".join(f"{rng.randrange(256):02x}" for _ in range(600)))
    given = (llama_build, tiny_models[name], *types("iso3", "rotor4"), "-c", "128", "-f", str(text))
    want = figure(perplexity(*given))
    for mode in ("layer", "tensor"):
        there = perplexity(
            *given, "--device", "Twin0,Twin1", "-sm", mode, env={"GGML_BACKEND_PATH": str(twins)}
        )
        assert figure(there) == pytest.approx(want, rel=0 if mode == "layer" else 1e-3)
