"""K or V of one layer as blocks: chunks of cells, so that growing copies nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from ggufrq.hf.codec import Codec

#: Cells of a chunk. As many may be held beyond the last token, and beyond a window.
CHUNK = 256


@dataclass
class Blocks:
    """Cells ``start`` … ``end`` - 1 in chunks [batch, heads, CHUNK, bytes]; ``start`` is a multiple of
    CHUNK."""

    start: int = 0
    end: int = 0
    chunks: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, start: int, blocks: torch.Tensor) -> Blocks:
        """The cells from ``start`` on with these blocks [batch, heads, cells, bytes], which are copied."""
        chunks = list(blocks.split(CHUNK, dim=2)) if blocks.shape[2] else []
        chunks = [torch.nn.functional.pad(part, (0, 0, 0, CHUNK - part.shape[2])).clone() for part in chunks]
        return cls(start, start + blocks.shape[2], chunks)

    def append(
        self, rows: torch.Tensor, stored: Callable[[torch.Tensor], torch.Tensor], codec: Codec
    ) -> None:
        """Encode ``rows`` [batch, heads, cells, head_dim], each chunk's as ``stored`` turns them."""
        done = 0
        while done < rows.shape[2]:
            used = self.end % CHUNK
            part = stored(rows[:, :, done : done + CHUNK - used])
            blocks = codec.encode(part)
            if used == 0:
                self.chunks.append(blocks.new_empty(*blocks.shape[:2], CHUNK, blocks.shape[3]))
            self.chunks[-1][:, :, used : used + part.shape[2]] = blocks
            done += part.shape[2]
            self.end += part.shape[2]

    def tiles(self, cells: int) -> Iterator[tuple[int, torch.Tensor]]:
        """First cell and blocks [batch, heads, n, bytes] of some ``cells`` at a time."""
        step = max(cells // CHUNK, 1)
        for i in range(0, len(self.chunks), step):
            first = self.start + i * CHUNK
            some = self.chunks[i : i + step]
            last = some[-1][:, :, : self.end - first - (len(some) - 1) * CHUNK]
            yield first, torch.cat([*some[:-1], last], dim=2) if len(some) > 1 else last

    def snapshot(self) -> Blocks:
        """What is held now, whatever comes later; nothing is copied."""
        return Blocks(self.start, self.end, list(self.chunks))

    def crop(self, end: int) -> None:
        """Forget the cells from ``end`` on."""
        self.end = max(end, self.start)
        del self.chunks[(self.end - self.start + CHUNK - 1) // CHUNK :]

    def drop(self, before: int) -> None:
        """Forget chunks whose cells all lie before the cell ``before``."""
        gone = max(min(before // CHUNK * CHUNK, self.end // CHUNK * CHUNK) - self.start, 0) // CHUNK
        del self.chunks[:gone]
        self.start += gone * CHUNK

    def change(self, rows: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace each chunk by what ``rows`` makes of it, one after another."""
        for i, chunk in enumerate(self.chunks):
            self.chunks[i] = rows(chunk)
