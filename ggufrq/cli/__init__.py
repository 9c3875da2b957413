"""The command ``ggufrq``: registers the commands and turns every error into two lines, in one place."""

from __future__ import annotations

import difflib
import errno
import importlib
import logging
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Sequence
from types import FrameType

import click

from ggufrq import __version__
from ggufrq.base import log, texts
from ggufrq.base.errors import GgufrqError

#: Commands by what they are for, in the order of the help.
GROUPS = {
    "Build": ("build", "bundle", "doctor", "where", "completion"),
    "Make": ("quantize", "imatrix", "sensitivity"),
    "Run": ("advise", "run", "serve", "memory", "fallback"),
    "Measure": ("demo", "validate", "claims", "calibrate", "tune"),
    "Publish": ("card", "publish"),
    "Follow upstream": ("upstream",),
}

#: Command name -> "module:attribute", imported when the command is used.
COMMANDS = {name: f"ggufrq.cli.{name}:{name}" for names in GROUPS.values() for name in names}


class _LazyGroup(click.Group):
    """Imports a command's module only when it is used, so that ``ggufrq where bin`` does not load numpy."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        known = ctx.resilient_parsing or args[0] in COMMANDS
        near = [] if known else difflib.get_close_matches(args[0], COMMANDS, 1)
        if near:
            ctx.fail(f"No such command '{args[0]}'. Did you mean {near[0]}?")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, names in GROUPS.items():
            found = [(name, self.get_command(ctx, name)) for name in names]
            with formatter.section(title):
                formatter.write_dl(
                    [
                        (name.ljust(max(map(len, COMMANDS))), _in_short(command))
                        for name, command in found
                        if command
                    ]
                )


def _in_short(command: click.Command) -> str:
    """The first sentence of a command's help up to its colon or semicolon."""
    return re.split(r"[:;] ", command.get_short_help_str(limit=1000))[0].rstrip(".")


class _Stopped(BaseException):
    """TERM or HUP arrived; unwinds the stack so that child processes are stopped and temporary files
    removed.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if not value or ctx.resilient_parsing:
        return
    from ggufrq.patchset.series import default_patch_set
    from ggufrq.source.pin import load_pin

    pin = load_pin()
    click.echo(f"ggufrq {__version__}")
    click.echo(f"llama.cpp {pin.commit} ({pin.date})")
    click.echo(f"patch set {default_patch_set().hash}")
    ctx.exit()


@click.group(
    cls=_LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.option(
    "--version",
    is_flag=True,
    expose_value=False,
    is_eager=True,
    callback=_print_version,
    help="Print the version, the pinned llama.cpp commit and the hash of the patch set.",
)
@click.option("--debug", is_flag=True, help="Show each program that is run, and tracebacks of errors.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no hints on stderr.")
def cli(debug: bool, quiet: bool) -> None:
    """Three-bit KV caches for upstream llama.cpp: patch, build, quantize, run and measure.

    Start with `ggufrq build`, then `ggufrq demo`. `ggufrq doctor` says what is missing.
    """
    log.set_up(debug=debug, quiet=quiet)


def report(error: GgufrqError) -> None:
    """Show an error as ``error: ...`` and, when there is a remedy, ``  try: ...``."""
    click.echo(f"error: {error.message}", err=True)
    if error.remedy:
        click.echo(f"  try: {error.remedy}", err=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: run the command line and exit with its status."""
    sys.exit(invoke(sys.argv[1:] if arguments is None else list(arguments)))


def invoke(arguments: list[str]) -> int:
    """Run one command line and return its exit status.

    0 success, 2 usage, 3 to 8 as in ``errors``, 130 after Ctrl-C, 128 + n after another signal.
    """
    debug = "--debug" in arguments
    texts.let_out()
    _forward_signals()
    try:
        result = cli.main(args=arguments, prog_name="ggufrq", standalone_mode=False)
        return result if isinstance(result, int) else 0
    except GgufrqError as error:
        logging.getLogger("ggufrq").debug("%s", traceback.format_exc())
        if debug:
            traceback.print_exc()
        report(error)
        return error.exit_code
    except (click.exceptions.Abort, KeyboardInterrupt):  # click has ended the line that ^C was shown in
        click.echo("interrupted; what was finished is kept, the same command goes on from there", err=True)
        return 130
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except _Stopped as error:
        click.echo(
            f"stopped by {signal.Signals(error.number).name}; nothing half-made is left behind", err=True
        )
        return 128 + error.number
    except BrokenPipeError:
        # The reader (head, less) has gone: point stdout elsewhere so that Python's own flush stays silent.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        logging.getLogger("ggufrq").debug("%s", traceback.format_exc())
        if debug:
            traceback.print_exc()
        report(_from_os_error(error))
        return 1


def _from_os_error(error: OSError) -> GgufrqError:
    place = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return GgufrqError(
            f"the disk is full{place}",
            remedy="free some space, or set GGUFRQ_CACHE to a folder on a larger disk",
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return GgufrqError(
            f"{error.strerror}{place}",
            remedy="another folder by -o or --json; GGUFRQ_CACHE for another cache, where it is in that",
        )
    return GgufrqError(f"{error.strerror or error}{place}", remedy="run again with --debug to see where")


def _forward_signals() -> None:
    def stop(number: int, _: FrameType | None) -> None:
        raise _Stopped(number)

    if threading.current_thread() is not threading.main_thread():
        return
    for name in ("SIGTERM", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, stop)
