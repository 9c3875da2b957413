"""Conversations of the calibration mix, by our renderer and by transformers'."""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest

from ggufrq.base import paths
from ggufrq.make import mix

Conversation = dict[str, Any]
Writer = Callable[[str, Conversation], str]


def conversations() -> list[dict[str, Any]]:
    lines = (paths.data_dir("texts") / "mix" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    return [mix.with_ids(json.loads(line)) for line in lines]


TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}


@cache
def transformers_writer() -> Writer:
    """A conversation as ``apply_chat_template`` writes it, on the day that our text is always of."""
    transformers = pytest.importorskip("transformers")
    from transformers.utils import chat_template_utils

    folder = paths.data_dir("models") / "docs-qwen3-8m"
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **TOKENS)

    class Day(datetime.datetime):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Day:
            return cls(2026, 1, 1)

    def write(template: str, conversation: dict[str, Any]) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chat_template_utils, "datetime", Day)
            made = tokenizer.apply_chat_template(
                conversation["messages"],
                tools=conversation.get("tools"),
                chat_template=template,
                tokenize=False,
                add_generation_prompt=False,
            )
        return str(made)

    return write


def values_of(template: str) -> dict[str, Any]:
    return {
        "tokenizer.chat_template": template,
        "tokenizer.ggml.tokens": ("<unk>", "<s>", "</s>", "<pad>"),
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 3,
    }


def alike(
    template: str, chats: Sequence[Conversation], capsys: pytest.CaptureFixture[str]
) -> tuple[int, list[str]]:
    """How many conversations come out as ``apply_chat_template`` writes them, in the first form that it
    takes. The others must be ChatML, which lines tell of that are returned, too."""
    render, write = mix.renderer(values_of(template)), transformers_writer()
    same = 0
    for conversation in chats:
        made, expected = render(conversation), None
        for form in mix.forms(conversation):
            try:
                expected = write(template, form)
                break
            except Exception as error:  # what transformers does not take
                assert not isinstance(error, (AttributeError, NameError)), error
        if made == expected:
            same += 1
        else:
            assert made == mix.chatml(conversation)
    told = [line for line in capsys.readouterr().err.splitlines() if "ChatML" in line]
    assert bool(told) == (same < len(chats))
    return same, told
