"""Models for mlx with quantized weights: mlx-lm's own codes, in the same bits throughout or by a recipe."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import quantize_model, save_config

from ggufrq import __version__
from ggufrq.base import log, paths, texts
from ggufrq.base.errors import ModelError, UsageError
from ggufrq.base.locks import locked_folder
from ggufrq.base.progress import progress
from ggufrq.make.recipe import Recipe
from ggufrq.make.record import Record, require_free
from ggufrq.mlx import files, fold, sensitivity
from ggufrq.mlx.bits import BITS, bits_of, choose, counted
from ggufrq.mlx.models import config_of
from ggufrq.mlx.names import GROUP
from ggufrq.models import as_gguf, convert
from ggufrq.models.resolve import resolve
from ggufrq.search.sensitivity.solve import Budget

#: Tokens of the check against the model as it was, and of the text that is generated.
CHECKED, GENERATED = 256, 16
#: What goes along as it is: the tokenizer with its template, defaults of generation, the licence.
COMPANIONS = ("*.json", "*.jinja", "tokenizer.model", "*.txt", "LICENSE*", "NOTICE*")
_OWN = ("config.json", "*.index.json", convert.DECLARATION, "*.ggufrq.json")


@dataclass(frozen=True)
class Request:
    """What is asked for: ``model`` (a name, folder or id on the Hub) in so many bits, by a recipe, or by the
    one that is best within a budget; in the folder ``out``. ``fold``: ``awq``, or None. Files have ``most``
    bytes of tensors."""

    model: str
    what: int | Recipe | Budget
    out: Path | None = None
    revision: str | None = None
    fold: str | None = None
    most: int = files.MOST

    @property
    def called(self) -> str:
        """What it is called."""
        if isinstance(self.what, int):
            name = f"{self.what}bit"
        else:
            name = self.what.name if isinstance(self.what, Recipe) else f"sensitivity-{self.what.name}"
        return f"{name}-{self.fold}" if self.fold else name

    @property
    def name(self) -> str:
        """The name of the model that is made."""
        return f"{resolve(self.model).name}-mlx-{self.called}"

    @property
    def folder(self) -> Path:
        """Where it goes."""
        return self.out or Path(self.name)


@dataclass(frozen=True)
class Plan:
    """What a model will be: ``modules`` counts by bits, 16 those that stay; ``files`` has the bytes of each
    file but the manifest, ``tensors`` are those of all tensors; ``weights`` were there before."""

    name: str
    what: str
    modules: dict[int, int]
    files: dict[str, int]
    tensors: int
    weights: int

    @property
    def bytes(self) -> int:
        """Of all files."""
        return sum(self.files.values())

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.tensors / self.weights


@dataclass(frozen=True)
class Made:
    """A model that was made, or was there already; ``kld`` is the mean divergence of its predictions from
    those of the model as it was, ``text`` what it wrote."""

    plan: Plan
    folder: Path
    kld: float
    text: str
    fresh: bool


def quantize(request: Request) -> Made:
    """Make a model in its folder, which gets its name when all is written, and was loaded by mlx-lm and
    compared with the model as it was.

    A folder that this made of the same is kept, and files that a run has finished before it was stopped.
    Raises UsageError when the folder is another one or the wish cannot be had, ModelError when the model
    cannot be read or what was made does not work.
    """
    out = request.folder
    foreign = UsageError(f"{out} exists, and holds something else", remedy="another folder by -o")
    if out.exists() and not (out / f"{request.name}.ggufrq.json").is_file():
        raise foreign
    source = _source(request, weights=True)
    wish = _wish(request, source)
    with locked_folder(out):
        kept = _kept(request, wish)
        if kept is not None:
            return kept
        if out.exists():
            raise foreign
        assert source.hf is not None
        folder = source.hf.folder
        model, tokenizer, config = _loaded(request, source)
        what = request.what
        if isinstance(what, Budget):
            what = sensitivity.solved(model, tokenizer, what, source.key, _overhead(folder, model))
        with _part(out, wish) as made:
            if request.fold:
                fold.fold(model, tokenizer, choose(model, what), made.parent / "fold.safetensors")
            layout = _layout(request, folder, model, config, what)
            plan = layout.plan
            require_free(out.absolute().parent, plan.bytes, out.name)
            layout.write(made)
            kld, text = _check(folder, made)
            record = Record(made, request.name, opens=Path.exists)
            record.data |= {"format": "mlx", "source": source.identity}
            facts = {
                **{"type": "mlx", "recipe": plan.what, "bits": plan.bits, "fold": request.fold or ""},
                **{"kld": kld, "text": text, "plan": asdict(plan), "arch": str(config["model_type"])},
                "made_by": {"ggufrq": __version__, **{one: version(one) for one in ("mlx", "mlx-lm")}},
            }
            record.finish(request.name, [(made / name, name) for name in plan.files], wish, facts)
            made.rename(out)
    return Made(plan, out, kld, text, fresh=True)


def plan(request: Request) -> Plan:
    """What ``quantize`` would make; weights are not read, of a model on the Hub only headers are fetched.
    Raises as it does, and UsageError for a budget, whose recipe takes measurements."""
    if isinstance(request.what, Budget):
        raise UsageError(
            "the recipe sensitivity takes measurements; there is no dry run of it",
            remedy="leave out --dry-run",
        )
    source = _source(request, weights=False)
    assert source.hf is not None
    model, _, config = _loaded(request, source)
    return _layout(request, source.hf.folder, model, config, request.what).plan


def _source(request: Request, *, weights: bool) -> as_gguf.Source:
    if isinstance(request.what, int) and request.what not in BITS:
        raise UsageError(
            f"mlx has no code of {request.what} bits", remedy=f"one of {', '.join(map(str, BITS))}"
        )
    found = as_gguf.find(resolve(request.model), request.revision, as_gguf.Options(), weights=weights)
    if found.hf is None:
        raise ModelError(
            f"{request.model} is a GGUF file, which mlx-lm does not read", remedy="the model's folder"
        )
    if not any(name.startswith("model") for name in found.hf.weights.files):
        raise ModelError(f"{request.model} holds no model*.safetensors, which mlx-lm reads")
    if found.hf.config.keys() & {"quantization", "quantization_config"} or found.hf.has_codes:
        raise ModelError(f"{request.model} is quantized already", remedy="the model that it was made of")
    return found


def _wish(request: Request, source: as_gguf.Source) -> dict[str, str]:
    """All that what is made depends on."""
    what = request.what if isinstance(request.what, int) else asdict(request.what)
    facts = {"what": what, "fold": request.fold, "most": request.most, "group": GROUP}
    return {"source": source.key, "wish": json.dumps(facts, sort_keys=True, default=str)}


def _kept(request: Request, wish: dict[str, str]) -> Made | None:
    """What an earlier run made of the same."""
    entry = Record(request.folder, request.name, opens=Path.exists).kept(request.name, wish)
    if entry is None:
        return None
    facts = {**entry["plan"], "modules": {int(bits): n for bits, n in entry["plan"]["modules"].items()}}
    return Made(Plan(**facts), request.folder, entry["kld"], entry["text"], fresh=False)


@contextmanager
def _part(out: Path, wish: dict[str, str]) -> Iterator[Path]:
    """The folder in work, in which files of an earlier run stay when it was after the same. It goes when what
    was made does not work."""
    work = out.absolute().parent / f".{out.name}.part"
    said = work / "wish.json"
    if paths.read_json(said) != wish:
        paths.remove_tree(work)
        paths.atomic_write(said, json.dumps(wish))
    made = work / out.name
    for left in made.glob(".*.tmp"):
        left.unlink()
    try:
        yield made
    except (ModelError, UsageError):
        paths.remove_tree(work)
        raise
    paths.remove_tree(work)


@dataclass
class _Layout:
    """What is written: small files by name, and ``arrays``, nothing of which is computed yet, in shards."""

    plan: Plan
    small: dict[str, bytes]
    shards: list[files.Shard]
    arrays: dict[str, mx.array]

    def write(self, made: Path) -> None:
        """Write all files; shards that are there already stay."""
        made.mkdir(exist_ok=True)
        for name, data in self.small.items():
            paths.atomic_write(made / name, data)
        todo = [shard for shard in self.shards if not _has(made / shard.name, shard.bytes)]
        if len(todo) < len(self.shards):
            log.say(f"{len(self.shards) - len(todo)} of {len(self.shards)} files are there already")
        with progress(f"Writing {self.plan.name}", len(todo), unit="files") as bar:
            for shard in todo:
                files.write(shard, self.arrays, made)
                bar.advance()


def _has(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _loaded(request: Request, source: as_gguf.Source) -> tuple[Any, Any, dict[str, Any]]:
    """The model as mlx-lm has it, nothing of it read yet, its tokenizer and configuration."""
    assert source.hf is not None
    folder = source.hf.folder
    try:
        found = mlx_lm.load(str(folder), model_config=config_of(folder), lazy=True, return_config=True)
    except ValueError as error:
        raise ModelError(f"mlx-lm cannot load {request.model}: {error}") from None
    return found[0], found[1], found[2]


def _layout(
    request: Request, folder: Path, model: Any, config: dict[str, Any], what: int | Recipe
) -> _Layout:
    """The model quantized, and all of its files. It is no longer what it was afterwards."""
    weights = sum(x.size for _, x in tree_flatten(model.parameters()))
    usual = what if isinstance(what, int) else max(BITS)
    choices = choose(model, what)
    vision = "vision_tower" in getattr(model, "model", {})
    with redirect_stdout(StringIO()):  # it prints
        model, config = quantize_model(
            model, config, GROUP, usual, quant_predicate=lambda path, _: choices.get(path, False)
        )
    arrays = dict(tree_flatten(model.parameters()))
    shards = files.shards(arrays, request.most)
    small = _companions(folder)
    with TemporaryDirectory(prefix="ggufrq-") as temporary:
        said = Path(temporary) / "config.json"
        save_config(config, said, keep_vision_config=vision)
        small["config.json"] = said.read_bytes()
    small[files.INDEX] = files.index(shards, arrays, weights).encode()
    sizes = {name: len(data) for name, data in small.items()} | {one.name: one.bytes for one in shards}
    bits = counted({path: bits_of(choice, usual) for path, choice in choices.items()})
    name = f"{what} bits" if isinstance(what, int) else what.name
    tensors = sum(x.nbytes for x in arrays.values())
    plan = Plan(request.name, name, bits, dict(sorted(sizes.items())), tensors, weights)
    return _Layout(plan, small, shards, arrays)


def _overhead(folder: Path, model: Any) -> int:
    """Bytes of all files beside the tensors, at most: a module has three tensors, each in a header and in the
    index, and a line in the configuration."""
    small = sum(len(data) for data in _companions(folder).values()) + (folder / "config.json").stat().st_size
    return small + 4096 + sum(1024 + 8 * len(path) for path, _ in tree_flatten(model.parameters()))


def _companions(folder: Path) -> dict[str, bytes]:
    """Small files of a model that stay as they are, by name."""
    found = {path.name: path for pattern in COMPANIONS for path in folder.glob(pattern) if path.is_file()}
    own = {name for name in found if any(fnmatch(name, pattern) for pattern in _OWN)}
    return {name: path.read_bytes() for name, path in sorted(found.items()) if name not in own}


def _check(folder: Path, made: Path) -> tuple[float, str]:
    """Mean divergence from the model as it was, and a text. Raises ModelError when a figure is none."""
    text = texts.read(paths.data_dir("texts") / "heldout.txt")[: 16 * CHECKED]

    def predictions(model: Any, tokenizer: Any) -> Any:
        ids = mx.array(tokenizer.encode(text)[:CHECKED])[None]
        logits = model(ids, cache=make_prompt_cache(model))[0].astype(mx.float32)
        found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        mx.eval(found)
        return found

    old = predictions(*mlx_lm.load(str(folder), model_config=config_of(folder))[:2])
    after, tokenizer = mlx_lm.load(str(made))[:2]
    new = predictions(after, tokenizer)
    kld = float((mx.exp(old) * (old - new)).sum(axis=-1).mean().item())
    if not -0.01 < kld < float("inf"):
        raise ModelError(f"the model that was made does not predict: its divergence is {kld}")
    return kld, mlx_lm.generate(after, tokenizer, text[:200], max_tokens=GENERATED)
