"""What the look must know before it pays for the settings' library."""

from __future__ import annotations

import os


def tls_is_configured() -> bool:
    """Whether any of the transport's TLS settings is set; TransportConfig says which, and checks them."""
    return any(value and name.startswith("TREADLE_TLS_") for name, value in os.environ.items())
