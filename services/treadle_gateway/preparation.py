"""From a checked generation to the entry of a lane: the model, the prompt's ids, the bounds, the defaults."""

from __future__ import annotations

from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.queue.keys import RequestKeys
from treadle_gateway import bounds, defaults
from treadle_gateway.clients import Tokenizer
from treadle_gateway.convert import to_lane_entry
from treadle_gateway.deadlines import Deadline
from treadle_gateway.generation import Generation
from treadle_gateway.models import Models, ServedModel
from treadle_gateway.prompts import tokenize

_TRIES = 3
"""How often a model may go while its prompt is tokenised."""


class Preparation:
    """Prepares requests; holds nothing of any of them."""

    def __init__(
        self, models: Models, tokenizer: Tokenizer, gateway_id: str, *, tokenizer_timeout_s: float
    ) -> None:
        self._models = models
        self._tokenizer = tokenizer
        self._gateway_id = gateway_id
        self._tokenizer_timeout_s = tokenizer_timeout_s

    async def prepare(
        self, generation: Generation, request: RequestKeys, deadline: Deadline, traceparent: str = ""
    ) -> LaneEntry:
        """The complete entry; raises whatever is wrong with the request, its model or its time."""
        model, ids = await self._tokenized(generation, request, deadline)
        for _ in range(_TRIES - 1):
            # Tokenising may take long enough for the model to be let go meanwhile.
            if await deadline.bound(self._models.is_ready(model)):
                break
            model, ids = await self._tokenized(generation, request, deadline)
        bounds.check_lengths(generation, ids, model)
        complete = defaults.complete(generation, model, len(ids))
        return to_lane_entry(
            complete,
            request,
            model,
            ids,
            gateway_id=self._gateway_id,
            timeout_ms=deadline.remaining_ms(),
            traceparent=traceparent,
        )

    async def _tokenized(
        self, generation: Generation, request: RequestKeys, deadline: Deadline
    ) -> tuple[ServedModel, tuple[int, ...]]:
        assert generation.prompt is not None, "validate refuses a request without a prompt"
        finding = self._models.find(generation.model, generation.profile, request.request_id)
        model = await deadline.bound(finding)
        bounds.check_task("generate", model, "generation.model")
        bounds.check_ids(generation, model)
        ids = await tokenize(
            self._tokenizer, generation.prompt, model, deadline, timeout_s=self._tokenizer_timeout_s
        )
        return model, ids
