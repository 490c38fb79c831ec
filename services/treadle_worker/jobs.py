"""A request as the I/O process knows it: what was asked, and what earlier owners delivered."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from treadle.models.stored_folder import StoredFolder
from treadle.queue.keys import RequestKeys
from treadle.queue.log import START, EntryId
from treadle_worker.engine_protocol import AddRequest, SamplingParams


@dataclass(frozen=True, slots=True)
class Job:
    """What a lane's entry asks for."""

    request: RequestKeys
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    stop_strings: tuple[str, ...] = ()
    include_stop_string: bool = False
    include_special_tokens: bool = False
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

    def to_engine(self, engine_id: str, delivered: Sequence[int]) -> AddRequest:
        """The command that starts it, or goes on after what was delivered."""
        return AddRequest(
            request_id=engine_id,
            prompt_token_ids=list(self.prompt_token_ids),
            output_token_ids=list(delivered),
            sampling=self.sampling,
            priority=self.priority,
            cache_salt=f"{self.request.tenant}/{self.adapter}",
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
