"""Models on the Hugging Face Hub: only the files that are needed, and which revision they are of."""

from __future__ import annotations

import errno
import io
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path, PurePosixPath
from typing import BinaryIO, TypeVar, cast

from ggufrq.base import log, paths
from ggufrq.base.errors import ModelError
from ggufrq.ggufs.drafts import has_head
from ggufrq.ggufs.header import Header, parse_header, read_header
from ggufrq.models import patience
from ggufrq.models.names import RECIPE, names_beside
from ggufrq.models.tags import head_of

Result = TypeVar("Result")

#: What conversion needs of a repository.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "LICENSE*")
#: Not read by llama.cpp's converter, and often large.
_IGNORED = ("original/*", "onnx/*", "*/*.safetensors", "consolidated*")
#: More bytes than any header of a safetensors file has.
_MAX_HEADER = 100_000_000
_ID = re.compile(r"^([\w][\w.-]*/[\w][\w.-]*?)(?::([\w.-]+))?$")
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
#: GGUF files that are no model by themselves: projectors, heads and drafts for further tokens, importance
#: matrices, profiles of K.
_PART = re.compile(r"mmproj|imatrix|(?:^|/)(?:mtp|eagle3|dflash|dspark)-|-kv\.gguf$", re.IGNORECASE)
_SNAPSHOT = re.compile(r"/models--([^/]+--[^/]+)/snapshots/([0-9a-f]{40})$")
_TRIES = 5
#: Repositories that are taken from the Hub's cache, as the Hub cannot be asked.
_at_hand: set[str] = set()


@dataclass(frozen=True)
class HubModel:
    """A downloaded repository: its id, the commit that it is of, and where its files are."""

    repo: str
    revision: str
    folder: Path


class NoParts(ModelError):
    """A mirror that sends whole files alone: headers cannot be read without the weights."""


def parse_id(text: str) -> tuple[str, str | None] | None:
    """``user/model`` or ``user/model:Q4_K_M`` as id and label; None for anything else."""
    found = _ID.match(text)
    return (found[1], found[2]) if found else None


def fetch_model(repo: str, revision: str | None = None) -> HubModel:
    """Download a model in Hugging Face form into the Hub's own cache. Raises ModelError."""
    sha, _ = _safetensors(repo, revision)
    _say(repo, f"fetching {repo} at {sha[:12]}")
    folder = _snapshot(repo, sha, MODEL_FILES)
    _remember(repo, revision, sha)
    return HubModel(repo, sha, folder)


def fetch_headers(repo: str, revision: str | None = None) -> HubModel:
    """A model in Hugging Face form with holes in place of its weights, in ggufrq's cache: only the headers of
    its safetensors files are downloaded, by range requests. Raises ModelError."""
    sha, names = _safetensors(repo, revision)
    folder = _headers_folder(repo, sha)
    if folder.is_dir():
        return HubModel(repo, sha, folder)
    _say(repo, f"fetching the headers of {repo} at {sha[:12]}")
    small = _snapshot(repo, sha, tuple(name for name in MODEL_FILES if name != "*.safetensors"))
    if all((small / name).is_file() for name in names):  # with its weights, by an earlier download
        return HubModel(repo, sha, small)
    with paths.atomic_path(folder) as temporary:
        temporary.mkdir()
        for path in small.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, temporary / path.name)
        for name in names:
            header, size = _asked(repo, partial(_header, repo, name, sha))
            with (temporary / name).open("wb") as file:
                file.write(header)
                file.truncate(size)
    return HubModel(repo, sha, folder)


def fetch_file(repo: str, name: str, sha: str, folder: Path) -> Path:
    """Download one file of a commit into ``folder``, and not into the Hub's cache; what an earlier try has of
    it is gone on with. Raises ModelError."""
    from huggingface_hub import hf_hub_download

    return Path(_asked(repo, partial(hf_hub_download, repo, name, revision=sha, local_dir=folder)))


def has_safetensors(repo: str, revision: str | None = None) -> bool:
    """Whether a repository has a model in Hugging Face form. Raises ModelError."""
    return any(_is_weights(name) for name in _files(repo, revision)[1])


