"""What a model writes with a cache: greedy continuations, needles, several keys, and how sane long texts are.

Every function asks one server and returns plain figures; ``assemble`` compares those of a case with the
base's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ggufrq.base.progress import Listener
from ggufrq.measure.validate.client import Client
from ggufrq.measure.validate.plan import ValidationSettings
from ggufrq.measure.validate.prompts import facts, haystack, passage

#: Warm enough that a healthy model does not repeat itself.
TEMPERATURE = 0.8
_NGRAM = 4
_PRINTABLE = frozenset("\n\r\t")


def greedy(client: Client, text: str, settings: ValidationSettings, listener: Listener) -> dict[str, Any]:
    """Tokens and text of greedy continuations. ``listener`` is told the tokens done."""
    answers = []
    for i in range(settings.greedy_prompts):
        prompt = passage(client, text, settings.greedy_prompt_tokens, f"greedy {settings.seed} {i}")
        answer = client.greedy(prompt, settings.greedy_tokens)
        answers.append({"tokens": list(answer.tokens), "text": answer.text})
        listener.advance(len(prompt) + settings.greedy_tokens)
    return {"answers": answers}


def needle(client: Client, text: str, settings: ValidationSettings, listener: Listener) -> dict[str, Any]:
    """One fact in a text, per context and depth, and the log-probability of the right answer."""
    cells = []
    for ctx in settings.needle_ctx:
        for repeat in range(settings.needle_repeats):
            # one text per context, from the deepest needle up: each shares what stands before it
            seed = f"needle {settings.seed} {ctx} {repeat}"
            depths = sorted(settings.needle_depths, reverse=True)
            for depth, fact in zip(depths, facts(len(depths), seed), strict=True):
                prompt, answer = haystack(client, text, [(depth, fact)], fact, ctx, seed)
                given = client.given(prompt, answer)
                cells.append(
                    {
                        "ctx": ctx,
                        "depth": depth,
                        "repeat": repeat,
                        "hit": given.hit,
                        "logprob": given.logprob,
                        "tokens": len(answer),
                    }
                )
                listener.advance(ctx)
    return {"cells": sorted(cells, key=lambda cell: (cell["ctx"], cell["depth"], cell["repeat"]))}


def retrieval(client: Client, text: str, settings: ValidationSettings, listener: Listener) -> dict[str, Any]:
    """Several facts in one text, each asked for."""
    seed = f"retrieval {settings.seed}"
    found = facts(settings.retrieval_keys, seed)
    depths = [(i + 0.5) / len(found) for i in range(len(found))]
    hidden = list(zip(depths, found, strict=True))
    # the passage is what the longest question leaves room for, so that all share it
    asked = max(found, key=lambda fact: len(client.tokenize(fact.question + fact.answer)))
    whole, answer = haystack(client, text, hidden, asked, settings.retrieval_ctx, seed)
    shared = whole[: len(whole) - len(client.tokenize(asked.question))]
    keys = []
    for depth, fact in hidden:
        answer = client.tokenize(fact.answer)
        given = client.given([*shared, *client.tokenize(fact.question)], answer)
        keys.append(
            {
                "key": fact.key,
                "depth": depth,
                "hit": given.hit,
                "logprob": given.logprob,
                "tokens": len(answer),
            }
        )
        listener.advance(settings.retrieval_ctx // len(found))
    return {"ctx": settings.retrieval_ctx, "keys": keys}


def sanity(client: Client, text: str, settings: ValidationSettings, listener: Listener) -> dict[str, Any]:
    """Texts drawn at a usual temperature: how much of each repeats itself or is no text, and which end."""
    texts = []
    for i in range(settings.sanity_prompts):
        prompt = passage(client, text, settings.greedy_prompt_tokens, f"sanity {settings.seed} {i}")
        answer = client.sample(
            prompt, settings.sanity_tokens, seed=settings.seed * 1000 + i, temperature=TEMPERATURE
        )
        texts.append(
            {
                "repeated": repeated(answer.tokens),
                "garbage": garbage(answer.text),
                "ended": answer.ended,
                "length": len(answer.tokens),
            }
        )
        listener.advance(len(prompt) + settings.sanity_tokens)
    return {"texts": texts}


def repeated(tokens: Sequence[int], n: int = _NGRAM) -> float:
    """Share of the runs of ``n`` tokens that occurred before in the same text; 0 for shorter texts."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def garbage(text: str) -> float:
    """Share of characters that stand for broken UTF-8 or are control characters; 0 for an empty text."""
    bad = sum(c == "\ufffd" or (ord(c) < 32 and c not in _PRINTABLE) or 127 <= ord(c) < 160 for c in text)
    return bad / len(text) if text else 0.0
