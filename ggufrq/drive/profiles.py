"""The profile that K of a model is kept by: a file that is given or lies beside the model, or one that is
made on first use and kept, from a short text or from its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ggufrq.base import environment, log, paths
from ggufrq.base.errors import GgufrqError, ModelError
from ggufrq.base.locks import locked
from ggufrq.base.progress import progress
from ggufrq.build.project import Build
from ggufrq.cache.cases import Case
from ggufrq.cache.kv import KvPlan, Sought
from ggufrq.drive.moments import sum_moments
from ggufrq.ggufs.fingerprint import fingerprint
from ggufrq.ggufs.header import read_header
from ggufrq.models.names import RECIPE, names_beside
from ggufrq.tools.logs import PROFILE_SOURCES

if TYPE_CHECKING:  # numpy takes a while to import, and most commands need no profile
    from ggufrq.profile import Profile
    from ggufrq.profile.tensors import Tensors
    from ggufrq.profile.whole import Whole

#: Tokens of text that a profile is made from unless it is asked for (``ggufrq calibrate``): on three models
#: they take a third to a half off the noise that the weights' profile leaves, on code and in other languages,
#: too, and twice as many hardly more (docs/real-models.md). It takes as long as a prompt.
TOKENS = 256
#: Counted up when the same model gets another profile, so that what is kept is made anew.
MAKE = 2
#: Small tensors that tell of K and Q, in 32 bits whatever the model was quantized to.
_OF_KEYS = re.compile(
    r"^blk\.\d+\.attn_(?:(?:norm|norm_2|q_norm|k_norm)\.(?:weight|bias)|(?:q|k|qkv)\.bias)$"
)


@dataclass(frozen=True)
class Found:
    """The file of a profile, and what it is in a few words; None, and why."""

    file: Path | None
    said: str


def settle(
    plan: KvPlan,
    model: Path,
    n_ctx: int | None = None,
    build: Build | None = None,
    threads: int | None = None,
    places: Sequence[str] = (),
) -> tuple[KvPlan, str | None]:
    """The plan with the profile of this GGUF model for a context of ``n_ctx`` tokens, and what is said of it
    (None where none was asked for). Parameters and errors are those of ``find``."""
    if plan.profile is None:
        return plan, None
    found = find(model, plan.profile, n_ctx, build, threads, places)
    return plan.with_profile(found.file), found.said


def settle_cases(
    cases: Iterable[Case], model: Path, n_ctx: int | None = None, build: Build | None = None
) -> list[Case]:
    """The cases with the profiles of this GGUF model, each once; says which these are. Raises as ``find``."""
    known: dict[Path | Sought, Found] = {}
    settled = []
    for case in cases:
        wish = case.plan.profile
        if wish is not None:
            if wish not in known:
                known[wish] = find(model, wish, n_ctx, build)
                log.say(known[wish].said)
            case = replace(case, plan=case.plan.with_profile(known[wish].file))
        settled.append(case)
    return list(dict.fromkeys(settled))


def find(
    model: Path,
    wish: Path | Sought,
    n_ctx: int | None = None,
    build: Build | None = None,
    threads: int | None = None,
    places: Sequence[str] = (),
) -> Found:
    """The profile for a GGUF model and a context of ``n_ctx`` tokens: the file ``wish``; or the one beside
    the model, or else one from ``TOKENS`` tokens of text, which the programs of ``build`` read, or from the
    weights where that cannot be, or none; or that from the weights. ``places`` are llama.cpp's options for
    where the model lies (``passed_on.places``).

    Raises ModelError for a file that is damaged or, where it was asked for, of another model, and when the
    one from the weights was asked for and cannot be made.
    """
    from ggufrq.profile.tensors import Tensors

    tensors = Tensors(model)
    if isinstance(wish, Path):
        return _described(wish, tensors)
    beside = _beside(tensors, n_ctx) if wish is Sought.AUTO else None
    if beside is not None:
        return beside
    try:
        return _made_once(tensors, n_ctx, build if wish is Sought.AUTO else None, threads, places)
    except GgufrqError as error:
        if wish is Sought.WEIGHTS:
            raise
        return Found(None, f"no profile: {error.message}")


def make(
    model: Path,
    positions: int | None,
    build: Build | None,
    threads: int | None = None,
    places: Sequence[str] = (),
) -> tuple[Profile, str]:
    """The profile of a GGUF model over so many ``positions`` (its own context, ``LONGEST`` at most) that it
    has unless there is a better one, and how long it took: from ``TOKENS`` tokens of text, which the programs
    of ``build`` read, with the model in these ``places``, or from the weights where there are none or they
    fail, which is said.

    Raises ModelError when none can be made.
    """
    from ggufrq.profile import profile_from_weights
    from ggufrq.profile.whole import Whole

    if build is not None:
        whole = Whole.of(model, positions)
        try:
            with progress(f"Profile from {TOKENS} tokens of text (once)", unit="texts") as bar:
                made = _from_text(whole, build, threads, places)
                return made, f"made in {bar.elapsed_text()}"
        except (GgufrqError, OSError) as error:
            why = error.message if isinstance(error, GgufrqError) else str(error)
            log.say(f"no profile from a text ({why}), so one from the weights; ggufrq calibrate tries again")
    with progress("Profile from the weights", unit="layers") as bar:
        made = profile_from_weights(model, positions, lambda done, total: bar.update(done, total=total))
        return made, f"made in {bar.elapsed_text()}"


def _from_text(whole: Whole, build: Build, threads: int | None, places: Sequence[str]) -> Profile:
    """Raises GgufrqError or OSError when it cannot be made."""
    from ggufrq.profile.sums import read_sums
    from ggufrq.profile.text import profile_from_sums

    whole.require_known()
    text = paths.data_dir("texts") / "calibration.txt"
    with TemporaryDirectory(dir=paths.own_dir("calibration")) as folder:
        sums = Path(folder) / "sums.gguf"
        path = whole.tensors.path
        sum_moments(
            sums,
            path,
            text,
            build,
            lambda *_: None,
            n_ctx=TOKENS,
            chunks=1,
            threads=threads,
            extra=places,
        )
        return profile_from_sums(whole, read_sums(sums).all)


def positions_for(native: int | None, n_ctx: int | None) -> int:
    """Over how many positions the profile for a context of ``n_ctx`` tokens is averaged: one for all contexts
    up to the model's own or ``LONGEST``, then one for each power of two."""
    from ggufrq.profile.whole import LONGEST

    usual = min(native or LONGEST, LONGEST)
    return usual if n_ctx is None or n_ctx <= usual else 1 << (n_ctx - 1).bit_length()


