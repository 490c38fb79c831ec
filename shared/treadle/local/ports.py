"""Loopback ports that nobody listens on."""

from __future__ import annotations

import contextlib
import socket

from treadle.errors import Unavailable

LOOPBACK = "127.0.0.1"


def is_free(port: int) -> bool:
    """Whether a server could listen on the loopback port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
    return True


def free_ports(count: int) -> list[int]:
    """So many different free ports, chosen by the kernel."""
    with contextlib.ExitStack() as held:
        probes = [held.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind((LOOPBACK, 0))
        return [probe.getsockname()[1] for probe in probes]


def choose(preferred: int, *, required: bool) -> int:
    """`preferred` when it is free (0: any), else another; raises Unavailable when it is `required`."""
    if preferred and is_free(preferred):
        return preferred
    if preferred and required:
        raise Unavailable(
            f"port {preferred} is taken by another process; choose another with --port, or --port 0 for any",
            reason="ADDRESS_IN_USE",
        )
    return free_ports(1)[0]
