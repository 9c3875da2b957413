"""The kernels in Triton, by its interpreter; and compiled for cards, of which none is needed.

Triton is not among what `make setup` installs: `pip install triton`, else all of it is skipped. The
interpreter is chosen by a variable when Triton is imported, so that its tests are run by one that has a
process for them.
"""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hard_rows import hard

from ggufrq.base.errors import UsageError
from ggufrq.codec import quantize
from ggufrq.codec.tables import code

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("triton")

import ggufrq.hf.attention as hf_attention  # noqa: E402
import ggufrq.hf.blocks as hf_blocks  # noqa: E402
from ggufrq.hf import IsoQuantCache, kernels  # noqa: E402
from ggufrq.hf.codec import TritonCodec  # noqa: E402
from ggufrq.hf.layer import QuantizedAttentionLayer  # noqa: E402
from ggufrq.hf.side import Settings  # noqa: E402

#: Ampere to consumer Blackwell.
CARDS = (80, 86, 89, 90, 100, 120)
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ggufrq.codec.tables import code
from ggufrq.hf import kernels

def compiled(kernel, types, constants):
    names = [name for name in kernel.arg_names if name not in constants]
    signature = dict(zip(names, types, strict=True)) | {name: "constexpr" for name in constants}
    for card in map(int, sys.argv[1:]):
        made = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", card, 32))
        print(card, len(made.asm["cubin"]))

for bits in (2, 3, 4, 5):
    one, other = code(bits, 128), code(bits, 64)
    compiled(kernels.encode_kernel, ("*fp32", "*u8", "*i32", "i32"), kernels.encode_constants(one))
    for made, dim, group in ((one, 128, 4), (other, 192, 1)):
        size = dim // made.block * made.bytes
        constants = kernels.attend_constants(group, dim, ((256, size), (256, size)), made, made)
        types = ("*fp32", "*i64", "*i64", "*u8", *5 * ("*fp32",), *3 * ("i32",), *2 * ("fp32",))
        compiled(kernels.attend_kernel, types, constants | {"CAPPED": group == 1})
"""


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
by_interpreter = pytest.mark.skipif(not INTERPRETED, reason="run by test_by_the_interpreter")
outside = pytest.mark.skipif(INTERPRETED, reason="it is the interpreter")


def run(*command: str, **env: str) -> str:
    """What a command of this Python says."""
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *command], env={**clean, **env}, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


@outside
@pytest.mark.slow
def test_by_the_interpreter() -> None:
    options = ("-q", "-p", "no:cacheprovider")
    assert "15 passed" in run("-m", "pytest", *options, __file__, TRITON_INTERPRET="1")


@by_interpreter
@pytest.mark.parametrize("bits", [2, 3, 4, 5])
@pytest.mark.parametrize("block", [128, 64])
def test_byte_for_byte(bits: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "BLOCKS", 2048)  # the interpreter has few steps then
    x = hard(block)
    found = TritonCodec(code(bits, block)).encode(torch.from_numpy(x)).numpy()
    assert np.array_equal(found, quantize(x, bits, block=block))


@by_interpreter
@pytest.mark.parametrize("bits", [(2, 3), (5, 4), (4, 2)])
@pytest.mark.parametrize(("dims", "softcap"), [((128, 64), None), ((192, 128), 2.0)])
def test_attention_of_a_query_is_that_of_torch(
    bits: tuple[int, int], dims: tuple[int, int], softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hf_blocks, "CHUNK", 16)
    monkeypatch.setattr(kernels, "CHUNKS", 1)
    layers = [
        QuantizedAttentionLayer(Settings("iso", *bits, 3, 1), triton=triton) for triton in (False, True)
    ]
    for n, mask in ((22, None), (1, None), (1, torch.rand(2, 1, 1, 24) > 0.3)):
        q, k, v = (torch.randn(2, heads, n, dim) for heads, dim in ((6, dims[0]), (2, dims[0]), (2, dims[1])))
        out = [hf_attention.attend(q, one.update(k, v)[0].kept, mask, 0.1, softcap=softcap) for one in layers]
        assert torch.allclose(*out, atol=1e-5)


@by_interpreter
def test_a_cache_by_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[Any] = []
    attend = kernels.attend
    monkeypatch.setattr(kernels, "attend", lambda *given: used.append(given) or attend(*given))
    cache = IsoQuantCache(3, triton=True)
    rows = torch.randn(1, 2, 5, 128)
    key, _ = cache.update(rows, rows, 0)
    plain = IsoQuantCache(3)
    plain.update(rows, rows, 0)
    blocks = [one.layers[0].sides[0].blocks.chunks[0][:, :, :5] for one in (cache, plain)]
    assert torch.equal(*blocks)
    hf_attention.attend(rows[:, :, :1], key.kept, None, 1.0)
    assert len(used) == 1
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(UsageError, match="is for CUDA, and the model is on cpu"):
        IsoQuantCache(3, triton=True).update(rows, rows, 0)


@outside
@pytest.mark.thorough
def test_the_kernels_compile_for_cards() -> None:
    cards = [str(card) for card in CARDS]
    assert len(run("-c", COMPILE, *cards).split()) == 2 * 12 * len(cards)
