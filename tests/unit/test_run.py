"""Running and serving, as far as it takes no llama.cpp."""

from __future__ import annotations

import re
import shlex
import socket
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from ggufrq import cli
from ggufrq.base import machine
from ggufrq.base.errors import GgufrqError, ModelError, ToolError, UsageError
from ggufrq.build.project import Build
from ggufrq.cache.kv import Sought, parse_kv, parse_plan
from ggufrq.drive import run, serve, threads
from ggufrq.drive.serve import Draft
from ggufrq.make.ready import head_beside, model_file
from ggufrq.models.names import RECIPE
from ggufrq.tools import passed_on, server
from ggufrq.tools.logs import parse_context
from ggufrq.tools.programs import Programs

LOGS = Path(__file__).parent.parent / "logs" / "tools"
UPSTREAM = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")


MakePrograms = Callable[..., Programs]
PATCHED = (*UPSTREAM, "iso3", "iso4", "planar4")
OPTIONS = "--kv-layers SPEC  ...\n--kv-profile FILE  ...\n--kv-recent N  ...\n--kv-first N  ..."


@pytest.fixture
def programs(tmp_path: Path) -> MakePrograms:
    """Makes a llama.cpp of nothing but a llama-cli that prints the help of one with these types and
    options."""

    def make(types: tuple[str, ...], build: Build | None = None, options: str = "") -> Programs:
        folder = tmp_path / "llama.cpp" / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        told = (
            f"--cache-type-k TYPE  type of K\nallowed values: {', '.join(types)}\n(default: f16)\n{options}"
        )
        tool = folder / "llama-cli"
        tool.write_text(f"#!{sys.executable}\nprint({told!r})\n")
        tool.chmod(0o755)
        return Programs(folder, build)

    return make


@pytest.mark.parametrize(
    ("kv", "used"),
    [
        ("iso3", "q8_0"),
        ("iso3/planar4", "q8_0"),
        ("iso3/q4_0", "q8_0/q4_0"),
        ("f16/rotor2", "f16/q8_0"),
        ("q4_0", "q4_0"),
    ],
)
def test_fallback(programs: MakePrograms, kv: str, used: str, capsys: pytest.CaptureFixture[str]) -> None:
    pair = run.settle(parse_plan(kv), programs(UPSTREAM), fallback=True, command="ggufrq run m")
    assert pair.name == used
    assert ("using " + used in capsys.readouterr().err) == (kv != used)


def test_without_fallback(programs: MakePrograms) -> None:
    with pytest.raises(
        UsageError, match=r"/llama\.cpp/bin has no cache type iso3 and planar4; it has f32"
    ) as caught:
        run.settle(
            parse_plan("iso3/planar4"), programs(UPSTREAM), fallback=False, command="ggufrq run m -p …"
        )
    remedy = str(caught.value.remedy)
    assert "ggufrq run m -p … --kv q8_0, or --fallback" in remedy
    assert "8.5 bits per value instead of 3.625" in remedy
    assert "LM Studio, Ollama and others: ggufrq fallback RUNTIME MODEL" in remedy


