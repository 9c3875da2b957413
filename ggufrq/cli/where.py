"""``ggufrq where``: one path on stdout, for scripts."""

from __future__ import annotations

import click

from ggufrq.base import log, paths
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.cache.kv import Sought


@click.command()
@click.argument("what", type=click.Choice(["bin", "source", "cache", "log", "cmake", "profile"]))
@click.argument("model", required=False)
@click.option("-c", "n_ctx", type=click.IntRange(1), help="profile: for a context of so many tokens.")
@click.option("--weights", is_flag=True, help="profile: from the weights, whatever lies beside the model.")
def where(what: str, model: str | None, n_ctx: int | None, weights: bool) -> None:
    """Print one path: where the built tools are (bin), the patched llama.cpp source (source), the cache,
    the log of the last run (log), the files of options for building by hand (cmake), or the profile that K of
    MODEL is kept by (profile), which is made unless it is there.

    \b
    Examples:
      $(ggufrq where bin)/llama-cli --help
      less "$(ggufrq where log)"
      cmake -C "$(ggufrq where cmake)/cuda.cmake" -S "$(ggufrq where source)" -B build
      LLAMA_RQ_PROFILE="$(ggufrq where profile MODEL)" llama-bench -m MODEL -ctk iso3 -ctv iso3
    """
    if (what == "profile") != (model is not None) or (model is None and (n_ctx or weights)):
        raise UsageError(
            "a profile is that of a model" if what == "profile" else f"{what} takes no model and no options",
            remedy="ggufrq where profile MODEL" if what == "profile" else f"ggufrq where {what}",
        )
    if what == "cache":
        click.echo(paths.cache_dir())
    elif what == "cmake":
        click.echo(paths.data_dir("cmake"))
    elif what == "log":
        click.echo(log.latest() or paths.logs_dir())
    elif model is not None:
        from ggufrq.build.builds import usable_build
        from ggufrq.drive import profiles
        from ggufrq.make.ready import model_file

        wish = Sought.WEIGHTS if weights else Sought.AUTO
        found = profiles.find(model_file(model), wish, n_ctx, usable_build())
        if found.file is None:
            raise ModelError(found.said)
        log.say(found.said)
        click.echo(found.file)
    else:
        from ggufrq.build.builds import require_build

        build = require_build()
        click.echo(build.bin if what == "bin" else build.source)
