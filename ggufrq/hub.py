"""Models on the Hugging Face Hub: only the files that are needed, and which revision they are of."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ggufrq import log
from ggufrq.errors import ModelError

#: What conversion needs of a repository.
MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "tokenizer.model", "vocab.txt", "merges.txt", "LICENSE*")
#: Not read by llama.cpp's converter, and often large.
_IGNORED = ("original/*", "onnx/*", "*/*.safetensors", "consolidated*")
_ID = re.compile(r"^([\w][\w.-]*/[\w][\w.-]*?)(?::([\w.-]+))?$")
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
    from huggingface_hub import HfApi, snapshot_download

    with _errors(repo):
        info = HfApi().model_info(repo, revision=revision)
        names = [entry.rfilename for entry in info.siblings or []]
        sha = str(info.sha)
    if not any(name.endswith(".safetensors") and "/" not in name for name in names):
        ggufs = sum(name.endswith(".gguf") for name in names)
        raise ModelError(
            f"{repo} has no safetensors files" + (f", but {ggufs} GGUF files" if ggufs else ""),
            remedy=f"ggufrq run {repo} …" if ggufs else "a repository of the original model",
        )
    log.say(f"fetching {repo} at {sha[:12]}")
    with _errors(repo):
        folder = snapshot_download(
            repo, revision=sha, allow_patterns=list(MODEL_FILES), ignore_patterns=list(_IGNORED)
        )
    return HubModel(repo, sha, Path(folder))


def fetch_gguf(repo: str, label: str | None = None, revision: str | None = None) -> Path:
    """Download one GGUF file, all its shards if it is split, and return the (first) file.

    ``label`` chooses by the encoding in the name (``Q4_K_M``); without it Q4_K_M is taken, or the only file.
    Raises ModelError that lists the labels when the choice is not clear.
    """
    from huggingface_hub import HfApi, hf_hub_download

    with _errors(repo):
        info = HfApi().model_info(repo, revision=revision)
        names = sorted(entry.rfilename for entry in info.siblings or [])
    chosen = choose_gguf(repo, names, label)
    log.say(
        f"fetching {chosen[0]} of {repo} at {str(info.sha)[:12]}"
        + (f" and {len(chosen) - 1} more shards" if chosen[1:] else "")
    )
    with _errors(repo):
        paths = [Path(hf_hub_download(repo, name, revision=info.sha)) for name in chosen]
    return paths[0]


def choose_gguf(repo: str, names: list[str], label: str | None) -> list[str]:
    """The file with this label among a repository's file names, with all its shards in order. Raises
    ModelError."""
    models = [
        n for n in names if n.endswith(".gguf") and "mmproj" not in n.lower() and "imatrix" not in n.lower()
    ]
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
