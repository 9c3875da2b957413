"""Prompts from a text, at places that a seed fixes, so that every cache is asked the very same."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ggufrq.base.errors import UsageError
from ggufrq.measure.validate.client import Client

#: Characters that surely hold a token, to know how much of a text to take.
_CHARACTERS = 8

_FIRST = "amber azure brisk calm coral dusky fern gold hazel ivory jade lunar maple misty opal pine plum"
_SECOND = "badger crane dingo egret falcon gecko heron ibis jackal koala lemur lynx marten otter panda quail"


@dataclass(frozen=True)
class Fact:
    """Something to be hidden in a text and asked for: the code of ``key`` is ``value``."""

    key: str
    value: str

    @property
    def sentence(self) -> str:
        """As it stands in the text."""
        return f"\n\nThe access code of {self.key} is {self.value}. Remember it.\n\n"

    @property
    def question(self) -> str:
        """The beginning of a sentence whose end is the answer."""
        return f"\n\nThe access code of {self.key} is"

    @property
    def answer(self) -> str:
        """The end of that sentence."""
        return f" {self.value}"


def facts(count: int, seed: str) -> list[Fact]:
    """Facts with different keys and random five-digit values."""
    draw = random.Random(seed)
    keys = draw.sample([f"{a}-{b}" for a in _FIRST.split() for b in _SECOND.split()], count)
    return [Fact(key, str(draw.randrange(10_000, 100_000))) for key in keys]


def passage(client: Client, text: str, tokens: int, seed: str) -> list[int]:
    """So many tokens of the text from the beginning of a paragraph on, chosen by the seed; what the model
    wants at the beginning of a text goes before and counts.

    Raises UsageError when the text is too short.
    """
    draw = random.Random(seed)
    starts = [0, *(found.end() for found in re.finditer(r"\n\n(?=\S)", text))]
    size = tokens * _CHARACTERS
    usable = [start for start in starts if start + size <= len(text)] or [0]
    start = draw.choice(usable)
    found = client.tokenize(text[start : start + size], begin=True)
    if len(found) < tokens:
        raise UsageError(
            f"the text is too short: {tokens} tokens are wanted and it has {len(found)}",
            remedy="--text with a longer file",
        )
    return found[:tokens]


def haystack(
    client: Client, text: str, hidden: Sequence[tuple[float, Fact]], asked: Fact, ctx: int, seed: str
) -> tuple[list[int], list[int]]:
    """A prompt and its right answer, together ``ctx`` tokens: a passage with each fact at its depth (the
    share of the passage before it), then the question. Tokens, not characters, are counted."""
    question, answer = client.tokenize(asked.question), client.tokenize(asked.answer)
    sentences = [(depth, client.tokenize(fact.sentence)) for depth, fact in hidden]
    left = ctx - len(question) - len(answer) - sum(len(tokens) for _, tokens in sentences)
    if left < 16:
        raise UsageError(f"a context of {ctx} tokens is too short to hide anything in", remedy="--ctx 2048")
    hay = passage(client, text, left, seed)
    prompt: list[int] = []
    at = 0
    for depth, tokens in sorted(sentences, key=lambda pair: pair[0]):
        here = max(1, round(depth * len(hay)))  # behind the model's token for the beginning
        prompt += [*hay[at:here], *tokens]
        at = here
    return [*prompt, *hay[at:], *question], answer
