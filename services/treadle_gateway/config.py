"""The gateway's settings: read from the environment once, then passed down."""

from __future__ import annotations

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from treadle.security import TransportConfig


class GatewayConfig(BaseSettings):
    """Settings of the gateway (`TREADLE_GATEWAY_*`); the limits are what one request may ask for."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_GATEWAY_", frozen=True, extra="ignore", populate_by_name=True
    )

    address: str = "127.0.0.1:50051"
    metrics_address: str = "127.0.0.1:9051"
    """Where Prometheus finds `/metrics`; empty: nowhere."""
    transport: TransportConfig = Field(default_factory=TransportConfig)
    """TLS and keys."""
    registry_address: str = Field(default="127.0.0.1:50052", validation_alias="TREADLE_REGISTRY_ADDRESS")
    tokenizer_address: str = Field(default="127.0.0.1:50053", validation_alias="TREADLE_TOKENIZER_ADDRESS")
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", validation_alias="TREADLE_REDIS_URL")
    redis_connections: int = Field(default=32, ge=2)
    """Commands that run at once in Redis; further ones wait for their turn."""
    redis_patience_s: float = Field(default=10.0, gt=0)
    """How long streams wait for a Redis that is away before they end as UNAVAILABLE."""
    attached_s: float = Field(default=15.0, ge=1.5)
    """How long its clients are taken to be there after it said so last; it does three times in it."""
    grace_period_s: float = Field(default=30.0, gt=0)
    """From SIGTERM to the end; streams that still run then are told to attach again elsewhere."""

    max_concurrent_requests: int = Field(default=1024, ge=1)
    """Requests and attached streams that this gateway holds at once; more are RESOURCE_EXHAUSTED."""
    lane_limit: int = Field(default=1000, ge=1)
    """Requests, waiting and running, of one profile, priority and tenant."""
    max_batch_in_flight: int = Field(default=64, ge=1)
    """Items of one BatchGenerate call, or of one stream of a task, that are read and not answered."""

    default_timeout_s: float = Field(default=600.0, gt=0)
    """For a request that has neither a timeout nor a gRPC deadline."""
    max_timeout_s: float = Field(default=3600.0, gt=0, le=3600.0)
    """The longest timeout; a longer gRPC deadline counts as this. Keys live an hour unattended."""
    max_retention_s: float = Field(default=3600.0, gt=0, le=86400.0)
    """The longest that a detached answer waits for its client."""
    tokenizer_timeout_s: float = Field(default=10.0, gt=0)
    """For one call to the tokenizer; rendering a chat template counts."""
    registry_timeout_s: float = Field(default=2.0, gt=0)
    """For one call to the registry."""

    max_prompt_bytes: int = Field(default=4 << 20, ge=1, le=12 << 20)
    """UTF-8 bytes of a prompt: text, or all messages of a chat. The context bounds its tokens."""
    max_chat_messages: int = Field(default=1024, ge=1)
    max_template_arguments_bytes: int = Field(default=16 << 10, ge=2)
    max_stop_strings: int = Field(default=16, ge=1)
    max_stop_string_bytes: int = Field(default=256, ge=1)
    max_stop_token_ids: int = Field(default=256, ge=1)
    max_logit_bias: int = Field(default=1024, ge=1)
    """Entries of logit_bias."""
    max_logprobs: int = Field(default=20, ge=0)
    """Alternatives a token."""

    max_task_inputs: int = Field(default=256, ge=1, le=512)
    """Texts, pairs or documents of one task: one entry of a lane, which one worker computes, all of it again
    after a takeover. Score sends two texts an input to the tokenizer, which takes 1,024."""
    max_task_bytes: int = Field(default=4 << 20, ge=1, le=4 << 20)
    """UTF-8 bytes of all texts of one task, a rerank's query once a document. Score sends contexts twice to
    the tokenizer, which takes 8 MiB."""
    max_task_tokens: int = Field(default=1 << 18, ge=1)
    """Tokens of all texts of one task: what waits in Redis is about three bytes a token."""
