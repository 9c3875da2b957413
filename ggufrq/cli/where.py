"""``ggufrq where``: one path on stdout, for scripts."""

from __future__ import annotations

import click

from ggufrq.base import log, paths


@click.command()
@click.argument("what", type=click.Choice(["bin", "source", "cache", "log", "cmake"]))
def where(what: str) -> None:
    """Print one path: where the built tools are (bin), the patched llama.cpp source (source), the cache,
    the log of the last run (log), or the files of options for building by hand (cmake).

    \b
    Examples:
      $(ggufrq where bin)/llama-cli --help
      less "$(ggufrq where log)"
      cmake -C "$(ggufrq where cmake)/cuda.cmake" -S "$(ggufrq where source)" -B build
    """
    if what == "cache":
        click.echo(paths.cache_dir())
    elif what == "cmake":
        click.echo(paths.data_dir("cmake"))
    elif what == "log":
        click.echo(log.latest() or paths.logs_dir())
    else:
        from ggufrq.build.builds import require_build

        build = require_build()
        click.echo(build.bin if what == "bin" else build.source)
