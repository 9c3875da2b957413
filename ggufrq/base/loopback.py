"""Requests to programs on this machine, which no proxy comes between."""

from __future__ import annotations

import requests


def session() -> requests.Session:
    """For requests to programs on this machine. A proxy that the environment names would look for them on its
    own machine, and a ``.netrc`` has nothing for them."""
    made = requests.Session()
    made.trust_env = False
    return made
