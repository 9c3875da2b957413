"""Prompts and requests, against a server that speaks like llama-server; its tokens are characters."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from heard import Heard

from ggufrq.base.errors import ToolError, UsageError
from ggufrq.base.progress import SILENT
from ggufrq.measure.validate import generation
from ggufrq.measure.validate.client import Client
from ggufrq.measure.validate.plan import ValidationSettings
from ggufrq.measure.validate.prompts import facts, haystack, passage

BEGIN = 1
TEXT = "\n\n".join(f"Paragraph {i} speaks of {i * 7} things and of others." for i in range(400))
Answer = Callable[[str, dict[str, Any]], tuple[int, dict[str, Any]]]


def model(prompt: list[int]) -> int:
    """The likeliest token: the next letter of the alphabet."""
    return ord("a") + (prompt[-1] - ord("a") + 1) % 26


def speak(path: str, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    if path == "/tokenize":
        return 200, {"tokens": [BEGIN] * body["add_special"] + [ord(c) for c in body["content"]]}
    if path == "/detokenize":
        return 200, {"content": "".join(map(chr, body["tokens"]))}
    so_far, made = list(body["prompt"]), []
    for _ in range(body["n_predict"]):
        token = body["logit_bias"][0][0] if "logit_bias" in body else model(so_far)
        made.append(token)
        so_far.append(token)
    likeliest = model(body["prompt"])
    found: dict[str, Any] = {
        "tokens": made if body.get("return_tokens") else [],
        "content": "".join(map(chr, made)),
        "stop_type": "limit",
    }
    if "n_probs" in body:
        found["completion_probabilities"] = [
            {
                "id": made[0],
                "logprob": math.log(0.5 if made[0] == likeliest else 0.25),
                "top_logprobs": [{"id": likeliest, "logprob": math.log(0.5)}],
            }
        ]
    return 200, found


class Fake:
    """A server that answers as ``answer`` says and keeps what it was asked."""

    def __init__(self, answer: Answer) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append((self.path, body))
                code, found = answer(self.path, body)
                data = json.dumps(found).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.client = Client(f"http://127.0.0.1:{self.server.server_address[1]}")

    def of(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]


@pytest.fixture
def fake() -> Iterator[Callable[..., Fake]]:
    made: list[Fake] = []

    def make(answer: Answer = speak) -> Fake:
        made.append(Fake(answer))
        return made[-1]

    yield make
    for one in made:
        one.client.close()
        one.server.shutdown()
        one.server.server_close()


def test_passage_begins_at_a_paragraph_and_is_as_long_as_asked(fake: Callable[..., Fake]) -> None:
    client = fake().client
    tokens = passage(client, TEXT, 200, "seed")
    assert len(tokens) == 200
    assert tokens[0] == BEGIN
    assert "".join(map(chr, tokens[1:11])) == "Paragraph "
    assert passage(client, TEXT, 200, "seed") == tokens
    assert any(passage(client, TEXT, 200, f"other {i}") != tokens for i in range(3))


def test_text_that_is_too_short(fake: Callable[..., Fake]) -> None:
    with pytest.raises(UsageError, match="too short: 100 tokens are wanted and it has 8"):
        passage(fake().client, "A text.", 100, "seed")


def test_facts_differ_and_depend_on_the_seed() -> None:
    found = facts(20, "seed")
    assert len({fact.key for fact in found}) == 20
    assert all(len(fact.value) == 5 and fact.value.isdigit() for fact in found)
    assert facts(20, "seed") == found != facts(20, "other")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_needle_lies_at_its_depth(fake: Callable[..., Fake], depth: float) -> None:
    client = fake().client
    (fact,) = facts(1, "seed")
    prompt, answer = haystack(client, TEXT, [(depth, fact)], fact, 1000, "seed")
    assert len(prompt) + len(answer) == 1000
    text = "".join(map(chr, prompt))
    at = text.index(fact.sentence)
    hay = 1000 - len(fact.question) - len(fact.answer) - len(fact.sentence)
    assert at == max(1, round(depth * hay))
    assert text[:at] + text[at + len(fact.sentence) : -len(fact.question)] == "".join(
        map(chr, passage(client, TEXT, hay, "seed"))
    )
    assert text.endswith(fact.question)
    assert "".join(map(chr, answer)) == f" {fact.value}"
    assert prompt[0] == BEGIN


def test_context_too_short_for_a_needle(fake: Callable[..., Fake]) -> None:
    (fact,) = facts(1, "seed")
    with pytest.raises(UsageError, match="too short to hide"):
        haystack(fake().client, TEXT, [(0.5, fact)], fact, 100, "seed")


def test_answer_is_scored_token_by_token(fake: Callable[..., Fake]) -> None:
    server = fake()
    right = server.client.given([ord("a")], [ord("b"), ord("c")])
    assert right.hit
    assert right.logprob == pytest.approx(2 * math.log(0.5))
    wrong = server.client.given([ord("a")], [ord("b"), ord("x"), ord("y")])
    assert not wrong.hit
    assert wrong.logprob == pytest.approx(2 * math.log(0.5) + math.log(0.25))
    # each token after the right ones before it, not after what the model would have said
    assert [body["prompt"][1:] for body in server.of("/completion")[2:]] == [
        [],
        [ord("b")],
        [ord("b"), ord("x")],
    ]


def test_greedy_is_from_an_empty_cache_and_of_full_length(fake: Callable[..., Fake]) -> None:
    server = fake()
    settings = ValidationSettings(greedy_prompts=2, greedy_prompt_tokens=30, greedy_tokens=5)
    heard = Heard()
    found = generation.greedy(server.client, TEXT, settings, heard)
    assert [len(answer["tokens"]) for answer in found["answers"]] == [5, 5]
    assert heard.counts == [35, 35]
    for body in server.of("/completion"):
        assert len(body["prompt"]) == 30
        assert (body["temperature"], body["cache_prompt"], body["ignore_eos"]) == (0, False, True)


def test_needle_grid(fake: Callable[..., Fake]) -> None:
    server = fake()
    settings = ValidationSettings(needle_ctx=(300, 600), needle_depths=(0.1, 0.9), needle_repeats=2)
    found = generation.needle(server.client, TEXT, settings, SILENT)
    assert [(cell["ctx"], cell["depth"], cell["repeat"]) for cell in found["cells"]] == [
        (ctx, depth, repeat) for ctx in (300, 600) for depth in (0.1, 0.9) for repeat in (0, 1)
    ]
    assert all(cell["logprob"] < 0 and cell["tokens"] == 6 for cell in found["cells"])


def test_all_keys_are_asked_of_one_text(fake: Callable[..., Fake]) -> None:
    server = fake()
    found = generation.retrieval(
        server.client, TEXT, ValidationSettings(retrieval_ctx=1500, retrieval_keys=3), SILENT
    )
    assert [key["depth"] for key in found["keys"]] == [pytest.approx((i + 0.5) / 3) for i in range(3)]
    first = ["".join(map(chr, body["prompt"])) for body in server.of("/completion")][::6]
    shared = [text[: text.rindex("\n\nThe access code of ")] for text in first]
    assert len(first) == 3 and len(set(shared)) == 1
    for key, text in zip(found["keys"], first, strict=True):
        assert text.endswith(f"{key['key']} is") and text.count(f"The access code of {key['key']} is") == 2
        assert len(text) + 6 <= 1500


def test_sanity_is_drawn_with_different_seeds(fake: Callable[..., Fake]) -> None:
    server = fake()
    settings = ValidationSettings(sanity_prompts=3, sanity_tokens=60, greedy_prompt_tokens=20)
    found = generation.sanity(server.client, TEXT, settings, SILENT)
    assert len({body["seed"] for body in server.of("/completion")}) == 3
    assert all(not body.get("ignore_eos") for body in server.of("/completion"))
    for text in found["texts"]:
        assert text["repeated"] == pytest.approx(1 - 26 / 57)  # the alphabet again and again
        assert (text["garbage"], text["ended"], text["length"]) == (0, False, 60)


@pytest.mark.parametrize(
    ("tokens", "share"),
    [([1, 2, 3], 0), ([1, 2, 3, 4, 5], 0), ([7] * 5, 1 / 2), ([1, 2, 3, 4, 1, 2, 3, 4], 1 / 5)],
)
def test_repeated(tokens: list[int], share: float) -> None:
    assert generation.repeated(tokens) == pytest.approx(share)


def test_garbage() -> None:
    assert generation.garbage("") == 0
    assert generation.garbage("Grüße\n\t«世界»") == 0
    assert generation.garbage("ab\ufffd\x00") == 0.5


@pytest.mark.parametrize(
    ("code", "found", "message"),
    [
        (400, {"error": {"message": "the context is full"}}, "refused a request: the context is full"),
        (500, {}, "refused a request: 500"),
        (200, [], "something else"),
        (200, {"content": "no tokens"}, "has no tokens"),
        (200, {"tokens": [1, 2], "content": "", "stop_type": "limit"}, "generated 2 of 3 tokens"),
    ],
)
def test_bad_answers(fake: Callable[..., Fake], code: int, found: Any, message: str) -> None:
    server = fake(lambda path, body: (code, found))
    with pytest.raises(ToolError, match=message):
        server.client.greedy([1], 3)


@pytest.mark.parametrize(
    "probabilities",
    [None, [], [{"id": 5, "logprob": -1.0, "top_logprobs": []}], [{"id": 6, "logprob": -1.0}]],
)
def test_answers_without_probabilities(fake: Callable[..., Fake], probabilities: Any) -> None:
    server = fake(lambda path, body: (200, {"completion_probabilities": probabilities}))
    with pytest.raises(ToolError, match="gave no probabilities"):
        server.client.given([1], [5])


def test_server_that_takes_another_token(fake: Callable[..., Fake]) -> None:
    answer = {"completion_probabilities": [{"id": 6, "logprob": -1.0, "top_logprobs": [{"id": 6}]}]}
    server = fake(lambda path, body: (200, answer))
    with pytest.raises(ToolError, match="took token 6 although 5 was forced"):
        server.client.given([1], [5])


def test_server_that_is_gone() -> None:
    with pytest.raises(ToolError, match="did not answer"):
        Client("http://127.0.0.1:9").tokenize("x")
