"""The worker's settings: read from the environment once, then passed down."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from treadle.models.profile import ServingProfile, served_dtype
from treadle.models.serving_memory import (
    DEFAULT_BATCHED_TOKENS,
    DEFAULT_BLOCK_SIZE,
    DEFAULT_ENCODER_TOKENS,
)
from treadle.security import TransportConfig
from treadle.transfer.config import NodeCacheConfig
from treadle_worker.models.device_turns import DEFAULT_TASK_SHARE


class EngineConfig(BaseSettings):
    """Settings of one engine process (`TREADLE_ENGINE_*`)."""

    model_config = SettingsConfigDict(env_prefix="TREADLE_ENGINE_", frozen=True, extra="ignore")

    device: str = "auto"
    """"cpu", "cuda", "cuda:1", "mps", or "auto": CUDA, then mps, then the CPU."""
    dtype: Literal["auto", "bfloat16", "float32", "float16"] = "auto"
    """"auto": bfloat16 for decoders, float32 for encoders."""
    quantization: Literal["", "int8", "int4"] = ""
    """Of the weights, on a CPU: 8 bits with a scale for each 96 inputs (64 where 96 do not divide them), or 4
    bits with scale and minimum for each 32; the rows they are multiplied with are rounded to 8 bits in the
    same groups. Empty: as the model is stored, which is dtype unless it was quantised in the registry."""
    kernels: Literal["auto", "native", "torch"] = "auto"
    """What computes on a CPU: the package treadle-kernels, or torch. "auto": the package if it is there."""
    block_size: int = Field(default=DEFAULT_BLOCK_SIZE, ge=16, le=256, multiple_of=16)
    """Tokens a KV block. Sums over fewer than 16 keys are rounded by where they stand."""
    num_blocks: int | None = Field(default=None, ge=2)
    """KV blocks; unset: what the bytes below hold."""
    kv_cache_bytes: int | None = Field(default=None, ge=1 << 20)
    """Of KV blocks; unset: what max_memory_percent gives, or else 1 GiB."""
    max_memory_percent: float | None = Field(default=None, gt=0, le=95)
    """On CUDA: of all of the device's memory, for weights, KV blocks and the largest step together.
    Elsewhere: of what is free with the model loaded, for KV blocks."""
    cache_dtype: Literal["auto", "bfloat16", "float32", "float16", "int8"] = "auto"
    """Of keys and values; "auto": dtype. "int8" has a scale for each token and head."""
    attention_backend: Literal["auto", "sdpa", "flash_attn", "flashinfer"] = "auto"
    """On CUDA: "auto" takes flash-attn, else flashinfer, where they are installed and fit, else "sdpa",
    torch's own. "sdpa" runs on a CPU, too: for tests, since answers then depend on their neighbours' bits."""
    enforce_eager: bool = False
    """On CUDA: no graphs of small steps. They cost time to load, and memory."""
    max_num_seqs: int = Field(default=64, ge=1, le=1024)
    """Requests that run at once."""
    max_num_batched_tokens: int = Field(default=DEFAULT_BATCHED_TOKENS, ge=16, le=65536)
    """Token budget of a step: prefill chunks and decodes together."""
    max_num_batched_task_tokens: int = Field(default=DEFAULT_ENCODER_TOKENS, ge=16, le=65536)
    """Token budget of an encoder's step; attention within long texts counts as more tokens. A text that alone
    takes more is a step of its own."""
    max_inter_token_ms: float = Field(default=200.0, ge=0)
    """What a step may take where somebody waits for the next token, or another engine for the device: prompts
    get what is left of it, by what steps took before, and at least 16 tokens. An encoder's step takes half of
    it at most while another engine uses the device. 0: no such bound."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Prompt and answer together; unset: the model's context."""
    enable_prefix_caching: bool = True
    num_speculative_tokens: int = Field(default=4, ge=0, le=32)
    """Tokens of an answer guessed at once from what it repeats, then checked in one step; 0: none. Answers
    are the same with any number."""
    max_speculative_rows: int = Field(default=32, ge=0)
    """Tokens of a step, guessed ones included, up to which it pays to guess."""
    num_threads: int | None = Field(default=None, ge=1)
    """Threads of the tensor library; unset: the cores."""

    def resolved(self, *, is_encoder: bool) -> EngineConfig:
        """The settings for such a model, "auto" replaced by what it means."""
        return self.model_copy(update={"dtype": served_dtype(self.dtype, is_encoder=is_encoder)})

    def profile(self, compute_digest: str) -> ServingProfile:
        """What an answer of such an engine depends on; of a decoder's, where the dtype is not resolved."""
        if self.dtype == "auto":
            return self.resolved(is_encoder=False).profile(compute_digest)
        cache_dtype = "" if self.cache_dtype in ("auto", self.dtype) else self.cache_dtype
        return ServingProfile(compute_digest, self.dtype, self.quantization, cache_dtype)


