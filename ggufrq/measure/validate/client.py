"""Asking a llama-server: tokens in, tokens and their log-probabilities out."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.base.errors import ToolError
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case, assignments
from ggufrq.drive import serve
from ggufrq.drive.cache_check import check_context, mode_of
from ggufrq.measure.divergence import Subject, bits_of
from ggufrq.tools.programs import Programs
from ggufrq.tools.server import Connection

#: A bias that no logit withstands, to make the server take a certain token.
_FORCED = 1e6
#: The smallest probability that the server can report is that of a float.
_LEAST_LOG = -104.0


@dataclass(frozen=True)
class Answer:
    """Generated tokens, their text, and whether the end was the model's own (an end-of-text token)."""

    tokens: tuple[int, ...]
    text: str
    ended: bool


@dataclass(frozen=True)
class Given:
    """What the model makes of an answer that it is given: the sum of the log-probabilities of its tokens
    (nats), and whether each was the likeliest, so that greedy decoding would give this very answer."""

    logprob: float
    hit: bool


class Client:
    """A running server. Raises ToolError when it refuses a request or its answer has not what was asked."""

    def __init__(self, url: str) -> None:
        self._server = Connection(url)

    def close(self) -> None:
        """Let the connection go."""
        self._server.close()

    def tokenize(self, text: str, *, begin: bool = False) -> list[int]:
        """Tokens of a text; with ``begin`` what the model wants at the beginning of one goes before."""
        return [int(t) for t in self._post("tokenize", content=text, add_special=begin)["tokens"]]

    def greedy(self, prompt: Sequence[int], tokens: int) -> Answer:
        """The likeliest continuation of exactly so many tokens, from an empty cache."""
        answer = self._complete(prompt, tokens, temperature=0, ignore_eos=True)
        if len(answer.tokens) != tokens:
            raise ToolError(f"llama-server generated {len(answer.tokens)} of {tokens} tokens")
        return answer

    def sample(self, prompt: Sequence[int], tokens: int, *, seed: int, temperature: float) -> Answer:
        """A continuation drawn with a seed, of so many tokens or to its own end, from an empty cache."""
        return self._complete(prompt, tokens, temperature=temperature, seed=seed)

    def given(self, prompt: Sequence[int], answer: Sequence[int]) -> Given:
        """How likely ``answer`` is after ``prompt``, token by token, each after the right ones before it."""
        so_far, total, hit = list(prompt), 0.0, True
        for token in answer:
            found = self._post(
                "completion",
                prompt=so_far,
                n_predict=1,
                temperature=0,
                cache_prompt=True,
                n_probs=1,
                logit_bias=[[token, _FORCED]],
            )
            try:
                (first,) = found["completion_probabilities"]
                taken, logprob, likeliest = first["id"], first["logprob"], first["top_logprobs"][0]["id"]
            except (KeyError, IndexError, TypeError, ValueError):
                raise ToolError("llama-server gave no probabilities") from None
            if taken != token:
                raise ToolError(f"llama-server took token {taken} although {token} was forced")
            total += max(float(logprob), _LEAST_LOG)
            hit = hit and likeliest == token
            so_far.append(token)
        return Given(total, hit)

    def _complete(self, prompt: Sequence[int], tokens: int, **options: Any) -> Answer:
        found = self._post(
            "completion",
            prompt=list(prompt),
            n_predict=tokens,
            cache_prompt=False,
            return_tokens=True,
            **options,
        )
        try:
            ids = tuple(int(token) for token in found["tokens"])
            return Answer(ids, str(found["content"]), found["stop_type"] == "eos")
        except (KeyError, TypeError, ValueError):
            raise ToolError("llama-server's answer has no tokens") from None

    def _post(self, path: str, **body: Any) -> dict[str, Any]:
        return self._server.post(path, body)


@dataclass(frozen=True)
class Served:
    """A server for one case: its client, what its cache takes as ``memory`` in the result, how K and V are
    rotated, and the command line with files by their names alone."""

    client: Client
    memory: dict[str, Any]
    mode: str
    command: str


@contextmanager
def serving(
    case: Case, model: Subject, build: Build, *, n_ctx: int, threads: int | None, log: Path
) -> Iterator[Served]:
    """A server that keeps its cache as the case says, from its start to the end of the ``with`` block.

    Raises ToolError when it does not come up or dies, CacheError when it keeps the cache otherwise.
    """
    with serve.serving(
        model.path,
        case.plan,
        Programs.of_build(build),
        port=serve.ANY_PORT,
        n_ctx=n_ctx,
        threads=threads,
        extra=("--cache-ram", "0"),  # states of earlier prompts are not wanted back
        env=case.environment(),
        log_path=log,
    ) as running:
        context = running.context
        size = check_context(case, context, model.path, model.shape, None)
        memory = {
            "cache_bytes": size,
            "cache_tokens": context.tokens,
            "recurrent_mib": context.recurrent_mib,
            "bits_per_value": bits_of(case, model.shape, size, context.tokens),
        }
        files = {str(path): path.name for path in (model.path, case.plan.file) if path is not None}
        shown = [files.get(arg, arg) for arg in map(str, running.process.args[1:])]
        variables = {k: v for k, v in case.environment().items() if k not in case.plan.environment()}
        command = assignments(variables) + shlex.join(["llama-server", *shown])
        client = Client(running.url)
        try:
            yield Served(client, memory, mode_of(context), command)
        finally:
            client.close()
