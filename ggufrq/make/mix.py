"""The text that importance matrices are made from by default: prose, code, chat and tool calls, in turns.

Conversations are written as the model's own chat template has it, or as ChatML where it has none or takes
none of the forms that a conversation can be given. The same model gets the same text, to the byte.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ggufrq.base import log, paths, proc, texts
from ggufrq.base.environment import of_package
from ggufrq.base.errors import ToolError
from ggufrq.ggufs.files import model_header

if TYPE_CHECKING:
    from jinja2.ext import Extension

#: What the text is called in a matrix.
NAME = "ggufrq-mix.txt"
_VERSION = 2
#: Characters of a piece of prose or code, and of all the documentation that is taken.
_PIECE, _PAGES = 2400, 90_000
#: Lines and calls that a template may take for a conversation, and characters that it may write. Real ones
#: take 1,500, and write 4,000. No seconds, since the text must not depend on how busy a machine is.
_STEPS, _LONGEST = 200_000, 1_000_000
#: Seconds of a processor and bytes of memory that the program may take in which a model's template runs: a
#: single expression may ask for any. Those of the tests take .12 s and 30 MB.
_SECONDS, _MEMORY = 30, 1 << 30
#: So many times these seconds by the clock: all that Windows has, and far off, as others compute, too.
_PATIENCE = 10
#: Templates that write the date get this one.
_DATE = datetime.datetime(2026, 1, 1)

#: Special tokens by what templates call them: GGUF's word for them.
_SPECIAL = {
    **{"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"},
    **{"cls": "cls", "mask": "mask"},
}

#: Metadata that a template is rendered by.
_TOLD = re.compile(r"tokenizer\.(chat_template.*|ggml\.(tokens|\w+_token_id))")

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
    """Write the text for a GGUF model. Its template, which is somebody's program, runs in a process of its
    own with limits (``_limits``); where it takes more, all is ChatML, and a line says so."""
    values = {key: value for key, value in model_header(model).values.items() if _TOLD.fullmatch(key)}
    paths.atomic_write(out, _text_apart(values) if "tokenizer.chat_template" in values else text(values))
    return out


def _text_apart(values: Mapping[str, Any]) -> str:
    """``text`` by ``main`` in a process of its own."""
    why = ""
    try:
        done = proc.run(
            [sys.executable, "-m", "ggufrq.make.mix", str(_SECONDS), str(_MEMORY)],
            env=of_package(),
            stdin=json.dumps(values),
            timeout=_PATIENCE * _SECONDS,
            check=False,
            on_stderr=log.say,
        )
        if done.rc == 0:
            return done.stdout
        why = proc.how_it_ended(done)
    except ToolError as error:
        why = error.message
    log.say(f"the calibration text is ChatML, since the chat template cannot be run in {_limits()}: {why}")
    return text({})


def _limits() -> str:
    """What a template may take on this system, as ``main`` can hold it."""
    if sys.platform == "win32":
        return f"{_PATIENCE * _SECONDS} seconds"
    memory = f" and {_MEMORY >> 20} MiB" if sys.platform == "linux" else ""
    return f"{_SECONDS} seconds of a processor{memory}"


def main() -> None:
    """The text for the metadata that stdin has as JSON, in so many seconds and bytes of memory as the two
    arguments say: memory where the system holds it (Linux), seconds but on Windows."""
    with contextlib.suppress(ImportError):
        import resource

        limits = resource.RLIMIT_CPU, resource.RLIMIT_AS
        for limit, most in zip(limits, map(int, sys.argv[1:]), strict=True):
            with contextlib.suppress(OSError, ValueError):  # macOS has no limit of memory
                resource.setrlimit(limit, (most, most))
    sys.stdout.buffer.write(texts.to_bytes(text(json.load(sys.stdin))))


def text(values: Mapping[str, Any]) -> str:
    """The text for a model with this metadata: about 170,000 characters."""
    folder = paths.data_dir("texts")
    read = {name: (folder / "mix" / name).read_text(encoding="utf-8") for name in ("prose.txt", "code.txt")}
    lines = (folder / "mix" / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    chats: list[Conversation] = [with_ids(json.loads(line)) for line in lines]
    render = renderer(values)
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


def with_ids(conversation: Conversation) -> Conversation:
    """A conversation whose calls of tools have ids, nine letters and figures as Mistral's templates want
    them, and whose answers name them."""
    ids: list[str] = []
    messages: list[dict[str, Any]] = []
    for message in conversation["messages"]:
        if message.get("tool_calls"):
            calls = [{**c, "id": f"call{len(ids) + i:05d}"} for i, c in enumerate(message["tool_calls"])]
            ids += [call["id"] for call in calls]
            message = {**message, "tool_calls": calls}
        elif message["role"] == "tool":
            answered = sum(earlier["role"] == "tool" for earlier in messages)
            message = {**message, "tool_call_id": ids[answered]}
        messages.append(message)
    return {**conversation, "messages": messages}


def forms(conversation: Conversation) -> Iterator[Conversation]:
    """What a template may take when it does not take the conversation as it is: calls one after the other
    (Llama 3 knows one at a time), and no turn of the system (Gemma 2 knows none), but its words before the
    user's."""
    yield conversation
    single = {**conversation, "messages": _one_by_one(conversation["messages"])}
    if len(single["messages"]) != len(conversation["messages"]):
        yield single
    first, *others = single["messages"]
    if first["role"] == "system" and others and others[0]["role"] == "user":
        user = {**others[0], "content": f"{first['content']}\n\n{others[0]['content']}"}
        yield {**conversation, "messages": [user, *others[1:]]}


