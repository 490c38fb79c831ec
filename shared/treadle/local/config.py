"""Settings of the local suite: read from the environment once, then passed down."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict


class LocalConfig(BaseSettings):
    """Settings of `treadle up` and `treadle demo` (`TREADLE_*`)."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_", frozen=True, extra="ignore")

    home: Path = Path("~/.cache/treadle")
    """Where the store, Valkey's files and the logs lie."""
    redis_url: str = ""
    """A Redis or Valkey to use when none can be started here."""

    @field_validator("home")
    @classmethod
    def _absolute(cls, home: Path) -> Path:
        return home.expanduser().absolute()


def inherited_environment() -> dict[str, str]:
    """What the services inherit of this process's environment."""
    return dict(os.environ)
