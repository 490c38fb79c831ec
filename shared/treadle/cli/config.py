"""Settings of the command: read from the environment once, then passed down."""

from __future__ import annotations

from pydantic_settings import BaseSettings, SettingsConfigDict


class CliConfig(BaseSettings):
    """Where the commands find a suite (`TREADLE_*`)."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_", frozen=True, extra="ignore")

    address: str = ""
    """The gateway; empty: the suite that runs in TREADLE_HOME, else the default address."""
    registry_address: str = ""
    """The registry, likewise."""
    tokenizer_address: str = ""
    """The tokenizer, likewise; `treadle eval perplexity` asks it."""
