"""What a caller shows, and what it believes: a key, a certificate, the roots of the server's."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from treadle.security.pem import read_pem


@dataclass(frozen=True, slots=True)
class Credentials:
    """How to call a server. Nothing set: in plain text, without a key."""

    api_key: str = field(default="", repr=False)
    """ "trd_…", sent with every call."""
    tls: bool = False
    ca: bytes | None = field(default=None, repr=False)
    """PEM of the roots to trust; None: those that gRPC brings."""
    certificate: bytes | None = field(default=None, repr=False)
    """PEM of the chain to show under mutual TLS."""
    private_key: bytes | None = field(default=None, repr=False)

    @classmethod
    def from_files(
        cls,
        *,
        api_key: str = "",
        tls: bool = False,
        ca: Path | str | None = None,
        certificate: Path | str | None = None,
        private_key: Path | str | None = None,
    ) -> Self:
        """Reads the PEM files; any of them turns TLS on. Raises FailedPrecondition (PEM_UNREADABLE)."""
        return cls(
            api_key=api_key,
            tls=tls or ca is not None or certificate is not None,
            ca=None if ca is None else read_pem(Path(ca), "the roots to trust"),
            certificate=None if certificate is None else read_pem(Path(certificate), "the certificate"),
            private_key=None if private_key is None else read_pem(Path(private_key), "the private key"),
        )
