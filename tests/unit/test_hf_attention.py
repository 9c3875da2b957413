"""Attention by tiles over blocks against attention over what they decode to."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from ggufrq.base.errors import UsageError

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import ggufrq.hf.attention as hf_attention  # noqa: E402
import ggufrq.hf.blocks as hf_blocks  # noqa: E402
import ggufrq.hf.fixed as hf_fixed  # noqa: E402
from ggufrq.hf.fixed import FixedAttentionLayer  # noqa: E402
from ggufrq.hf.layer import QuantizedAttentionLayer  # noqa: E402
from ggufrq.hf.side import Settings  # noqa: E402
from ggufrq.profile import LayerProfile  # noqa: E402

BATCH, HEADS, KV_HEADS, DIM, V_DIM = 2, 4, 2, 128, 64
SCALE = 0.2


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short text has several of all."""
    monkeypatch.setattr(hf_blocks, "CHUNK", 8)
    monkeypatch.setattr(hf_attention, "TILE", 16)
    monkeypatch.setattr(hf_attention, "QUERIES", 5)
    monkeypatch.setattr(hf_fixed, "TILE", 16)
    monkeypatch.setattr(hf_fixed, "QUERIES", 5)
    torch.manual_seed(1)


def rows(cells: int) -> tuple[Any, Any, Any]:
    """Queries, K and V; a shift that all keys share, as in models."""
    q = torch.randn(BATCH, HEADS, cells, DIM)
    return q, torch.randn(BATCH, KV_HEADS, cells, DIM) + 1, torch.randn(BATCH, KV_HEADS, cells, V_DIM)


def layer(bits: int = 3, recent: int = 0, first: int = 0, window: int | None = None) -> Any:
    return QuantizedAttentionLayer(Settings("iso", bits, bits, recent, first), window=window)


def decoded(x: Any, side: Any) -> Any:
    """What is left of rows behind the code: from the blocks that are held, and those are right."""
    out = side.basis.restore(side.codec.decode(side.codec.encode(side.basis.store(x))))
    for first, blocks in side.blocks.tiles(8):
        held = side.basis.restore(side.codec.decode(blocks))
        part = slice(first, first + held.shape[2])
        assert (
            held - out[:, :, part]
        ).abs().mean() < 1e-3  # a value on the edge falls to one side or the other
        out[:, :, part] = held
    return out


def as_they_were(x: Any, side: Any) -> Any:
    return side.basis.restore(side.exact(x).float())


def expected(
    made: Any, q: Any, k: Any, v: Any, seen: Any, starts: list[int], softcap: float = 0.0, sinks: Any = None
) -> Any:
    """Newest and first tokens of each query as they were, all others from the code."""
    s, cells = made.settings, torch.arange(k.shape[2])
    behind = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - cells
    after = cells - torch.tensor(starts)[:, None]
    first = (after >= 0) & (after < s.first)
    exact = ((behind >= 0) & (behind < s.recent))[None] | first[:, None]
    both = []
    for rows, side in zip((k, v), made.sides, strict=True):
        each = (as_they_were(rows, side), decoded(rows, side))
        both.append([x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in each])
    (k_was, k_code), (v_was, v_code) = both
    exact = exact[:, None]
    scores = torch.where(exact, q @ k_was.mT, q @ k_code.mT) * SCALE
    scores = torch.tanh(scores / softcap) * softcap if softcap else scores
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks[:, None, None].expand(BATCH, -1, q.shape[2], 1)], dim=3)
    weights = scores.softmax(-1).nan_to_num(0)[..., : len(cells)]
    return weights * exact @ v_was + weights * ~exact @ v_code


def causal(queries: int, cells: int, window: int = 1 << 20) -> Any:
    at = torch.arange(cells) - torch.arange(cells - queries, cells)[:, None]
    return ((at <= 0) & (at > -window)).expand(BATCH, -1, -1)


@pytest.mark.parametrize(("recent", "first"), [(0, 0), (4, 0), (0, 2), (6, 3), (100, 1)])
@pytest.mark.parametrize("sizes", [[21], [9, 1, 1, 12], [30, 1]])
def test_each_query_sees_its_own_newest_and_the_first(recent: int, first: int, sizes: list[int]) -> None:
    q, k, v = rows(sum(sizes))
    made, done = layer(recent=recent, first=first), 0
    for n in sizes:
        part = slice(done, done + n)
        key, _ = made.update(k[:, :, part], v[:, :, part])
        mask = None if done == 0 or n == 1 else causal(n, done + n)[:, None]
        got = hf_attention.attend(q[:, :, part], key.kept, mask, SCALE)
        done += n
        want = expected(made, q[:, :, part], k[:, :, :done], v[:, :, :done], causal(n, done), [0, 0])
        assert torch.allclose(got, want, atol=1e-3)


