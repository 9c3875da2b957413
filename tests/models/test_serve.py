"""llama-server with quantized caches: started, used in the ways that have broken forks, and stopped."""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from guessing import dflash, eagle, with_head
from processes import gone

from ggufrq.base.errors import ToolError, UsageError
from ggufrq.base.loopback import free_port, session
from ggufrq.base.paths import data_dir
from ggufrq.build.project import Build
from ggufrq.cache.kv import parse_kv, parse_plan
from ggufrq.drive.serve import Draft, Server, serving, started
from ggufrq.ggufs.header import read_header
from ggufrq.ggufs.kv_shape import kv_shape
from ggufrq.make.plan import Family
from ggufrq.tools import server
from ggufrq.tools.logs import parse_context, parse_draft, uses
from ggufrq.tools.programs import Programs

DENSE, HYBRID = "docs-qwen3-8m", "docs-qwen3.5-8m"


def text(characters: int, skip: int = 0) -> str:
    return (data_dir("texts") / "heldout.txt").read_text(encoding="utf-8")[skip : skip + characters]


def complete(running: Server, prompt: str | list[int], **options: Any) -> dict[str, Any]:
    body = {"prompt": prompt, "n_predict": 8, "temperature": 0, "cache_prompt": True, **options}
    answer = session().post(f"{running.url}/completion", json=body, timeout=300)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


@pytest.mark.parametrize("name", [DENSE, HYBRID])
def test_start_answer_stop(families: dict[str, Family], programs: Programs, name: str) -> None:
    model, plan, port = families[name].file("Q8_0"), parse_plan("iso3/planar4"), free_port()
    with serving(model, plan, programs, port=port, n_ctx=1024) as running:
        assert running.url == f"http://127.0.0.1:{port}"
        assert server.healthy(running.url)
        context = parse_context(running.log.read_text())
        assert context is not None
        assert context.k_types == {"iso3"} and context.v_types == {"planar4"}
        assert running.context.kv_bytes == plan.bytes_for(kv_shape(model), 1024)
        message = {"role": "user", "content": "Hello"}
        body = {"messages": [message], "max_tokens": 6, "ignore_eos": True}
        answer = session().post(f"{running.url}/v1/chat/completions", json=body, timeout=300).json()
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] == 6
        pid = running.process.pid
        deadline = time.monotonic() + 10
        while not server.parse_requests(running.log.read_text()) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(server.parse_requests(running.log.read_text())) == 1
    assert gone(pid, within=0)
    assert not server.healthy(f"http://127.0.0.1:{port}")


def test_layers_apart(families: dict[str, Family], programs: Programs) -> None:
    model, plan = families[DENSE].file("Q8_0"), parse_plan("iso3; 0,-1:q8_0/iso4")
    with serving(model, plan, programs, port=free_port(), n_ctx=1024) as running:
        assert running.kv_bytes == plan.bytes_for(kv_shape(model), 1024)
        assert complete(running, text(400))["tokens_predicted"] == 8


def test_a_draft_beside_a_model_with_a_profile(
    families: dict[str, Family], programs: Programs, tmp_path: Path
) -> None:
    """The profile is for the model alone; the draft, another one, is kept in a type of ours without."""
    model, draft = families[DENSE].file("Q8_0"), tmp_path / "draft.gguf"
    data, header = bytearray(model.read_bytes()), read_header(model)
    norm = next(tensor for tensor in header.tensors if tensor.name == "output_norm.weight")
    data[header.data_offset + norm.offset] ^= 1  # which makes it another model, though hardly
    draft.write_bytes(data)
    plan = parse_plan("iso3").as_usual()
    extra = ("-md", str(draft), "-ctkd", "iso3", "-ctvd", "iso3")
    with serving(model, plan, programs, port=free_port(), n_ctx=1024, extra=extra) as running:
        assert running.plan.title == "iso3 +profile +first1 +recent32"
        assert running.context.profile is not None
        assert complete(running, text(400))["tokens_predicted"] == 8
        said = running.log.read_text()
    assert "is not used for this model: it is that of another one of this process" in said
    found = parse_draft(said)
    assert found is not None and found[1].profile is None and found[1].k_types == {"iso3"}


