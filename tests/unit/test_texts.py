"""The border for text: by the command line, and by what goes over it."""

from __future__ import annotations

import codecs
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from ggufrq import cli
from ggufrq.base import log, paths, proc, texts
from ggufrq.base.errors import GgufrqError, UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
#: A name that is no UTF-8, as programs that speak Latin-1 leave them.
NAME = os.fsdecode(b"caf\xe9")


@pytest.mark.parametrize(
    ("data", "says", "remedy"),
    [
        (b"caf\xe9 au lait", "byte 0xe9 at 3 is not UTF-8", "iconv -f LATIN1 -t UTF-8"),
        (b"one\0two", "a zero byte at 3", "a plain text"),
        ("hello".encode("utf-16"), "is in UTF-16LE, not in UTF-8", "iconv -f UTF-16LE"),
        (codecs.BOM_UTF16_BE + "hello".encode("utf-16-be"), "is in UTF-16BE", "iconv -f UTF-16BE"),
        (codecs.BOM_UTF32_LE + "hello".encode("utf-32-le"), "is in UTF-32LE", "iconv -f UTF-32LE"),
        ("hello".encode("utf-16-le"), "as texts in UTF-16LE have them", "iconv -f UTF-16LE"),
        ("hello".encode("utf-16-be"), "as texts in UTF-16BE have them", "iconv -f UTF-16BE"),
    ],
)
def test_what_is_no_text_is_refused(tmp_path: Path, data: bytes, says: str, remedy: str) -> None:
    path = tmp_path / "a text.txt"
    path.write_bytes(data)
    with pytest.raises(UsageError) as caught:
        texts.read(path)
    assert says in caught.value.message and str(path) in caught.value.message
    assert remedy in str(caught.value.remedy)
    with pytest.raises(UsageError, match=says.split(" at ")[0]):
        paths.plain_text(path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "docs-qwen3-8m", "-f", "FILE"],
        ["imatrix", "make", "docs-qwen3-8m", "-o", "m.gguf", "--text", "FILE"],
        ["calibrate", "docs-qwen3-8m", "FILE"],
        ["quantize", "docs-qwen3-8m", "--calibrate", "FILE"],
        ["validate", "docs-qwen3-8m", "--text", "FILE"],
        ["advise", "docs-qwen3-8m", "--text", "FILE"],
        ["tune", "docs-qwen3-8m", "--budget", "3.5", "--text", "FILE"],
        ["sensitivity", "docs-qwen3-8m", "--bpw", "5", "--check-text", "FILE"],
        ["claims", "docs-qwen3-8m", "--text", "FILE"],
        ["quantize", "docs-qwen3-8m", "--recipe", "FILE.toml", "--dry-run"],
    ],
)
@pytest.mark.usefixtures("cache")
def test_every_command_refuses_it(
    tmp_path: Path, arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("FILE", "FILE.toml"):
        Path(name).write_bytes(b"name = 'caf\xe9'\n")
    for module in ("quantize", "imatrix"):
        monkeypatch.setattr(f"ggufrq.cli.{module}.require_build", lambda: None)
    result = CliRunner().invoke(cli.cli, arguments)
    assert isinstance(result.exception, UsageError), result.output
    assert "byte 0xe9 at 11 is not UTF-8" in result.exception.message
    assert not Path("m.gguf").exists()


def test_a_mark_at_the_start_is_no_part_of_a_text(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo")
    assert texts.read(path) == "one\ntwo"
    plain = paths.plain_text(path)
    assert (plain.name, plain.read_bytes()) == ("t.txt", b"one\r\ntwo")
    assert cache in plain.parents and paths.plain_text(path) == plain
    path.write_bytes(b"one")
    assert paths.plain_text(path) == path


@pytest.mark.usefixtures("cache")
def test_a_prompt_that_is_no_text() -> None:
    result = CliRunner().invoke(cli.cli, ["run", "docs-qwen3-8m", "-p", os.fsdecode(b"a\xff")])
    assert isinstance(result.exception, UsageError)
    assert result.exception.message == "--prompt is no text in UTF-8: byte 0xff at 1 is not UTF-8"
    assert result.exception.remedy == "write it in UTF-8, or -f FILE"
    result = CliRunner().invoke(cli.cli, ["run", "docs-qwen3-8m", "-p", "a\ud800"])
    assert isinstance(result.exception, UsageError)
    assert result.exception.message.startswith("--prompt is no text in UTF-8: the character at 1 is half")


def test_a_path_that_is_no_utf8_goes_through(tmp_path: Path, cache: Path) -> None:
    """Logs of the run and of programs, messages, hashes of names, and JSON take it."""
    log.set_up(command=["quantize", NAME])
    logging.getLogger("ggufrq").info("%s", NAME)
    latest = log.latest()
    assert latest is not None and b"caf\xe9" in latest.read_bytes()
    logged = tmp_path / "programs.log"
    proc.run([sys.executable, "-c", "", NAME], log=logged)
    assert b"caf\xe9" in logged.read_bytes()
    assert json.loads(texts.to_json({"path": NAME, "letter": "é"})) == {"path": NAME, "letter": "é"}
    assert "é" in texts.to_json("é")
    paths.atomic_write(tmp_path / "settings", f"FROM {NAME}\n")
    assert (tmp_path / "settings").read_bytes() == b"FROM caf\xe9\n"


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii"])
def test_every_output_takes_every_text(tmp_path: Path, encoding: str) -> None:
    """A whole command: its name for a model that is not there holds a byte that is no UTF-8."""
    env = {**os.environ, "PYTHONIOENCODING": encoding, "GGUFRQ_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-m", "ggufrq", "memory", b"no such \xe9 model \xe2\x86\x92"]
    done = subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, timeout=60, check=False)
    assert done.returncode == 7, done.stderr
    assert b"error: there is no model" in done.stderr and b"Traceback" not in done.stderr
    if encoding != "ascii":  # there the library of the command line writes for us
        assert b"such \xe9 model" in done.stderr


def test_a_zero_byte_for_a_program_is_told() -> None:
    with pytest.raises(GgufrqError, match="zero byte"):
        proc.run([sys.executable, "a\0b"])


@given(st.binary(max_size=40))
def test_bytes_are_a_text_or_refused(data: bytes) -> None:
    try:
        text = texts.decode(data, "it")
    except UsageError as error:
        assert error.message.startswith("it is ") and error.remedy
    else:
        assert text.encode() == data.removeprefix(codecs.BOM_UTF8) and "\0" not in text


@given(st.text(st.characters(exclude_categories=())))
def test_whatever_there_is_can_be_written(text: str) -> None:
    assert texts.to_bytes(text) is not None
    assert json.loads(texts.to_json(text)) == text
    texts.clean(text).encode()
