"""The text that importance matrices are made from by default: prose, code, chat and tool calls, in turns.

Conversations are written as the model's own chat template has it, or as ChatML where it has none. The same
model gets the same text, to the byte.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ggufrq.base import paths
from ggufrq.ggufs.header import read_header

#: What the text is called in a matrix.
NAME = "ggufrq-mix.txt"
_VERSION = 1
#: Characters of a piece of prose or code, and of all the documentation that is taken.
_PIECE, _PAGES = 2400, 90_000
#: Templates that write the date get this one.
_DATE = datetime.datetime(2026, 1, 1)

_logger = logging.getLogger(__name__)

Conversation = dict[str, Any]


def digest() -> str:
    """A hash of everything that the text is made of, but for the model's template."""
    folder = paths.data_dir("texts")
    files = [folder / "calibration.txt", *sorted((folder / "mix").iterdir())]
    found = hashlib.sha256(f"{_VERSION} {_PIECE} {_PAGES}".encode())
    for path in files:
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def write(model: Path, out: Path) -> Path:
    """Write the text for a GGUF model."""
    paths.atomic_write(out, text(read_header(model).values))
    return out


def text(values: Mapping[str, Any]) -> str:
    """The text for a model with this metadata: about 170,000 characters."""
    folder = paths.data_dir("texts")
    read = {name: (folder / "mix" / name).read_text(encoding="utf-8") for name in ("prose.txt", "code.txt")}
    lines = (folder / "mix" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    chats: list[Conversation] = [json.loads(line) for line in lines]
    render = _renderer(values)
    pages = _pieces((folder / "calibration.txt").read_text(encoding="utf-8"))
    step = max(1, len(pages) * _PIECE // _PAGES)
    return "\n\n".join(
        _in_turns(
            pages[::step],
            _pieces(read["prose.txt"]),
            _pieces(read["code.txt"]),
            [render(chat).strip() for chat in chats if "tools" not in chat],
            [render(chat).strip() for chat in chats if "tools" in chat],
        )
    )


def _pieces(whole: str) -> list[str]:
    """Pieces of about ``_PIECE`` characters that end between paragraphs."""
    found = [""]
    for paragraph in whole.split("\n\n"):
        if len(found[-1]) > _PIECE:
            found.append("")
        found[-1] += f"{paragraph}\n\n"
    return [piece.strip("\n") for piece in found if piece.strip()]


def _in_turns(*kinds: list[str]) -> list[str]:
    """All pieces, each kind spread evenly over the whole."""
    placed = [
        ((i + 0.5) / len(pieces), number, piece)
        for number, pieces in enumerate(kinds)
        for i, piece in enumerate(pieces)
    ]
    return [piece for _, _, piece in sorted(placed)]


def _renderer(values: Mapping[str, Any]) -> Callable[[Conversation], str]:
    """How the model writes conversations; ChatML where its template is missing or does not take one."""
    template = values.get("tokenizer.chat_template")
    if not isinstance(template, str):
        return chatml
    from jinja2 import Environment, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment: Environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals |= {"raise_exception": refuse, "strftime_now": _DATE.strftime}
    tokens = values.get("tokenizer.ggml.tokens", ())
    special = {
        f"{name}_token": tokens[number] if isinstance(number, int) and number < len(tokens) else ""
        for name in ("bos", "eos")
        for number in [values.get(f"tokenizer.ggml.{name}_token_id")]
    }

    def render(conversation: Conversation) -> str:
        if conversation.get("tools") and "tool_calls" not in template:
            return chatml(conversation)  # the template would drop the calls
        try:
            made = environment.from_string(template).render(
                messages=conversation["messages"],
                tools=conversation.get("tools"),
                add_generation_prompt=False,
                **special,
            )
        except (TemplateError, TypeError, ValueError, KeyError) as error:
            _logger.debug("the chat template does not take a conversation: %s", error)
            return chatml(conversation)
        return str(made)

    return render


def chatml(conversation: Conversation) -> str:
    """A conversation as ChatML, tools and their calls as JSON in tags."""
    messages = [dict(message) for message in conversation["messages"]]
    if conversation.get("tools"):
        listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in conversation["tools"])
        messages[0]["content"] += f"\n\n<tools>\n{listed}\n</tools>"
    lines = []
    for message in messages:
        content = message["content"]
        for call in message.get("tool_calls", ()):
            content += f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>\n"
        role = message["role"]
        if role == "tool":
            role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
        lines.append(f"<|im_start|>{role}\n{content.strip()}<|im_end|>")
    return "\n".join(lines)