def _beside(model: Tensors, n_ctx: int | None) -> Found | None:
    """The file beside the model, unless it is of another one, or one for a shorter context than ``n_ctx``
    that is made as well here."""
    for name in names_beside(model.path, model.headers[0].values.get(RECIPE)):
        path = model.path.parent / name
        if not path.is_file():
            continue
        try:
            header = _header(path)
            if header.model != fingerprint(model.path):
                log.say(f"{path.name} is a profile for another model and is not used")
            elif header.made and header.n_ctx < (n_ctx or 0):
                log.say(f"{path.name} is for {header.n_ctx:,} positions, and this context is longer")
            else:
                return _described(path, model)
        except ModelError as error:
            raise ModelError(error.message, remedy=f"move {path} away, or --kv-profile weights") from None
    return None


def _native(model: Tensors) -> int | None:
    values = model.headers[0].values
    native = values.get(f"{values.get('general.architecture')}.context_length")
    return native if isinstance(native, int) else None


def _described(path: Path, model: Tensors) -> Found:
    """What a file is. Raises ModelError when it is damaged, no profile, or for another model."""
    from ggufrq.profile import read_profile

    header = _header(path)
    if header.model != fingerprint(model.path):
        raise ModelError(
            f"{path} is a profile for another model than {model.path.name}",
            remedy="--kv-profile weights, or one made for this model by ggufrq calibrate",
        )
    if header.kind == "kv-calib":
        return Found(path, f"means of K subtracted: {path.name}")
    return Found(path, f"profile {path.name}, {PROFILE_SOURCES[read_profile(path).source]}")


