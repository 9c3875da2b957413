"""What a publication changes, worked out beforehand, and doing it: create, send, verify, collect."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggufrq.base.errors import HubError, UsageError
from ggufrq.models.tags import shadowed
from ggufrq.publish.local import MANIFEST_END, LocalFile, local_files
from ggufrq.publish.readme import differences
from ggufrq.publish.remote import Hub, RemoteFile


@dataclass(frozen=True)
class UploadPlan:
    """All that would change: files to ``send`` (``there`` are those that the repository has already, ``kept``
    those that it has beside them), and whether the repository is new or becomes visible. ``collection`` is
    the title asked for; ``collection_is_new`` and ``collects`` whether it must be made, and be added to.
    ``bases`` are the models that the files are of, ``card`` has sentences on a card that is of others,
    ``unseen`` tells that there was no token, so that what is private was not seen."""

    repo: str
    url: str
    is_new: bool
    private: bool
    make_public: bool
    send: tuple[LocalFile, ...]
    there: tuple[LocalFile, ...]
    kept: tuple[str, ...]
    collection: str | None = None
    collection_is_new: bool = False
    collects: bool = False
    bases: tuple[str, ...] = ()
    card: tuple[str, ...] = ()
    unseen: bool = False

    @property
    def shadows(self) -> list[str]:
        """Sentences for files of the repository that llama.cpp's ``-hf`` does not take by their tags."""
        names = [*(file.name for file in (*self.send, *self.there)), *self.kept]
        return [line for base in self.bases for line in shadowed(names, base)]

    @property
    def changes(self) -> bool:
        """Whether there is anything to do."""
        return self.is_new or self.make_public or bool(self.send) or self.collects

    def as_data(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return {
            "repo": self.repo,
            "url": self.url,
            "is_new": self.is_new,
            "private": self.private,
            "make_public": self.make_public,
            "files": [
                {"name": file.name, "bytes": file.bytes, "sha256": file.sha256, "action": action}
                for action, files in (("send", self.send), ("there", self.there))
                for file in files
            ],
            "kept": list(self.kept),
            "collection": self.collection,
            "collection_is_new": self.collection_is_new,
            "collects": self.collects,
            "shadows": self.shadows,
            "card": list(self.card),
            "unseen": self.unseen,
        }


@dataclass(frozen=True)
class Published:
    """What was done: the plan, the names of the files whose arrival was verified, and the address of the
    collection."""

    plan: UploadPlan
    verified: tuple[str, ...]
    collection_url: str | None = None


def plan(
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    collection: str | None = None,
    exclude: Sequence[str] = (),
) -> UploadPlan:
    """What publishing a folder would change, as far as it can be seen; nothing is written anywhere.

    Raises UsageError, ModelError as ``local_files``; UsageError when the repository is public and ``public``
    was not asked for; HubError.
    """
    hub = Hub(repo, look=True)  # before files are hashed, which may take minutes
    return _plan(local_files(folder, exclude), hub, public=public, collection=collection)


def publish(
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    collection: str | None = None,
    exclude: Sequence[str] = (),
) -> Published:
    """Create the repository if need be (private unless ``public``), send what it does not have yet, verify
    all by size and hash, then make it visible and put it into the collection, where asked for.

    Raises as ``plan``. What was sent before an error or an interruption is not sent again by the next run.
    """
    hub = Hub(repo)  # before files are hashed, which may take minutes
    files = local_files(folder, exclude)
    todo = _plan(files, hub, public=public, collection=collection)
    if todo.is_new:
        hub.create(private=True)
    if todo.send:
        hub.send(list(todo.send), _message(todo.send))
    _verify(files, hub)
    if todo.make_public:
        hub.make_public()
    url = hub.collect(collection, private=not public) if collection and todo.collects else None
    return Published(todo, tuple(file.name for file in files), url)


def _plan(files: Sequence[LocalFile], hub: Hub, *, public: bool, collection: str | None) -> UploadPlan:
    found = hub.look()
    private, remote = found if found is not None else (True, {})
    if found is not None and not private and not public:
        raise UsageError(
            f"{hub.repo} is public; what is sent there, everybody sees", remedy="--public, if that is meant"
        )
    there = tuple(file for file in files if _is_there(file, remote))
    names = {file.name for file in files}
    kept = tuple(sorted(remote.keys() - names))
    card = next((file.path.read_text("utf-8", "replace") for file in files if file.name == "README.md"), "")
    known = hub.collection(collection) if collection else None
    collects = collection is not None and (
        known is None or hub.repo not in {item.item_id for item in known.items}
    )
    return UploadPlan(
        repo=hub.repo,
        url=hub.url,
        is_new=found is None,
        private=not public,
        make_public=public and private,
        send=tuple(file for file in files if file not in there),
        there=there,
        kept=kept,
        collection=collection,
        collection_is_new=collection is not None and known is None,
        collects=collects,
        bases=tuple(
            file.name.removesuffix(MANIFEST_END) for file in files if file.name.endswith(MANIFEST_END)
        ),
        card=tuple(differences(card, hub.repo, sorted(names), kept)),
        unseen=not hub.has_token,
    )


def _verify(files: Sequence[LocalFile], hub: Hub) -> None:
    """Raise HubError unless the repository has each of these files, with its size and hash."""
    found = hub.look()
    remote = found[1] if found is not None else {}
    wrong = [file.name for file in files if not _is_there(file, remote)]
    if wrong:
        raise HubError(
            f"{', '.join(wrong)} did not arrive in {hub.repo} as sent",
            remedy="the same command once more sends what differs",
        )


def _is_there(file: LocalFile, remote: dict[str, RemoteFile]) -> bool:
    return file.name in remote and remote[file.name].is_same(file)


def _message(files: Sequence[LocalFile]) -> str:
    names = [file.name for file in files]
    return f"Upload {names[0]}" if len(names) == 1 else f"Upload {len(names)} files with ggufrq"