@pytest.mark.parametrize("additive", [False, True])
def test_padding_on_the_left(additive: bool) -> None:
    """The first tokens are those behind the padding, also where that ends in a later part of a prompt."""
    q, k, v = rows(24)
    starts, made, done = [0, 13], layer(recent=3, first=2), 0
    for n in (10, 13, 1):
        part = slice(done, done + n)
        key, _ = made.update(k[:, :, part], v[:, :, part])
        done += n
        seen = causal(n, done) & (torch.arange(done) >= torch.tensor(starts)[:, None, None])
        mask = torch.where(seen, 0.0, torch.finfo(torch.float32).min) if additive else seen
        got = hf_attention.attend(q[:, :, part], key.kept, mask[:, None], SCALE)
        want = expected(made, q[:, :, part], k[:, :, :done], v[:, :, :done], seen, starts)
        assert torch.allclose(got, want, atol=1e-3)


def test_a_window_is_seen_and_no_more_is_held() -> None:
    q, k, v = rows(60)
    made, done = layer(recent=3, first=1, window=12), 0
    for n in (20, *[1] * 15, 25):
        part = slice(done, done + n)
        cells, offset = made.get_mask_sizes(n)
        key, _ = made.update(k[:, :, part], v[:, :, part])
        done += n
        assert (cells, offset + cells) == (key.shape[2], done)
        seen = causal(n, done, 12)
        got = hf_attention.attend(q[:, :, part], key.kept, seen[:, None, :, offset:], SCALE)
        want = expected(made, q[:, :, part], k[:, :, :done], v[:, :, :done], seen, [0, 0])
        assert torch.allclose(got, want, atol=1e-3)
        assert len(made.sides[0].blocks.chunks) <= 12 // 8 + 2


@pytest.mark.parametrize("profile", [False, True])
def test_capped_scores_sinks_and_a_mask_for_each_head(profile: bool) -> None:
    q, k, v = rows(17)
    made, sinks = layer(recent=2), torch.randn(HEADS)
    if profile:  # a mean shifts all scores of a query, which a cap and sinks do not pass over
        same = np.tile(np.eye(DIM, dtype=np.float32), (KV_HEADS, 1, 1))
        made.profile = LayerProfile(same, same, np.ones((KV_HEADS, DIM), np.float32))
    key, _ = made.update(k, v)
    seen = causal(17, 17)
    mask = seen[:, None].expand(-1, HEADS, -1, -1)
    got = hf_attention.attend(q, key.kept, mask, SCALE, softcap=2.0, sinks=sinks)
    want = expected(made, q, k, v, seen, [0, 0], softcap=2.0, sinks=sinks)
    assert torch.allclose(got, want, atol=1e-3)


def test_where_rows_begin_is_learnt_anew_behind_a_crop_below() -> None:
    """What was behind the padding is taken back, and other tokens begin earlier."""
    q, k, v = rows(24)
    made, done = layer(first=2), 0
    for n, begins in ((20, 13), (14, 10)):  # cells 0 to 19, then 10 to 23 instead
        part = slice(done, done + n)
        key, _ = made.update(k[:, :, part], v[:, :, part])
        done += n
        seen = causal(n, done) & (torch.arange(done) >= torch.tensor([0, begins])[:, None, None])
        got = hf_attention.attend(q[:, :, part], key.kept, seen[:, None], SCALE)
        want = expected(made, q[:, :, part], k[:, :, :done], v[:, :, :done], seen, [0, begins])
        assert torch.allclose(got, want, atol=1e-3)
        if begins == 13:
            made.crop(-10)
            done = 10


SIZE = 40


def fixed(recent: int = 0, first: int = 0, window: int | None = None) -> Any:
    return FixedAttentionLayer(Settings("iso", 3, 3, recent, first), None, window, SIZE)


def both(made: tuple[Any, Any], part: tuple[Any, Any, Any], seen: Any, additive: bool = False) -> Any:
    """Attention of some new tokens over a layer that grows and over one of a fixed size."""
    (q, k, v), out = part, []
    for one in made:
        cells, offset = one.get_mask_sizes(k.shape[2])
        key, _ = one.update(k, v)
        mask = None
        if seen is not None:
            wide = torch.nn.functional.pad(seen, (0, SIZE - seen.shape[2]))
            mask = wide[:, None, :, offset : offset + cells]
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min) if additive else mask
        options = {"softcap": 2.0, "sinks": torch.linspace(-1, 1, HEADS)} if additive else {}
        if one is made[0]:
            out.append(hf_attention.attend(q, key.kept, mask, SCALE, **options))
        else:
            out.append(key.moment.attend(q, mask, SCALE, **options))
    return out


