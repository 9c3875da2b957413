"""The caches in models of transformers: small ones of random weights."""

from __future__ import annotations

import copy
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ggufrq.base.errors import ModelError, UsageError
from ggufrq.profile import LayerProfile, Profile

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import safetensors.torch  # noqa: E402

import ggufrq.hf.blocks as hf_blocks  # noqa: E402
from ggufrq.hf import IsoQuantCache, PlanarQuantCache, RotorQuantCache  # noqa: E402

#: So many newest tokens as they were that nothing is lost but to 16 bits: all else must then be as without.
ALL = 1 << 20
NAME = "cache" if transformers.__version__ >= "5.24" else "past_key_values"
BASE = {
    **dict(vocab_size=60, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4),
    **dict(
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512, pad_token_id=0, eos_token_id=None
    ),
}
LINEAR = {
    **dict(layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2),
    **dict(linear_num_key_heads=2, linear_key_head_dim=16, linear_value_head_dim=16),
}
MODELS: dict[str, Callable[[], Any]] = {
    "dense": lambda: transformers.LlamaConfig(**BASE),
    "windows": lambda: transformers.Gemma3TextConfig(
        **BASE, sliding_window=12, layer_types=["sliding_attention", "full_attention"]
    ),
    "hybrid": lambda: transformers.Qwen3_5TextConfig(**BASE, **LINEAR),
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small chunks; and what transformers warns of is not ours."""
    monkeypatch.setattr(hf_blocks, "CHUNK", 8)
    transformers.logging.set_verbosity_error()
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    torch.manual_seed(0)
    made = {}
    for name, config in MODELS.items():
        model = transformers.AutoModelForCausalLM.from_config(config(), dtype=torch.float32).eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.15)
        made[name] = model
    return made


def tokens(rows: int, length: int, padded: int = 0) -> dict[str, Any]:
    ids = torch.randint(1, 60, (rows, length))
    mask = torch.ones_like(ids)
    if padded:
        ids[0, :padded], mask[0, :padded] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


def generate(model: Any, inputs: Any, cache: Any, **options: Any) -> Any:
    held = {} if cache is None else {NAME: cache}
    return model.generate(**inputs, **held, max_new_tokens=8, do_sample=False, **options)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "in parts": {"prefill_chunk_size": 5},
    "prompt lookup": {"prompt_lookup_num_tokens": 3},
    "assisted": {"assistant_model": None},
}


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_generation_without_loss_is_that_of_a_dense_cache(
    models: dict[str, Any], name: str, way: str, configured: bool
) -> None:
    model, options = models[name], dict(WAYS[way])
    helped = way in ("prompt lookup", "assisted")
    if name == "hybrid" and helped:
        pytest.skip("transformers refuses it: a recurrent state cannot be taken back")
    if "assistant_model" in options:
        options["assistant_model"] = models["dense" if name == "dense" else name]
    inputs = tokens(1, 21) if helped else tokens(2, 21, padded=6)
    if helped:  # guesses change nothing; the text alone is that of a dense cache but for ties
        want = generate(model, inputs, IsoQuantCache(4, recent=ALL))
    else:
        want = generate(model, inputs, transformers.DynamicCache(config=model.config), **options)
    cache = IsoQuantCache(4, recent=ALL, config=model.config if configured else None)
    got = generate(model, inputs, cache, **options)
    assert torch.equal(got, want)
    assert cache.get_seq_length() >= got.shape[1] - 1


@pytest.mark.parametrize("kind", [PlanarQuantCache, IsoQuantCache, RotorQuantCache])
@pytest.mark.parametrize("implementation", ["sdpa", "eager", "ggufrq"])
def test_more_bits_lose_less(models: dict[str, Any], kind: Any, implementation: str) -> None:
    model, inputs = models["dense"], tokens(2, 40, padded=5)
    seen = inputs["attention_mask"].bool()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        dense = model(**inputs).logits[seen]
        lost = [
            (model(**inputs, **{NAME: kind(bits, recent=0)}).logits[seen] - dense).square().mean()
            for bits in (2, 3, 4, 5)
        ]
    model.set_attn_implementation("sdpa")
    assert lost[0] > 2 * lost[1] > 4 * lost[2] > 0


def test_the_line_of_the_cards(models: dict[str, Any]) -> None:
    inputs = tokens(1, 9)
    out = models["dense"].generate(**inputs, past_key_values=IsoQuantCache(bits=3), max_new_tokens=3)
    assert out.shape == (1, 12)


def test_linear_layers_stay_as_they_are(models: dict[str, Any]) -> None:
    inputs = tokens(1, 30)
    ours, dense = IsoQuantCache(), transformers.DynamicCache(config=models["hybrid"].config)
    with torch.no_grad():
        for cache in (ours, dense):
            models["hybrid"](**inputs, **{NAME: cache})
    for what in ("conv_states", "recurrent_states"):
        mine, theirs = (getattr(cache.layers[0], what)[0] for cache in (ours, dense))
        assert torch.equal(mine, theirs)


def held(thing: Any, found: dict[int, int], seen: set[int]) -> None:
    """Bytes of every storage that can be reached from a thing, by address."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, torch.Tensor):
        found[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    elif isinstance(thing, dict):
        held(list(thing.values()), found, seen)
    elif isinstance(thing, (list, tuple)):
        for one in thing:
            held(one, found, seen)
    elif hasattr(thing, "__dict__"):
        held(vars(thing), found, seen)


@pytest.mark.parametrize("name", MODELS)
def test_what_is_held_is_what_is_told(models: dict[str, Any], name: str) -> None:
    """Nothing but blocks, 5 rows for each head in 16 bits, and states of linear layers stays behind."""
    model, length = models[name], 200
    cache = IsoQuantCache(3, recent=4, first=1, config=model.config)
    with torch.no_grad():
        model(**tokens(2, length), **{NAME: cache})
        model(torch.ones(2, 1, dtype=torch.long), **{NAME: cache})
    found: dict[int, int] = {}
    for layer in cache.layers:
        held(vars(layer), found, set())
        for side in getattr(layer, "sides", ()) or ():
            for part in (side.basis.into, side.basis.query):
                found.pop(part.untyped_storage().data_ptr(), None)
    assert 0 <= sum(found.values()) - cache.nbytes() <= 100  # where rows begin, and the like
    sides = [side for layer in cache.layers for side in getattr(layer, "sides", ())]
    for side in sides:
        cells = sum(chunk.shape[2] for chunk in side.blocks.chunks)
        assert sum(chunk.nbytes for chunk in side.blocks.chunks) == 2 * 2 * cells * 26
        assert cells <= length + 8 if side.blocks.start == 0 else cells <= 12 + 2 * 8
        assert side.recent.nbytes + side.first.nbytes == 2 * 2 * 5 * 64 * 2


def test_tokens_are_taken_back(models: dict[str, Any]) -> None:
    model, inputs = models["windows"], tokens(2, 40)
    ids = inputs["input_ids"]
    cache, other = (IsoQuantCache(3, recent=0, first=0, config=model.config) for _ in range(2))
    with torch.no_grad():
        model(ids[:, :20], **{NAME: other})
        want = model(ids[:, 20:], **{NAME: other}).logits
        cache.activate_past_recording()
        model(ids[:, :20], **{NAME: cache})
        model(torch.randint(1, 60, (2, 9)), **{NAME: cache})
        cache.crop(-9)
        assert cache.get_seq_length() == 20
        got = model(ids[:, 20:], **{NAME: cache}).logits
    assert (got - want).abs().mean() < 1e-3 * want.abs().mean()
    with pytest.raises(UsageError, match="left behind"):
        other.crop(-30)
    with pytest.raises(UsageError, match="older versions"):
        other.crop(5)
    cache.crop(-100)
    assert cache.get_seq_length() == 0


def test_the_batch_is_changed(models: dict[str, Any]) -> None:
    """As contrastive search and beams do it: rows repeated, selected, in another order."""
    model, ids = models["windows"], tokens(2, 25)["input_ids"]
    plain, changed = (IsoQuantCache(3, recent=3, config=model.config) for _ in range(2))
    order = torch.tensor([1, 1, 0])
    step = torch.randint(1, 60, (3, 1))
    with torch.no_grad():
        model(ids, **{NAME: changed})
        model(ids[order], **{NAME: plain})
        changed.batch_repeat_interleave(3)
        changed.reorder_cache(torch.tensor([5, 4, 3, 2, 1, 0]))
        changed.batch_select_indices(torch.tensor([0, 2, 4]))
        got, want = (model(step, **{NAME: cache}).logits for cache in (changed, plain))
    assert (got - want).abs().mean() < 1e-3 * want.abs().mean()
    assert changed.nbytes() == plain.nbytes()
    changed.reset()
    assert (changed.get_seq_length(), changed.get_mask_sizes(4, 1)) == (0, (4, 0))


@pytest.mark.parametrize("configured", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(models: dict[str, Any], name: str, configured: bool, tmp_path: Path) -> None:
    model = models[name]
    config = model.config if configured else None
    cache, other = (IsoQuantCache(3, 4, recent=5, config=config) for _ in range(2))
    with torch.no_grad():
        model(**tokens(2, 30, padded=4), **{NAME: cache})
        cache.save(tmp_path / "kept.safetensors")
        other.load(tmp_path / "kept.safetensors")
        again = copy.deepcopy(cache)
        assert other.nbytes() == cache.nbytes() == again.nbytes()
        step, mask = torch.tensor([[7], [9]]), torch.ones(2, 31, dtype=torch.long)
        mask[0, :4] = 0
        want, *rest = (
            model(step, attention_mask=mask, **{NAME: each}).logits for each in (cache, other, again)
        )
    assert all(torch.equal(got, want) for got in rest)


def test_windows_of_a_file_are_those_of_a_cache_without_layers(
    models: dict[str, Any], tmp_path: Path
) -> None:
    model = models["windows"]
    cache, other = IsoQuantCache(3, config=model.config), IsoQuantCache(3)
    with torch.no_grad():
        model(**tokens(1, 40), **{NAME: cache})
        cache.save(tmp_path / "kept.safetensors")
        other.load(tmp_path / "kept.safetensors")
        more = tokens(1, 5)["input_ids"]
        want, got = (model(more, **{NAME: each}).logits for each in (cache, other))
    assert torch.equal(got, want) and other.nbytes() == cache.nbytes()


def test_a_file_that_does_not_fit_is_refused(models: dict[str, Any], tmp_path: Path) -> None:
    model, path = models["dense"], tmp_path / "kept.safetensors"
    cache = IsoQuantCache(3)
    with torch.no_grad():
        model(**tokens(1, 10), **{NAME: cache})
    cache.save(path)
    for other in (PlanarQuantCache(3), IsoQuantCache(4), IsoQuantCache(3, recent=1)):
        with pytest.raises(ModelError, match="of another kind"):
            other.load(path)
    with pytest.raises(ModelError, match="other layers"):
        IsoQuantCache(3, config=models["windows"].config).load(path)
    with pytest.raises(ModelError, match="no saved cache"):
        IsoQuantCache(3).load(tmp_path / "none")


@pytest.fixture
def saved_hybrid(models: dict[str, Any], tmp_path: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A cache, and what it has written: head and tensors."""
    cache, path = IsoQuantCache(3, config=models["hybrid"].config), tmp_path / "kept.safetensors"
    with torch.no_grad():
        models["hybrid"](**tokens(1, 20), **{NAME: cache})
    cache.save(path)
    with safetensors.safe_open(path, "pt") as file:
        head = json.loads(file.metadata()["ggufrq.cache"])
        return cache, head, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


DAMAGES: dict[str, tuple[str, Callable[[Any, Any], Any]]] = {
    "a tensor is missing": ("'1.k.blocks' is missing", lambda head, all_: all_.pop("1.k.blocks")),
    "one too many": ("of no layer: 7.x", lambda head, all_: all_.update({"7.x": torch.zeros(1)})),
    "fewer cells": (
        "blocks of V of layer 1 are",
        lambda head, all_: all_.update({"1.v.blocks": all_["1.v.blocks"][:, :, 1:].clone()}),
    ),
    "another type": (
        "recent of K of layer 1 are",
        lambda head, all_: all_.update({"1.k.recent": all_["1.k.recent"].float()}),
    ),
    "another shape": (
        "damaged",
        lambda head, all_: all_.update({"1.k.first": all_["1.k.first"][0].clone()}),
    ),
    "another length": ("blocks of K", lambda head, all_: head["layers"][1].update(length=21)),
    "no length": ("holds tokens 0 to None", lambda head, all_: head["layers"][1].update(length=None)),
    "rows that begin nowhere": (
        "begin nowhere",
        lambda head, all_: all_.update({"1.starts": torch.tensor([99])}),
    ),
    "layers of no kind": ("'kind' is missing", lambda head, all_: head["layers"][1].pop("kind")),
    "no layers": ("'layers' is missing", lambda head, all_: head.pop("layers")),
    "no settings": ("none that is known", lambda head, all_: head.update(settings=None)),
    "another version": ("of version 1", lambda head, all_: head.update(version=7)),
    "another model": (
        "another model: hidden_size=65, and this one is hidden_size=64",
        lambda head, all_: head["model"].update(hidden_size=65),
    ),
    "no states": ("damaged", lambda head, all_: head["layers"][0].update(states="two")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused_and_nothing_is_loaded(
    saved_hybrid: tuple[Any, dict[str, Any], dict[str, Any]],
    models: dict[str, Any],
    damage: str,
    tmp_path: Path,
) -> None:
    cache, head, held = saved_hybrid
    says, change = DAMAGES[damage]
    change(head, held)
    path = tmp_path / "damaged.safetensors"
    safetensors.torch.save_file(held, path, {"ggufrq.cache": json.dumps(head)})
    before = [x.clone() for x in cache.tensors()]
    for other in (cache, IsoQuantCache(3, config=models["hybrid"].config)):
        with pytest.raises(ModelError, match=re.escape(says)) as error:
            other.load(path)
        assert "\n" not in error.value.message
    assert all(torch.equal(x, y) for x, y in zip(cache.tensors(), before, strict=True))
    assert other.get_seq_length() == 0


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda data: data[:-9], "damaged"),
        (lambda data: data[:5], "damaged"),
        (lambda data: b"", "damaged"),
        (lambda data: data.replace(b"ggufrq.cache", b"ggufrq.other"), "no saved cache of version 1"),
        (lambda data: data.replace(b'{\\"version\\"', b'[\\"version\\"'), "damaged"),
    ],
)
def test_a_file_that_is_none_is_refused(
    models: dict[str, Any], change: Callable[[bytes], bytes], says: str, tmp_path: Path
) -> None:
    cache, path = IsoQuantCache(3), tmp_path / "kept.safetensors"
    with torch.no_grad():
        models["dense"](**tokens(1, 10), **{NAME: cache})
    cache.save(path)
    assert change(path.read_bytes()) != path.read_bytes()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ModelError, match=says):
        cache.load(path)
    assert cache.get_seq_length() == 10


def test_a_cache_of_another_model_is_refused_at_its_first_token(models: dict[str, Any]) -> None:
    cache = IsoQuantCache(3)
    with torch.no_grad():
        models["dense"](**tokens(1, 10), **{NAME: cache})
    for rows in (torch.zeros(1, 3, 1, 64), torch.zeros(2, 2, 1, 64), torch.zeros(1, 2, 1, 128)):
        with pytest.raises(ModelError, match="holds 1 × 2 heads of 64 values for each token, and"):
            cache.update(rows, rows, 0)
    assert cache.get_seq_length() == 10


@pytest.mark.parametrize("name", MODELS)
def test_a_fixed_size_changes_nothing(models: dict[str, Any], name: str, tmp_path: Path) -> None:
    """Of what is generated, with padding, by beams, and behind what was saved by either kind of cache."""
    model, inputs = models[name], tokens(2, 21, padded=6)
    for options in ({}, {"num_beams": 3}):
        want = generate(model, inputs, transformers.DynamicCache(config=model.config), **options)
        cache = IsoQuantCache(4, recent=ALL, config=model.config, max_cache_len=40)
        assert cache.is_compileable
        assert torch.equal(generate(model, inputs, cache, **options), want)
        assert int(cache.get_seq_length()) == 28
    made = {size: IsoQuantCache(3, recent=5, config=model.config, max_cache_len=size) for size in (None, 40)}
    more, out = tokens(2, 3)["input_ids"], []
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], dim=1)
    with torch.no_grad():
        for size, cache in made.items():
            model(**inputs, **{NAME: cache})
            cache.save(tmp_path / f"{size}.safetensors")
        for size, other in ((None, None), (40, 40), (None, 40), (40, None)):
            cache = IsoQuantCache(3, recent=5, config=model.config, max_cache_len=size)
            cache.load(tmp_path / f"{other}.safetensors")
            out.append(model(more, attention_mask=mask, **{NAME: cache}).logits)
    assert all(torch.allclose(x, out[0], atol=1e-3 * float(out[0].abs().mean())) for x in out)
    small = IsoQuantCache(3, recent=5, config=model.config, max_cache_len=20)
    with pytest.raises(ModelError, match="21 tokens were saved, and this cache has room for 20"):
        small.load(tmp_path / "40.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_compiled_whole(models: dict[str, Any], name: str) -> None:
    """In one graph, without a break, which the steps of generation then share."""
    model, inputs = models[name], tokens(2, 12, padded=3)
    cache = IsoQuantCache(3, recent=4, config=model.config, max_cache_len=24)
    want = generate(model, inputs, cache, disable_compile=True)
    graphs: list[Any] = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    cache.reset()
    config = transformers.CompileConfig(fullgraph=True, backend=backend, mode=None)
    config._compile_all_devices = True
    try:
        assert torch.equal(generate(model, inputs, cache, compile_config=config), want)
    finally:
        torch.compiler.reset()
        model.__dict__.pop("_compiled_call", None)
    assert len(graphs) == 1


def some_profile(layers: int, heads: int, dim: int) -> Profile:
    """Any symmetric maps and their inverses, and a mean."""
    rng = np.random.default_rng(1)
    made = {}
    for il in range(layers):
        a = rng.standard_normal((heads, dim, dim))
        k_map = a @ a.transpose(0, 2, 1) / dim + np.eye(dim)
        q_map = np.linalg.inv(k_map)
        mean = rng.standard_normal((heads, dim)).astype(np.float32)
        parts = ((x + x.transpose(0, 2, 1)) / 2 for x in (k_map, q_map))
        made[il] = LayerProfile(*(x.astype(np.float32) for x in parts), mean)
    return Profile("0" * 16, "weights", 512, made)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_profile_changes_only_what_is_lost(
    models: dict[str, Any], name: str, implementation: str, tmp_path: Path
) -> None:
    model, inputs = models[name], tokens(2, 30, padded=3)
    seen = inputs["attention_mask"].bool()
    some_profile(2, 2, 64).write(tmp_path / "some-kv.gguf")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        want = model(**inputs).logits[seen]
        for bits, recent, most in ((4, ALL, 0.01), (4, 0, 0.5)):
            cache = IsoQuantCache(bits, recent=recent, profile=tmp_path / "some-kv.gguf", config=model.config)
            got = model(**inputs, **{NAME: cache}).logits[seen]
            assert (got - want).abs().mean() < most * want.abs().mean()
    model.set_attn_implementation("sdpa")


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda config: IsoQuantCache(6), "no code of 6 bits"),
        (lambda config: IsoQuantCache(3, 16), "no code of 16 bits"),
        (lambda config: IsoQuantCache(recent=-1), "at least 0"),
        (lambda config: IsoQuantCache(max_cache_len=64), "takes the model's configuration"),
        (lambda config: IsoQuantCache(config=config, max_cache_len=0), "at least 1"),
        (lambda config: IsoQuantCache(profile="weights"), "takes the model's configuration"),
        (lambda config: IsoQuantCache(profile="weights", config=config), "does not say where"),
        (lambda config: IsoQuantCache(profile="none.gguf", config=config), "none.gguf"),
        (lambda config: IsoQuantCache(profile="weights", config=transformers.BloomConfig()), "which order"),
        (lambda config: IsoQuantCache(config=transformers.FalconH1Config()), "hybrid"),
    ],
)
def test_what_makes_no_sense_is_refused(make: Any, says: str) -> None:
    with pytest.raises((UsageError, ModelError), match=re.escape(says)):
        make(MODELS["dense"]())


def test_a_profile_is_of_the_commit_that_the_model_was_loaded_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the branch is at by now."""
    asked = []

    def find(model: Any, revision: str | None, options: Any) -> Any:
        asked.append((model.repo, revision))
        raise ModelError("that is enough")

    monkeypatch.setattr("ggufrq.models.as_gguf.find", find)
    config = MODELS["dense"]()
    config.name_or_path = "some/model"
    for commit in (None, 40 * "c"):
        config._commit_hash = commit
        with pytest.raises(ModelError, match="that is enough"):
            IsoQuantCache(profile="weights", config=config)
    assert asked == [("some/model", None), ("some/model", 40 * "c")]


def test_heads_that_no_block_fills_are_refused() -> None:
    with pytest.raises(ModelError, match="heads of 80 values"):
        IsoQuantCache().update(torch.zeros(1, 1, 3, 80), torch.zeros(1, 1, 3, 80), 0)
    profile, config = some_profile(2, 3, 64), MODELS["dense"]()
    with pytest.raises(ModelError, match="3 heads of 64"):
        cache = IsoQuantCache(profile=profile, config=config)
        cache.update(torch.zeros(1, 2, 3, 64), torch.zeros(1, 2, 3, 64), 0)
