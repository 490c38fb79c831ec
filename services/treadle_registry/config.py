"""The registry's settings: read from the environment once, then passed down."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from treadle.errors import FailedPrecondition, invalid_field
from treadle.security import Credentials, TransportConfig


class HubConfig(BaseSettings):
    """What of a hub is the registry's own (`TREADLE_REGISTRY_HUB_*`); the rest is `HF_*`, see docs/hub.md."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_REGISTRY_HUB_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    token_file: Path | None = None
    """A file with a token; without one HF_TOKEN, HF_TOKEN_PATH and `hf auth login` hold."""


class RemotesConfig(BaseSettings):
    """Other registries that models may be taken from (`TREADLE_REGISTRY_REMOTE*`); requests name them."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_REGISTRY_", frozen=True, extra="ignore", populate_by_name=True
    )

    remotes: Annotated[Mapping[str, str], NoDecode] = Field(default_factory=dict)
    """Addresses by name: "name=host:port,…"."""
    remote_keys: Annotated[Mapping[str, str], NoDecode] = Field(default_factory=dict)
    """Files with the keys to show them, by name: "name=/path,…"."""
    remote_ca: Path | None = None
    """PEM roots that they are trusted by; turns TLS on for all of them. Under mutual TLS they are shown this
    registry's own certificate."""
    transport: TransportConfig = Field(default_factory=TransportConfig)

    @field_validator("remotes", "remote_keys", mode="before")
    @classmethod
    def _pairs(cls, value: object) -> object:
        if not isinstance(value, str):
            return value
        pairs = [entry.partition("=") for entry in value.split(",") if entry.strip()]
        if bad := [name for name, _, found in pairs if not name.strip() or not found.strip()]:
            raise ValueError(f"{bad[0]!r} must be name=value, several by commas")
        return {name.strip(): found.strip() for name, _, found in pairs}

    @model_validator(mode="after")
    def _known(self) -> Self:
        if unknown := self.remote_keys.keys() - self.remotes.keys():
            raise ValueError(f"TREADLE_REGISTRY_REMOTE_KEYS names {min(unknown)!r}, which is no remote")
        return self

    def address(self, name: str) -> str:
        """ "host:port" of a remote; raises InvalidArgument with the names that are known."""
        if name not in self.remotes:
            known = ", ".join(sorted(self.remotes)) or "none: set TREADLE_REGISTRY_REMOTES"
            raise invalid_field("registry.remote", f"{name!r} is not known here; known are: {known}")
        return self.remotes[name]

    def credentials(self, name: str) -> Credentials:
        """What a remote is shown, and trusted by; reads the files. Raises FailedPrecondition."""
        key = ""
        if path := self.remote_keys.get(name):
            try:
                key = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise FailedPrecondition(
                    f"the key of the remote {name!r} in {path} cannot be read: {error}",
                    reason="KEY_UNREADABLE",
                ) from error
        if self.remote_ca is None:
            return Credentials(api_key=key)
        return Credentials.from_files(
            api_key=key,
            ca=self.remote_ca,
            certificate=self.transport.tls_certificate,
            private_key=self.transport.tls_private_key,
        )


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
    other_registries: RemotesConfig = Field(default_factory=RemotesConfig)
    """Other registries."""
    store: Path = Field(default=Path("~/.cache/treadle/store"), validation_alias="TREADLE_STORE")
    """Where models lie."""
    max_imports: int = Field(default=2, ge=1, le=64)
    """Imports that run at once."""
    max_waiting_imports: int = Field(default=32, ge=0, le=1024)
    """Imports that wait for their turn; more are refused."""
    kept_operations: int = Field(default=1000, ge=1)
    """How many ended operations can still be asked for."""
    max_uploads: int = Field(default=8, ge=1, le=256)
    """Blobs that come at once."""
    max_downloads: int = Field(default=32, ge=1, le=1024)
    """Blobs that go at once."""
    max_upload_bytes: int = Field(default=1 << 40, ge=1)
    """Of uploads that wait for an import, all together."""
    grace_period_s: float = Field(default=5.0, gt=0)
    """From SIGTERM to the end."""

    @field_validator("store")
    @classmethod
    def _absolute(cls, store: Path) -> Path:
        return store.expanduser().absolute()
