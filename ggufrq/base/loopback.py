"""Programs on this machine that answer HTTP: a free port, and requests that no proxy comes between."""

from __future__ import annotations

import socket

import requests


def session() -> requests.Session:
    """For requests to programs on this machine. A proxy that the environment names would look for them on its
    own machine, and a ``.netrc`` has nothing for them."""
    made = requests.Session()
    made.trust_env = False
    return made


def family(host: str) -> socket.AddressFamily:
    """The kind of an address."""
    return socket.AF_INET6 if ":" in host else socket.AF_INET


def free_port(host: str = "127.0.0.1") -> int:
    """A port that nobody listens on. Raises OSError when ``host`` is no address of this machine."""
    with socket.socket(family(host), socket.SOCK_STREAM) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
