"""Models on the Hugging Face Hub: only the files that are needed, and which revision they are of."""

from __future__ import annotations

import errno
import io
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO, cast

from ggufrq.base import log, paths
from ggufrq.base.errors import ModelError
from ggufrq.ggufs.header import Header, parse_header
from ggufrq.models.names import PROFILE_END, names_beside

#: What conversion needs of a repository.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "LICENSE*")
#: Not read by llama.cpp's converter, and often large.
_IGNORED = ("original/*", "onnx/*", "*/*.safetensors", "consolidated*")
#: More bytes than any header of a safetensors file has.
_MAX_HEADER = 100_000_000
_ID = re.compile(r"^([\w][\w.-]*/[\w][\w.-]*?)(?::([\w.-]+))?$")
#: In names of files that go with a model.
_NO_MODEL = ("mmproj", "imatrix", PROFILE_END)
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")


@dataclass(frozen=True)
class HubModel:
    """A downloaded repository: its id, the commit that it is of, and where its files are."""

    repo: str
    revision: str
    folder: Path


def parse_id(text: str) -> tuple[str, str | None] | None:
    """``user/model`` or ``user/model:Q4_K_M`` as id and label; None for anything else."""
    found = _ID.match(text)
    return (found[1], found[2]) if found else None


def fetch_model(repo: str, revision: str | None = None) -> HubModel:
    """Download a model in Hugging Face form into the Hub's own cache. Raises ModelError."""
    sha, _ = _safetensors(repo, revision)
    log.say(f"fetching {repo} at {sha[:12]}")
    return HubModel(repo, sha, _snapshot(repo, sha, MODEL_FILES))


def fetch_headers(repo: str, revision: str | None = None) -> HubModel:
    """A model in Hugging Face form with holes in place of its weights, in ggufrq's cache: only the headers of
    its safetensors files are downloaded, by range requests. Raises ModelError."""
    sha, names = _safetensors(repo, revision)
    folder = paths.cache_dir() / "headers" / f"{repo.replace('/', '--')}-{sha}"
    if folder.is_dir():
        return HubModel(repo, sha, folder)
    log.say(f"fetching the headers of {repo} at {sha[:12]}")
    small = _snapshot(repo, sha, tuple(name for name in MODEL_FILES if name != "*.safetensors"))
    with paths.atomic_path(folder) as temporary:
        temporary.mkdir()
        for path in small.iterdir():
            if path.is_file() and path.suffix != ".safetensors":
                shutil.copyfile(path, temporary / path.name)
        for name in names:
            with _errors(repo):
                header, size = _header(repo, name, sha)
            with (temporary / name).open("wb") as file:
                file.write(header)
                file.truncate(size)
    return HubModel(repo, sha, folder)


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
    log.say(f"fetching the header of {chosen[0]} of {repo} at {sha[:12]}")
    with _errors(repo):
        headers = []
        for name in chosen:
            file = _RangeFile(repo, name, sha)
            headers.append(parse_header(cast(BinaryIO, file), file.size, f"{repo}/{name}"))
    return chosen, sha, tuple(headers)


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
    """The commit that a revision stands for, and the names of its files."""
    from huggingface_hub import HfApi

    with _errors(repo):
        info = HfApi().model_info(repo, revision=revision)
        return str(info.sha), sorted(entry.rfilename for entry in info.siblings or [])


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

    with _errors(repo):
        return Path(
            snapshot_download(
                repo, revision=sha, allow_patterns=list(patterns), ignore_patterns=list(_IGNORED)
            )
        )


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
            raise ModelError(f"the Hub does not send parts of {name}", remedy="without --dry-run")
        size = int(answer.headers["Content-Range"].rpartition("/")[2])
        return answer.raw.read(length), size


def fetch_gguf(repo: str, label: str | None = None, revision: str | None = None) -> Path:
    """Download one GGUF file, all its shards if it is split, and return the (first) file.

    ``label`` chooses by the encoding in the name (``Q4_K_M``); without it Q4_K_M is taken, or the only file.
    The profile of its KV cache that lies beside it is downloaded, too.
    Raises ModelError that lists the labels when the choice is not clear.
    """
    return fetch_gguf_at(repo, label, revision)[0]


def fetch_gguf_at(repo: str, label: str | None = None, revision: str | None = None) -> tuple[Path, str]:
    """As ``fetch_gguf``, with the commit that the file is of."""
    from huggingface_hub import hf_hub_download

    sha, names = _files(repo, revision)
    chosen = choose_gguf(repo, names, label)
    log.say(
        f"fetching {chosen[0]} of {repo} at {sha[:12]}"
        + (f" and {len(chosen) - 1} more shards" if chosen[1:] else "")
    )
    beside = (
        str(PurePosixPath(chosen[0]).with_name(name)) for name in names_beside(PurePosixPath(chosen[0]))
    )
    profile = [name for name in beside if name in names][:1]
    with _errors(repo):
        files = [Path(hf_hub_download(repo, name, revision=sha)) for name in [*chosen, *profile]]
    return files[0], sha


def choose_gguf(repo: str, names: list[str], label: str | None) -> list[str]:
    """The file with this label among a repository's file names, with all its shards in order. Raises
    ModelError."""
    models = [n for n in names if n.endswith(".gguf") and not any(word in n.lower() for word in _NO_MODEL)]
    if not models:
        raise ModelError(f"{repo} has no GGUF files", remedy=f"ggufrq quantize {repo}")
    groups: dict[str, list[str]] = {}
    for name in models:
        groups.setdefault(_SHARD.sub(".gguf", name), []).append(name)
    wanted = label or ("Q4_K_M" if len(groups) > 1 else "")
    pattern = re.compile(rf"(?:^|[^A-Za-z0-9]){re.escape(wanted)}\.gguf$", re.IGNORECASE)
    found = [name for name in groups if not wanted or pattern.search(name)]
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


@contextmanager
def _errors(repo: str) -> Iterator[None]:
    from huggingface_hub import errors
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if log.is_quiet():
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


def _unreachable(repo: str, error: Exception) -> ModelError:
    reason = str(error).strip().splitlines()
    return ModelError(
        f"{repo} could not be fetched from the Hub: {reason[0] if reason else type(error).__name__}",
        remedy="the same command once more goes on where it stopped; HF_ENDPOINT chooses a mirror",
    )
