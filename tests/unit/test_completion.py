"""Completion in shells, as these ask for it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from ggufrq import cli
from ggufrq.cli import COMMANDS
from ggufrq.cli.completion import SHELLS


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.invoke(["completion", shell]) == 0
    out = capsys.readouterr().out
    assert f"_GGUFRQ_COMPLETE={shell}_complete" in out and "ggufrq" in out


def complete(words: str) -> list[str]:
    environment = {
        **os.environ,
        "_GGUFRQ_COMPLETE": "bash_complete",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    command = [sys.executable, "-m", "ggufrq"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [line.partition(",")[2] for line in done.stdout.splitlines()]


def test_commands_and_options_are_completed() -> None:
    assert set(complete("ggufrq ")) == set(COMMANDS)
    assert complete("ggufrq upstream ch") == ["check"]
    assert "--backend" in complete("ggufrq build --b")
    assert complete("ggufrq completion z") == ["zsh"]
