"""How a server guards its ports: TLS, client certificates, keys, and where it may bind."""

from __future__ import annotations

import ipaddress
import ssl
from dataclasses import dataclass
from pathlib import Path

from treadle.errors import FailedPrecondition
from treadle.security.key_file import KeyFile
from treadle.security.principal import ANYBODY, Principal, Role


@dataclass(frozen=True, slots=True)
class ServerTls:
    """PEM files of a server's identity, and of the CA that its callers' certificates must come from."""

    certificate: Path
    private_key: Path
    client_ca: Path | None = None

    def ssl_context(self) -> ssl.SSLContext:
        """For ports that are not gRPC's; raises ssl.SSLError and OSError."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(self.certificate, self.private_key)
        if self.client_ca is not None:
            context.load_verify_locations(self.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
        return context


@dataclass(frozen=True, slots=True)
class ServerSecurity:
    """Nothing set: in plain text, for anybody, on loopback."""

    tls: ServerTls | None = None
    keys: KeyFile | None = None
    trusted_network: bool = False
    """The network is private: anybody on it may call."""

    def check_address(self, address: str) -> None:
        """Raises FailedPrecondition (OPEN_TO_STRANGERS) for an address that strangers could call."""
        guarded = self.keys is not None or (self.tls is not None and self.tls.client_ca is not None)
        if guarded or self.trusted_network or is_loopback(address):
            return
        raise FailedPrecondition(
            f"{address} is open to other machines, and nothing asks who calls: set TREADLE_KEYS_FILE or "
            "TREADLE_TLS_CLIENT_CA; or TREADLE_TRUSTED_NETWORK=true where the network itself is private",
            reason="OPEN_TO_STRANGERS",
        )

    def authenticate(self, authorization: str | None) -> Principal:
        """Who calls; raises Unauthenticated. Without keys: ANYBODY."""
        return ANYBODY if self.keys is None else self.keys.authenticate(authorization)

    def authorize_scrape(self, authorization: str | None) -> None:
        """Raises Unauthenticated or PermissionDenied unless the caller may read metrics."""
        self.authenticate(authorization).require(frozenset({Role.MONITOR}), "reading metrics")


def is_loopback(address: str) -> bool:
    """Whether only this machine reaches "host:port" (or a unix socket)."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    host = address.rpartition(":")[0].strip("[]")
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
