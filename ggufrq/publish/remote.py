"""The Hub's side of an upload: calls that are patient with a busy Hub, errors in words, and no token in any
of them."""

from __future__ import annotations

import logging
import re
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ggufrq.base import log
from ggufrq.base.errors import GgufrqError, HubError, UsageError
from ggufrq.models import patience
from ggufrq.models.patience import causes, is_network, status
from ggufrq.publish.local import LocalFile

Result = TypeVar("Result")

_TRIES = 6
_LATER = "the same command once more, when it can be reached; HF_ENDPOINT chooses another Hub"
_SECRETS = re.compile(r"hf_\w{6,}|(?<=Bearer )[\w.-]+|(?<=\?)[^\s'\"]*(?:[Ss]ignature|[Tt]oken)=[^\s'\"]*")


@dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: its size, and the hash of its content: sha256 for what is kept apart, else
    git's id."""

    bytes: int
    sha256: str | None
    git_id: str

    def is_same(self, file: LocalFile) -> bool:
        """Whether it has the content of a local file, by size and hash."""
        if self.sha256 is not None:
            return (self.bytes, self.sha256) == (file.bytes, file.sha256)
        return (self.bytes, self.git_id) == (file.bytes, file.git_id)


def redacted(text: str) -> str:
    """A text without tokens and signatures of addresses."""
    from huggingface_hub import get_token

    token = get_token()
    return _SECRETS.sub("…", text.replace(token, "…") if token else text)


