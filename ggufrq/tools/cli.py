"""llama-cli: one turn of a chat. Its answer stands on stdout between a banner with the echoed prompt and a
farewell."""

from __future__ import annotations

from pathlib import Path

from ggufrq.base.errors import ToolError
from ggufrq.cache.kv import KvPlan
from ggufrq.tools import completion
from ggufrq.tools.logs import explain
from ggufrq.tools.tail import Tail

#: A prompt that begins with one of these would be taken as a command.
COMMANDS = ("/exit", "/regen", "/clear", "/read ", "/glob ", "/image ", "/audio ", "/video ")

_ECHOED = 500
_BANNER = "available commands:"
#: The message, after the newline that ends an answer, if there is one.
_FAREWELL = ("\n\n\nExiting...\n", "\n\nExiting...\n")
_ERROR = "Error: "


def arguments(
    model: Path,
    prompt: str | Path,
    plan: KvPlan,
    *,
    tokens: int,
    n_ctx: int,
    threads: int | None = None,
    temperature: float | None = None,
    seed: int | None = None,
) -> list[str]:
    """Arguments of a single turn that answers ``prompt`` with up to ``tokens`` tokens in a context of
    ``n_ctx``."""
    args = completion.common_arguments(
        model,
        prompt,
        plan,
        tokens=tokens,
        n_ctx=n_ctx,
        threads=threads,
        temperature=temperature,
        seed=seed,
    )
    return [*args, "-st", "--simple-io", "--no-show-timings", "--color", "off"]


class Answer:
    """Takes stdout in chunks and gives the answer in chunks, without banner, echo and farewell."""

    def __init__(self, prompt: str) -> None:
        echo = prompt.encode()
        shown = (
            echo[:_ECHOED].decode(errors="replace") + " ... (truncated)" if len(echo) > _ECHOED else prompt
        )
        self._start = f"\n> {shown}\n"
        self._before = ""
        self._begun = False
        self._tail = Tail(*_FAREWELL)
        self._opening = ""
        self.text = ""

    def feed(self, chunk: str) -> str:
        """The part of the answer that has become certain by this chunk."""
        if not self._begun:
            self._before += chunk
            banner = self._before.find(_BANNER)
            start = self._before.find(self._start, banner) if banner >= 0 else -1
            if start < 0:
                return ""
            self._begun = True
            chunk = self._before[start + len(self._start) :]
        return self._give(self._tail.feed(chunk))

    def close(self) -> str:
        """The rest of the answer. Raises ToolError when llama-cli did not come to it."""
        if not self._begun:
            raise ToolError(f"llama-cli did not come to the answer: {explain(self._before, 'see its log')}")
        rest = self._give(self._tail.close())
        # An error instead of an answer is in the log, too, where it cannot be mistaken for an answer.
        left, self._opening = self._opening, ""
        if left and not left.startswith(_ERROR):
            self.text += left
            rest += left
        return rest

    def _give(self, text: str) -> str:
        if not self.text:
            text = self._opening + text
            self._opening = ""
            if text.startswith(_ERROR) or _ERROR.startswith(text):
                self._opening = text
                return ""
        self.text += text
        return text
