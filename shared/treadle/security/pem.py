"""PEM files, with an error that names the file."""

from __future__ import annotations

from pathlib import Path

from treadle.errors import FailedPrecondition


def read_pem(path: Path, what: str) -> bytes:
    """The file's bytes; raises FailedPrecondition (PEM_UNREADABLE) where it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise FailedPrecondition(
            f"{what} in {path} cannot be read: {error.strerror}", reason="PEM_UNREADABLE"
        ) from error
    if b"-----BEGIN " not in content:
        raise FailedPrecondition(f"{what} in {path} is not in PEM format", reason="PEM_UNREADABLE")
    return content
