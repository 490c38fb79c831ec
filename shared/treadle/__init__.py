"""The suite's public face: its version and the Python client.

The client is imported when it is first asked for, so that a child process which only needs
`treadle.process` does not pay for gRPC.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from treadle._version import __version__

if TYPE_CHECKING:
    from treadle.client import AsyncClient, Client, GenerationRequest, Message, RegistryClient

__all__ = ["AsyncClient", "Client", "GenerationRequest", "Message", "RegistryClient", "__version__"]


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import treadle.client

    return getattr(treadle.client, name)
