"""``ggufrq publish``: a family to the Hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ggufrq.base import table
from ggufrq.base.sizes import size_text
from ggufrq.card import mlx
from ggufrq.publish import upload
from ggufrq.publish.upload import UploadPlan


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.argument("repo")
@click.option("--public", is_flag=True, help="Let everybody see the repository.  [default: private]")
@click.option("--collection", metavar="TITLE", help="Put the repository into this collection of its owner.")
@click.option(
    "--exclude", multiple=True, metavar="PATTERN", help="Leave out files with such names; more than once."
)
@click.option("--dry-run", is_flag=True, help="Only show what would change.")
@click.option("--json", "as_json", is_flag=True, help="Print what changed as JSON.")
def publish(
    folder: Path,
    repo: str,
    public: bool,
    collection: str | None,
    exclude: tuple[str, ...],
    dry_run: bool,
    as_json: bool,
) -> None:
    """Upload the family in DIR to REPO (user/name) on the Hub, and verify what arrived by size and hash.

    Only files that the manifest of `ggufrq quantize` vouches for are sent, with README.md, LICENSE and the
    manifest. What the repository has already is not sent again: the same command goes on after it was
    stopped, and a second one sends nothing. Of a family for mlx each model goes to a repository of its own,
    REPO-4bit and the like. The token is that of `hf auth login`, or HF_TOKEN; --dry-run goes without.

    \b
    Examples:
      ggufrq publish Qwen3-0.6B-GGUF me/Qwen3-0.6B-GGUF --exclude '*-BF16.gguf' --dry-run
      ggufrq publish Qwen3-0.6B-GGUF me/Qwen3-0.6B-GGUF --public --collection "Qwen3 with iso3"
    """
    family = mlx.members(folder)
    places = {place: mlx.repo_of(place, repo) for place in family} or {folder: repo}
    how: dict[str, Any] = {"public": public, "collection": collection, "exclude": exclude}
    every = []
    for place, name in places.items():
        if dry_run:
            plan = upload.plan(place, name, **how)
            data, said = plan.as_data(), render(plan)
        else:
            done = upload.publish(place, name, **how)
            data = {**done.plan.as_data(), "verified": list(done.verified)}
            data["collection_url"] = done.collection_url
            said = render(done.plan, done=True)
            said += f"\nverified {len(done.verified)} files by size and hash: {done.plan.url}"
            said += f"\ncollected in {done.collection_url}" if done.collection_url else ""
        every.append(data)
        if not as_json:
            click.echo(said)
    if as_json:
        click.echo(json.dumps(every if family else every[0], indent=2))


def render(plan: UploadPlan, *, done: bool = False) -> str:
    """A plan as plain text: a line per file, then what else changes, or was changed where it is ``done``."""
    rows = [("sent" if done else "send", file.name, size_text(file.bytes)) for file in plan.send]
    rows += [("there", file.name, size_text(file.bytes)) for file in plan.there]
    rows += [("left", name, "") for name in plan.kept]
    lines = [table.render(("", plan.repo, "size"), rows, "llr")]
    state = "new" if plan.is_new else "there"
    seen = "private" if plan.private else "public"
    if plan.make_public and not plan.is_new:
        seen += " from now on"
    lines.append(f"repository: {state}, {seen}")
    if plan.collection is not None:
        made = "new; " if plan.collection_is_new else ""
        added = ("added" if done else "to add") if plan.collects else "has it"
        lines.append(f"collection '{plan.collection}': {made}{added}")
    lines += [*plan.shadows, *plan.card]
    if plan.unseen:
        lines.append(
            "there is no token: what is private was not seen, nor whether you may write there; hf auth login"
        )
    total = sum(file.bytes for file in plan.send)
    sent = f"{'sent' if done else 'to send'}: {len(plan.send)} files, {size_text(total)}"
    lines.append(sent if plan.changes else "nothing to do")
    return "\n".join(lines)
