"""From a checked generation to the entry of a lane: the model, the prompt's ids, the bounds, the defaults."""

from __future__ import annotations

from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.queue.keys import RequestKeys
from treadle_gateway import bounds, defaults
from treadle_gateway.clients import Tokenizer
from treadle_gateway.convert import to_lane_entry
from treadle_gateway.deadlines import Deadline
from treadle_gateway.generation import Generation
from treadle_gateway.models import Models
from treadle_gateway.prompts import tokenize


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
        assert generation.prompt is not None, "validate refuses a request without a prompt"
        model = await deadline.bound(self._models.find(generation.model, generation.profile))
        bounds.check_ids(generation, model)
        ids = await tokenize(
            self._tokenizer, generation.prompt, model, deadline, timeout_s=self._tokenizer_timeout_s
        )
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
