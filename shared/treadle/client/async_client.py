"""The asynchronous client of the gateway."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Unpack

import grpc

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.client.answer import Answer, BatchItem, ServedModel
from treadle.client.batch import Batch, BatchMethod, Items
from treadle.client.convert import answer_from_proto, generation_to_proto, served_model_from_proto
from treadle.client.inference_connection import BATCH_S
from treadle.client.reconnect import Reconnects
from treadle.client.request import GenerationOptions, GenerationRequest
from treadle.client.stream import AnswerStream, ChunkCall
from treadle.client.task_methods import TaskMethods
from treadle.rpc import from_rpc_error

_QUICK_S = 10.0
_BATCH_WINDOW = 256


class AsyncClient(TaskMethods):
    """Asks a gateway. One client serves any number of requests at once.

    Every request carries an id, so a call that loses its connection is made again, at most `reconnects`
    times in a row, without running twice. Every method raises TreadleError. The tasks beside generation
    (`embed`, `classify`, `tag`, `rerank`, `score`) are TaskMethods'.
    """

    async def generate(self, prompt: str | None = None, **options: Unpack[GenerationOptions]) -> Answer:
        """Runs one request to its end. `options` are the fields of GenerationRequest."""
        request = GenerationRequest(prompt=prompt, **options)
        timeout_s = self._timeout_of(request)
        message = inference_pb2.GenerateRequest(generation=self._to_proto(request))
        return answer_from_proto(
            await self._again_when_lost(
                lambda left_s: self._stub.Generate(message, timeout=left_s), timeout_s
            )
        )

    def stream(self, prompt: str | None = None, **options: Unpack[GenerationOptions]) -> AnswerStream:
        """Streams one answer; see AnswerStream. `options` are the fields of GenerationRequest."""
        request = GenerationRequest(prompt=prompt, **options)
        generation = self._to_proto(request)
        message = inference_pb2.GenerateStreamRequest(generation=generation)

        def open_call(cursor: str, left_s: float) -> ChunkCall:
            if cursor:
                return self._attach_call(generation.tenant, generation.request_id, cursor, left_s)
            return self._stub.GenerateStream(message, timeout=left_s)

        return AnswerStream(
            generation.request_id, open_call, Reconnects(self._reconnects, self._timeout_of(request))
        )

    def attach(self, request_id: str, cursor: str = "", *, tenant: str = "") -> AnswerStream:
        """Picks up a request's chunks after `cursor`, or from its start.

        The stream's `answer` holds what came since the cursor.
        """

        def open_call(after: str, left_s: float) -> ChunkCall:
            return self._attach_call(tenant or self._tenant, request_id, after, left_s)

        reconnects = Reconnects(self._reconnects, self._timeout_s)
        return AnswerStream(request_id, open_call, reconnects).resume_after(cursor)

    async def cancel(self, request_id: str, *, tenant: str = "") -> bool:
        """Ends a request wherever it is; False when it had ended before."""
        message = inference_pb2.CancelRequest(tenant=tenant or self._tenant, request_id=request_id)
        response = await self._again_when_lost(
            lambda left_s: self._stub.Cancel(message, timeout=left_s), _QUICK_S
        )
        return response.cancelled

    def batch(
        self, requests: Items[GenerationRequest], *, window: int = _BATCH_WINDOW, timeout_s: float = BATCH_S
    ) -> AsyncGenerator[BatchItem[Answer], None]:
        """Runs many requests; yields each outcome when it is ready, in any order.

        `window` bounds the requests that wait for their answers at a time, and `timeout_s` the whole batch,
        in seconds. One bad request fails alone: its
        item has the error.
        """

        method = BatchMethod(
            self._batch_message,
            lambda sending, left_s: self._stub.BatchGenerate(sending, timeout=left_s),
            lambda received: answer_from_proto(received.response),
            ordered=False,
        )
        return Batch(requests, method, Reconnects(self._reconnects, timeout_s), window).outcomes()

    async def models(self) -> list[ServedModel]:
        """What can be asked for now."""
        models: list[ServedModel] = []
        token = ""
        while True:
            message = inference_pb2.ListModelsRequest(tenant=self._tenant, page_token=token)
            try:
                response = await self._stub.ListModels(message, timeout=_QUICK_S)
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from error
            models += map(served_model_from_proto, response.models)
            token = response.next_page_token
            if not token:
                return models

    def _batch_message(self, request: GenerationRequest) -> tuple[str, inference_pb2.BatchGenerateRequest]:
        generation = self._to_proto(request)
        return generation.request_id, inference_pb2.BatchGenerateRequest(generation=generation)

    def _to_proto(self, request: GenerationRequest) -> generation_pb2.Generation:
        return generation_to_proto(
            request, model=self._model, tenant=self._tenant, timeout_s=self._timeout_of(request)
        )

    def _attach_call(self, tenant: str, request_id: str, cursor: str, left_s: float) -> ChunkCall:
        message = inference_pb2.AttachRequest(tenant=tenant, request_id=request_id, cursor=cursor)
        return self._stub.Attach(message, timeout=left_s)
