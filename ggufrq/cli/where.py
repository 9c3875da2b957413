"""``ggufrq where``: one path on stdout, for scripts."""

from __future__ import annotations

import click

from ggufrq.base import log, paths


@click.command()
@click.argument("what", type=click.Choice(["bin", "source", "cache", "log"]))
def where(what: str) -> None:
    """Print one path: where the built tools are (bin), the patched llama.cpp source (source), the cache, or
    the log of the last run (log).

    \b
    Examples:
      $(ggufrq where bin)/llama-cli --help
      less "$(ggufrq where log)"
    """
    if what == "cache":
        click.echo(paths.cache_dir())
    elif what == "log":
        click.echo(log.latest() or paths.logs_dir())
    else:
        from ggufrq.build.builds import require_build

        build = require_build()
        click.echo(build.bin if what == "bin" else build.source)
