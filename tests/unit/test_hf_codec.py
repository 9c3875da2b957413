"""The codes in torch against the numpy reference, byte for byte."""

from __future__ import annotations

import numpy as np
import pytest
from hard_rows import hard

from ggufrq.codec import cache_types, dequantize, quantize, rotate
from ggufrq.codec.tables import code

torch = pytest.importorskip("torch")

import ggufrq.hf.codec as hf_codec  # noqa: E402
from ggufrq.hf import IsoQuantCache, PlanarQuantCache, QuantizedCache, RotorQuantCache  # noqa: E402

CLASSES: dict[str, type[QuantizedCache]] = {
    "planar": PlanarQuantCache,
    "iso": IsoQuantCache,
    "rotor": RotorQuantCache,
}


@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("block", [128, 64])
def test_byte_for_byte(bits: int, block: int) -> None:
    x = hard(block)
    blocks, codec = quantize(x, bits, block=block), hf_codec.TorchCodec(code(bits, block))
    assert np.array_equal(codec.encode(torch.from_numpy(x)).numpy(), blocks)
    decoded = codec.decode(torch.from_numpy(blocks)).numpy()
    assert np.array_equal(decoded.view(np.uint32), dequantize(blocks, bits, block=block).view(np.uint32))


@pytest.mark.parametrize("name", [t.name for t in cache_types()])
@pytest.mark.parametrize("dims", [(128, 128), (64, 64), (192, 128), (320, 256)])
def test_a_layer_holds_the_blocks_of_the_type(name: str, dims: tuple[int, int]) -> None:
    found = next(t for t in cache_types() if t.name == name)
    rng = np.random.default_rng(1)
    k, v = (rng.standard_normal((2, 3, 5, dim)).astype(np.float32) for dim in dims)
    cache = CLASSES[found.family](found.bits)
    cache.update(torch.from_numpy(k), torch.from_numpy(v), 0)
    for side, x, dim in zip(cache.layers[0].sides, (k, v), dims, strict=True):
        together = next(n for n in (256, 128, 64) if dim % n == 0)
        block = 128 if dim % 128 == 0 else 64
        rotated = side.basis.store(torch.from_numpy(x)).numpy()
        assert np.allclose(rotated, rotate(x, found.family, "full", together), atol=1e-5)
        ((_, held),) = side.blocks.tiles(64)
        assert np.array_equal(held.numpy(), quantize(rotated, found.bits, block=block))


def test_without_a_build_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_codec, "_libraries", lambda: None)
    hf_codec.codec.cache_clear()
    assert isinstance(hf_codec.codec(3, 128, torch.device("cpu")), hf_codec.TorchCodec)
    hf_codec.codec.cache_clear()
