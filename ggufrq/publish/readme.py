"""Whether a card is of what is published: written before a file was added, for another repository, or with
files that are left out, it has links that lead nowhere."""

from __future__ import annotations

import re
from collections.abc import Collection

#: As the table of files in a card has them.
_LINK = re.compile(r"https://huggingface\.co/([\w.-]+(?:/[\w.-]+)?)/blob/main/([\w.-]+\.gguf)")
#: What a card does not list: matrices, and shards but the first.
_UNLISTED = re.compile(r"imatrix\.gguf$|-(?!00001)\d{5}-of-\d{5}\.gguf$")


def differences(text: str, repo: str, files: Collection[str], kept: Collection[str] = ()) -> list[str]:
    """Sentences on a README.md that does not go with these ``files`` and those that ``repo`` has ``kept``
    beside them; none for one without links to files."""
    links = _LINK.findall(text)
    if not links:
        return []
    repos = sorted({of for of, _ in links})
    if repo not in repos:
        return [f"README.md links to files of {', '.join(repos)}: `ggufrq card DIR --repo {repo}` mends that"]
    told = []
    gone = sorted({name for of, name in links if of == repo} - {*files, *kept})
    if gone:
        told.append(f"README.md links to {', '.join(gone)}, not published: `ggufrq card` has --exclude, too")
    new = [
        name for name in files if name.endswith(".gguf") and not _UNLISTED.search(name) and name not in text
    ]
    if new:
        told.append(f"README.md does not name {', '.join(new)}: `ggufrq card DIR --repo {repo}` does")
    return told
