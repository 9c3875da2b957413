"""Attention by tiles over blocks against attention over what they decode to."""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import ggufrq.hf.attention as hf_attention  # noqa: E402
import ggufrq.hf.blocks as hf_blocks  # noqa: E402
from ggufrq.hf.layer import QuantizedAttentionLayer  # noqa: E402
from ggufrq.hf.side import Settings  # noqa: E402

BATCH, HEADS, KV_HEADS, DIM, V_DIM = 2, 4, 2, 128, 64
SCALE = 0.2


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a short text has several of all."""
    monkeypatch.setattr(hf_blocks, "CHUNK", 8)
    monkeypatch.setattr(hf_attention, "TILE", 16)
    monkeypatch.setattr(hf_attention, "QUERIES", 5)
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


def test_capped_scores_sinks_and_a_mask_for_each_head() -> None:
    q, k, v = rows(17)
    made, sinks = layer(recent=2), torch.randn(HEADS)
    key, _ = made.update(k, v)
    seen = causal(17, 17)
    mask = seen[:, None].expand(-1, HEADS, -1, -1)
    got = hf_attention.attend(q, key.kept, mask, SCALE, softcap=2.0, sinks=sinks)
    want = expected(made, q, k, v, seen, [0, 0], softcap=2.0, sinks=sinks)
    assert torch.allclose(got, want, atol=1e-3)


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
    assert torch.equal(key.transpose(2, 3), key.dense().transpose(2, 3))
