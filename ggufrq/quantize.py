"""A family of GGUF files from one model: converted if need be, quantized to each type, checked, and resumed.

Each file is made under a temporary name, checked, entered in the family's record, and renamed; a run that was
killed goes on with the first file that the record does not vouch for.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ggufrq import convert, hub, log, paths, proc
from ggufrq.build import Build
from ggufrq.errors import GgufrqError, ModelError, UsageError
from ggufrq.gguf_file import GgufFacts, read_gguf, verify_quantized
from ggufrq.progress import progress
from ggufrq.resolve import Model, embedded_folder, resolve
from ggufrq.tools import imatrix as imatrix_tool
from ggufrq.tools import quantize as quantize_tool
from ggufrq.tools.logs import retried

DEFAULT_TYPES = ("IQ4_XS", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
#: Types that are not made without an importance matrix: llama.cpp refuses some, the others lose too much.
NEEDS_IMATRIX = ("IQ1_", "IQ2_", "IQ3_", "Q2_K", "Q3_K")
#: Chunks of 512 tokens of the calibration text that an importance matrix is made from.
IMATRIX_CHUNKS = 100
_SPARE_DISK = 64 << 20
#: Up to this size a source file is known by its content, beyond it by its size and time.
_HASHED = 256 << 20


@dataclass(frozen=True)
class Made:
    """One file of a family. ``imatrix`` tells whether an importance matrix was used, ``fresh`` whether this
    run made it."""

    name: str
    type: str
    path: Path
    bytes: int
    bits: float
    imatrix: bool
    fresh: bool
    fallbacks: int = 0


@dataclass(frozen=True)
class Family:
    """Files made from one model, and where they came from."""

    base: str
    folder: Path
    source: dict[str, Any]
    files: tuple[Made, ...]

    def file(self, type_name: str) -> Path:
        """Path of the file with this type. KeyError when it is not in the family."""
        return {made.type: made.path for made in self.files}[type_name]


def parse_types(text: str, build: Build) -> tuple[str, ...]:
    """``Q4_K_M,q8_0`` as names that llama-quantize lists; aliases become what they stand for. Raises
    UsageError."""
    known = quantize_tool.parse_types(_help(build))
    names = [part.strip().upper() for part in text.split(",") if part.strip()]
    wrong = [name for name in names if name not in known]
    if wrong or not names:
        raise UsageError(
            f"llama.cpp has no quantization type '{wrong[0] if wrong else text}'; it has {', '.join(known)}",
            remedy=f"--types {','.join(DEFAULT_TYPES)}",
        )
    return tuple(dict.fromkeys(known[name] for name in names))


def needs_imatrix(type_name: str) -> bool:
    """Whether this type is only made with an importance matrix."""
    return type_name.startswith(NEEDS_IMATRIX)


def make_family(
    model: str,
    types: Sequence[str],
    build: Build,
    *,
    out: Path | None = None,
    imatrix: Path | None = None,
    pre_tokenizer: str | None = None,
    revision: str | None = None,
    requantize: bool = False,
    force: bool = False,
) -> Family:
    """Quantize ``model`` (see ``resolve``) to each of ``types`` in the folder ``out``.

    Files that are already there and whole are kept. ``imatrix`` is used for all types; without one, the types
    that need it get one made from the calibration text. ``force`` replaces files that ggufrq did not make.
    Raises ModelError, UsageError or ToolError.
    """
    chosen = resolve(model)
    if imatrix is not None and not imatrix.is_file():
        raise UsageError(f"there is no importance matrix {imatrix}")
    folder = out or (
        embedded_folder(chosen.name) if chosen.kind == "embedded" else Path(f"{chosen.name}-GGUF")
    )
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        work = _Work(chosen, folder, build, requantize=requantize, force=force)
        return work.run(types, imatrix, pre_tokenizer, revision)


class _Work:
    """One run over one folder, under its lock."""

    def __init__(self, model: Model, folder: Path, build: Build, *, requantize: bool, force: bool) -> None:
        self.model = model
        self.base = model.name
        self.folder = folder
        self.build = build
        self.requantize = requantize
        self.force = force
        self.log = paths.logs_dir() / f"quantize-{self.base}.log"
        self.record_path = folder / f"{self.base}.ggufrq.json"
        self.record = _read_record(self.record_path)
        for left in folder.glob(f".{self.base}-*.tmp"):  # of a run that was killed: the lock is ours
            left.unlink(missing_ok=True)

    def run(
        self, types: Sequence[str], imatrix: Path | None, pre_tokenizer: str | None, revision: str | None
    ) -> Family:
        source, root = self._source(pre_tokenizer, revision)
        facts = read_gguf(source)
        if facts.is_quantized and not self.requantize:
            raise ModelError(
                f"{source.name} is quantized already ({facts.file_type}); doing it once more loses quality",
                remedy="start from the F16 or BF16 file or the original model, or add --requantize",
            )
        matrices = self._matrices(types, imatrix, source, root)
        digests = {path: _digest(path) for path in set(matrices.values()) if path is not None}
        weights = {name: digests[path] if path is not None else "" for name, path in matrices.items()}
        self._require_disk(source, [name for name in types if self._kept(name, root, weights[name]) is None])
        files = [
            self._kept(name, root, weights[name])
            or self._quantize(name, root, source, facts, matrices[name], weights[name])
            for name in types
        ]
        return Family(self.base, self.folder, dict(self.record.get("source", {})), tuple(files))

    # Where it comes from

    def _source(self, pre_tokenizer: str | None, revision: str | None) -> tuple[Path, str]:
        """The GGUF file in 16 bits (or as given), and what tells it from another."""
        if self.model.kind == "gguf":
            assert self.model.path is not None
            identity = {"file": self.model.path.name, "id": _identity([self.model.path])}
            self._enter_source(identity)
            return self.model.path, str(identity["id"])
        if self.model.kind == "hub":
            assert self.model.repo is not None
            fetched = hub.fetch_model(self.model.repo, revision)
            folder, identity = fetched.folder, {"repo": fetched.repo, "revision": fetched.revision}
            identity["id"] = f"{fetched.repo}@{fetched.revision}"
        else:
            assert self.model.path is not None
            folder = self.model.path
            names = [*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("tokenizer.model")]
            identity = {"folder": folder.name, "id": _identity(sorted(names))}
        hf = convert.inspect(folder)
        kind = hf.out_type.upper()
        key = f"{identity['id']}+{pre_tokenizer}" if pre_tokenizer else str(identity["id"])
        self._enter_source(identity)
        path = self._path(kind)
        if self._kept(kind, key) is None:
            self._refuse_foreign(path)
            _require_free(self.folder, int(hf.data_bytes * 1.1), f"{self.base} in {kind}")
            with progress(f"Converting to {kind}", 100, unit="%") as bar:
                with self._entered(path, kind, key) as temporary:
                    convert.convert_to(
                        temporary,
                        folder,
                        self.build.source,
                        pre_tokenizer=pre_tokenizer,
                        log=self.log,
                        on_percent=lambda percent: bar.update(percent),
                    )
                bar.update(100)
        return path, key

    def _enter_source(self, identity: dict[str, Any]) -> None:
        self.record["source"] = identity
        self.record["llama_cpp"] = self.build.manifest.get("llama_cpp", {}).get("commit", "")

    # Importance matrices

    def _matrices(
        self, types: Sequence[str], given: Path | None, source: Path, root: str
    ) -> dict[str, Path | None]:
        if given is not None:
            return dict.fromkeys(types, given)
        if not any(needs_imatrix(name) for name in types):
            return dict.fromkeys(types)
        path = self.folder / f"{self.base}-imatrix.gguf"
        text = paths.data_dir("texts") / "calibration.txt"
        key = f"{root}+{_digest(text)}+{IMATRIX_CHUNKS}"
        if self._kept_at(path, key) is None:
            self._refuse_foreign(path)
            self._make_imatrix(path, key, source, text)
        return {name: path if needs_imatrix(name) else None for name in types}

    def _make_imatrix(self, path: Path, key: str, source: Path, text: Path) -> None:
        output = {"out": ""}
        with (
            progress("Importance matrix", unit="chunks") as bar,
            self._entered(path, "imatrix", key) as temporary,
        ):

            def on_stdout(chunk: str) -> None:
                output["out"] += chunk
                bar.update(imatrix_tool.chunks_done(output["out"]))

            def on_stderr(line: str) -> None:
                total = imatrix_tool.chunks_planned(line)
                if total:
                    bar.update(0, total=total)

            args = imatrix_tool.arguments(source, text, temporary, chunks=IMATRIX_CHUNKS)

            def attempt() -> None:
                output["out"] = ""
                done = proc.run(
                    [self.build.tool("llama-imatrix"), *args],
                    log=self.log,
                    check=False,
                    on_stdout=on_stdout,
                    on_stderr=on_stderr,
                )
                imatrix_tool.check(done.stdout, done.stderr)

            retried(attempt)

    # Quantization

    def _quantize(
        self,
        type_name: str,
        key: str,
        source: Path,
        facts: GgufFacts,
        matrix: Path | None,
        matrix_digest: str,
    ) -> Made:
        path = self._path(type_name)
        self._refuse_foreign(path)
        with progress(f"{self.base}-{type_name}", facts.tensors, unit="tensors") as bar:
            with self._entered(path, type_name, key, matrix_digest) as temporary:
                args = quantize_tool.arguments(
                    source, temporary, type_name, imatrix=matrix, requantize=self.requantize
                )
                done = proc.run(
                    [self.build.tool("llama-quantize"), *args],
                    log=self.log,
                    check=False,
                    on_stderr=lambda line: bar.update(max(bar.done, quantize_tool.tensors_done(line)[0])),
                )
                outcome = quantize_tool.parse(done.rc, done.stderr + done.stdout)
                made = read_gguf(temporary)
                verify_quantized(made, type_name, facts.tensors, outcome.fallbacks)
            bar.update(facts.tensors)
        if outcome.fallbacks:
            log.say(
                f"{path.name}: {outcome.fallbacks} tensors have rows that {type_name} cannot hold; "
                "llama.cpp gave them a larger type"
            )
        return Made(
            path.name,
            type_name,
            path,
            made.file_bytes,
            made.bits,
            matrix is not None,
            True,
            outcome.fallbacks,
        )

    def _require_disk(self, source: Path, types: Sequence[str]) -> None:
        """Sum what the files will take by llama-quantize's own dry run."""
        need = 0
        for name in types:
            args = quantize_tool.arguments(source, None, name, dry_run=True, requantize=self.requantize)
            done = proc.run([self.build.tool("llama-quantize"), *args], log=self.log, check=False)
            need += int(quantize_tool.parse(done.rc, done.stderr + done.stdout).quant_mib * (1 << 20))
        if types:
            _require_free(self.folder, need, f"{', '.join(types)} of {self.base}")

    # The record

    def _path(self, type_name: str) -> Path:
        return self.folder / f"{self.base}-{type_name}.gguf"

    def _kept(self, type_name: str, key: str, matrix: str = "") -> Made | None:
        path = self._path(type_name)
        entry = self._kept_at(path, key, matrix)
        if entry is None:
            return None
        return Made(path.name, type_name, path, entry["bytes"], entry["bits"], bool(matrix), False)

    def _kept_at(self, path: Path, key: str, matrix: str = "") -> dict[str, Any] | None:
        """The record's entry for a file, when the file is still what was entered and opens."""
        entry = self.record["files"].get(path.name)
        if not isinstance(entry, dict) or not path.is_file():
            return None
        if (entry.get("from"), entry.get("imatrix")) != (key, matrix):
            return None
        found = path.stat()
        if (found.st_size, found.st_mtime_ns) != (entry.get("bytes"), entry.get("mtime_ns")):
            return None
        try:
            facts = read_gguf(path)
        except ModelError:
            return None
        return entry if facts.tensors == entry.get("tensors") else None

    def _refuse_foreign(self, path: Path) -> None:
        """Never replace a file that ggufrq did not make."""
        if not path.exists() or self.force or path.name in self.record["files"]:
            return
        raise UsageError(
            f"{path} exists and was not made by ggufrq here",
            remedy="-o another folder, or --force to replace it",
        )

    @contextmanager
    def _entered(self, path: Path, kind: str, key: str, matrix: str = "") -> Iterator[Path]:
        """Yield a temporary path; on success enter it in the record, then rename it: a file that is not in
        the record or differs from it was not finished."""
        with paths.atomic_path(path) as temporary:
            yield temporary
            facts = read_gguf(temporary)
            found = temporary.stat()
            self.record["files"][path.name] = {
                "type": kind,
                "from": key,
                "bytes": found.st_size,
                "mtime_ns": found.st_mtime_ns,
                "tensors": facts.tensors,
                "bits": facts.bits,
                "imatrix": matrix,
            }
            paths.atomic_write(self.record_path, json.dumps(self.record, indent=2) + "\n")