@dataclass(frozen=True)
class _Header:
    """The kind of a file, the fingerprint of its model, whether ``make`` makes such ones, and over how many
    positions it is."""

    kind: str
    model: Any
    made: bool
    n_ctx: int


def _header(path: Path) -> _Header:
    """What a file says of itself. Raises ModelError when it is no profile."""
    values = read_header(path).values
    kind = str(values.get("general.type") or values.get("general.architecture") or "of no type")
    if kind not in ("kv-profile", "kv-calib"):
        raise ModelError(
            f"{path} is no profile of a KV cache but {kind}",
            remedy="a file that ggufrq calibrate made, or --kv-profile weights",
        )
    model = values.get(f"rq.{kind.removeprefix('kv-')}.model")
    n_ctx = values.get("rq.profile.n_ctx", 0)
    made = values.get("rq.profile.source") == "weights" or values.get("rq.profile.tokens") == TOKENS
    return _Header(kind, model, made, n_ctx if isinstance(n_ctx, int) else 0)


def _made_once(
    model: Tensors, n_ctx: int | None, build: Build | None, threads: int | None, places: Sequence[str]
) -> Found:
    """The profile that is kept, or one made and kept now. Raises ModelError when none can be made.

    Where a build could make none from a text, a file says so, and that build does not try this model's file
    in these places, also as variables name them, again; with another quantization, or elsewhere, there may be
    room.
    """
    positions = positions_for(_native(model), n_ctx)
    named, keys, cache = fingerprint(model.path), _keys_of(model), paths.find_cache()
    kept, shared = paths.own_dir("profiles"), [] if cache is None else [cache / "profiles"]
    name = f"{named}-{keys}-{positions}"
    failed = kept / f"{name}-text-{MAKE}.failed"
    lies = [*places, *(f"{name}={value}" for name, value in environment.of_the_machine().items())]
    tried = "" if build is None else " ".join([build.key, str(model.path.resolve()), *lies])

    def there() -> Found | None:
        text = build is not None and not (failed.is_file() and failed.read_text() == tried)
        source = "text" if text else "weights"
        for folder in dict.fromkeys([*shared, kept]):
            file = folder / f"{name}-{source}-{MAKE}.gguf"
            if _is_sound(file, named, positions, source):
                return Found(file, f"profile {PROFILE_SOURCES[source]}")
        return None

    found = there()
    if found is None:
        with locked(kept / f"{name}.lock", "another ggufrq makes the profile of this model"):
            found = there()
            if found is None:
                made, how = make(model.path, positions, build, threads, places)
                file = kept / f"{name}-{made.source}-{MAKE}.gguf"
                made.write(file)
                if build is not None and made.source == "weights":
                    paths.atomic_write(failed, tried)
                found = Found(file, f"profile {PROFILE_SOURCES[made.source]}, {how}")
    return found


def _keys_of(model: Tensors) -> str:
    """A hash of what the fingerprint does not see of Q and K: heads, norms, biases, and whether the file is
    folded. It is the same for all quantizations of a model, which leave these alone."""
    values = model.headers[0].values
    arch = values.get("general.architecture")
    keys = ("head_count", "head_count_kv", "key_length")
    whole = hashlib.sha256(repr([values.get(f"{arch}.attention.{key}") for key in keys]).encode())
    whole.update(repr([values.get("ggufrq.fold"), values.get("ggufrq.fold.version")]).encode())
    for name in sorted(name for name in model.names if _OF_KEYS.match(name)):
        part = model.vector(name)
        assert part is not None
        whole.update(name.encode() + part.tobytes())
    return whole.hexdigest()[:12]


def _is_sound(kept: Path, named: str, positions: int, source: str) -> bool:
    from ggufrq.profile import read_profile

    try:
        profile = read_profile(kept)
    except ModelError:
        return False
    return (profile.model, profile.n_ctx, profile.source) == (named, positions, source)
