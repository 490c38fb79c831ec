"""The tokenizer over gRPC: convert, call, convert back."""

from __future__ import annotations

from typing import Any

import grpc

from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb
from treadle.api.tokenizer.v1 import tokenizer_pb2_grpc
from treadle_tokenizer import convert
from treadle_tokenizer.text_service import TextService

Context = grpc.aio.ServicerContext[Any, Any]

SERVICE = "treadle.api.tokenizer.v1.TokenizerService"


class TokenizerServicer(tokenizer_pb2_grpc.TokenizerServiceServicer):
    """Errors leave as TreadleError; the server's interceptor makes statuses of them."""

    def __init__(self, service: TextService) -> None:
        self._service = service

    async def Encode(  # noqa: N802
        self, request: pb.EncodeRequest, context: Context
    ) -> pb.EncodeResponse:
        """Texts to token ids."""
        texts, options = convert.texts(request.inputs), convert.encode_options(request)
        return await self._service.encode(
            request.model, texts, options, convert.encodings, convert.encode_response
        )

    async def Decode(  # noqa: N802
        self, request: pb.DecodeRequest, context: Context
    ) -> pb.DecodeResponse:
        """Token ids to text."""
        skip = request.skip_special_tokens if request.HasField("skip_special_tokens") else True
        rows = [list(entry.ids) for entry in request.inputs]
        model, texts = await self._service.decode(request.model, rows, skip_special_tokens=skip)
        return pb.DecodeResponse(
            artifact_digest=model.artifact_digest, tokenizer_digest=model.tokenizer.digest, texts=texts
        )

    async def CountTokens(  # noqa: N802
        self, request: pb.CountTokensRequest, context: Context
    ) -> pb.CountTokensResponse:
        """How many tokens each text has."""
        add = request.add_special_tokens if request.HasField("add_special_tokens") else True
        texts = convert.texts(request.inputs)
        model, counts = await self._service.count(request.model, texts, add_special_tokens=add)
        return pb.CountTokensResponse(
            artifact_digest=model.artifact_digest, tokenizer_digest=model.tokenizer.digest, counts=counts
        )

    async def RenderChat(  # noqa: N802
        self, request: pb.RenderChatRequest, context: Context
    ) -> pb.RenderChatResponse:
        """Messages to the prompt that the model's chat template makes of them."""
        model, chat = await self._service.render_chat(
            request.model,
            [{"role": message.role, "content": message.content} for message in request.messages],
            add_generation_prompt=not request.HasField("add_generation_prompt")
            or request.add_generation_prompt,
            template_arguments_json=request.template_arguments_json,
            tokenize=request.tokenize,
        )
        return pb.RenderChatResponse(
            artifact_digest=model.artifact_digest,
            tokenizer_digest=model.tokenizer.digest,
            text=chat.text,
            ids=chat.ids,
        )
