"""What was asked, as the I/O process knows it, and what earlier owners delivered of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import cast

from treadle.models.stored_folder import StoredFolder
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, EntryId
from treadle_worker.engine_protocol import (
    Activation,
    AddRequest,
    AddTask,
    Pooling,
    SamplingParams,
    Task,
    TaskInput,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every entry of a lane says."""

    request: RequestKeys
    priority: int = 0
    timeout_ms: int = 0
    """From the entry's arrival in its lane; 0: no deadline."""
    detaches: bool = False
    """Whether it goes on when its client goes."""
    retention_ms: int = 0
    artifact_digest: str = ""
    tokenizer_digest: str = ""
    profile: str = ""
    adapter: str = ""
    model_name: str = ""
    """As the client named it."""
    traceparent: str = ""
    """The W3C trace context that it comes from; empty: none."""

    @property
    def cache_salt(self) -> str:
        """Whose prefixes it may share."""
        return f"{self.request.tenant}/{self.adapter}"


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationJob(Job):
    """A prompt that is to be gone on with."""

    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    stop_strings: tuple[str, ...] = ()
    include_stop_string: bool = False
    include_special_tokens: bool = False

    def to_engine(self, engine_id: str, delivered: Sequence[int]) -> AddRequest:
        """The command that starts it, or goes on after what was delivered."""
        return AddRequest(
            request_id=engine_id,
            prompt_token_ids=list(self.prompt_token_ids),
            output_token_ids=list(delivered),
            sampling=self.sampling,
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskJob(Job):
    """Something that is asked of whole texts, as AddTask says it; nothing of it is checked yet."""

    task: str
    """Empty: one that only a later worker knows."""
    inputs: tuple[TaskInput, ...]
    pooling: str = ""
    normalize: bool = False
    dimensions: int = 0
    activation: str = ""

    @property
    def num_tokens(self) -> int:
        """Of all inputs together."""
        return sum(len(one.token_ids) for one in self.inputs)

    def to_engine(self, engine_id: str) -> AddTask:
        """The command that has it computed; an engine may be sent it once `check_task` has passed it."""
        return AddTask(
            request_id=engine_id,
            task=cast("Task", self.task),
            inputs=list(self.inputs),
            pooling=cast("Pooling", self.pooling),
            normalize=self.normalize,
            dimensions=self.dimensions,
            activation=cast("Activation", self.activation),
            priority=self.priority,
            cache_salt=self.cache_salt,
        )


@dataclass(frozen=True, slots=True)
class History:
    """What a request's log says of earlier owners: it stays as it is."""

    started: bool = False
    cached_tokens: int = 0
    token_ids: list[int] = field(default_factory=list)
    last: EntryId = START
    """Nothing but fences lies behind it in the log."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A model as the registry has it."""

    digest: str
    compute_digest: str
    tokenizer_digest: str
    folder: StoredFolder
    """The canonical folder, on a path that this worker can read."""
    is_encoder: bool = False
    """It sees texts whole and generates nothing."""