class Hub:
    """One repository of the Hub, ``user/name``, or ``name`` in the namespace of who is logged in. Every
    method raises HubError. ``look``: nothing will be written, for which no token is needed unless the
    namespace is to be found out; ``has_token`` tells whether there is one.

    Raises UsageError for what is no id of a repository, HubError without the token that it takes, and within
    seconds when nobody answers: what takes long comes afterwards.
    """

    def __init__(self, repo: str, *, look: bool = False) -> None:
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.utils.tqdm import disable_progress_bars

        if not re.fullmatch(r"([\w.-]+/)?[\w.-]+", repo):
            raise UsageError(f"'{repo}' is no id of a repository", remedy="user/name")
        self.looks = look
        self.has_token = get_token() is not None
        if not self.has_token and not (look and "/" in repo):
            named = "" if "/" in repo else f"; or USER/{repo} for --dry-run"
            raise HubError("no token for the Hub was found", remedy=f"hf auth login, or HF_TOKEN{named}")
        if log.is_quiet() or not sys.stderr.isatty():
            disable_progress_bars()
        for handler in logging.getLogger("huggingface_hub").handlers:
            handler.addFilter(_redact_record)
        self.api = HfApi()
        self.repo = repo
        self._require_answer()
        if "/" not in repo:
            self.repo = f"{self.call(self.api.whoami)['name']}/{repo}"

    @property
    def owner(self) -> str:
        """The namespace of the repository."""
        return self.repo.partition("/")[0]

    @property
    def url(self) -> str:
        """The page of the repository."""
        return f"{self.api.endpoint}/{self.repo}"

    def call(self, function: Callable[..., Result], *args: Any, **kwargs: Any) -> Result:
        """Call the Hub, again and again while it is busy or cannot be reached."""
        for attempt in range(_TRIES):
            try:
                with warnings.catch_warnings(record=True) as told:
                    warnings.simplefilter("always")
                    result = function(*args, **kwargs)
                for warning in told:
                    if warning.category is UserWarning:  # such as of the metadata in README.md
                        log.say(redacted(str(warning.message)))
                return result
            except Exception as error:  # which HTTP library is under it, and so its errors, differ by version
                if not _is_ours(error):
                    raise
                wait = patience.wait(error, attempt)
                if wait is None or attempt == _TRIES - 1:
                    raise self._told(error) from None  # the cause may quote what was sent
                log.say(f"the Hub is busy or out of reach; once more in {wait:g} s")
                time.sleep(wait)
        raise AssertionError("unreachable")

    def look(self) -> tuple[bool, dict[str, RemoteFile]] | None:
        """Whether the repository is private, and its files by name; None when there is none, or none that
        is seen without a token."""
        from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError
        from huggingface_hub.hf_api import RepoFile

        def files() -> dict[str, RemoteFile] | None:
            try:
                entries = list(self.api.list_repo_tree(self.repo, recursive=True))
            except HfHubHTTPError as error:
                refused = status(error) == 401  # without a token: what is private, and what is not there
                if self.has_token if refused else not isinstance(error, RepositoryNotFoundError):
                    raise
                return None
            return {
                entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
                for entry in entries
                if isinstance(entry, RepoFile)
            }

        found = self.call(files)
        if found is None:
            return None
        return bool(self.call(self.api.repo_info, self.repo).private), found

    def create(self, *, private: bool) -> None:
        """Create the repository; one that is there stays as it is."""
        self.call(self.api.create_repo, self.repo, private=private, exist_ok=True)

    def make_public(self) -> None:
        """Let everybody see the repository."""
        self.call(self.api.update_repo_settings, self.repo, private=False)

    def send(self, files: list[LocalFile], message: str) -> None:
        """Send the content of files, then enter them all in one commit. Content that the Hub has is not sent
        again, so that after an interruption only the rest is."""
        from huggingface_hub import CommitOperationAdd

        def attempt() -> None:
            operations = [CommitOperationAdd(file.name, str(file.path)) for file in files]
            for operation, file in zip(operations, files, strict=True):
                operation.upload_info.sha256 = bytes.fromhex(file.sha256)
                log.say(f"sending {file.name}")
                self.api.preupload_lfs_files(self.repo, [operation], free_memory=False)
            self.api.create_commit(self.repo, operations, commit_message=message)

        self.call(attempt)

    def collection(self, title: str) -> Any | None:
        """The owner's collection with this title, with all its items."""
        for found in self.call(lambda: list(self.api.list_collections(owner=self.owner))):
            if found.title == title:
                return self.call(self.api.get_collection, found.slug)
        return None

    def collect(self, title: str, *, private: bool) -> str:
        """Put the repository into the owner's collection with this title, made if need be; its address."""
        found = self.collection(title)
        if found is None:
            found = self.call(
                self.api.create_collection, title, namespace=self.owner, private=private, exists_ok=True
            )
        self.call(self.api.add_collection_item, found.slug, self.repo, "model", exists_ok=True)
        return f"{self.api.endpoint}/collections/{found.slug}"

    def _require_answer(self) -> None:
        """Ask once, for any answer at all: ``call`` is patient with what was there a moment ago."""
        from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

        try:
            get_session().head(self.api.endpoint, timeout=patience.FIRST)
        except Exception as error:
            if not _is_ours(error):
                raise
            raise HubError(
                f"the Hub at {self.api.endpoint} does not answer: {_reason(error)}", remedy=_LATER
            ) from None

    def _told(self, error: Exception) -> HubError:
        if isinstance(error, HubError):
            return error
        code = status(error)
        reason = _reason(error)
        if code == 401 and self.has_token:
            return HubError(
                f"the Hub does not accept the token (401): {reason}", remedy="hf auth login; tokens expire"
            )
        if code == 403 and not self.looks:
            return HubError(
                f"this token may not write to {self.repo} (403): {reason}",
                remedy="a token with write access to this namespace: hf auth login",
            )
        if isinstance(error, ValueError) and "metadata" in reason:
            return HubError(reason, remedy="mend the head of README.md, or ggufrq card DIR")
        shown = f" ({code})" if code else ""
        if self.looks:
            return HubError(
                f"the Hub could not be asked about {self.repo}{shown}: {reason}",
                remedy=_LATER,
            )
        return HubError(
            f"the upload to {self.repo} stopped{shown}: {reason}",
            remedy="the same command once more goes on from there",
        )


def _redact_record(record: logging.LogRecord) -> bool:
    record.msg, record.args = redacted(record.getMessage()), ()
    return True


def _reason(error: Exception) -> str:
    """What the Hub says, or else the first line of the innermost error, without tokens."""
    every = causes(error)
    said = [str(text) for cause in every if (text := getattr(cause, "server_message", None))]
    text = said[0] if said else str(every[-1]) or type(every[-1]).__name__
    lines = [line.strip() for line in redacted(text).splitlines() if line.strip()]
    return lines[0] if not isinstance(error, ValueError) else " ".join(lines)


def _is_ours(error: Exception) -> bool:
    """Whether an error is of the Hub or on the way there; any other is a fault of the program or the disk."""
    return (
        status(error) is not None
        or any(is_network(cause) for cause in causes(error))
        or isinstance(error, ValueError | RuntimeError | GgufrqError)
    )
