"""Metadata that a channel sends with every call: the key, and what else belongs to each of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import grpc

Headers = Callable[[], Sequence[tuple[str, str]]]
"""Asked at each call."""


class _Sends:
    def __init__(self, headers: Headers) -> None:
        self._headers = headers

    async def _continue(self, continuation: Callable[..., Any], details: Any, request: Any) -> Any:
        metadata = grpc.aio.Metadata(*(details.metadata or ()), *self._headers())
        return await continuation(details._replace(metadata=metadata), request)


# One class a kind of call: grpc.aio files an interceptor under the first kind that it is an instance of.
class _UnaryUnary(_Sends, grpc.aio.UnaryUnaryClientInterceptor):
    async def intercept_unary_unary(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._continue(continuation, client_call_details, request)


class _UnaryStream(_Sends, grpc.aio.UnaryStreamClientInterceptor):
    async def intercept_unary_stream(self, continuation: Any, client_call_details: Any, request: Any) -> Any:
        return await self._continue(continuation, client_call_details, request)


class _StreamUnary(_Sends, grpc.aio.StreamUnaryClientInterceptor):
    async def intercept_stream_unary(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await self._continue(continuation, client_call_details, request_iterator)


class _StreamStream(_Sends, grpc.aio.StreamStreamClientInterceptor):
    async def intercept_stream_stream(
        self, continuation: Any, client_call_details: Any, request_iterator: Any
    ) -> Any:
        return await self._continue(continuation, client_call_details, request_iterator)


def sends(headers: Headers) -> list[grpc.aio.ClientInterceptor]:
    """The interceptors that add `headers()` to every call of a channel.

    gRPC's own call credentials would do for a fixed key, but refuse to travel in plain text, as they have to
    on loopback and in a private network.
    """
    return [_UnaryUnary(headers), _UnaryStream(headers), _StreamUnary(headers), _StreamStream(headers)]
