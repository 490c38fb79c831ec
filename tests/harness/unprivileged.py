"""An ordinary user for tests of permissions."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_NOBODY = 65534


@contextlib.contextmanager
def unprivileged() -> Iterator[None]:
    """As an ordinary user where the tests run as root, whom no mode keeps out."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(_NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
