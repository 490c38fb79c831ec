"""The asynchronous client of the tokenizer: a model's token ids, and their text."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import grpc

from treadle.api.tokenizer.v1 import tokenizer_pb2, tokenizer_pb2_grpc
from treadle.client.connection import Connection
from treadle.client.reconnect import Reconnects
from treadle.security import Credentials

DEFAULT_TOKENIZER_ADDRESS = "127.0.0.1:50053"
_CALL_S = 120.0
"""A text of megabytes takes its seconds."""
_RECONNECTS = 6
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class TokenizedTexts:
    """The ids of each text, and the digests of what made them."""

    token_ids: tuple[tuple[int, ...], ...]
    model_digest: str
    tokenizer_digest: str


class TokenizerClient(Connection):
    """Asks a tokenizer. Every method raises TreadleError."""

    def __init__(
        self, address: str = DEFAULT_TOKENIZER_ADDRESS, *, credentials: Credentials | None = None
    ) -> None:
        super().__init__(address, credentials)

    @property
    def _stub(self) -> tokenizer_pb2_grpc.TokenizerServiceStub:
        return tokenizer_pb2_grpc.TokenizerServiceStub(self._channel)

    async def encode(
        self, texts: Iterable[str], *, model: str, add_special_tokens: bool = True
    ) -> TokenizedTexts:
        """The token ids of each text; `model` is an alias or an artifact digest."""
        request = tokenizer_pb2.EncodeRequest(
            model=model,
            inputs=[tokenizer_pb2.EncodeInput(text=text) for text in texts],
            add_special_tokens=add_special_tokens,
        )
        response = await _call(lambda left_s: self._stub.Encode(request, timeout=left_s))
        return TokenizedTexts(
            tuple(tuple(encoding.ids) for encoding in response.encodings),
            response.artifact_digest,
            response.tokenizer_digest,
        )

    async def decode(
        self, token_ids: Iterable[Sequence[int]], *, model: str, skip_special_tokens: bool = True
    ) -> tuple[str, ...]:
        """The text of each list of ids."""
        request = tokenizer_pb2.DecodeRequest(
            model=model,
            inputs=[tokenizer_pb2.DecodeInput(ids=ids) for ids in token_ids],
            skip_special_tokens=skip_special_tokens,
        )
        response = await _call(lambda left_s: self._stub.Decode(request, timeout=left_s))
        return tuple(response.texts)


async def _call(call: Callable[[float], Awaitable[_T]]) -> _T:
    reconnects = Reconnects(_RECONNECTS, _CALL_S)
    while True:
        try:
            return await call(reconnects.left_s())
        except grpc.aio.AioRpcError as error:
            await reconnects.pause(error)