def test_prompt_cache_is_reused(families: dict[str, Family], programs: Programs) -> None:
    shared = text(1500)
    with serving(
        families[DENSE].file("Q8_0"), parse_plan("iso3"), programs, port=free_port(), n_ctx=2048
    ) as running:
        first = complete(running, shared + " One")
        second = complete(running, shared + " Two")
        again = complete(running, shared + " One")
        fresh = complete(running, shared + " One", cache_prompt=False)
    assert first["timings"]["cache_n"] == 0
    tokens = first["timings"]["prompt_n"]
    assert second["timings"]["cache_n"] > 0.9 * tokens
    assert again["timings"]["cache_n"] > 0.9 * tokens
    assert fresh["timings"]["cache_n"] == 0
    assert first["content"] == fresh["content"] != ""


def tokens(running: Server, prompt: str) -> list[int]:
    """The prompt as tokens, so that parts keep their tokens wherever they stand."""
    answer = session().post(f"{running.url}/tokenize", json={"content": prompt}, timeout=60)
    found: list[int] = answer.json()["tokens"]
    return found


def test_chunks_are_reused_by_shifting_keys(families: dict[str, Family], programs: Programs) -> None:
    """--cache-reuse moves K to other positions: it is decoded, rotated back, turned, and encoded anew.

    What then seems likely is what seems likely with a cache that was never shifted; with K at the positions
    where it was, or left rotated, it is not.
    """
    options = {"n_predict": 1, "n_probs": 40}
    model, plan = families[DENSE].file("Q8_0"), parse_plan("iso4")
    likely: list[dict[int, float]] = []
    reused: list[int] = []
    for reuse in ((), ("--cache-reuse", "32")):
        with serving(model, plan, programs, port=free_port(), n_ctx=2048, extra=reuse) as running:
            head, dropped, kept = (
                tokens(running, text(n, skip)) for n, skip in ((600, 0), (500, 5000), (1500, 20000))
            )
            complete(running, [*head, *dropped, *kept])
            found = complete(running, [*head, *kept], **options)
            top = found["completion_probabilities"][0]["top_logprobs"]
            likely.append({entry["id"]: math.exp(entry["logprob"]) for entry in top})
            reused.append(found["timings"]["cache_n"])
    assert reused[0] == len(head)
    assert reused[1] > len(head) + 0.9 * len(kept)
    apart = sum(abs(share - likely[1].get(token, 0)) for token, share in likely[0].items()) / 2
    assert apart < 0.1, f"{apart:.0%} of the probability went elsewhere"


def test_context_shift(families: dict[str, Family], programs: Programs) -> None:
    extra = ("--context-shift", "--ignore-eos")
    with serving(
        families[DENSE].file("Q8_0"),
        parse_plan("iso3/rotor4"),
        programs,
        port=free_port(),
        n_ctx=256,
        extra=extra,
    ) as running:
        found = complete(running, text(300), n_predict=300)
        log = running.log.read_text()
    assert found["tokens_predicted"] == 300
    assert "slot context shift" in log


