"""``ggufrq completion``: the script that lets a shell complete commands and options."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

SHELLS = ("bash", "zsh", "fish")


@click.command()
@click.argument("shell", type=click.Choice(SHELLS))
@click.pass_context
def completion(ctx: click.Context, shell: str) -> None:
    """Print the script that completes commands and options in SHELL.

    \b
    Examples:
      ggufrq completion bash > ~/.local/share/bash-completion/completions/ggufrq
      ggufrq completion zsh > ~/.zfunc/_ggufrq
      ggufrq completion fish > ~/.config/fish/completions/ggufrq.fish
    """
    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(ctx.find_root().command, {}, "ggufrq", "_GGUFRQ_COMPLETE").source())
