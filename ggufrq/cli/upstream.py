"""``ggufrq upstream``: the patch set on other versions of llama.cpp, and patches written anew."""

from __future__ import annotations

from pathlib import Path

import click

from ggufrq.base import log, paths, texts
from ggufrq.base.errors import PatchError, UsageError
from ggufrq.source.pin import PIN_FILE, pin_toml

_SOURCE = (
    "A version of llama-cpp-python on PyPI, whose sdist carries llama.cpp (0.3.35); a tag or commit of "
    "llama.cpp, by git; a git checkout; an sdist file; or pin."
)
_FOLDER = click.Path(path_type=Path, file_okay=False)


@click.group()
def upstream() -> None:
    """Follow llama.cpp: try the patch set on another version, mend it, write the patches anew.

    \b
    Examples:
      ggufrq upstream check --source 0.3.35
      ggufrq upstream import ~/llama-patches --source 0.3.35
      ggufrq upstream refresh ~/llama-patches
    """


@upstream.command()
@click.option("--source", "where", required=True, metavar="SOURCE", help=_SOURCE)
@click.option("--no-build", is_flag=True, help="Only tell whether the patches apply.")
@click.option("--json", "as_json", is_flag=True, help="Print the row as JSON.")
@click.pass_context
def check(ctx: click.Context, where: str, no_build: bool, as_json: bool) -> None:
    """Tell whether the patch set applies to another llama.cpp, builds there, and passes.

    What is built is held against the numpy specification and llama.cpp's own tests, and its figures on an
    embedded model against those of the pinned build. In a checkout the result is kept in
    patches/compat/rows.json, which the table in docs/upstream.md is made from. Takes a build: 5 to 15
    minutes on two cores.
    """
    from ggufrq.flows import upstream as core
    from ggufrq.source.snapshot import snapshot

    root = paths.data_dir("patches")
    row = core.check(snapshot(where), root, build=not no_build)
    if as_json:
        click.echo(texts.to_json(row, indent=1))
    else:
        _render(row)
    if not no_build and paths.in_checkout():
        core.write_row(root, row)
        log.say(f"kept in {root / core.ROWS}; make docs writes the table in docs/upstream.md")
    if not core.passed(row):
        if not row["applies"]:
            log.say(f"to mend: ggufrq upstream import DIR --source {where}")
        ctx.exit(PatchError.exit_code)


@upstream.command("import")
@click.argument("folder", type=_FOLDER, metavar="DIR")
@click.option("--source", "where", metavar="SOURCE", help=f"{_SOURCE}  [required unless DIR was begun]")
def import_(folder: Path, where: str | None) -> None:
    """Make DIR a git work tree of llama.cpp with the patch set in it, one commit per patch.

    Where the patches are made for another version, git merges what it can. It stops at a patch that takes a
    person: what is left of it lies beside the files as .rej; put it where it belongs, remove the .rej files,
    and run `ggufrq upstream import DIR` again.
    """
    from ggufrq.patchset.worktree import import_to, open_worktree
    from ggufrq.source.snapshot import snapshot

    if where is None:
        where = open_worktree(folder).source
    work = import_to(folder, snapshot(where), paths.data_dir("patches"))
    click.echo(f"{folder}: llama.cpp {work.commit[:9]} and {len(work.commits())} commits of the patch set")
    log.say(f"edit, git commit --fixup COMMIT, then: ggufrq upstream refresh {folder}")


@upstream.command()
@click.argument("folder", type=_FOLDER, metavar="[DIR]", required=False)
@click.option(
    "--source", "where", metavar="SOURCE", help=f"Without DIR: the upstream.  [default: pin]  {_SOURCE}"
)
@click.option("--check", "only_check", is_flag=True, help="Write nothing; fail if anything would change.")
@click.option("--as-pin", is_flag=True, help="Move the pin to the llama.cpp in DIR: the series and pin.toml.")
def refresh(folder: Path | None, where: str | None, only_check: bool, as_pin: bool) -> None:
    """Write the patches anew from the commits in DIR, which `ggufrq upstream import` made.

    Fixup commits are taken into the commits that they mend. A work tree of the pinned llama.cpp gives the
    series and the overlay, one of another version what fits the series to that (patches/compat). Without DIR
    the patch set is imported into a temporary folder and written from there.
    """
    from ggufrq.patchset import refresh as core
    from ggufrq.patchset.worktree import open_worktree
    from ggufrq.source.snapshot import snapshot

    if folder is not None and where is not None:
        raise click.UsageError("--source is known to DIR already")
    if as_pin and (folder is None or only_check):
        raise click.UsageError("--as-pin takes a DIR, and no --check")
    root = paths.data_dir("patches")
    if not only_check and not paths.in_checkout():
        raise UsageError(f"{root} belongs to an installed ggufrq", remedy="run this in a checkout of ggufrq")
    if folder is not None:
        work = open_worktree(folder)
        of = snapshot(work.source)
        found = core.refreshed(work, of, root, as_pin=as_pin)
    else:
        found = core.refreshed_anew(snapshot(where or "pin"), root)
    changed = found.changed(root) if only_check else found.write(root)
    for name in changed:
        click.echo(name)
    if as_pin:
        paths.atomic_write(PIN_FILE, pin_toml(of.pin))
        log.say(f"the pin is llama.cpp {of.pin.short} ({of.pin.date}) now; ggufrq build, make test")
    if only_check and changed:
        again = f"ggufrq upstream refresh{f' {folder}' if folder else f' --source {where}' if where else ''}"
        raise PatchError(f"{len(changed)} files of {root} are not what the commits give", remedy=again)
    log.say("nothing changes" if not changed else f"{len(changed)} files written in {root}")


def _render(row: dict[str, object]) -> None:
    from ggufrq.flows.upstream import render

    click.echo(render(row))
