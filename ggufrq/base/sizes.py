"""Sizes as people read them."""

from __future__ import annotations

import re

from ggufrq.base.errors import UsageError

_TOKENS = re.compile(r"^(\d+)(K|M)?$", re.IGNORECASE)
_BYTES = re.compile(r"^(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?$", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
#: Smaller files are not asked for: who writes 5 means 5G.
_LEAST_FILE = 10**6


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
    size = _bytes(text, ("K", "M", "G", "T"), binary=True)
    if not size:
        raise UsageError(f"'{text}' is no size of a memory", remedy="24GB, 24GiB or 512MB")
    return size


def parse_size(text: str) -> int:
    """The size of a file: ``5G``, ``1.5GB``, ``500M`` or plain bytes, decimal as the Hub counts. Raises
    UsageError."""
    size = _bytes(text, ("", "K", "M", "G"), binary=False)
    if size < _LEAST_FILE:
        raise UsageError(
            f"'{text}' is no size of a file", remedy="5G, 1.5GB, 500M, or bytes; 1M at the least"
        )
    return size


def _bytes(text: str, units: tuple[str, ...], *, binary: bool) -> int:
    """A number with one of the units, as a number of bytes; 0 for what is none. ``binary``: GiB, too."""
    found = _BYTES.match(text.strip())
    if found is None:
        return 0
    unit, of_two = found[2].upper(), bool(found[3])
    if unit not in units or (of_two and not binary):
        return 0
    size: int = (1024 if of_two else 1000) ** _POWERS[unit]
    return round(float(found[1]) * size)


def mib_text(size: int) -> str:
    """Bytes as MiB, as llama.cpp shows them: two decimals below 10, one below 1,000."""
    mib = size / (1 << 20)
    return f"{mib:,.{2 if mib < 10 else 1 if mib < 1000 else 0}f}"