class WorkerConfig(BaseSettings):
    """Settings of the worker's I/O process (`TREADLE_WORKER_*`)."""

    model_config = SettingsConfigDict(
        env_prefix="TREADLE_WORKER_", frozen=True, extra="ignore", populate_by_name=True
    )

    address: str = "127.0.0.1:50055"
    metrics_address: str = "127.0.0.1:9055"
    """Where Prometheus finds `/metrics`; empty: nowhere."""
    transport: TransportConfig = Field(default_factory=TransportConfig)
    """TLS and keys."""
    name: str = ""
    """The worker's name; unset: the host's. The consumer's name adds a boot nonce."""
    models: Annotated[tuple[str, ...], NoDecode] = ()
    """Aliases or digests to load and serve, by commas; of an alias that is deployed, what is deployed."""
    deployments: bool = True
    """Take up deployments of other aliases, too, while workers are wanted for them."""
    max_deployed_models: int = Field(default=2, ge=1, le=64)
    """Of those other aliases, models held at once, loading ones and those being let go included: each has its
    own weights and KV cache. The last room is kept for another model of an alias that is served here."""
    retire_timeout_s: float = Field(default=900.0, gt=0)
    """How long a model that is no longer wanted may take to finish what was sent to it."""
    registry_address: str = Field(default="127.0.0.1:50052", validation_alias="TREADLE_REGISTRY_ADDRESS")
    node_cache: NodeCacheConfig = Field(default_factory=NodeCacheConfig)
    """For models whose files the registry has on another machine."""
    redis_url: str = Field(default="redis://127.0.0.1:6379/0", validation_alias="TREADLE_REDIS_URL")
    lease_s: float = Field(default=15.0, ge=1.5)
    """How long it is taken to live after its last beat, and how long it lets others be silent before it takes
    over what they held. It beats three times a lease; a busy machine needs a long one."""
    grace_period_s: float = Field(default=30.0, gt=0)
    """From SIGTERM to the end; what still runs then is handed back."""
    gather_s: float = Field(default=0.125, ge=0, le=10)
    """The longest that an answer's tokens are gathered into one message, while many answers stream; with few
    of them they are not. 0: never."""
    max_claimed: int = Field(default=64, ge=1)
    """Requests held at once a model: running and waiting in the engine."""
    max_claimed_tokens: int = Field(default=16_384, ge=1)
    """Of a model that does not generate: tokens held at once, instead of requests. Steps of its engine should
    find enough of them; what is more waits in the lanes, for any worker."""

    task_share: float = Field(default=DEFAULT_TASK_SHARE, gt=0, lt=1)
    """Of a device's time, what the engines of encoders get while decoders generate on the same device; the
    models of a kind divide their part evenly. Who has nothing to do leaves its part to the others."""

    @field_validator("models", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return (
            tuple(name.strip() for name in value.split(",") if name.strip())
            if isinstance(value, str)
            else value
        )