def fetch_gguf_headers(
    repo: str, label: str | None = None, revision: str | None = None
) -> tuple[list[str], str, tuple[Header, ...]]:
    """The headers of one GGUF model, of all its shards when it is split, by range requests: names of its
    files, their commit, and the headers. ``label`` as in ``fetch_gguf``. Raises ModelError."""
    sha, names = _files(repo, revision)
    chosen = choose_gguf(repo, names, label)
    here = _downloaded(repo, sha)
    if here is not None and all((here / name).is_file() for name in chosen):
        return chosen, sha, tuple(read_header(here / name) for name in chosen)
    log.say(f"fetching the header of {chosen[0]} of {repo} at {sha[:12]}")

    def read(name: str) -> Header:
        file = _RangeFile(repo, name, sha)
        return parse_header(cast(BinaryIO, file), file.size, f"{repo}/{name}")

    return chosen, sha, tuple(_asked(repo, partial(read, name)) for name in chosen)


class _RangeFile:
    """A file on the Hub that is read from its beginning, in blocks that are fetched when they are needed."""

    _BLOCK = 4 << 20

    def __init__(self, repo: str, name: str, sha: str) -> None:
        self._of = (repo, name, sha)
        self._asked = 0
        self._block = io.BytesIO()
        self._ask(0)

    def read(self, length: int) -> bytes:
        """The next ``length`` bytes, fewer at the end of the file."""
        data = self._block.read(length)
        if len(data) < length and self._asked < self.size:
            self._ask(length - len(data))
            data += self._block.read(length - len(data))
        return data

    def _ask(self, length: int) -> None:
        data, self.size = _range(*self._of, self._asked, max(length, self._BLOCK))
        self._asked += len(data)
        self._block = io.BytesIO(data)


