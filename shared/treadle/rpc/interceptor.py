"""The one server interceptor: names the request in the log, maps errors to statuses, asks who calls, decodes
tolerantly; in this order, from the outside in.

grpc.aio ends a call as UNKNOWN, before servicer and interceptors, when a deserialiser raises. So the
deserialiser gives back a marker instead, and the marker is refused here as INVALID_ARGUMENT.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import grpc

from treadle.errors import InvalidArgument, TreadleError, Unimplemented
from treadle.rpc.status import abort
from treadle.security import ANYBODY, Principal, ServerSecurity, bind_principal
from treadle.security.permissions import allowed_roles
from treadle.telemetry import bind_request_id

logger = logging.getLogger(__name__)

_QUIET = ("/grpc.health.v1.", "/grpc.reflection.")


class _Malformed:
    """Stands where a request would, had it been decodable."""


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    def attempt(data: bytes) -> Any:
        try:
            return deserialize(data) if deserialize else data
        except Exception:
            logger.info("a message could not be decoded", exc_info=True)
            return _Malformed()

    return attempt


def _checked(request: Any) -> Any:
    if isinstance(request, _Malformed):
        raise InvalidArgument(
            "the message cannot be decoded; send the message that the contract names, with valid UTF-8",
            reason="MALFORMED_MESSAGE",
        )
    return request


async def _checked_stream(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        yield _checked(request)


def _request_id(request: Any) -> str:
    """The client's request_id, wherever the request carries one."""
    for holder in (request, getattr(request, "generation", None), getattr(request, "context", None)):
        if request_id := getattr(holder, "request_id", ""):
            return str(request_id)[:128]
    return ""


def _authorize(security: ServerSecurity, details: grpc.HandlerCallDetails) -> Principal:
    """Who calls; raises Unauthenticated and PermissionDenied."""
    allowed = allowed_roles(details.method)
    if security.keys is None or allowed is None:
        return ANYBODY
    shown = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    principal = security.authenticate(str(shown[0]) if shown else None)
    principal.require(allowed, details.method.rpartition("/")[2])
    return principal


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server; see the module's docstring."""

    def __init__(self, security: ServerSecurity) -> None:
        self._security = security

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """The handler of the call, wrapped; None where the method is unknown."""
        handler: Any = await continuation(handler_call_details)
        if handler is None:
            return None
        kind = f"{'stream' if handler.request_streaming else 'unary'}_" + (
            "stream" if handler.response_streaming else "unary"
        )
        wrap = _wrap_stream if handler.response_streaming else _wrap_unary
        call = _Call(
            handler_call_details.method,
            handler.request_streaming,
            partial(_authorize, self._security, handler_call_details),
        )
        return handler._replace(
            request_deserializer=_tolerant(handler.request_deserializer),
            **{kind: wrap(getattr(handler, kind), call)},
        )


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    request_streaming: bool
    authorize: Callable[[], Principal]

    @contextlib.contextmanager
    def bound(self, request: Any) -> Iterator[None]:
        """What the log lines of this call carry."""
        with bind_request_id("" if self.request_streaming else _request_id(request)):
            yield

    def checked(self, request: Any) -> Any:
        return _checked_stream(request) if self.request_streaming else _checked(request)


def _wrap_unary(behaviour: Any, call: _Call) -> Any:
    async def handle(request: Any, context: Any) -> Any:
        started = time.monotonic()
        with call.bound(request):
            try:
                with bind_principal(call.authorize()):
                    response = await behaviour(call.checked(request), context)
            except BaseException as error:
                await _fail(context, call.method, started, error)
                raise
            _log(call.method, started, "OK")
            return response

    return handle


def _wrap_stream(behaviour: Any, call: _Call) -> Any:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        started = time.monotonic()
        with call.bound(request):
            try:
                with bind_principal(call.authorize()):
                    responses = behaviour(call.checked(request), context)
                    if inspect.isawaitable(responses):  # one that writes by itself, as Health.Watch
                        await responses
                    else:
                        async for response in responses:
                            yield response
            except BaseException as error:
                await _fail(context, call.method, started, error)
                raise
            _log(call.method, started, "OK")

    return handle


async def _fail(context: Any, method: str, started: float, error: BaseException) -> None:
    """Ends the call with the status of `error`; returns where the error must simply go on."""
    # grpc.aio leaks native memory where a handler swallows its cancellation.
    if isinstance(error, asyncio.CancelledError | GeneratorExit | grpc.aio.AbortError):
        _log(method, started, "CANCELLED" if not isinstance(error, grpc.aio.AbortError) else "ABORTED")
        return
    if isinstance(error, NotImplementedError):
        error = Unimplemented(f"{method} is in the contract, but this service has no code for it yet")
    if isinstance(error, TreadleError):
        _log(method, started, error.code, reason=error.reason)
    else:
        logger.error("a handler failed", exc_info=error, extra={"method": method})
        _log(method, started, "INTERNAL")
    await abort(context, error)


def _log(method: str, started: float, outcome: str, **fields: str) -> None:
    level = logging.DEBUG if method.startswith(_QUIET) else logging.INFO
    took = round((time.monotonic() - started) * 1e3, 2)
    logger.log(level, "call", extra={"method": method, "status": outcome, "milliseconds": took, **fields})
