"""The codes on tensors: by C of our build where there is one and the tensor is on the CPU, else by torch. The
numpy reference (``ggufrq.codec.quant``) is the specification; both give its bytes."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from typing import Protocol

import torch

from ggufrq.base.errors import GgufrqError
from ggufrq.build.builds import usable_build
from ggufrq.build.ggml_library import CpuTraits, Traits, library
from ggufrq.codec.pack import low_plane
from ggufrq.codec.quant import BITS_INF, BITS_MAX, BITS_MIN, LARGEST_FP16
from ggufrq.codec.tables import Code, cache_types, code, head_block, siblings

#: Values that are encoded or decoded at a time by torch, which takes some ten times their size meanwhile.
_SLAB = 1 << 20

_Row = Callable[[int, int, int], object]


class Codec(Protocol):
    """Encodes and decodes contiguous rows of whole blocks."""

    code: Code

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """float32 [..., values] to blocks, uint8 [..., bytes]."""

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """Blocks, uint8 [..., bytes], to float32 [..., values]."""


@cache
def codec(bits: int, head_dim: int, device: torch.device, triton: bool = False) -> Codec:
    """The codec for heads of ``head_dim`` values, a multiple of 64, on this device; ``triton`` for that of
    ``ggufrq.hf.kernels``."""
    made = code(bits, head_block(head_dim))
    if triton:
        return TritonCodec(made)
    native = _native(made) if device.type == "cpu" and "LLAMA_RQ_SCALE" not in os.environ else None
    return native or TorchCodec(made)


class TorchCodec:
    """A code by operations of torch, on any device."""

    def __init__(self, made: Code) -> None:
        self.code = made

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Codec``. Any bit pattern is allowed."""
        c = self.code
        rows = x.reshape(-1, c.block)
        parts = [self._encode(part) for part in rows.split(_SLAB // c.block)]
        return torch.cat(parts).reshape(*x.shape[:-1], x.shape[-1] // c.block * c.bytes)

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """See ``Codec``."""
        c = self.code
        rows = blocks.reshape(-1, c.bytes)
        step = rows[:, :2].contiguous().view(torch.float16).float() * (1 / 128)
        centroids = torch.tensor(c.centroids, dtype=torch.float32, device=blocks.device)
        values = centroids[self._unpack(rows[:, 2:]).int()] * step
        return values.reshape(*blocks.shape[:-1], blocks.shape[-1] // c.bytes * c.block)

    def _encode(self, x: torch.Tensor) -> torch.Tensor:
        """Blocks of x [n, block], by the steps of ``quant._encode`` and in its units."""
        c = self.code
        word = x.contiguous().view(torch.int32)
        magnitude = word & 0x7FFFFFFF
        nan = magnitude > BITS_INF
        magnitude = magnitude.clamp(max=BITS_MAX).masked_fill(nan, 0)
        negative = (word < 0) & ~nan
        largest = magnitude.amax(1, keepdim=True)
        zero = largest < BITS_MIN
        e = ((largest >> 23) - 127).masked_fill(zero, 0)
        a = (magnitude.view(torch.float32) * _power(14 - e)).int()

        s = self._least_squares(a)
        d = _stored(s, e)
        s = (d.float() * _power(18 - e)).long()
        zero |= s == 0
        level, m = self._levels(a, s)
        wide = a.long()
        d = _stored(((wide * wide).sum(1, keepdim=True) << 11) // _dot(a, m).clamp(min=1), e)
        zero |= d == 0
        index = level + len(c.magnitudes)
        index = torch.where(negative, ~index, index) & (2**c.bits - 1)
        scale = d.masked_fill(zero, 0).view(torch.uint8)
        return torch.cat([scale, self._pack(index.masked_fill(zero, 0).to(torch.uint8))], dim=1)

    def _levels(self, a: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Levels and centroids of the magnitudes a [n, block] under the scales s [n, 1]."""
        magnitudes = self.code.magnitudes
        level, m = torch.zeros_like(a), torch.full_like(a, magnitudes[0])
        for i, mid2 in enumerate(self.code.mid2):
            above = (a > (s * mid2 >> 12).clamp(max=32767)).int()
            level += above
            m += above * (magnitudes[i + 1] - magnitudes[i])
        return level, m

    def _fit(self, a: torch.Tensor, s: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The least-squares scale for the levels that scale s gives, and what it takes off the error."""
        _, m = self._levels(a, s)
        num = _dot(a, m)
        s = (num << 11) // _dot(m, m)
        return s, s * num

    def _least_squares(self, a: torch.Tensor) -> torch.Tensor:
        top = a.amax(1, keepdim=True).long()
        s = best = torch.zeros_like(top)
        for start in self.code.starts:
            si, gain = self._fit(a, top * start >> 3)
            s = torch.where(gain > best, si, s)
            best = torch.maximum(best, gain)
        return self._fit(a, s)[0]

    def _pack(self, index: torch.Tensor) -> torch.Tensor:
        """Indices [n, block] as planes of bits, see ``ggufrq.codec.pack``."""
        n, block = index.shape
        low = low_plane(self.code.bits)

        def plane(part: torch.Tensor, width: int) -> torch.Tensor:
            shift = torch.arange(0, 8, width, dtype=torch.uint8, device=index.device)[:, None]
            return (part.view(n, 8 // width, block * width // 8) << shift).sum(1, dtype=torch.uint8)

        planes = [plane(index & (2**low - 1), low)]
        planes += [plane(index >> low, 1)] if self.code.bits > low else []
        return torch.cat(planes, dim=1)

    def _unpack(self, planes: torch.Tensor) -> torch.Tensor:
        """The indices [n, block] in planes [n, bytes]."""
        low = low_plane(self.code.bits)
        end = self.code.block * low // 8

        def indices(part: torch.Tensor, width: int) -> torch.Tensor:
            shift = torch.arange(0, 8, width, dtype=torch.uint8, device=planes.device)[:, None]
            index: torch.Tensor = part[:, None] >> shift & (2**width - 1)
            return index.view(len(planes), self.code.block)

        index = indices(planes[:, :end], low)
        return index | indices(planes[:, end:], 1) << low if self.code.bits > low else index


def _dot(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Sums [n, 1] of products below 2**31 each."""
    return (a * b).sum(1, keepdim=True, dtype=torch.int64)


def _power(e: torch.Tensor) -> torch.Tensor:
    """2**e as float32, exact, for the exponent of a normal number."""
    return (e.int() + 127 << 23).view(torch.float32)


def _stored(s: torch.Tensor, e: torch.Tensor) -> torch.Tensor:
    """The scales [n, 1] as they are stored; e [n, 1] is the exponent of the largest magnitude."""
    return (s.float() * _power(e - 18)).clamp(max=float(LARGEST_FP16)).half()


class TritonCodec(TorchCodec):
    """A code by Triton, as far as it is written; blocks are decoded by torch."""

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Codec``."""
        from ggufrq.hf import kernels  # not everybody has it

        return kernels.encode(x, self.code)


class NativeCodec:
    """A code by our build of ggml, for tensors on the CPU. Its functions take the addresses of what is read
    and of what is written, and how many values there are."""

    def __init__(self, made: Code, encode: _Row, decode: _Row) -> None:
        self.code = made
        self._encode, self._decode = encode, decode

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """See ``Codec``."""
        c = self.code
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], x.shape[-1] // c.block * c.bytes, dtype=torch.uint8)
        self._encode(x.data_ptr(), out.data_ptr(), x.numel())
        return out

    def decode(self, blocks: torch.Tensor) -> torch.Tensor:
        """See ``Codec``."""
        c = self.code
        blocks = blocks.contiguous()
        out = torch.empty(*blocks.shape[:-1], blocks.shape[-1] // c.bytes * c.block, dtype=torch.float32)
        self._decode(blocks.data_ptr(), out.data_ptr(), out.numel())
        return out


def _native(made: Code) -> NativeCodec | None:
    """The codec of our build, None where there is no build."""
    libraries = _libraries()
    if libraries is None:
        return None
    base, cpu = libraries
    number = next(t.id for t in (*cache_types(), *siblings()) if (t.bits, t.block) == (made.bits, made.block))
    encode = cpu.ggml_get_type_traits_cpu(number).contents.from_float
    return NativeCodec(made, encode, base.ggml_get_type_traits(number).contents.to_float)


@cache
def _libraries() -> tuple[ctypes.CDLL, ctypes.CDLL] | None:
    """ggml's libraries of the current build, if there is one: types, and the CPU's functions for them."""
    try:
        found = usable_build()
        if found is None:
            return None
        base, cpu = library(found.bin, "ggml-base"), library(found.bin, "ggml-cpu")
    except (GgufrqError, OSError):
        return None
    base.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    cpu.ggml_get_type_traits_cpu.restype = ctypes.POINTER(CpuTraits)
    cpu.ggml_cpu_init()
    return base, cpu
