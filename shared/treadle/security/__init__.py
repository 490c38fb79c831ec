"""Who may call what: bearer keys, TLS identities, roles and tenants. Knows no gRPC."""

from treadle.security.config import TransportConfig
from treadle.security.credentials import Credentials
from treadle.security.principal import ANYBODY, Principal, Role, bind_principal, current_principal
from treadle.security.server_security import ServerSecurity

__all__ = [
    "ANYBODY",
    "Credentials",
    "Principal",
    "Role",
    "ServerSecurity",
    "TransportConfig",
    "bind_principal",
    "current_principal",
]
