"""The trainer's settings: read from the environment once, then passed down."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from treadle.security import TransportConfig


class TrainerConfig(BaseSettings):
    """Settings of the trainer (`TREADLE_TRAINER_*`)."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_TRAINER_", frozen=True, extra="ignore")

    address: str = "127.0.0.1:50054"
    metrics_address: str = "127.0.0.1:9054"
    """Where Prometheus finds `/metrics`; empty: nowhere."""
    transport: TransportConfig = Field(default_factory=TransportConfig)
    """TLS and keys."""
    grace_period_s: float = Field(default=10.0, gt=0)
    """From SIGTERM to the end."""
