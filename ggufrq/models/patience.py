"""How long to wait for the Hub: for its first answer, and when it is busy for the next try, as long as it
says, whichever way it does."""

from __future__ import annotations

import re
import time
from email.utils import parsedate_to_datetime
from typing import Any

#: Seconds for a connection to each address of the Hub, and for an answer, where it is asked before any work:
#: its client would wait without an end. Every HTTP library under it takes such a pair, whatever types say.
FIRST: Any = (5, 20)
#: Statuses of a Hub that is busy or broken for a while, and of a commit that another one came before.
_PASSING = (408, 412, 429, 500, 502, 503, 504)
#: Seconds: the longest wait that we choose, and the longest that we take from the Hub.
_LONGEST_OWN, _LONGEST_ASKED = 16.0, 600.0
_RESET = re.compile(r";\s*t=(\d+)")


def causes(error: BaseException) -> list[BaseException]:
    """An error and what it came from: an upload in a thread wraps its own."""
    found = [error]
    while (cause := found[-1].__cause__) is not None and cause not in found:
        found.append(cause)
    return found


def status(error: BaseException) -> int | None:
    """The HTTP status that an error stands for, None when there was no answer."""
    for cause in causes(error):
        found = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(found, int):
            return found
    return None


def is_network(error: BaseException) -> bool:
    """Whether an error is one of a connection, whichever library it is from."""
    module = type(error).__module__.partition(".")[0]
    return isinstance(error, ConnectionError | TimeoutError) or (
        module in ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
    )


def asked(error: BaseException) -> float | None:
    """Seconds that a busy Hub asks to wait, None when it does not say or is not busy: by ``Retry-After``, in
    seconds or as a date, or by ``RateLimit``, as ``"api";r=0;t=40``."""
    if status(error) not in _PASSING:
        return None
    for cause in causes(error):
        headers = getattr(getattr(cause, "response", None), "headers", None) or {}
        seconds = _after(str(headers.get("Retry-After", "")).strip())
        reset = _RESET.search(str(headers.get("RateLimit", "")))
        if seconds is None and reset is not None:
            seconds = float(reset[1])
        if seconds is not None:
            return min(max(seconds, 0.0), _LONGEST_ASKED)
    return None


def wait(error: BaseException, attempt: int) -> float | None:
    """Seconds to wait before the next try, None when another try is no use."""
    seconds = asked(error)
    if seconds is not None:
        return seconds
    code = status(error)
    if code not in _PASSING and (code is not None or not any(map(is_network, causes(error)))):
        return None
    return min(_LONGEST_OWN, float(2**attempt))


def _after(text: str) -> float | None:
    """The seconds of a ``Retry-After``."""
    if text.isdecimal():
        return float(text)
    try:
        return parsedate_to_datetime(text).timestamp() - time.time()
    except ValueError:
        return None