@pytest.mark.parametrize("name", [DENSE, HYBRID])
def test_parallel_slots(families: dict[str, Family], programs: Programs, name: str) -> None:
    prompts = [text(800), text(700, 30000)]
    answers: dict[int, str] = {}
    with serving(
        families[name].file("Q8_0"), parse_plan("iso3"), programs, port=free_port(), n_ctx=2048, parallel=2
    ) as running:
        assert running.context.caches[0].sequences == 2
        alone = [complete(running, prompt, cache_prompt=False)["content"] for prompt in prompts]

        def ask(index: int) -> None:
            answers[index] = complete(running, prompts[index], cache_prompt=False, id_slot=index)["content"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        log = running.log.read_text()
    assert {request.slot for request in server.parse_requests(log)} == {0, 1}
    # batched differently, the last digits may differ, and so may a near tie: the beginning is the same
    assert [answers[0][:4], answers[1][:4]] == [answer[:4] for answer in alone]


@pytest.mark.parametrize("name", [DENSE, HYBRID])
def test_state_is_saved_and_restored(
    families: dict[str, Family], programs: Programs, tmp_path: Path, name: str
) -> None:
    model, prompt = families[name].file("Q8_0"), text(1200)
    extra = ("--slot-save-path", str(tmp_path))

    def slot(running: Server, action: str) -> dict[str, Any]:
        answer = session().post(
            f"{running.url}/slots/0?action={action}", json={"filename": "s.bin"}, timeout=60
        )
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    plan = parse_plan("iso3/planar4")
    with serving(model, plan, programs, port=free_port(), n_ctx=1024, extra=extra) as running:
        before = complete(running, prompt, n_predict=4)
        saved = slot(running, "save")
    with serving(model, plan, programs, port=free_port(), n_ctx=1024, extra=extra) as running:
        restored = slot(running, "restore")
        after = complete(running, prompt + before["content"], n_predict=4)
    with serving(model, plan, programs, port=free_port(), n_ctx=1024) as running:
        fresh = complete(running, prompt + before["content"], n_predict=4)
    assert saved["n_saved"] == restored["n_restored"] > 100
    assert saved["n_written"] == restored["n_read"]
    per_token = plan.bytes_for(kv_shape(model), 1)
    assert saved["n_written"] > saved["n_saved"] * per_token
    if name == DENSE:
        assert saved["n_written"] < saved["n_saved"] * per_token * 1.2  # the state, too, is that small
    assert after["timings"]["cache_n"] > 0.9 * saved["n_saved"]
    assert after["content"][:3] == fresh["content"][:3]
    # another type must not be read as this one
    with serving(model, parse_plan("iso3"), programs, port=free_port(), n_ctx=1024, extra=extra) as running:
        refused = session().post(
            f"{running.url}/slots/0?action=restore", json={"filename": "s.bin"}, timeout=60
        )
        assert refused.status_code >= 400
        assert complete(running, "It still works", n_predict=2)["content"]


@pytest.mark.parametrize("name", [DENSE, HYBRID])
def test_a_state_that_was_cut_short_is_refused(
    families: dict[str, Family], programs: Programs, tmp_path: Path, name: str
) -> None:
    """The server goes on, as with any other bad request."""
    extra = ("--slot-save-path", str(tmp_path))
    with serving(
        families[name].file("Q8_0"), parse_plan("iso3"), programs, port=free_port(), n_ctx=512, extra=extra
    ) as running:
        first = complete(running, text(400), n_predict=4)["content"]
        slot = f"{running.url}/slots/0?action="
        assert session().post(slot + "save", json={"filename": "s.bin"}, timeout=60).status_code == 200
        whole = (tmp_path / "s.bin").read_bytes()
        for size in (0, 3, 11, 200, 600, len(whole) // 2, len(whole) - 1):
            (tmp_path / "cut.bin").write_bytes(whole[:size])
            answer = session().post(slot + "restore", json={"filename": "cut.bin"}, timeout=60)
            assert answer.status_code == 400, (size, answer.text)
        assert complete(running, text(400), n_predict=4, cache_prompt=False)["content"] == first
        assert session().post(slot + "restore", json={"filename": "s.bin"}, timeout=60).status_code == 200


def test_a_draft_keeps_its_own_cache(families: dict[str, Family], programs: Programs) -> None:
    model, draft = families[DENSE].file("Q8_0"), families[DENSE].file("IQ4_XS")
    with serving(
        model, parse_plan("iso3"), programs, port=free_port(), n_ctx=512, extra=("-md", str(draft))
    ) as running:
        assert running.kv_bytes == parse_plan("iso3").bytes_for(kv_shape(model), 512)
        assert running.draft is not None and running.draft[0] == draft.name
        assert running.draft[1].k_types == {"f16"}
        assert complete(running, text(200))["tokens_predicted"] == 8


@pytest.mark.parametrize("kv", ["q8_0", "iso3/iso4"])
def test_a_draft_guesses_what_the_model_says(
    families: dict[str, Family], programs: Programs, kv: str
) -> None:
    """Guesses that are right save steps, and those that are not change nothing."""
    model, plan = families[DENSE].file("Q8_0"), parse_plan("iso3").as_usual()
    draft = Draft(families[DENSE].file("IQ4_XS"), parse_kv(kv))
    answers = []
    for guess in (None, draft):
        with serving(model, plan, programs, port=free_port(), n_ctx=1024, draft=guess) as running:
            answers.append(complete(running, text(760), n_predict=160, ignore_eos=True))
            if guess is not None:
                assert running.draft is not None and uses(running.draft[1], guess.kv)
    assert answers[0]["content"] == answers[1]["content"]
    assert "draft_n_accepted" not in answers[0]["timings"]
    timings = answers[1]["timings"]
    assert 10 < timings["draft_n_accepted"] < timings["draft_n"]


@pytest.mark.parametrize("kv", ["q8_0", "iso4/iso3"])
def test_a_head_of_the_model_guesses(
    families: dict[str, Family], programs: Programs, tmp_path: Path, kv: str
) -> None:
    """Its cache is checked by its own context; the hybrid model takes guesses back that are wrong."""
    model = with_head(families[HYBRID].file("Q8_0"), tmp_path / "guessing.gguf")
    plan, answers = parse_plan("iso3").with_exact(32, 1), []
    for guess in (None, Draft(None, parse_kv(kv))):
        with serving(model, plan, programs, port=free_port(), n_ctx=1024, draft=guess) as running:
            answers.append(complete(running, text(700), n_predict=64, ignore_eos=True))
            assert uses(running.context, plan.base) and running.context.recent == 32
            if guess is not None:
                assert running.draft is not None and uses(running.draft[1], guess.kv)
    assert answers[0]["content"] == answers[1]["content"]
    assert answers[1]["timings"]["draft_n"] > 0


def test_drafts_that_are_made_for_a_model(
    families: dict[str, Family], programs: Programs, tmp_path: Path
) -> None:
    """EAGLE-3 and DFlash: the text stays as it is, and what they guess with their caches in a type of ours is
    near what they guess in f16, the nearer the more bits."""
    model, plan = families[DENSE].file("Q8_0"), parse_plan("iso3").with_exact(32, 1)

    def run(draft: Draft | None, how: str = "") -> tuple[str, list[str], str]:
        port, log = free_port(), tmp_path / "server.log"
        extra = () if draft is None else draft.arguments()
        args = server.arguments(model, plan, host="127.0.0.1", port=port, n_ctx=1024, threads=1, extra=extra)
        url = f"http://127.0.0.1:{port}"
        with started([programs.tool("llama-server"), *args, "-lv", "5"], url, log_path=log):
            body = {"prompt": text(700), "n_predict": 48, "temperature": 0, "ignore_eos": True}
            answer = session().post(f"{url}/completion", json=body, timeout=60).json()
        told = log.read_text()
        context = parse_context(told)
        assert context is not None and uses(context, plan.base)
        assert (context.recent, context.first) == (32, 1), "whatever the draft can hold"
        if draft is not None:
            found = parse_draft(told)
            assert found is not None and uses(found[1], draft.kv) and f"'{how}'" in told
        guesses = re.findall(r"draft candidate +(\d+, pos +\d+: +\d+) ", told)
        return str(answer["content"]), guesses, told

    plain = run(None)[0]
    for make, how in ((eagle, "draft-eagle3"), (dflash, "draft-dflash")):
        path = make(model, tmp_path / f"{how}.gguf")
        exact = run(Draft(path, parse_kv("f16")), how)[1]
        alike = {}
        for kv in ("iso4/iso5", "iso2"):
            said, guesses, told = run(Draft(path, parse_kv(kv)), how)
            assert said == plain and len(guesses) > 100
            alike[kv] = sum(a == b for a, b in zip(exact, guesses, strict=False)) / len(exact)
            found = parse_draft(told)
            stores = "this model stores K and V in graphs that do not attend to them"
            assert found is not None and found[1].not_held == (stores if how == "draft-dflash" else None)
        assert alike["iso4/iso5"] > max(0.4, alike["iso2"]), alike


def test_a_draft_that_is_refused_is_named(families: dict[str, Family], programs: Programs) -> None:
    with (
        pytest.raises(
            ToolError, match=r"ended before it was ready: the draft, the head for further tokens: "
        ),
        serving(
            families[HYBRID].file("Q8_0"),
            parse_plan("iso3"),
            programs,
            port=free_port(),
            draft=Draft(None, parse_kv("q8_0")),
        ),
    ):
        pass


@pytest.mark.parametrize("by", ["option", "variable"])
def test_a_prefix_is_followed(families: dict[str, Family], programs: Programs, by: str) -> None:
    extra = ("--api-prefix", "/x/y") if by == "option" else ()
    env = {"LLAMA_ARG_API_PREFIX": "/x/y"} if by == "variable" else None
    port = free_port()
    with serving(
        families[DENSE].file("Q4_K_M"),
        parse_plan("iso3"),
        programs,
        port=port,
        n_ctx=256,
        extra=extra,
        env=env,
        timeout=60,
    ) as running:
        assert running.url == f"http://127.0.0.1:{port}/x/y"
        assert complete(running, "Hello", n_predict=2)["tokens_predicted"] == 2


def test_variables_of_a_shell_do_not_reach_a_server_of_ours(
    families: dict[str, Family], programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its prefix, its key and its template would stop what is asked of it."""
    for name in ("LLAMA_ARG_API_PREFIX", "LLAMA_API_KEY", "LLAMA_ARG_CHAT_TEMPLATE", "LLAMA_ARG_HF_REPO"):
        monkeypatch.setenv(name, "/nonsense")
    with serving(
        families[DENSE].file("Q4_K_M"), parse_plan("iso3"), programs, port=free_port(), n_ctx=256, timeout=60
    ) as running:
        assert complete(running, "Hello", n_predict=2)["tokens_predicted"] == 2


def test_model_that_does_not_load(families: dict[str, Family], programs: Programs, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(families[DENSE].file("Q8_0").read_bytes()[:2_000_000])
    started = time.monotonic()
    with (
        pytest.raises(ToolError, match=r"ended before it was ready: .*not within the file bounds"),
        serving(path, parse_plan("iso3"), programs, port=free_port()),
    ):
        pass
    assert time.monotonic() - started < 60


def test_port_that_is_taken(families: dict[str, Family], programs: Programs) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with (
            pytest.raises(UsageError, match=f"port {port} of 127.0.0.1 cannot be used"),
            serving(families[DENSE].file("Q8_0"), parse_plan("iso3"), programs, port=port),
        ):
            pass


def ggufrq(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        start_new_session=True,
    )


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_command_stops_cleanly(
    families: dict[str, Family], llama_build: Build, command_line: Callable[..., list[str]], number: int
) -> None:
    port = free_port()
    model = str(families[DENSE].file("Q4_K_M"))
    arguments = ["serve", model, "--kv", "iso3", "--port", str(port), "-c", "512", "--", "--no-warmup"]
    with ggufrq(command_line(llama_build, *arguments)) as process:
        assert process.stdout is not None and process.stderr is not None
        url = process.stdout.readline().strip()
        assert url == f"http://127.0.0.1:{port}"
        assert server.healthy(url)
        log = Path(os.environ["GGUFRQ_CACHE"]) / "logs" / f"llama-server-{port}.log"
        assert "--no-warmup" in log.read_text().splitlines()[0]
        told = ""
        while "curl" not in told:  # the last that it says before it waits
            line = process.stderr.readline()
            assert line, told
            told += line
        process.send_signal(number)
        told += process.stderr.read()
        assert process.wait(60) == 0, told
    assert re.search(r"Q4_K_M\.gguf with its KV cache in iso3 \+profile \+first1 \+recent32: \d", told)
    assert re.search(rf"^profile {DENSE}-kv\.gguf, from a text", told, re.MULTILINE)
    assert re.search(r"curl http://127\.0\.0\.1:\d+/v1/chat/completions", told)
    assert told.endswith("stopped\n")
    assert not server.healthy(url)


@pytest.mark.skipif(os.name != "posix", reason="sends signals")
def test_server_does_not_outlive_a_killed_command(
    families: dict[str, Family], llama_build: Build, command_line: Callable[..., list[str]]
) -> None:
    port = free_port()
    arguments = ["serve", str(families[DENSE].file("Q4_K_M")), "--port", str(port), "-c", "512"]
    with ggufrq(command_line(llama_build, *arguments)) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        assert server.healthy(url)
        process.kill()
    deadline = time.monotonic() + 20
    while server.healthy(url) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not server.healthy(url)