@pytest.mark.parametrize(
    ("kv", "types", "options", "used"),
    [
        ("iso3; 0,-1:q8_0", PATCHED, OPTIONS, "iso3; 0,-1:q8_0"),
        ("iso3; 0:rotor2/f16", PATCHED, OPTIONS, "iso3; 0:q8_0/f16"),
        ("iso3; 0,-1:f16", UPSTREAM, "", "q8_0"),
        ("iso3; 0,-1:f16", PATCHED, "", "iso3"),
        ("f16; 0:q8_0", UPSTREAM, "--kv-layers-of-another-kind", "f16"),
    ],
)
def test_fallback_of_layers(
    programs: MakePrograms,
    kv: str,
    types: tuple[str, ...],
    options: str,
    used: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan, others = parse_plan(kv), programs(types, options=options)
    found = run.settle(plan, others, fallback=True, command="ggufrq run m")
    assert found.name == used
    assert ("using " + used in capsys.readouterr().err) == (kv != used)
    if kv != used:
        with pytest.raises(UsageError) as caught:
            run.settle(plan, others, fallback=False, command="ggufrq run m")
        assert f"ggufrq run m --kv {shlex.quote(used)}, or --fallback" in str(caught.value.remedy)
        assert ("no option --kv-layers" in caught.value.message) == ("--kv-layers " not in options)


def test_fallback_of_a_profile(programs: MakePrograms, capsys: pytest.CaptureFixture[str]) -> None:
    plan = parse_plan("iso3").with_profile(Path("m-kv.gguf"))
    assert run.settle(plan, programs(PATCHED, options=OPTIONS), fallback=False, command="") == plan
    with pytest.raises(UsageError, match="has no option --kv-profile"):
        run.settle(plan, programs(PATCHED), fallback=False, command="ggufrq run m")
    found = run.settle(plan, programs(PATCHED), fallback=True, command="ggufrq run m")
    assert found == parse_plan("iso3")
    assert "no option --kv-profile; using iso3" in capsys.readouterr().err
    # a type of K that is not there takes it with it
    mixed = parse_plan("rotor3/iso3").with_profile(Path("m-kv.gguf"))
    found = run.settle(mixed, programs(PATCHED, options=OPTIONS), fallback=True, command="ggufrq run m")
    assert found == parse_plan("q8_0/iso3")
    capsys.readouterr()
    # one that nobody asked for is no reason to refuse
    usual = parse_plan("iso3").with_profile(Sought.AUTO)
    assert run.settle(usual, programs(PATCHED), fallback=False, command="") == parse_plan("iso3")
    assert run.settle(usual, programs(PATCHED, options=OPTIONS), fallback=False, command="") == usual
    assert capsys.readouterr().err == ""
    with pytest.raises(UsageError, match="has no option --kv-profile"):
        run.settle(usual.with_profile(Sought.WEIGHTS), programs(PATCHED), fallback=False, command="")


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--port", "--port of ggufrq"),
        ("--host", "--host of ggufrq"),
        ("-c", "-c of ggufrq"),
        ("--ctx-size", "-c of ggufrq"),
        ("-ctk", "--kv of ggufrq"),
        ("--cache_type_v", "--kv of ggufrq"),
        ("-m", "named by MODEL"),
        ("--fim-qwen-7b-default", "named by MODEL"),
        ("--fim-qwen-7b-spec", "named by MODEL"),
        ("--vision_gemma_4b_default", "named by MODEL"),
        ("--log-disable", "the server's log is read"),
        ("--ssl-key-file", "by http"),
        ("--help", "llama-server"),
    ],
)
@pytest.mark.usefixtures("no_programs")
def test_options_that_would_change_what_is_relied_on(option: str, says: str) -> None:
    plan, programs = parse_plan("f16"), Programs(Path("/nowhere"))
    with (
        pytest.raises(UsageError, match="cannot be passed on to llama-server") as caught,
        serve.serving(Path("m.gguf"), plan, programs, extra=("--no-warmup", option, "8299")),
    ):
        pass
    assert says in caught.value.message and option.replace("_", "-") in str(caught.value.remedy)