def _help(build: Build) -> str:
    completed = proc.run([build.tool("llama-quantize"), "--help"], check=False, timeout=60)
    return completed.stdout + completed.stderr


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = {}
    if not isinstance(record, dict) or not isinstance(record.get("files"), dict):
        record = {"files": {}}
    return record


def _identity(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        facts = path.stat()
        what = _digest(path) if facts.st_size <= _HASHED else f"{facts.st_size}/{facts.st_mtime_ns}"
        digest.update(f"{path.name} {what}\n".encode())
    return digest.hexdigest()


def _digest(path: Path | None) -> str:
    if path is None:
        return ""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _require_free(folder: Path, need: int, what: str) -> None:
    free = shutil.disk_usage(folder).free
    if free < need + _SPARE_DISK:
        raise GgufrqError(
            f"{what} takes {need / 1e9:.2f} GB, and {folder.absolute()} has {free / 1e9:.2f} GB free",
            remedy="free some space, or -o with a folder on a larger disk",
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
    locks = paths.cache_dir() / "locks"
    locks.mkdir(exist_ok=True)
    lock = FileLock(locks / f"{name}.lock")
    try:
        lock.acquire(timeout=0.2)
    except Timeout:
        log.say(f"another ggufrq works in {folder}; waiting for it")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
