"""What the I/O process and the engine process say to one another.

Frozen msgspec structs, sent as MessagePack frames over a socket pair: one bounded message a step each
way. Nothing here knows of torch, Redis or gRPC, so that both processes and the tests may import it.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop_token", "length", "aborted", "error"]
Task = Literal["embed", "classify", "tag", "rank", "score"]
Pooling = Literal["", "mean", "cls", "last"]
Activation = Literal["", "softmax", "sigmoid"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How one request's tokens are drawn. Every value was checked by the gateway."""

    temperature: float = 1.0
    """0 is greedy."""
    top_k: int = 0
    """0: all."""
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    """Over prompt and output, as in CTRL: positive logits are divided, negative ones multiplied."""
    presence_penalty: float = 0.0
    """Over the output alone, once a token."""
    frequency_penalty: float = 0.0
    """Over the output alone, once an occurrence."""
    logit_bias: dict[int, float] = {}
    stop_token_ids: tuple[int, ...] = ()
    """With the model's end-of-text ids, unless they are ignored."""
    max_new_tokens: int
    min_new_tokens: int = 0
    logprobs: int | None = None
    """None: none; n: of the chosen token and of the n best."""


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag="add"):
    """Starts a request, or goes on with one that another worker began.

    `output_token_ids` are tokens that were delivered before: they count as output (penalties, lengths,
    sampling positions) and are never sampled again.
    """

    request_id: str
    prompt_token_ids: list[int]
    output_token_ids: list[int] = []
    sampling: SamplingParams
    priority: int = 0
    """Higher goes first and is preempted last."""
    cache_salt: str = ""
    """Prefix blocks are shared only between requests with the same salt (tenant and adapter)."""


class TaskInput(msgspec.Struct, frozen=True, kw_only=True):
    """A text, or a pair, as ids."""

    token_ids: list[int]
    type_ids: list[int] = []
    """One a token; empty: all 0."""
    first: int = 0
    """Of "embed" the first token that is pooled, of "score" the first of the continuation."""


class AddTask(msgspec.Struct, frozen=True, kw_only=True, tag="task"):
    """Asks for something about whole texts. A TaskOutput answers, its bytes laid out as queue.proto says."""

    request_id: str
    task: Task
    inputs: list[TaskInput]
    pooling: Pooling = ""
    """Of "embed"; of "rank" where documents are ranked by embeddings, else empty."""
    normalize: bool = False
    dimensions: int = 0
    """0: all."""
    activation: Activation = ""
    """Of "classify", and of "rank" by a head."""
    priority: int = 0
    cache_salt: str = ""
    """As AddRequest's, for "score"."""


class AbortRequest(msgspec.Struct, frozen=True, kw_only=True, tag="abort"):
    """Drops a request or a task; one that is not there is no error. No output follows."""

    request_id: str


class Turn(msgspec.Struct, frozen=True, kw_only=True, tag="turn"):
    """Of engines that share a device one at a time computes. An engine begins with the turn; told that it is
    taken away, it ends its step, says TurnOver and makes no other before it is given again."""

    granted: bool


class Shutdown(msgspec.Struct, frozen=True, kw_only=True, tag="shutdown"):
    """Ends the engine process."""


class EngineStart(msgspec.Struct, frozen=True, kw_only=True, tag="start"):
    """The first message: what to load, and how. The fields are EngineConfig's."""

    model_folder: str
    """A canonical folder: config.json and safetensors."""
    device: str
    dtype: str
    quantization: Literal["", "int8", "int4"]
    kernels: Literal["auto", "native", "torch"]
    block_size: int
    num_blocks: int | None
    kv_cache_bytes: int | None
    max_memory_percent: float | None
    cache_dtype: str
    attention_backend: Literal["auto", "sdpa", "flash_attn", "flashinfer"]
    enforce_eager: bool
    max_num_seqs: int
    max_num_batched_tokens: int
    max_num_batched_task_tokens: int
    max_model_len: int | None
    enable_prefix_caching: bool
    num_threads: int | None
    max_inter_token_ms: float
    num_speculative_tokens: int
    max_speculative_rows: int


EngineCommand = AddRequest | AddTask | AbortRequest | Turn | Shutdown


class EngineCommands(msgspec.Struct, frozen=True, kw_only=True):
    """One message from the I/O process."""

    commands: list[EngineCommand]


class TokenLogprobs(msgspec.Struct, frozen=True, kw_only=True):
    """Log-probabilities at one position."""

    logprob: float
    top: list[tuple[int, float]] = []


class SequenceOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What one step did for one request."""

    request_id: str
    first_index: int
    """Index in the output of the first of token_ids; delivered tokens count."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""
    """What went wrong, with finish_reason "error"."""
    stop_token_id: int | None = None
    num_cached_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was first scheduled."""


class TaskOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A task's end: its result, or what went wrong."""

    request_id: str
    data: bytes = b""
    error: str = ""


class DeviceMemory(msgspec.Struct, frozen=True, kw_only=True):
    """Of the accelerator's memory, in bytes; 0 on a CPU."""

    allocated_bytes: int = 0
    """In tensors of the engine: weights, cache, and what a step makes."""
    reserved_bytes: int = 0
    """Those, and what the engine keeps for the next ones."""
    peak_bytes: int = 0
    """The most that was in tensors since the engine became ready."""
    total_bytes: int = 0
    """Of the device."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges of now, and counters since the engine started."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks: int = 0
    num_free_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    prefix_cache_queries: int = 0
    """Prompt tokens that were looked up in the prefix cache."""
    prefix_cache_hits: int = 0
    """Prompt tokens that were found there."""
    num_chunked_prefills: int = 0
    """Prefill chunks that did not reach their prompt's end."""
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0
    num_draft_tokens: int = 0
    """Tokens that were guessed and checked."""
    num_accepted_tokens: int = 0
    """Tokens that came in the same step as the one before them, because they had been guessed."""
    num_task_inputs: int = 0
    """Texts that tasks were computed of."""
    num_task_tokens: int = 0
    num_commands: int = 0
    """Commands taken in: whoever sent an abort knows from it that the blocks are free."""
    device_memory: DeviceMemory = DeviceMemory()


class StepOutputs(msgspec.Struct, frozen=True, kw_only=True, tag="step"):
    """What one step made."""

    outputs: list[SequenceOutput]
    stats: EngineStats
    task_outputs: list[TaskOutput] = []
    scheduled_at: float = 0.0
    """By the machine's monotonic clock, seconds."""
    admitted: list[str] = []
    """Requests that were scheduled for the first time."""
    preempted: list[str] = []
    """Requests whose blocks were taken away; their tokens are computed anew later."""


class TurnOver(msgspec.Struct, frozen=True, kw_only=True, tag="turn_over"):
    """The engine makes no step until it is given the turn."""


class Loading(msgspec.Struct, frozen=True, kw_only=True, tag="loading"):
    """The engine still loads; sent at least every few seconds meanwhile."""

    stage: str


class Ready(msgspec.Struct, frozen=True, kw_only=True, tag="ready"):
    """The engine takes requests."""

    max_model_len: int
    vocab_size: int
    num_blocks: int
    block_size: int
    max_num_seqs: int
    process_id: int
    device_memory: DeviceMemory = DeviceMemory()
    tasks: list[Task] = []
    """What else than generation can be asked of it."""
    generates: bool = True


class Failed(msgspec.Struct, frozen=True, kw_only=True, tag="failed"):
    """The engine cannot go on; it ends after this."""

    message: str


EngineEvent = StepOutputs | TurnOver | Loading | Ready | Failed
