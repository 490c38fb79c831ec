"""The front door's calls in plain Python: run, attach, cancel, list."""

from __future__ import annotations

import uuid
from dataclasses import replace

from treadle.errors import Cancelled
from treadle.queue import control
from treadle.queue.keys import RequestKeys
from treadle_gateway.addressing import check_names
from treadle_gateway.admission import Admission
from treadle_gateway.attachment import Attachment
from treadle_gateway.config import GatewayConfig
from treadle_gateway.convert import to_status
from treadle_gateway.cursor import Cursor
from treadle_gateway.deadlines import Deadline, request_deadline
from treadle_gateway.generation import DEFAULT_TENANT, Generation
from treadle_gateway.hold import Queue
from treadle_gateway.listing import Aliases, Listed, list_served, page
from treadle_gateway.lookup import log_state
from treadle_gateway.metrics import GatewayMetrics
from treadle_gateway.models import Models
from treadle_gateway.observation import GenerationObservation
from treadle_gateway.preparation import Preparation
from treadle_gateway.run import Run
from treadle_gateway.validation import validate
from treadle_gateway.violations import Violations


class Inference:
    """What the gateway can be asked for.

    `remaining_s` is what the call's own deadline leaves; None: it has none.
    """

    def __init__(
        self,
        config: GatewayConfig,
        queue: Queue,
        preparation: Preparation,
        models: Models,
        aliases: Aliases,
        admission: Admission,
        metrics: GatewayMetrics,
    ) -> None:
        self._config = config
        self._queue = queue
        self._preparation = preparation
        self._models = models
        self._aliases = aliases
        self._admission = admission
        self._metrics = metrics

    def run(self, generation: Generation, remaining_s: float | None) -> Run:
        """Takes a generation; nothing happens before its chunks are read.

        The caller says `leave` when the client is gone. Raises ResourceExhausted (GATEWAY_FULL),
        InvalidArgument and Unimplemented.
        """
        with self._admission.taking(self._metrics.refused) as slot:
            validate(generation, self._config)
            request_id = generation.request_id or f"gen-{uuid.uuid4().hex}"
            return Run(
                self._queue,
                self._preparation,
                generation,
                RequestKeys(generation.tenant, request_id),
                request_deadline(generation.timeout_s, remaining_s, self._config),
                slot,
                GenerationObservation(self._metrics, generation, request_id),
            )

    def attach(self, tenant: str, request_id: str, cursor: str, remaining_s: float | None) -> Attachment:
        """Follows a request again, after a cursor; raises ResourceExhausted and InvalidArgument."""
        request = _named(tenant, request_id)
        after = Cursor.decode(cursor, request)
        deadline = Deadline.earliest(remaining_s, self._config.max_timeout_s)
        attachment = Attachment(self._queue, request, after, deadline, self._admission.admit())
        self._metrics.resumes.inc()
        return attachment

    async def cancel(self, tenant: str, request_id: str) -> bool:
        """Ends a request wherever it is; False when it had ended before; raises NotFound."""
        request = _named(tenant, request_id)
        # Before anything is written, so that unknown ids leave no keys.
        await log_state(self._queue.redis, request)
        status = to_status(Cancelled("the request was cancelled by a call of Cancel"))
        return await control.cancel(self._queue.redis, request, status)

    async def list_models(self, page_size: int, page_token: str) -> tuple[list[Listed], str]:
        """A page of what is served now, and the token of the next one ("": none)."""
        loaded = await self._models.loaded()
        aliases = await self._aliases.read(loaded)
        lines, token = page(list_served(loaded, aliases), page_size, page_token)
        known = await self._models.artifacts(line.artifact_digest for line in lines)
        facts = {digest: artifact.facts for digest, artifact in known.items()}
        return [replace(line, facts=facts.get(line.artifact_digest)) for line in lines], token


def _named(tenant: str, request_id: str) -> RequestKeys:
    found = Violations()
    check_names(found, request_id, tenant, required=True)
    found.check()
    return RequestKeys(tenant or DEFAULT_TENANT, request_id)