def test_options_that_pass() -> None:
    passed_on.check(["--spec-default", "--default", "--temp", "0.1"])


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("given", [["Why is the sky blue?"], ["--", "-ngl", "0", "--temp", "1"]])
def test_run_passes_on_where_the_model_is_to_lie_alone(
    given: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.invoke(["run", "docs-qwen3-8m", "-p", "x", *given]) == UsageError.exit_code
    told = capsys.readouterr().err
    assert f"'{given[0] if len(given) == 1 else '--temp'}' is not passed on" in told
    assert "-p TEXT for the prompt" in told
    passed_on.check_places(["-ngl", "0", "--cpu_moe", "-dev", "none", "--n-cpu-moe", "2"])


def test_variables_of_the_user(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Those that run and serve pass on, and those that something else says."""
    for name, value in {"TEMPERATURE": "0.1", "API_PREFIX": "/x", "PORT": "8299", "RPC": "h:1"}.items():
        monkeypatch.setenv(f"LLAMA_ARG_{name}", value)
    found = passed_on.variables()
    assert found == {"LLAMA_ARG_TEMPERATURE": "0.1", "LLAMA_ARG_API_PREFIX": "/x"}
    assert capsys.readouterr().err == "LLAMA_ARG_PORT is not passed on: --port of ggufrq says it\n"
    assert passed_on.api_prefix((), found) == "/x"
    assert passed_on.api_prefix(("--no-warmup", "--api_prefix", "/y"), found) == "/y"
    assert passed_on.api_prefix(()) == ""


def test_variables_do_not_change_the_cache_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LAYERS", "PROFILE", "CALIB", "RECENT", "FIRST"):
        monkeypatch.setenv(f"LLAMA_RQ_{name}", "1")
    monkeypatch.setenv("LLAMA_ARG_TEMPERATURE", "0.1")
    got: dict[str, str | None] = {}

    def started(*_: object, env: dict[str, str | None], **__: object) -> None:
        got.update(env)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve, "started", started)
    monkeypatch.setattr(Programs, "tool", lambda _, name: Path(name))
    plan = parse_plan("iso3").with_exact(32)
    with (
        pytest.raises(KeyboardInterrupt),
        serve.serving(Path("m.gguf"), plan, Programs(Path("/nowhere")), env=passed_on.variables()),
    ):
        pass
    assert got["LLAMA_ARG_TEMPERATURE"] == "0.1"
    assert got.items() >= plan.environment().items()


def test_threads_sleep_where_others_use_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    told = iter(["0.5 0.5 0.5 3/99 7"] * 4 + ["0.5 0.5 0.5 3/99 7", "0.5 0.5 0.5 1/99 7"] * 2 + ["what"])
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: next(told))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.delenv(name, raising=False)
    assert threads.patience() == {"OMP_WAIT_POLICY": "passive"}
    assert threads.patience() == {}  # one that ran for a moment
    assert threads.patience() == {}  # a system that does not tell
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    assert threads.patience() == {}


def test_a_speed_that_nobody_measured() -> None:
    answer = run.Answer(
        "",
        "f16",
        "f16",
        "f16",
        64,
        1,
        1,
        0.1,
        0.0,
        prompt_tokens=1,
        prompt_tps=0.0,
        tokens=2,
        tps=0.0,
        log=Path("x"),
    )
    assert run.speed_text(answer) == "prompt 1 token, answer 2"
    told = run.speed_text(replace(answer, prompt_tokens=1200, prompt_tps=3400.2, tps=12.34))
    assert told == "prompt 1,200 tokens at 3,400 tokens/s, answer 2 at 12.3 tokens/s"


def test_fallback_of_first_tokens(programs: MakePrograms, capsys: pytest.CaptureFixture[str]) -> None:
    plan, others = parse_plan("iso3").with_exact(32, 1), programs(PATCHED, options="--kv-recent N  ...")
    with pytest.raises(UsageError, match="has no option --kv-first;"):
        run.settle(plan, others, fallback=False, command="ggufrq run m")
    found = run.settle(plan, others, fallback=True, command="ggufrq run m")
    assert found == parse_plan("iso3").with_exact(32)
    capsys.readouterr()


def test_fallback_of_the_newest_tokens(programs: MakePrograms, capsys: pytest.CaptureFixture[str]) -> None:
    plan = parse_plan("iso3").with_exact(32)
    assert run.settle(plan, programs(PATCHED, options=OPTIONS), fallback=False, command="") == plan
    with pytest.raises(UsageError, match="has no option --kv-recent"):
        run.settle(plan, programs(PATCHED), fallback=False, command="ggufrq run m")
    assert run.settle(plan, programs(PATCHED), fallback=True, command="ggufrq run m") == parse_plan("iso3")
    # a type that is not there takes them with it
    found = run.settle(plan, programs(UPSTREAM, options=OPTIONS), fallback=True, command="ggufrq run m")
    assert found == parse_plan("q8_0")
    plan = parse_plan("q4_0").with_exact(1024, 2)
    found = run.settle(
        plan, programs(PATCHED, options="--kv-recent N  ..."), fallback=True, command="ggufrq run m"
    )
    assert found.title == "q4_0 +recent1024"
    capsys.readouterr()


def test_usual_tokens_are_no_reason_to_refuse(
    programs: MakePrograms, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = parse_plan("iso3").with_wished(None, None)
    for options in ("", "--kv-recent N  ..."):
        found = run.settle(plan, programs(PATCHED, options=options), fallback=False, command="")
        assert found == parse_plan("iso3")
    assert run.settle(plan, programs(PATCHED, options=OPTIONS), fallback=False, command="").optional
    layered = parse_plan("iso3; 0:rotor2/f16").with_wished(None, None)
    capsys.readouterr()
    found = run.settle(layered, programs(PATCHED, options=OPTIONS), fallback=True, command="ggufrq run m")
    assert found.title == "iso3 +first1 +recent32; 0:q8_0/f16" and found.optional


def test_our_own_build_never_falls_back(programs: MakePrograms, tmp_path: Path) -> None:
    build = Build("key", tmp_path, tmp_path / "llama.cpp" / "bin", tmp_path, {})
    with pytest.raises(ToolError, match="has no cache type iso3"):
        run.settle(parse_plan("iso3"), programs(UPSTREAM, build), fallback=True, command="")
    with pytest.raises(ToolError, match="has no option --kv-layers") as caught:
        run.settle(parse_plan("q8_0; 0:f16"), programs(UPSTREAM, build), fallback=True, command="")
    assert caught.value.remedy == "ggufrq build"


ANSWER = run.Answer(
    "text", "iso3", "iso3", "iso3", 4096, 6553600, 33554432, 6.25, 0.0, 1200, 4321.5, 24, 88.25, Path("log")
)


def test_what_is_said_of_the_cache() -> None:
    assert run.cache_lines(ANSWER, parse_plan("iso3")) == [
        "iso3, 3.125 bits per value: 6,553,600 bytes for 4,096 tokens",
        "f16 takes 33,554,432 bytes, 5.12 times that",
    ]
    rough = replace(ANSWER, kv_bytes=None, f16_bytes=None, recurrent_mib=1.5)
    assert run.cache_lines(rough, parse_plan("iso3")) == [
        "iso3, 3.125 bits per value: 6.25 MiB for 4,096 tokens",
        "f16 takes 5.12 times that",
        "and 1.50 MiB of recurrent state in f32, whatever the cache type",
    ]
    same = replace(ANSWER, kv_bytes=33554432)
    assert run.cache_lines(same, parse_plan("f16")) == [
        "f16, 16 bits per value: 33,554,432 bytes for 4,096 tokens"
    ]
    layered = replace(ANSWER, kv_bytes=10911744)
    plan = parse_plan("iso3; 0-1,-1:q8_0; 5:iso4/iso3")
    layered = replace(layered, profile="profile from the weights, made in 0.3 s")
    assert run.cache_lines(layered, plan) == [
        "iso3; 0-1,-1:q8_0; 5:iso4/iso3, 5.20312 bits per value: 10,911,744 bytes for 4,096 tokens",
        "profile from the weights, made in 0.3 s",
        "f16 takes 33,554,432 bytes, 3.08 times that",
    ]
    recent = replace(ANSWER, kv_bytes=6969344, recent=50)
    assert run.cache_lines(recent, parse_plan("iso3").with_exact(50)) == [
        "iso3, 3.32324 bits per value: 6,969,344 bytes for 4,096 tokens",
        "the newest 50 tokens in f16, which is counted above",
        "f16 takes 33,554,432 bytes, 4.81 times that",
    ]
    both = replace(recent, kv_bytes=None, f16_bytes=None, first=1)
    assert run.cache_lines(both, parse_plan("iso3").with_exact(50, 1)) == [
        "iso3: 6.25 MiB for 4,096 tokens",
        "the first token and the newest 50 in f16, which is counted above",
    ]
    assert run.cache_lines(rough, parse_plan("iso3; 0:q8_0"))[0] == "iso3; 0:q8_0: 6.25 MiB for 4,096 tokens"
    assert run.speed_text(ANSWER) == "prompt 1,200 tokens at 4,322 tokens/s, answer 24 at 88.2 tokens/s"


@pytest.mark.parametrize(
    ("prompt", "raw", "says"),
    [
        ("", False, "the prompt is empty"),
        (" \n", True, "the prompt is empty"),
        ("/exit now", False, "/exit as a command"),
    ],
)
def test_prompts_that_are_refused(no_programs: None, prompt: str, raw: bool, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        run.generate(Path("m"), prompt, parse_plan("iso3"), Programs(Path("none")), raw=raw)


def test_text_of_a_repeated_run_comes_once() -> None:
    pieces: list[str] = []
    out = run._Text(pieces.append)
    out.begin()
    out.take("one ")
    out.take("tw")
    out.begin()
    for piece in ("on", "e two", " three"):
        out.take(piece)
    assert pieces == ["one ", "tw", "o", " three"]
    assert out.text == "one two three"


# The server


def test_text_comes_while_it_is_generated(cache: Path, tmp_path: Path) -> None:
    """A llama-completion that goes on only when its first words were handed on."""
    handed_on = tmp_path / "handed on"
    tool = tmp_path / "llama-completion"
    tool.write_text(
        f"#!{sys.executable}\n"
        "import pathlib, sys, time\n"
        "print('first words ', end='', flush=True)\n"
        f"while not pathlib.Path({str(handed_on)!r}).exists():\n"
        "    time.sleep(0.01)\n"
        "print('and the rest', flush=True)\n"
        f"sys.stderr.write(pathlib.Path({str(LOGS / 'completion-ok.err.txt')!r}).read_text())\n"
    )
    tool.chmod(0o755)
    pieces: list[str] = []

    def on_text(piece: str) -> None:
        pieces.append(piece)
        handed_on.touch()

    context = parse_context((LOGS / "completion-ok.err.txt").read_text())
    assert context is not None
    kinds = "/".join([*context.k_types, *context.v_types])
    answer = run.generate(
        tmp_path / "m.gguf", "Hello", parse_plan(kinds), Programs(tmp_path), raw=True, on_text=on_text
    )
    assert "".join(pieces).split() == ["first", "words", "and", "the", "rest"]
    assert len(pieces) > 1 and "".join(pieces) == answer.text


NOT_HELD = "llama_rq: the newest 32 and first 1 tokens are not held in f16: layer 0 is on CUDA0, only the CPU"


@pytest.mark.parametrize("usual", [True, False])
def test_tokens_that_the_device_does_not_hold(
    cache: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], usual: bool
) -> None:
    """Left out when nobody asked for them, an error otherwise."""
    tool, said = tmp_path / "llama-completion", (LOGS / "completion-ok.err.txt").read_text()
    said = re.sub(r"([KV]) \(\w+\):", r"\1 (iso3):", said) + f"\n{NOT_HELD}\n"
    tool.write_text(f"#!{sys.executable}\nimport sys\nprint('words')\nsys.stderr.write({said!r})\n")
    tool.chmod(0o755)
    plan = parse_plan("iso3").with_wished(None, None) if usual else parse_plan("iso3").with_exact(32, 1)

    def generated() -> run.Answer:
        return run.generate(tmp_path / "m.gguf", "Hello", plan, Programs(tmp_path), raw=True)

    if usual:
        answer = generated()
        assert (answer.recent, answer.first) == (0, 0)
        said = "the first token and the newest 32 are not kept in f16: layer 0 is on CUDA0"
        assert capsys.readouterr().err.count(said) == 1
        return
    with pytest.raises(ToolError, match=r"although iso3 \+first1 \+recent32 was asked for"):
        generated()


def test_port_is_8080_or_a_free_one() -> None:
    chosen = serve.choose_port("127.0.0.1", None)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            other.bind(("127.0.0.1", serve.DEFAULT_PORT))
        except OSError:
            assert chosen != serve.DEFAULT_PORT
            return
        assert chosen == serve.DEFAULT_PORT
        other.listen()
        assert serve.choose_port("127.0.0.1", None) != serve.DEFAULT_PORT


def test_any_port_is_not_the_one_that_people_use() -> None:
    chosen = {serve.choose_port("127.0.0.1", serve.ANY_PORT) for _ in range(3)}
    assert not chosen & {serve.ANY_PORT, serve.DEFAULT_PORT}


SERVER = """
import sys, http.server
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
print("loading", flush=True)
http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
"""


def test_server_is_waited_for_and_ended(tmp_path: Path) -> None:
    port = serve.choose_port("127.0.0.1", serve.ANY_PORT)
    url, path, said = f"http://127.0.0.1:{port}", tmp_path / "log", list[str]()
    path.write_text("of an earlier run\n")
    command = [sys.executable, "-c", SERVER, str(port)]
    with serve.started(command, url, log_path=path, cwd=tmp_path, on_log=said.append) as process:
        assert server.healthy(url)
        assert process.poll() is None
    assert process.poll() is not None and not server.healthy(url)
    assert "".join(said).endswith("loading\n") and "earlier" not in "".join(said)


@pytest.mark.parametrize(
    ("code", "timeout", "says"),
    [
        (
            "import sys; print('no model'); sys.exit(3)",
            60,
            r"ended before it was ready: exit status 3\n",
        ),
        ("import time; print('loading', flush=True); time.sleep(60)", 0.5, r"not ready within 0\.5 s\n"),
    ],
)
def test_server_that_does_not_come_up(tmp_path: Path, code: str, timeout: float, says: str) -> None:
    command = [sys.executable, "-c", code]
    with (
        pytest.raises(ToolError, match=says),
        serve.started(command, "http://127.0.0.1:9", log_path=tmp_path / "log", timeout=timeout),
    ):
        pass


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("cannot hold this model's K head_dim of 80: use q8_0 instead", "--kv q8_0"),
        ("CUDA0 has no attention kernel for iso3 with heads of 64", "--kv q8_0"),
        ("tensor 'a' data is not within the file bounds, model is corrupted", "download or copy it again"),
    ],
)
def test_what_to_do_when_a_server_ends(tmp_path: Path, words: str, remedy: str) -> None:
    """As ``run`` says it, whichever part of llama.cpp refuses the cache."""
    line = f"0.00.100.000 E llama_rq: {words}"
    command = [sys.executable, "-c", f"import sys; print({line!r}); sys.exit(1)"]
    with (
        pytest.raises(ToolError) as caught,
        serve.started(command, "http://127.0.0.1:9", log_path=tmp_path / "log", timeout=60),
    ):
        pass
    assert words in caught.value.message and remedy in str(caught.value.remedy)


def test_what_to_do_about_a_head_that_is_not_there(tmp_path: Path) -> None:
    saved = Path(__file__).parents[1] / "logs" / "tools" / "server-mtp-refused.err.txt"
    command = [sys.executable, "-c", f"import sys; print(open({str(saved)!r}).read()); sys.exit(1)"]
    with (
        pytest.raises(ToolError, match="the draft, the head for further tokens: ") as caught,
        serve.started(command, "http://127.0.0.1:9", log_path=tmp_path / "log", timeout=60),
    ):
        pass
    assert "without --spec-type draft-mtp (or --draft mtp)" in str(caught.value.remedy)


def test_port_that_is_taken_is_refused() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(UsageError, match="something else listens there"):
            serve.choose_port("127.0.0.1", other.getsockname()[1])


def test_host_that_is_not_ours() -> None:
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1"):
        serve.choose_port("192.0.2.1", None)


def test_follower_hands_on_whole_lines_once(tmp_path: Path) -> None:
    seen: list[str] = []
    follower = serve.Follower(tmp_path / "log", seen.append)
    follower.poll()
    with (tmp_path / "log").open("wb") as file:
        for part in (b"one\ntw", b"o\n", b"", b"thr\xc3", b"\xa9e\n"):
            file.write(part)
            file.flush()
            follower.poll()
    assert seen == ["one\n", "two\n", "thrée\n"]


def test_example_can_be_pasted() -> None:
    text = serve.example("http://127.0.0.1:8080")
    assert text.startswith("curl http://127.0.0.1:8080/v1/chat/completions ")
    assert "\\\n" in text and text.count("'") == 4


# Command lines


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["run", "docs-qwen3-8m"], UsageError, "either by -p or by -f"),
        (["run", "docs-qwen3-8m", "-p", "x", "-f", __file__], UsageError, "either by -p or by -f"),
        (
            ["run", "docs-qwen3-8m", "-p", "x", "--llama-cpp", str(Path(__file__).parent)],
            UsageError,
            "no llama-cli",
        ),
        (
            ["serve", "docs-qwen3-8m", "--llama-cpp", str(Path(__file__).parent)],
            UsageError,
            "no llama-server",
        ),
        (["run", "docs-qwen3-8m", "-p", "x"], GgufrqError, "has not been built yet"),
        (["serve", "docs-qwen3-8m"], GgufrqError, "has not been built yet"),
        (["run", "docs-qwen3-8m", "-p", "x", "--kv", "0:q8_0"], UsageError, "names layers"),
        (["serve", "docs-qwen3-8m", "--kv", "iso3; x:q8_0"], UsageError, "'x' is no layer"),
        (
            ["serve", "docs-qwen3-8m", "--kv", "q8_0/iso3", "--kv-calib", __file__],
            UsageError,
            "for K in a type of ours, and K is in q8_0",
        ),
        (
            ["run", "docs-qwen3-8m", "-p", "x", "--kv", "q8_0", "--kv-profile", "weights"],
            UsageError,
            "for K in a type of ours, and K is in q8_0",
        ),
        (
            ["run", "docs-qwen3-8m", "-p", "x", "--kv", "f16", "--kv-first", "1"],
            UsageError,
            "the first tokens are kept in f16 beside a quantized type, and K and V are in f16",
        ),
        (
            ["run", "docs-qwen3-8m", "-p", "x", "--kv", "f16", "--kv-recent", "8"],
            UsageError,
            "beside a quantized type, and K and V are in f16",
        ),
        (["quantize", "docs-qwen3-8m"], GgufrqError, "has not been built yet"),
        (["demo", "--models", "nothing"], GgufrqError, "there is no model 'nothing'"),
        (["demo", "--kv", "iso9"], UsageError, "no cache type 'iso9'"),
    ],
)
def test_errors(no_programs: None, arguments: list[str], error: type[GgufrqError], says: str) -> None:
    result = CliRunner().invoke(cli.cli, arguments)
    assert isinstance(result.exception, error)
    assert says in str(result.exception)
    assert result.stdout == ""


@pytest.mark.parametrize("command", ["quantize", "run", "serve", "demo"])
def test_help_fits_in_80_columns(command: str) -> None:
    result = CliRunner().invoke(cli.cli, [command, "--help"], terminal_width=80)
    assert result.exit_code == 0
    assert "Examples:" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def of_tensors(path: Path, architecture: str, tensors: tuple[str, ...], recipe: str = "") -> Path:
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string(RECIPE, recipe)
    for name in tensors:
        writer.add_tensor(name, np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("architecture", "tensors", "kind"),
    [
        ("llama", ("blk.0.attn_norm.weight",), "draft-simple"),
        ("qwen35", ("blk.0.attn_norm.weight", "blk.8.nextn.eh_proj.weight"), "draft-simple"),
        ("qwen35", ("blk.8.attn_norm.weight", "blk.8.nextn.eh_proj.weight"), "draft-mtp"),
        ("exaone4", ("blk.0.post_attention_norm.weight", "blk.64.nextn.eh_proj.weight"), "draft-simple"),
        ("eagle3", ("fc.weight",), "draft-eagle3"),
        ("dflash", ("fc.weight",), "draft-dflash"),
        ("dflash", ("fc.weight", "markov_w1.weight"), "draft-dspark"),
        ("gemma4-assistant", ("blk.0.attn_norm.weight",), "draft-mtp"),
    ],
)
def test_how_a_draft_guesses(tmp_path: Path, architecture: str, tensors: tuple[str, ...], kind: str) -> None:
    path = of_tensors(tmp_path / "draft.gguf", architecture, tensors)
    arguments = Draft(path, parse_kv("iso4/iso3")).arguments()
    assert arguments == ("--spec-type", kind, "-md", str(path), "-ctkd", "iso4", "-ctvd", "iso3")
    assert Draft(None, parse_kv("f16")).arguments()[:2] == ("--spec-type", "draft-mtp")
    assert model_file(str(path), draft=True) == path
    if kind == "draft-simple":
        assert model_file(str(path)) == path
        return
    with pytest.raises(ModelError, match=r"draft\.gguf does not run alone: it guesses tokens") as caught:
        model_file(str(path))
    assert str(path) in str(caught.value.remedy)


@pytest.mark.parametrize(
    ("model", "there", "found"),
    [
        ("X-8B-Q4_K_M.gguf", ("BF16", "Q8_0", "Q4_K_M"), "mtp-X-8B-Q4_K_M.gguf"),
        ("X-8B-Q5_K_M.gguf", ("BF16", "Q8_0"), "mtp-X-8B-Q8_0.gguf"),
        ("X-8B-mine-Q5_K_M.gguf", ("BF16",), "mtp-X-8B-BF16.gguf"),  # of a recipe
        ("X-8B-Instruct-Q5_K_M.gguf", ("BF16",), None),
        ("X-80B-Q4_K_M.gguf", ("BF16",), None),
    ],
)
def test_the_head_beside_a_model(
    model: str, there: tuple[str, ...], found: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it has none itself."""
    for kind in there:
        (tmp_path / f"mtp-X-8B-{kind}.gguf").write_bytes(b"GGUF")
    for tensors, expected in ((("blk.0.attn_norm.weight",), found), (("blk.1.nextn.eh_proj.weight",), None)):
        of_tensors(tmp_path / model, "qwen35", tensors, "mine")
        beside = head_beside(tmp_path / model)
        assert (beside and beside.name) == expected
        assert (f"taking {found}" in capsys.readouterr().err) == (expected is not None)
