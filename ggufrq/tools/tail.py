"""Taking a program's last words off a text that comes in chunks."""

from __future__ import annotations


class Tail:
    """Passes text on as soon as it cannot be part of one of ``tails``; what ends the text as one of them is
    dropped."""

    def __init__(self, *tails: str) -> None:
        self._tails = tails
        self._held = ""

    def feed(self, chunk: str) -> str:
        """The text that has become certain by this chunk."""
        text = self._held + chunk
        longest = max(map(len, self._tails))
        for size in range(min(longest, len(text)), 0, -1):
            end = text[-size:]
            if any(tail.startswith(end) for tail in self._tails):
                self._held = end
                return text[:-size]
        self._held = ""
        return text

    def close(self) -> str:
        """What is left once the program has ended, without its last words."""
        for tail in sorted(self._tails, key=len, reverse=True):
            if self._held.endswith(tail):
                return self._held.removesuffix(tail)
        return self._held
