"""The gateway over gRPC: convert, call, convert back."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from functools import partial

import grpc

from treadle.api.inference.v1 import generation_pb2, inference_pb2_grpc
from treadle.api.inference.v1 import inference_pb2 as pb
from treadle.errors import TreadleError
from treadle.security import current_principal
from treadle_gateway.batch import Batch
from treadle_gateway.calls import Context, when_over
from treadle_gateway.convert import ResponseBuilder, to_chunk, to_generation, to_served_model, to_status
from treadle_gateway.generation import DEFAULT_TENANT, Generation
from treadle_gateway.inference import Inference
from treadle_gateway.run import Run
from treadle_gateway.stream_items import Undecodable, decoded, item_decoder
from treadle_gateway.tasks.methods import TaskMethods
from treadle_gateway.tasks.tasks import Tasks

logger = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["InferenceService"].full_name


class InferenceServicer(TaskMethods, inference_pb2_grpc.InferenceServiceServicer):
    """Serves InferenceService."""

    def __init__(self, inference: Inference, tasks: Tasks, *, max_batch_in_flight: int) -> None:
        super().__init__(tasks, max_batch_in_flight=max_batch_in_flight)
        self._inference = inference

    async def Generate(self, request: pb.GenerateRequest, context: Context) -> pb.GenerateResponse:  # noqa: N802
        """The whole answer at once."""
        run = self._inference.run(_own(request.generation), context.time_remaining())
        when_over(context, run.leave)
        return await _collect(run)

    async def GenerateStream(  # noqa: N802
        self, request: pb.GenerateStreamRequest, context: Context
    ) -> AsyncIterator[pb.GenerateStreamResponse]:
        """The answer chunk by chunk."""
        run = self._inference.run(_own(request.generation), context.time_remaining())
        when_over(context, run.leave)
        async for chunk in run.chunks():
            yield pb.GenerateStreamResponse(chunk=to_chunk(chunk, run.request))

    async def Attach(  # noqa: N802
        self, request: pb.AttachRequest, context: Context
    ) -> AsyncIterator[pb.AttachResponse]:
        """The rest of an answer."""
        attachment = self._inference.attach(
            _tenant(request), request.request_id, request.cursor, context.time_remaining()
        )
        when_over(context, attachment.leave)
        async for chunk in attachment.chunks():
            yield pb.AttachResponse(chunk=to_chunk(chunk, attachment.request))

    async def Cancel(self, request: pb.CancelRequest, context: Context) -> pb.CancelResponse:  # noqa: N802
        """Ends a request."""
        return pb.CancelResponse(cancelled=await self._inference.cancel(_tenant(request), request.request_id))

    async def BatchGenerate(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.BatchGenerateRequest | Undecodable], context: Context
    ) -> AsyncIterator[pb.BatchGenerateResponse]:
        """Answers as they are ready."""
        answer = partial(self._answer_item, context)
        batch = Batch(aiter(request_iterator), answer, limit=self._max_in_flight)
        when_over(context, batch.close)
        async for response in batch.answers():
            yield response

    async def _answer_item(
        self, context: Context, index: int, item: pb.BatchGenerateRequest | Undecodable
    ) -> pb.BatchGenerateResponse:
        """An item's answer; whatever is wrong with it is wrong with it alone."""
        request_id = "" if isinstance(item, Undecodable) else item.generation.request_id
        try:
            run = self._inference.run(_own(decoded(item).generation), context.time_remaining())
            request_id = run.request.request_id
            return pb.BatchGenerateResponse(request_id=request_id, index=index, response=await _collect(run))
        except Exception as error:
            if not isinstance(error, TreadleError):
                logger.exception("an item of a batch failed", extra={"request_id": request_id})
            return pb.BatchGenerateResponse(request_id=request_id, index=index, error=to_status(error))

    async def ListModels(self, request: pb.ListModelsRequest, context: Context) -> pb.ListModelsResponse:  # noqa: N802
        """What can be asked for now."""
        lines, token = await self._inference.list_models(request.page_size, request.page_token)
        return pb.ListModelsResponse(models=map(to_served_model, lines), next_page_token=token)


def _own(message: generation_pb2.Generation) -> Generation:
    return to_generation(message, current_principal())


def _tenant(request: pb.AttachRequest | pb.CancelRequest) -> str:
    """Whose the request is; raises PermissionDenied for a foreign tenant."""
    return current_principal().tenant_for(request.tenant, default=DEFAULT_TENANT)


async def _collect(run: Run) -> pb.GenerateResponse:
    builder = ResponseBuilder()
    async for chunk in run.chunks():
        builder.add(chunk)
    return builder.build()


def add_to_server(servicer: InferenceServicer, server: grpc.aio.Server) -> None:
    """Adds the service; an undecodable item of a stream must reach its handler, not end the whole call."""
    inference_pb2_grpc.add_InferenceServiceServicer_to_server(servicer, server)
    batch = grpc.stream_stream_rpc_method_handler(
        servicer.BatchGenerate,
        request_deserializer=item_decoder(pb.BatchGenerateRequest),
        response_serializer=pb.BatchGenerateResponse.SerializeToString,
    )
    # The later registration of a method takes the earlier one's place.
    server.add_registered_method_handlers(SERVICE, {"BatchGenerate": batch, **servicer.stream_handlers()})
