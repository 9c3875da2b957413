"""The border for text. What comes in, from a file or an argument, is UTF-8 or is refused with a sentence;
what goes out can always be written.

Paths are bytes on POSIX: those that are no UTF-8 are strings with lone surrogates in Python, and must not
stop a log, a message or a hash.
"""

from __future__ import annotations

import codecs
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from ggufrq.base.errors import UsageError

#: Marks at the start of texts in other encodings; a longer one goes before one that it begins with.
_MARKS = (
    (codecs.BOM_UTF32_LE, "UTF-32LE"),
    (codecs.BOM_UTF32_BE, "UTF-32BE"),
    (codecs.BOM_UTF16_LE, "UTF-16LE"),
    (codecs.BOM_UTF16_BE, "UTF-16BE"),
)
_LONE = re.compile("[\ud800-\udfff]")
#: Name of what is done about characters that an output cannot have.
SHOWN = "ggufrq.shown"


def read(path: Path) -> str:
    """A text that a user names, with ``\\n`` as end of line and without a mark at its start. Raises
    UsageError when it is in another encoding or no text."""
    return _lines(decode(path.read_bytes(), str(path)))


def decode(data: bytes, name: str) -> str:
    """The text in ``data``, which ``name`` stands for in errors. Raises UsageError as ``read``."""
    for mark, encoding in _MARKS:
        if data.startswith(mark):
            raise _refused(name, f"is in {encoding}, not in UTF-8", encoding)
    try:
        text = data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        what = f"byte 0x{data[error.start]:02x} at {error.start:,} is not UTF-8"
        raise _refused(name, f"is no text in UTF-8: {what}", "LATIN1") from None
    zero = data.find(b"\0")
    if zero >= 0:
        wide = len(data) > 3 and 0 in data[:2] and data[:2] != b"\0\0"
        likely = ("UTF-16LE" if data[1] == 0 else "UTF-16BE") if wide else None
        looks = f", as texts in {likely} have them" if likely else ""
        raise _refused(name, f"is no text: there is a zero byte at {zero:,}{looks}", likely)
    return text


def argument(value: str, name: str) -> str:
    """A text from the command line, without a mark at its start, given by the option ``name``. Raises
    UsageError as ``read``."""
    try:
        return decode(value.encode("utf-8", "surrogateescape"), name)
    except UnicodeEncodeError as error:
        what = f"{name} is no text in UTF-8: the character at {error.start:,} is half of one"
    except UsageError as error:
        what = error.message
    file = ", or -f FILE" if name == "--prompt" else ""
    raise UsageError(what, remedy=f"write it in UTF-8{file}")


def clean(value: str) -> str:
    """A text for a format that must be UTF-8: what cannot be said in it becomes U+FFFD."""
    return _LONE.sub("\ufffd", value)


def as_read(path: str) -> str:
    """A path as it stands in what was read of a program's output: U+FFFD for what is no UTF-8."""
    return to_bytes(path).decode(errors="replace")


def to_bytes(value: str) -> bytes:
    """A text or path as bytes, for hashes and logs: the very bytes of a path that is no UTF-8."""
    return value.encode("utf-8", SHOWN)


def to_json(data: Any, **options: Any) -> str:
    """``json.dumps`` with letters as they are, but of a path that is no UTF-8 the escapes that JSON has."""
    text = json.dumps(data, ensure_ascii=False, **options)
    return _LONE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def let_out() -> None:
    """Let stdout and stderr take any text, whatever their encoding is."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors=SHOWN)


def _lines(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _refused(name: str, why: str, encoding: str | None) -> UsageError:
    if encoding is None:
        return UsageError(f"{name} {why}", remedy="a plain text")
    quoted = shlex.quote(name)
    return UsageError(
        f"{name} {why}", remedy=f"if it is in {encoding}: iconv -f {encoding} -t UTF-8 {quoted}"
    )


def _shown(error: UnicodeError) -> tuple[bytes, int]:
    """The bytes that a lone surrogate stands for, and escapes of other characters."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    out = bytearray()
    for letter in error.object[error.start : error.end]:
        number = ord(letter)
        escape = f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"
        out += bytes([number - 0xDC00]) if 0xDC80 <= number <= 0xDCFF else escape.encode()
    return bytes(out), error.end


codecs.register_error(SHOWN, _shown)
