"""Figures as text: no more digits than their errors bear out."""

from __future__ import annotations

import math

#: Stands where nothing was measured.
NONE = "–"


def decimals_for(error: float) -> int:
    """Decimals that a value with this standard error is shown with: to the first digit of the error, or to
    the second where the first is 1 or 2."""
    if not error > 0:
        return 0
    exponent = math.floor(math.log10(error))
    leading = error / 10**exponent
    return max(0, -exponent + (1 if leading < 2.95 else 0))


def with_error(value: float | None, error: float | None, *, most: int = 7) -> str:
    """``0.0185 ± 0.0003``; a value without an error has three significant digits."""
    if value is None:
        return NONE
    if not error:
        return significant(value)
    places = min(decimals_for(error), most)
    return f"{fixed(value, places)} ± {error:,.{places}f}"


def percent(value: float | None, error: float | None = None, *, signed: bool = False) -> str:
    """A share as ``92.1 ± 0.3``, in percent without the sign for it."""
    if value is None:
        return NONE
    value, error = 100 * value, 100 * (error or 0.0)
    places = min(decimals_for(error), 4) if error else 1
    sign = "+" if signed and round(value, places) > 0 else ""
    text = sign + fixed(value, places)
    return f"{text} ± {error:.{places}f}" if error else text


def change(ln_ratio: float, error: float) -> str:
    """How much more something is than another, ``+1,056``, in percent without the sign for it, from the
    logarithm of their ratio and its error: d exp(x) = exp(x) dx."""
    return percent(math.expm1(ln_ratio), math.exp(ln_ratio) * error, signed=True)


def significant(value: float | None, digits: int = 3) -> str:
    """A value with so many significant digits and never in powers of ten: ``0.00123``, ``1,749``."""
    if value is None:
        return NONE
    if value == 0 or not math.isfinite(value):
        return "0" if value == 0 else NONE
    places = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return fixed(value, min(places, 7))


def fixed(value: float, places: int) -> str:
    """With so many decimals, thousands apart, and a real minus sign but no ``−0``."""
    text = f"{value:,.{places}f}"
    if text.startswith("-"):
        text = text[1:] if not text.strip("-0.,") else "−" + text[1:]
    return text


def plain(value: float) -> str:
    """A round number as it stands at an axis: ``0.003``, ``20``."""
    text = f"{value:.9f}".rstrip("0").rstrip(".")
    return text or "0"


def ratio(value: float | None, error: float | None = None) -> str:
    """``1.82 ± 0.03 ×``."""
    if value is None:
        return NONE
    if not error:
        return f"{fixed(value, 2)}×"
    places = min(max(decimals_for(error), 1), 2 if value >= 1.995 else 3)
    return f"{fixed(value, places)} ± {error:.{places}f}×"


def size(count: float | None) -> str:
    """Bytes as MiB or GiB: ``100 MiB``."""
    if count is None:
        return NONE
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if count >= 1 << power:
            return f"{significant(count / (1 << power))} {unit}"
    return f"{count:,.0f} B"


def duration(seconds: float | None) -> str:
    """``42 s``, ``3 min``, ``1 h 05 min``."""
    if seconds is None:
        return NONE
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
