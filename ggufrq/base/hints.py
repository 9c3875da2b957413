"""Hints for the person at the terminal. ``log`` hands these out; what it needs itself asks here."""

from __future__ import annotations

import logging
import sys

_state = {"quiet": False}


def set_quiet(quiet: bool) -> None:
    """Turn hints and progress off, or on again."""
    _state["quiet"] = quiet


def is_quiet() -> bool:
    """Whether hints and progress are off."""
    return _state["quiet"]


def say(message: str) -> None:
    """A hint for the person at the terminal: one line on stderr, none when quiet; always in the run's log."""
    logging.getLogger("ggufrq").info("%s", message)
    if not is_quiet():
        print(message, file=sys.stderr, flush=True)
