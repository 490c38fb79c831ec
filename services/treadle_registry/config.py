"""The registry's settings: read from the environment once, then passed down."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from treadle.security import TransportConfig


class HubConfig(BaseSettings):
    """What of a hub is the registry's own (`TREADLE_REGISTRY_HUB_*`); the rest is `HF_*`, see docs/hub.md."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_REGISTRY_HUB_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    token_file: Path | None = None
    """A file with a token; without one HF_TOKEN, HF_TOKEN_PATH and `hf auth login` hold."""


class RegistryConfig(BaseSettings):
    """Settings of the registry (`TREADLE_REGISTRY_*`, and `TREADLE_STORE`)."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_REGISTRY_", frozen=True, extra="ignore", populate_by_name=True
    )

    address: str = "127.0.0.1:50052"
    metrics_address: str = "127.0.0.1:9052"
    """Where Prometheus finds `/metrics`; empty: nowhere."""
    transport: TransportConfig = Field(default_factory=TransportConfig)
    """TLS and keys."""
    hub: HubConfig = Field(default_factory=HubConfig)
    """The Hugging Face hub."""
    store: Path = Field(default=Path("~/.cache/treadle/store"), validation_alias="TREADLE_STORE")
    """Where models lie."""
    max_imports: int = Field(default=2, ge=1, le=64)
    """Imports that run at once."""
    max_waiting_imports: int = Field(default=32, ge=0, le=1024)
    """Imports that wait for their turn; more are refused."""
    kept_operations: int = Field(default=1000, ge=1)
    """How many ended operations can still be asked for."""
    grace_period_s: float = Field(default=5.0, gt=0)
    """From SIGTERM to the end."""

    @field_validator("store")
    @classmethod
    def _absolute(cls, store: Path) -> Path:
        return store.expanduser().absolute()
