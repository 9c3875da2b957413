"""Whether a converted model holds numbers, and if not, whether its source did."""

from __future__ import annotations

import math
from pathlib import Path

from ggufrq.base.errors import ModelError
from ggufrq.ggufs import values
from ggufrq.models.convert import Entry, HfModel

#: Values that are read at a time.
_PIECE = 1 << 22
#: The largest numbers that types hold, where they hold less than the source may.
_LARGEST = {"F16": 65504.0, "mmproj": 65504.0}
_CODES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}


def require_numbers(made: Path, model: HfModel, kind: str) -> None:
    """Raise ModelError when a file made of a model by conversion to ``kind`` holds anything but numbers; it
    tells whether the model itself does."""
    odd = values.first_odd(made)
    if odd is None:
        return
    largest = _LARGEST.get(kind, 3.3e38)
    for name, entry in model.entries.items():
        found = _odd_value(model.folder / entry.file, entry, largest)
        if found is None:
            continue
        if math.isfinite(found):
            projector = kind == "mmproj"
            raise ModelError(
                f"{odd}, because {name} of {entry.file} has the value {found:g}, and "
                f"{'F16' if projector else kind} holds {largest:g} at most",
                remedy="without --mmproj" if projector else "a source in BF16 or F32",
            )
        what = "NaN" if math.isnan(found) else "infinity"
        raise ModelError(
            f"{model.called} computes no numbers: {name} of {entry.file}, in the source itself, has {what}",
            remedy=values.DAMAGED,
        )
    raise ModelError(f"the converted model computes no numbers: {odd}", remedy=values.DAMAGED)


def _odd_value(path: Path, entry: Entry, largest: float) -> float | None:
    """A value of a tensor that is no finite number, or else the largest when it is beyond ``largest``."""
    import numpy as np

    code = _CODES.get(entry.dtype)
    if code is None:
        return None
    with path.open("rb") as file:
        file.seek(entry.start)
        for first in range(0, entry.values, _PIECE):
            raw = np.fromfile(file, np.dtype(code), min(_PIECE, entry.values - first))
            if entry.dtype == "BF16":
                raw = (raw.astype(np.uint32) << 16).view(np.float32)
            bad = raw[~(np.abs(raw) <= largest)]
            if bad.size:
                wrong = bad[~np.isfinite(bad)]
                return float(wrong[0] if wrong.size else bad[np.abs(bad).argmax()])
    return None
