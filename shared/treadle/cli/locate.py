"""Finds the suite to ask: named by option or environment, else the one that runs here, else the default."""

from __future__ import annotations

from treadle.cli.config import CliConfig
from treadle.client.inference_connection import DEFAULT_ADDRESS
from treadle.client.registry_connection import DEFAULT_REGISTRY_ADDRESS
from treadle.client.tokenizer_client import DEFAULT_TOKENIZER_ADDRESS
from treadle.local import Home, LocalConfig
from treadle.security import Credentials, TransportConfig


def running_suite() -> dict[str, str]:
    """The addresses of the suite that runs in TREADLE_HOME; empty when there is none."""
    return Home(LocalConfig().home).read_addresses() or {}


def gateway_address(given: str = "") -> str:
    """ "host:port" of the gateway."""
    return given or CliConfig().address or running_suite().get("gateway", DEFAULT_ADDRESS)


def registry_address(given: str = "") -> str:
    """ "host:port" of the registry."""
    return given or CliConfig().registry_address or running_suite().get("registry", DEFAULT_REGISTRY_ADDRESS)


def tokenizer_address(given: str = "") -> str:
    """ "host:port" of the tokenizer."""
    return (
        given or CliConfig().tokenizer_address or running_suite().get("tokenizer", DEFAULT_TOKENIZER_ADDRESS)
    )


def addresses(gateway: str = "") -> dict[str, str]:
    """The services to look at: all of the suite that runs here, unless a gateway is named."""
    config = CliConfig()
    if gateway or config.address:
        named = {"gateway": gateway or config.address}
        return named | ({"registry": config.registry_address} if config.registry_address else {})
    return running_suite() or {"gateway": DEFAULT_ADDRESS, "registry": DEFAULT_REGISTRY_ADDRESS}


def credentials() -> Credentials:
    """The key and the TLS identity that the environment gives."""
    return TransportConfig().credentials()