def _one_by_one(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The same messages, but every call of a tool with its answer behind it."""
    answers = {m["tool_call_id"]: m for m in messages if m.get("tool_call_id")}
    found: list[Mapping[str, Any]] = []
    for message in messages:
        calls = message.get("tool_calls") or ()
        if len(calls) < 2 or not all(call.get("id") in answers for call in calls):
            if message not in found:
                found.append(message)
            continue
        for i, call in enumerate(calls):
            content = message["content"] if i == 0 else ""
            found += [{**message, "content": content, "tool_calls": [call]}, answers[call["id"]]]
    return found


class _Endless(Exception):
    """A template goes on and on."""


def _limited(pieces: Iterable[str]) -> str:
    """All that a template writes, piece by piece. Raises _Endless when it takes or writes too much."""
    steps, found, length = 0, list[str](), 0

    def step(frame: FrameType, event: str, value: object) -> Callable[..., Any]:
        nonlocal steps
        steps += 1
        if steps > _STEPS:
            raise _Endless(f"it has not come to an end after {_STEPS:,} steps")
        return step

    before = sys.gettrace()
    sys.settrace(step)
    try:
        for piece in pieces:
            found.append(piece)
            length += len(piece)
            if length > _LONGEST:
                raise _Endless(f"it writes more than {_LONGEST:,} characters for a conversation")
    finally:
        sys.settrace(before)
    return "".join(found)


def renderer(values: Mapping[str, Any]) -> Callable[[Conversation], str]:
    """How the model writes conversations: as ``apply_chat_template`` of transformers does; ChatML where its
    template is missing, or does not take one, which is said."""
    default = values.get("tokenizer.chat_template")
    if not isinstance(default, str):
        return chatml
    with_tools = values.get("tokenizer.chat_template.tool_use")
    from jinja2 import Environment, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment: Environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[generation_tag(), "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": _DATE.strftime}
    tokens = values.get("tokenizer.ggml.tokens", ())
    special = {
        f"{name}_token": tokens[number]
        for name, key in _SPECIAL.items()
        for number in [values.get(f"tokenizer.ggml.{key}_token_id")]
        if isinstance(number, int) and number < len(tokens)
    }

    told, endless = set[str](), set[str]()
    compiled = cache(environment.from_string)

    def instead(conversation: Conversation, why: str) -> str:
        if why not in told:
            told.add(why)
            log.say(f"the calibration text is ChatML where the chat template does not take it: {why}")
        return chatml(conversation)

    def render(conversation: Conversation) -> str:
        template = with_tools if conversation.get("tools") and isinstance(with_tools, str) else default
        if conversation.get("tools") and "tool_calls" not in template:
            return instead(conversation, "it knows no calls of tools")
        if template in endless:
            return chatml(conversation)
        why = ""
        for form in forms(conversation):
            try:
                written = _limited(
                    compiled(template).generate(
                        messages=form["messages"],
                        tools=form.get("tools"),
                        documents=None,
                        add_generation_prompt=False,
                        **special,
                    )
                )
                if written.strip():
                    return written
                why = why or "it writes nothing"
            except (_Endless, MemoryError) as error:
                endless.add(template)
                return instead(conversation, str(error) or "it takes too much memory")
            except Exception as error:  # a template is a program, and may fail in any way
                why = why or (str(error).strip() or repr(error)).splitlines()[0]
        return instead(conversation, why)

    return render


def generation_tag() -> type[Extension]:
    """The tag ``generation`` of transformers, which marks what the assistant says; it changes nothing."""
    from jinja2.ext import Extension
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (so declared in jinja2)

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return Scope(body, lineno=line)

    return Generation


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as templates of transformers expect it: without HTML's escapes."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


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


if __name__ == "__main__":
    main()