@pytest.mark.parametrize(("recent", "first"), [(0, 0), (4, 0), (0, 2), (6, 3), (100, 1)])
@pytest.mark.parametrize("padded", [None, False, True])
def test_a_layer_of_a_fixed_size_gives_the_same(recent: int, first: int, padded: bool | None) -> None:
    """Over parts of a text, tokens taken back and others, and changes of the batch; ``padded`` None is
    without mask."""
    made, done = (layer(recent=recent, first=first), fixed(recent, first)), 0
    for n, gone in ((9, 0), (1, 0), (12, 7), (1, 0), (6, 1), (1, 0)):
        part = rows(n)
        seen = None
        if padded is not None:
            starts = torch.tensor([0, 11 if padded else 0])[:, None, None]
            seen = causal(n, done + n) & (torch.arange(done + n) >= starts)
        one, other = both(made, part, seen, additive=bool(padded))
        assert torch.allclose(one, other, atol=1e-3)
        done += n
        blocks = torch.cat([tile for _, tile in made[0].sides[0].blocks.tiles(8)], dim=2)
        same = made[1].sides[0].blocks[:, :, :done] == blocks
        assert same.float().mean() > 0.999  # a value on the edge falls to one side or the other
        if gone:
            for one in made:
                one.crop(-gone)
            done -= gone
        for one in made:
            one.batch_repeat_interleave(2)
            one.reorder_cache(torch.tensor([3, 2, 1, 0]))
            one.batch_select_indices(torch.tensor([0, 3]))
        assert int(made[1].get_seq_length()) == made[0].get_seq_length() == done
    key, other = (one.update(*part[1:])[0] for one in made)
    assert key.shape[2] == done + 1 and other.shape[2] == SIZE
    assert torch.allclose(other.dense()[:, :, : done + 1], key.dense(), atol=1e-3)


def test_a_window_in_a_layer_of_a_fixed_size() -> None:
    made, done = (layer(recent=3, first=1, window=12), fixed(3, 1, 12)), 0
    for n in (20, 1, 1, 12):
        seen = causal(n, done + n, 12)
        one, other = both(made, rows(n), seen)
        assert torch.allclose(one, other, atol=1e-3)
        done += n


def test_no_more_than_there_is_room_for() -> None:
    made = fixed(4, 1)
    _, k, v = rows(SIZE - 1)
    made.update(k, v)
    with pytest.raises(UsageError, match=f"room for {SIZE} tokens, and {SIZE - 1} [+] 2 come"):
        made.update(k[:, :, :2], v[:, :, :2])


@pytest.mark.thorough
def test_compiled_and_not_the_blocks_are_the_same() -> None:
    """The compiler fuses what stands around them, and leaves out roundings to 16 bits where it may."""

    def step(made: Any, q: Any, k: Any, v: Any, mask: Any) -> Any:
        key, _ = made.update(k * 1.5, v * 1.5)
        return made, key.moment.attend(q, mask, SCALE)

    compiled = torch.compile(step, fullgraph=True)
    plain, other = fixed(5, 2), fixed(5, 2)
    other.lazy_initialization(*(x[:, :, :0] for x in rows(1)[1:]))  # tables of ours are not for a compiler
    for n in (9, 1, 1):
        q, k, v = rows(n)
        done = int(plain.get_seq_length()) + n
        mask = torch.nn.functional.pad(causal(n, done), (0, SIZE - done))[:, None]
        _, want = step(plain, q, k, v, mask)
        with warnings.catch_warnings():  # torch's own compiler has some
            warnings.simplefilter("ignore")
            _, got = compiled(other, q, k, v, mask)
        assert torch.allclose(got, want, atol=1e-5)
    for one, two in zip((*plain.tensors(), plain.rows), (*other.tensors(), other.rows), strict=True):
        assert torch.equal(one, two)


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes, in values."""

    values = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.values = max(self.values, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_nothing_as_large_as_dense_k_is_made() -> None:
    """Neither while a text is read, nor when the next token looks at it."""
    cells = 160
    made = layer(recent=4, first=1)
    for n in (*[20] * (cells // 20), 1):
        q, k, v = rows(n)
        with Largest() as largest:
            key, _ = made.update(k, v)
            hf_attention.attend(q, key.kept, causal(n, made.length)[:, None] if n > 1 else None, SCALE)
    assert largest.values < BATCH * KV_HEADS * cells * DIM / 2
    with Largest() as largest:
        key.dense()
    assert largest.values >= BATCH * KV_HEADS * cells * DIM


def test_whoever_takes_it_for_a_tensor_gets_a_dense_one() -> None:
    q, k, v = rows(20)
    made = layer(recent=5, first=2)
    key, value = made.update(k, v)
    assert (key.shape, value.shape) == (k.shape, v.shape)
    assert (key.dtype, key.device) == (k.dtype, k.device)
    for got, x, side in ((key.dense(), k, made.sides[0]), (value.dense(), v, made.sides[1])):
        assert torch.allclose(got[:, :, 2:15], decoded(x, side)[:, :, 2:15], atol=1e-5)
        exact = [0, 1, *range(15, 20)]
        assert torch.allclose(got[:, :, exact], x[:, :, exact], atol=5e-3)
    one = q[:, :, -1:]
    got = torch.nn.functional.scaled_dot_product_attention(one, key, value, scale=SCALE, enable_gqa=True)
    assert torch.allclose(got, hf_attention.attend(one, key.kept, None, SCALE), atol=1e-3)
    assert torch.equal(key[:, :, 3:5], key.dense()[:, :, 3:5])
    assert torch.equal(torch.cat([key, k], dim=2), torch.cat([key.dense(), k], dim=2))
    assert torch.equal(key.transpose(2, 3), key.dense().transpose(2, 3))
