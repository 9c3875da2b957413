"""Sizes as people read them."""

from __future__ import annotations

import re

from ggufrq.base.errors import UsageError

_TOKENS = re.compile(r"^(\d+)(K|M)?$", re.IGNORECASE)
_MEMORY = re.compile(r"^(\d+(?:\.\d+)?) *(K|M|G|T)(i?)B?$", re.IGNORECASE)
_POWERS = {"K": 1, "M": 2, "G": 3, "T": 4}


def size_text(size: int) -> str:
    """Bytes as kB, MB or GB, decimal, as the Hub shows them."""
    if size < 1e5:
        return f"{size / 1e3:.1f} kB"
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def parse_tokens(text: str) -> int:
    """``8192``, ``8K`` (1,024 each) or ``262K``: where a power of two has that many thousands, it is meant,
    as 262,144 is by 262K. Raises UsageError."""
    found = _TOKENS.match(text.strip())
    number = int(found[1]) if found else 0
    if found is None or not number:
        raise UsageError(f"'{text}' is no number of tokens", remedy="8192, 8K or 1M")
    if found[2] is None:
        return number
    exponent = _POWERS[found[2].upper()]
    thousand = 10 ** (3 * exponent)
    power = 1 << (number * thousand).bit_length()
    return power if power // thousand == number else number << 10 * exponent


def parse_memory(text: str) -> int:
    """``24GB`` in bytes, decimal, or ``24GiB``, binary. Raises UsageError."""
    found = _MEMORY.match(text.strip())
    size = 0
    if found:
        size = round(float(found[1]) * (1024 if found[3] else 1000) ** _POWERS[found[2].upper()])
    if not size:
        raise UsageError(f"'{text}' is no size of a memory", remedy="24GB, 24GiB or 512MB")
    return size


def mib_text(size: int) -> str:
    """Bytes as MiB, as llama.cpp shows them: two decimals below 10, one below 1,000."""
    mib = size / (1 << 20)
    return f"{mib:,.{2 if mib < 10 else 1 if mib < 1000 else 0}f}"