def _files(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a revision stands for, and the names of its files; of those in the Hub's cache where it
    cannot be reached."""
    from huggingface_hub import HfApi

    try:
        info = _asked(repo, lambda: HfApi().model_info(repo, revision=revision, timeout=patience.FIRST))
    except _Unreachable:
        found = _cached(repo, revision)
        if found is None:
            raise
        return found
    return str(info.sha), sorted(entry.rfilename for entry in info.siblings or [])


@cache
def _cached(repo: str, revision: str | None) -> tuple[str, list[str]] | None:
    """What the Hub's cache has of a revision, as ``_files``, and where only headers were fetched, ours; says
    so, once. None when no model is among it."""
    folder = _downloaded(repo, revision)
    if folder is None:
        return None
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    names |= {path.name for path in _headers_folder(repo, folder.name).glob("*.safetensors")}
    if not any(name.endswith((".gguf", ".safetensors")) for name in names):
        return None
    log.say(f"the Hub is not asked or not reached: {repo} is taken from the cache, at {folder.name[:12]}")
    _at_hand.add(repo)
    return folder.name, sorted(names)


def _headers_folder(repo: str, sha: str) -> Path:
    """Where a model with holes in place of its weights is kept."""
    return paths.own_dir("headers") / f"{repo.replace('/', '--')}-{sha}"


def _downloaded(repo: str, revision: str | None) -> Path | None:
    """The folder of a revision in the Hub's cache, whatever is there of it: of a commit, of what a branch was
    when it was last looked at, or of the only one that there is. (``snapshot_download`` wants all files.)"""
    home = _home(repo)
    ref = home / "refs" / (revision or "main")
    name = ref.read_text(encoding="ascii").strip() if ref.is_file() else revision
    if name is None:
        every = sorted(path.name for path in (home / "snapshots").glob("*"))
        name = every[0] if len(every) == 1 else None
    folder = home / "snapshots" / name if name else None
    return folder if folder is not None and folder.is_dir() else None


def _say(repo: str, what: str) -> None:
    """Say what is fetched, unless it is taken from the cache, which was said."""
    if repo not in _at_hand:
        log.say(what)


def _home(repo: str) -> Path:
    """Where the Hub's cache keeps a repository."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def _remember(repo: str, revision: str | None, sha: str) -> None:
    """Note which commit a branch is at, as the Hub's own client does: files are fetched by the commit."""
    home, name = _home(repo), revision or "main"
    if name != sha and (home / "snapshots" / sha).is_dir():
        paths.atomic_write(home / "refs" / name, sha)


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") and "/" not in name and not name.startswith("consolidated")


def _safetensors(repo: str, revision: str | None) -> tuple[str, list[str]]:
    """The commit that a revision stands for, and its safetensors files."""
    sha, names = _files(repo, revision)
    found = [name for name in names if _is_weights(name)]
    if not found:
        ggufs = sum(name.endswith(".gguf") for name in names)
        raise ModelError(
            f"{repo} has no safetensors files" + (f", but {ggufs} GGUF files" if ggufs else ""),
            remedy=f"ggufrq run {repo} …" if ggufs else "a repository of the original model",
        )
    return sha, found


def _snapshot(repo: str, sha: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    def fetch() -> Path:
        return Path(
            snapshot_download(
                repo,
                revision=sha,
                allow_patterns=list(patterns),
                ignore_patterns=list(_IGNORED),
                local_files_only=repo in _at_hand,  # else it asks for half a minute
            )
        )

    return _asked(repo, fetch)


def _header(repo: str, name: str, sha: str) -> tuple[bytes, int]:
    """The header of a safetensors file, its length before it, and the size of the whole file."""
    start, size = _range(repo, name, sha, 0, 8)
    length = int.from_bytes(start, "little")
    if len(start) != 8 or length > min(_MAX_HEADER, size):
        raise ModelError(f"{name} of {repo} is not a safetensors file")
    return start + _range(repo, name, sha, 8, length)[0], size


def _range(repo: str, name: str, sha: str, start: int, length: int) -> tuple[bytes, int]:
    """``length`` bytes of a file on the Hub from ``start`` on, and the size of the whole file."""
    # Not by HfFileSystem: from a mirror that sends no parts it reads the whole file, weights and all, into
    # memory; it lists the repository first, and reads ahead.
    import requests
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    headers = {
        **build_hf_headers(),
        "Range": f"bytes={start}-{start + length - 1}",
        "Accept-Encoding": "identity",
    }
    url = hf_hub_url(repo, name, revision=sha)
    with requests.get(url, headers=headers, stream=True, timeout=30) as answer:
        answer.raise_for_status()
        if answer.status_code != 206:
            raise NoParts(
                f"the Hub does not send parts of {name}",
                remedy="another mirror (HF_ENDPOINT), or fetch the model first",
            )
        size = int(answer.headers["Content-Range"].rpartition("/")[2])
        return answer.raw.read(length), size


def fetch_gguf(
    repo: str, label: str | None = None, revision: str | None = None, *, head: bool = False
) -> Path:
    """Download one GGUF file, all its shards if it is split, and return the (first) file.

    ``label`` chooses by the encoding in the name (``Q4_K_M``); without it Q4_K_M is taken, or the only file.
    The profile of its KV cache that lies beside it is downloaded, too, and with ``head``, for a model without
    one, the head for further tokens that lies there in a file of its own (``tags.head_of``).
    Raises ModelError that lists the labels when the choice is not clear.
    """
    return fetch_gguf_at(repo, label, revision, head=head)[0]


def fetch_gguf_at(
    repo: str, label: str | None = None, revision: str | None = None, *, head: bool = False
) -> tuple[Path, str]:
    """As ``fetch_gguf``, with the commit that the file is of."""
    from huggingface_hub import hf_hub_download

    sha, names = _files(repo, revision)
    chosen = choose_gguf(repo, names, label)
    more = f" and {len(chosen) - 1} more shards" if chosen[1:] else ""
    _say(repo, f"fetching {chosen[0]} of {repo} at {sha[:12]}{more}")
    first = PurePosixPath(chosen[0])
    fetch = partial(hf_hub_download, repo, revision=sha)
    files = [Path(_asked(repo, partial(fetch, name))) for name in chosen]
    recipe = None
    with suppress(ModelError):  # which what opens the file tells better
        header = read_header(files[0])
        recipe = header.values.get(RECIPE)
        head = head and not has_head(tensor.name for tensor in header.tensors)
    beside = (str(first.with_name(name)) for name in names_beside(first, recipe))
    others = [name for name in beside if name in names][:1]
    if head and (found := head_of(first, names, recipe)) is not None:
        _say(repo, f"fetching {found}, its head for further tokens")
        others.append(found)
    for name in others:
        _asked(repo, partial(fetch, name))
    _remember(repo, revision, sha)
    return files[0], sha


def is_model(name: str) -> bool:
    """Whether a file with this name is a GGUF model by itself, or a shard of one."""
    return name.endswith(".gguf") and not _PART.search(name)


def choose_gguf(repo: str, names: list[str], label: str | None) -> list[str]:
    """The file with this label among a repository's file names, with all its shards in order. Raises
    ModelError."""
    models = [name for name in names if is_model(name)]
    if not models:
        raise ModelError(f"{repo} has no GGUF files", remedy=f"ggufrq quantize {repo}")
    groups: dict[str, list[str]] = {}
    for name in models:
        groups.setdefault(_SHARD.sub(".gguf", name), []).append(name)
    wanted = label or ("Q4_K_M" if len(groups) > 1 else "")
    pattern = re.compile(rf"(?:^|[^A-Za-z0-9]){re.escape(wanted)}\.gguf$", re.IGNORECASE)
    found = [name for name in groups if not wanted or pattern.search(name)]
    found = _exact(repo, found, wanted) or found
    if not found:  # the name of a recipe, as llama.cpp takes it, too
        inner = re.compile(rf"(?:^|[^A-Za-z0-9]){re.escape(wanted)}-", re.IGNORECASE)
        found = [name for name in groups if inner.search(name)]
    if len(found) != 1:
        labels = [name.rpartition("/")[2].removesuffix(".gguf") for name in groups]
        raise ModelError(
            f"{repo} has {'more than one' if found else 'no'} file for '{wanted}'; there are "
            f"{', '.join(labels)}",
            remedy=f"{repo}:LABEL, with the end of one of these names",
        )
    shards = sorted(groups[found[0]])
    counts = {int(m[2]) for m in map(_SHARD.search, shards) if m}
    if counts and counts != {len(shards)}:
        raise ModelError(f"{repo} has {len(shards)} of {max(counts)} shards of {found[0]}")
    return shards


def _exact(repo: str, found: list[str], label: str) -> list[str]:
    """Of several files whose names end with a label the one that is called just so: after the repository, or
    like all the others but for what these have before the label (X-Q5_K_M, X-awq-Q5_K_M)."""
    own = re.sub(r"-GGUF$", "", repo.rpartition("/")[2], flags=re.IGNORECASE)
    stems = {name: name[: -len(f"{label}.gguf")].rstrip("-._") for name in found}
    called = [name for name, stem in stems.items() if stem.rpartition("/")[2].lower() == own.lower()]
    shortest = [name for name in found if all(stem.startswith(stems[name]) for stem in stems.values())]
    return called if len(called) == 1 else shortest if len(shortest) == 1 else []


def snapshot_of(path: Path) -> tuple[str, str] | None:
    """The repository and the commit that a folder of the Hub's cache is of, None for any other folder."""
    found = _SNAPSHOT.search(path.absolute().as_posix())
    return (found[1].replace("--", "/", 1), found[2]) if found is not None else None


def require_downloaded(path: Path) -> None:
    """Raise ModelError when ``path`` is a link to a file that is not there, or a folder with one: the Hub's
    cache has such links when a file was not downloaded, or was removed."""
    inside = sorted(path.iterdir()) if path.is_dir() else [path]
    gone = [entry for entry in inside if entry.is_symlink() and not entry.exists()]
    if gone:
        known = snapshot_of(gone[0].parent)
        names = ", ".join(entry.name for entry in gone)
        raise ModelError(
            f"{names} of {gone[0].parent} is not downloaded: the link leads nowhere",
            remedy=f"hf download {known[0]} --revision {known[1]}" if known else "download it again",
        )


def _asked(repo: str, call: Callable[[], Result]) -> Result:
    """The answer of the Hub to a call, once more after the time that it asks to wait when it is busy."""
    for _ in range(_TRIES):
        try:
            with _errors(repo):
                return call()
        except _Unreachable as error:
            seconds = patience.asked(error)
            if seconds is None:
                raise
            log.say(f"the Hub is busy; once more in {seconds:.0f} s")
            time.sleep(seconds)
    with _errors(repo):
        return call()


class _Unreachable(ModelError):
    """The Hub did not answer, or not with what was asked for."""


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if log.is_quiet() or not sys.stderr.isatty():
        disable_progress_bars()
    try:
        yield
    except ModelError:
        raise
    except errors.GatedRepoError as error:
        raise ModelError(
            f"{repo} is open only to those who accepted its terms",
            remedy=f"accept them on the page of {repo}, then: hf auth login",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        what = "revision" if isinstance(error, errors.RevisionNotFoundError) else "repository"
        raise ModelError(
            f"the Hub has no such {what}: {repo}", remedy="check the name; a private one needs: hf auth login"
        ) from error
    except errors.HFValidationError as error:
        raise ModelError(f"'{repo}' is no id of a repository on the Hub") from error
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
            raise
        raise _unreachable(repo, error) from error
    except Exception as error:  # which HTTP library is under it, and so its errors, differ by version
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> _Unreachable:
    reason = str(error).strip().splitlines()
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return _Unreachable(
            f"{repo} is not in the Hub's cache, and HF_HUB_OFFLINE says that the Hub is not asked",
            remedy="the same command without HF_HUB_OFFLINE, once",
        )
    return _Unreachable(
        f"{repo} could not be fetched from the Hub: {reason[0] if reason else type(error).__name__}",
        remedy="the same command once more goes on where it stopped; HF_ENDPOINT chooses a mirror",
    )
