"""Estimates as a table and as data."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from ggufrq.base import table
from ggufrq.base.sizes import mib_text, size_text
from ggufrq.cache.kv import KvPlan
from ggufrq.ggufs.placement import Placement
from ggufrq.memory.cells import ContextSettings, state_bytes
from ggufrq.memory.estimate import Estimate, Fit, Memory
from ggufrq.memory.told import published

#: Contexts that are shown where they are no longer than the model's own.
CONTEXTS = (8 << 10, 32 << 10, 128 << 10)
_WIDTH = 79
#: What titles of caches say is on beside the types.
_MARKS = re.compile(r"(?: \+\w+)+")


@dataclass(frozen=True)
class Report:
    """What is told of a model: its name, its memory, the cache types, sequences, the type of its weights when
    another one than the file's was asked for, bytes of its tensors by name, and the memories to place it in,
    that of a GPU and that of the machine (None: as large as it takes)."""

    name: str
    memory: Memory
    plans: Sequence[KvPlan]
    parallel: int = 1
    weights: str | None = None
    sizes: Mapping[str, int] = field(default_factory=dict)
    room: tuple[int, int | None] | None = None

    def contexts(self, given: Sequence[int] | None) -> list[int]:
        """The contexts to show: those given, or the usual ones and the model's own."""
        if given is not None:
            return list(given)
        native = self.memory.shape.native
        return [*(ctx for ctx in CONTEXTS if ctx < native), native]

    def rows(self, contexts: Sequence[int] | None) -> list[Estimate]:
        """An estimate for each type and context."""
        return [
            self.memory.estimate(plan, ContextSettings(ctx, self.parallel))
            for plan in self.plans
            for ctx in self.contexts(contexts)
        ]

    def fits(self, budget: int) -> list[Fit]:
        """The largest context for each type."""
        return [self.memory.fit(plan, budget, self.parallel) for plan in self.plans]

    def places(self, contexts: Sequence[int] | None) -> list[tuple[Estimate, Placement | None]]:
        """How the weights are placed for each type and context."""
        assert self.room is not None
        return [
            self.memory.place(plan, ContextSettings(ctx, self.parallel), self.sizes, *self.room)
            for plan in self.plans
            for ctx in self.contexts(contexts)
        ]

    def as_data(self, contexts: Sequence[int] | None, budget: int | None) -> dict[str, Any]:
        """Everything as JSON data, sizes in bytes."""
        shape = self.memory.shape
        data: dict[str, Any] = {
            "model": self.name,
            "architecture": shape.architecture,
            "native_ctx": shape.native,
            "parallel": self.parallel,
            "weights": self.memory.weights,
            "layers": [asdict(layer) for layer in shape.layers],
            "window": shape.window,
        }
        if self.room is not None:
            data |= {"vram": self.room[0], "ram": self.room[1]}
            data["places"] = [
                {
                    **_row_data(row),
                    "placement": None
                    if placed is None
                    else {**asdict(placed), "option": placed.option, "override_tensor": placed.override},
                }
                for row, placed in self.places(contexts)
            ]
        elif budget is None or contexts is not None:
            data["rows"] = [_row_data(row) for row in self.rows(contexts)]
        if budget is not None:
            data["budget"] = budget
            data["fits"] = [
                {
                    "kv": fit.kv,
                    "ctx": fit.estimate.ctx if fit.estimate else None,
                    "native": fit.native,
                    "why_not": fit.why_not,
                    "estimate": _row_data(fit.estimate) if fit.estimate else None,
                }
                for fit in self.fits(budget)
            ]
        data["published"] = published(shape)
        return data

    def render(self, contexts: Sequence[int] | None, budget: int | None, *, why: bool = False) -> str:
        """The tables as plain text, with what must be known to read them."""
        parts = ["\n".join(self._head())]
        rows: list[Estimate] = []
        titles: list[str] = []
        if self.room is not None:
            placed = self.places(contexts)
            parts += self._places(placed)
            rows = [row for row, _ in placed]
        elif budget is None or contexts is not None:
            rows = self.rows(contexts)
            parts.append(self._table(rows))
        if budget is not None:
            fits = self.fits(budget)
            parts.append(self._fits(fits, budget))
            rows += [fit.estimate for fit in fits if fit.estimate is not None]
            titles = [fit.kv for fit in fits]
        parts.append("\n".join(self._notes(rows, titles)))
        if why:
            parts.append("\n".join(self._why()))
        return "\n\n".join(part for part in parts if part)

    def _head(self) -> list[str]:
        shape = self.memory.shape
        kind = f" in {self.weights}" if self.weights else ""
        lines = [
            self.name,
            f"weights{kind} {mib_text(self.memory.weights)} MiB ({size_text(self.memory.weights)})",
        ]
        said = [f"{len(shape.cached)} of {len(shape.layers)} layers keep K{'' if shape.mla else ' and V'}"]
        windows = sum(layer.window for layer in shape.layers)
        if windows:
            said.append(f"{windows} of them of the last {shape.window:,} tokens")
        indexed = sum(bool(layer.index) for layer in shape.layers)
        if indexed:
            said.append(f"{indexed} of them the keys of an indexer, too")
        if shape.state:
            state = mib_text(state_bytes(shape, ContextSettings(1)))
            said.append(f"recurrent state {state} MiB per sequence")
        return [*lines, "; ".join(said) + f"; own context {shape.native:,} tokens"]

    def _table(self, rows: Sequence[Estimate]) -> str:
        head = ["kv", "ctx", "K and V", "state", "compute", "total, MiB", "GB", ""]
        body = []
        for row, kv in zip(rows, _short([row.kv for row in rows])[0], strict=True):
            native = self.memory.shape.native * self.parallel
            note = "beyond the model's own" if row.ctx > native else ""
            if row.why_not is not None:
                body.append([kv, f"{row.ctx:,}", *["-"] * 5, ""])
                continue
            sizes = [row.cache, row.state, row.compute + row.output]
            cells = [mib_text(size) if size else "0" for size in sizes]
            cells[-1] = cells[-1] if row.exact else f"~{cells[-1]}"
            total = [mib_text(row.total), f"{row.total / 1e9:.2f}"]
            body.append([kv, f"{row.ctx:,}", *cells, *total, note])
        return table.render(head, body, "lrrrrrrl")

    def _places(self, placed: Sequence[tuple[Estimate, Placement | None]]) -> list[str]:
        assert self.room is not None
        vram, ram = self.room
        body, lines = [], {}
        for (row, place), kv in zip(placed, _short([row.kv for row, _ in placed])[0], strict=True):
            if place is None:
                body.append([kv, f"{row.ctx:,}", "-", "-", row.why_not or "does not fit"])
                continue
            there = place.vram + row.total - row.weights
            cells = [mib_text(there), mib_text(place.ram), place.option or "all of it on the GPU"]
            body.append([kv, f"{row.ctx:,}", *cells])
            if place.option:
                lines[place.option] = f"{place.option} is\n    --override-tensor '{place.override}'"
        said = f"{size_text(vram)} of VRAM" + (f" and {size_text(ram)} of RAM" if ram is not None else "")
        head = ["kv", "ctx", "VRAM, MiB", "RAM, MiB", ""]
        layers = "with --n-gpu-layers all, in RAM the embedding and what the option keeps with the CPU"
        return [f"in {said}, {layers}:\n{table.render(head, body, 'lrrrl')}", "\n".join(lines.values())]

    def _fits(self, fits: Sequence[Fit], budget: int) -> str:
        head = ["kv", "largest ctx", "K and V", "compute", "total, MiB", ""]
        body = []
        for fit, kv in zip(fits, _short([fit.kv for fit in fits])[0], strict=True):
            row = fit.estimate
            if row is None:
                note = fit.why_not or "does not fit"
                body.append([kv, "-", "-", "-", "-", note])
                continue
            note = "the model's own context" if fit.native else ""
            cells = [row.cache, row.compute + row.output, row.total]
            body.append([kv, f"{row.ctx:,}", *(mib_text(size) for size in cells), note])
        return f"in {mib_text(budget)} MiB ({size_text(budget)}):\n{table.render(head, body, 'lrrrrl')}"

    def _notes(self, rows: Sequence[Estimate], titles: Sequence[str]) -> list[str]:
        reasons = dict.fromkeys(f"{row.kv}: {row.why_not}" for row in rows if row.why_not is not None)
        lines = list(reasons)
        marks = _short([*titles, *(row.kv for row in rows)])[1]
        lines += [f"rotated types with{marks}, as run and serve keep them"] if marks else []
        good = [row for row in rows if row.why_not is None]
        if good:
            how = "from a dry run of llama.cpp" if all(row.exact for row in good) else "estimated (~)"
            note = f"compute: {how}, on the CPU with flash attention, as llama-server and llama-cli take it"
            extra = max(row.batch_extra for row in good)
            if extra:
                more = f"keep the logits of whole batches, up to {mib_text(extra)} MiB more"
                note += f"; llama-completion and llama-perplexity {more}"
            lines += textwrap.wrap(note, _WIDTH)
        return lines

    def _why(self) -> list[str]:
        shape = self.memory.shape
        lines = ["how K and V come about:"]
        kinds: dict[tuple[int, int, bool], int] = {}
        for layer in shape.cached:
            key = (layer.k, layer.v, layer.window)
            kinds[key] = kinds.get(key, 0) + 1
        for (k, v, window), count in kinds.items():
            where = f", of the last {shape.window:,} tokens" if window else ""
            lines.append(f"  {count} layers x ({k:,} values of K + {v:,} of V) per token{where}")
        for index, count in Counter(layer.index for layer in shape.cached if layer.index).items():
            lines.append(f"  {count} layers x {index:,} values of an indexer's key per token")
        state = {(layer.r, layer.s) for layer in shape.layers if layer.r or layer.s}
        for r, s in sorted(state):
            count = sum((layer.r, layer.s) == (r, s) for layer in shape.layers)
            lines.append(f"  {count} layers x ({r:,} + {s:,} values of state in f32) per sequence")
        told = published(shape)
        return [*lines, "published, and wrong:", *(f"  {line}" for line in told)] if told else lines


def _short(titles: Sequence[str]) -> tuple[list[str], str]:
    """Titles of caches without what all of the rotated ones have on beside the types, and what that is; as
    they are where it differs."""
    found = {marks[0] for marks in map(_MARKS.search, titles) if marks}
    marks = found.pop() if len(found) == 1 else ""
    short = [title.replace(marks, "") for title in titles]
    return (short, marks) if len(set(short)) == len(set(titles)) else (list(titles), "")


def _row_data(row: Estimate) -> dict[str, Any]:
    return {**asdict(row), "total": row.total if row.why_not is None else None}
