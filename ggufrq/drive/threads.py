"""How the threads of a program wait for each other."""

from __future__ import annotations

import os

from ggufrq.base import machine

#: Variables of OpenMP by which the user says it.
_SAID = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


def patience() -> dict[str, str | None]:
    """Variables that let threads sleep while they wait, on a machine whose cores are used by others; none on
    one that is free, and none where the user says it.

    Threads of llama.cpp wait for each other after every operation, hundreds of times for a token, by
    spinning. One that has to share its core lets the others spin their time away: an 8M model falls from
    hundreds of tokens a second to one. (``--poll`` is for builds without OpenMP.)
    """
    if any(name in os.environ for name in _SAID) or not machine.is_busy():
        return {}
    return {"OMP_WAIT_POLICY": "passive"}
