"""Settings of what a machine keeps of other machines' models."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class NodeCacheConfig(BaseSettings):
    """The node cache (`TREADLE_NODE_CACHE*`); one a machine, whichever services share it."""

    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", populate_by_name=True, env_ignore_empty=True
    )

    folder: Path = Field(default=Path("~/.cache/treadle/node"), validation_alias="TREADLE_NODE_CACHE")
    """Where models lie that a service could not read where the registry has them."""
    max_bytes: int = Field(default=200 << 30, ge=1, validation_alias="TREADLE_NODE_CACHE_MAX_BYTES")
    """Of all of them; what was used least recently gives way."""

    @field_validator("folder")
    @classmethod
    def _absolute(cls, folder: Path) -> Path:
        return folder.expanduser().absolute()
