"""The tokenizer's settings: read from the environment once, then passed down."""

from __future__ import annotations

import os

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from treadle.security import TransportConfig
from treadle.transfer.config import NodeCacheConfig


class TokenizerConfig(BaseSettings):
    """Settings of the tokenizer (`TREADLE_TOKENIZER_*`); the limits are what one request may ask for."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_TOKENIZER_", frozen=True, extra="ignore", populate_by_name=True
    )

    address: str = "127.0.0.1:50053"
    metrics_address: str = "127.0.0.1:9053"
    """Where Prometheus finds `/metrics`; empty: nowhere."""
    transport: TransportConfig = Field(default_factory=TransportConfig)
    """TLS and keys."""
    registry_address: str = Field(default="127.0.0.1:50052", validation_alias="TREADLE_REGISTRY_ADDRESS")
    registry_timeout_s: float = Field(default=2.0, gt=0)
    """For one call to the registry."""
    node_cache: NodeCacheConfig = Field(default_factory=NodeCacheConfig)
    """For models whose files the registry has on another machine."""
    grace_period_s: float = Field(default=10.0, gt=0)
    """From SIGTERM to the end."""

    resolve_ttl_s: float = Field(default=1.0, ge=0)
    """How long a model's artifact is taken for granted: an alias that moved is noticed within it."""
    max_resolved: int = Field(default=1024, ge=1)
    """Model names whose artifact is remembered."""
    max_loaded: int = Field(default=8, ge=1)
    """Tokenizers in memory at once; a large one has some 100 MB."""

    threads: int = Field(default_factory=lambda: max(2, os.cpu_count() or 2), ge=1)
    """Threads that encode and decode ordinary requests."""
    large_bytes: int = Field(default=64 << 10, ge=1)
    """Texts from this size on have one thread of their own, so that they hold up only each other."""
    max_waiting: int = Field(default=1024, ge=1)
    """Ordinary requests that wait for a thread."""
    max_waiting_large: int = Field(default=32, ge=1)

    max_inputs: int = Field(default=1024, ge=1)
    """Texts, or rows of ids, of one request."""
    max_text_bytes: int = Field(default=4 << 20, ge=1, le=12 << 20)
    """UTF-8 bytes of one text, with its pair."""
    max_request_bytes: int = Field(default=8 << 20, ge=1, le=12 << 20)
    """UTF-8 bytes of all texts of one request."""
    max_tokens: int = Field(default=2 << 20, ge=1)
    """Ids to decode, and ids of an answer with its padding and its overlapping windows."""
    max_messages: int = Field(default=1024, ge=1)
    max_template_arguments_bytes: int = Field(default=16 << 10, ge=2)

    template_processes: int = Field(default=2, ge=1)
    template_deadline_s: float = Field(default=2.0, gt=0)
    """For rendering one chat template; its process is killed after it."""
    max_waiting_templates: int = Field(default=256, ge=1)
