"""The one server interceptor: traces and logs, counts, maps errors to statuses, asks who calls, decodes
tolerantly; in this order, from the outside in.
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
from typing import TYPE_CHECKING, Any

import grpc

from treadle.errors import TreadleError, Unimplemented
from treadle.rpc.decoding import Refused, decode
from treadle.rpc.status import abort
from treadle.security import ANYBODY, Principal, ServerSecurity, bind_principal
from treadle.security.permissions import allowed_roles
from treadle.telemetry import bind_request_id
from treadle.telemetry.tracing import NO_SPAN, TRACEPARENT, Span, SpanKind, Tracer, bind_span

if TYPE_CHECKING:
    from treadle.telemetry.rpc_metrics import MethodMetrics
    from treadle.telemetry.service import Telemetry

logger = logging.getLogger(__name__)

_QUIET = ("/grpc.health.v1.", "/grpc.reflection.")
_CODES: dict[int, str] = {code.value[0]: code.name for code in grpc.StatusCode}


def _tolerant(deserialize: Callable[[bytes], Any] | None) -> Callable[[bytes], Any]:
    return partial(decode, deserialize) if deserialize else _as_it_is


def _as_it_is(data: bytes) -> bytes:
    return data


def _checked(request: Any) -> Any:
    if isinstance(request, Refused):
        raise request.error
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


def _unread(_: bytes) -> None:
    """For a call that is refused whatever it says: nothing of a stranger's message is parsed."""


def _caller(security: ServerSecurity, details: grpc.HandlerCallDetails) -> Principal | TreadleError:
    """Who calls, or why that one may not."""
    try:
        return _recognised(security, details)
    except TreadleError as refusal:
        return refusal


def _recognised(security: ServerSecurity, details: grpc.HandlerCallDetails) -> Principal:
    allowed = allowed_roles(details.method)
    if security.keys is None or allowed is None:
        return ANYBODY
    shown = [value for key, value in details.invocation_metadata or () if key == "authorization"]
    principal = security.authenticate(str(shown[0]) if shown else None)
    principal.require(allowed, details.method.rpartition("/")[2])
    return principal


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every handler of a server; see the module's docstring."""

    def __init__(self, security: ServerSecurity, telemetry: Telemetry | None = None) -> None:
        self._security = security
        self._telemetry = telemetry

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
        call = self._call(handler_call_details, handler.request_streaming)
        return handler._replace(
            request_deserializer=_unread if call.refused else _tolerant(handler.request_deserializer),
            **{kind: wrap(getattr(handler, kind), call)},
        )

    def _call(self, details: grpc.HandlerCallDetails, request_streaming: bool) -> _Call:
        metrics, span, method = None, NO_SPAN, details.method
        caller = _caller(self._security, details)
        if self._telemetry is not None:
            quiet = method.startswith(_QUIET)
            metrics = self._telemetry.rpc.method(method, measured=not quiet)
            if self._telemetry.tracer.recording and not quiet:
                span = _server_span(self._telemetry.tracer, details)
        return _Call(method, request_streaming, caller, metrics, span)


def _server_span(tracer: Tracer, details: grpc.HandlerCallDetails) -> Span:
    """The call's span, which goes on from the caller's."""
    name = details.method.lstrip("/")
    shown = [value for key, value in details.invocation_metadata or () if key == TRACEPARENT]
    return tracer.span(
        name,
        traceparent=str(shown[0]) if shown else "",
        kind=SpanKind.SERVER,
        attributes={"rpc.system.name": "grpc", "rpc.method": name},
    )


@dataclass(slots=True)
class _Ending:
    """How a call ended."""

    code: str = "OK"
    reason: str = ""
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class _Call:
    method: str
    request_streaming: bool
    caller: Principal | TreadleError
    metrics: MethodMetrics | None
    span: Span

    @property
    def refused(self) -> bool:
        return isinstance(self.caller, TreadleError)

    def admitted(self) -> Principal:
        """Who calls; raises the refusal."""
        if isinstance(self.caller, TreadleError):
            raise self.caller
        return self.caller

    @contextlib.contextmanager
    def observed(self, request: Any) -> Iterator[_Ending]:
        """Around everything that happens in the call: its log lines, its span, its counts."""
        ending, started = _Ending(), time.monotonic()
        if self.metrics is not None:
            self.metrics.begin()
        with (
            bind_request_id("" if self.request_streaming else _request_id(request)),
            bind_span(self.span) if self.span.recording else contextlib.nullcontext(),
        ):
            try:
                yield ending
            finally:
                seconds = time.monotonic() - started
                if self.metrics is not None:
                    self.metrics.end(ending.code, seconds)
                _log(self.method, seconds, ending)
                if self.span.recording:
                    self.span.set({"rpc.response.status_code": ending.code})
                    self.span.end(ending.error)

    def checked(self, request: Any) -> Any:
        return _checked_stream(request) if self.request_streaming else _checked(request)


def _wrap_unary(behaviour: Any, call: _Call) -> Any:
    async def handle(request: Any, context: Any) -> Any:
        with call.observed(request) as ending:
            try:
                with bind_principal(call.admitted()):
                    return await behaviour(call.checked(request), context)
            except BaseException as error:
                await _fail(context, call.method, ending, error)
                raise

    return handle


def _wrap_stream(behaviour: Any, call: _Call) -> Any:
    async def handle(request: Any, context: Any) -> AsyncIterator[Any]:
        with call.observed(request) as ending:
            try:
                with bind_principal(call.admitted()):
                    responses = behaviour(call.checked(request), context)
                    if inspect.isawaitable(responses):  # one that writes by itself, as Health.Watch
                        await responses
                    else:
                        async for response in responses:
                            yield response
            except BaseException as error:
                await _fail(context, call.method, ending, error)
                raise

    return handle


async def _fail(context: Any, method: str, ending: _Ending, error: BaseException) -> None:
    """Ends the call with the status of `error`; returns where the error must simply go on."""
    ending.error = error
    # grpc.aio leaks native memory where a handler swallows its cancellation.
    if isinstance(error, asyncio.CancelledError | GeneratorExit):
        remaining_s = context.time_remaining()
        ending.code = "CANCELLED" if remaining_s is None or remaining_s > 0 else "DEADLINE_EXCEEDED"
        return
    if isinstance(error, grpc.aio.AbortError):
        ending.code = _CODES.get(context.code(), "UNKNOWN")
        return
    if isinstance(error, NotImplementedError):
        error = Unimplemented(f"{method} is in the contract, but this service has no code for it yet")
    if isinstance(error, TreadleError):
        ending.code, ending.reason = error.code, error.reason
    else:
        logger.error("a handler failed", exc_info=error, extra={"method": method})
        ending.code = "INTERNAL"
    await abort(context, error)


def _log(method: str, seconds: float, ending: _Ending) -> None:
    level = logging.DEBUG if method.startswith(_QUIET) else logging.INFO
    fields: dict[str, object] = {"method": method, "status": ending.code}
    fields["milliseconds"] = round(seconds * 1e3, 2)
    if ending.reason:
        fields["reason"] = ending.reason
    logger.log(level, "call", extra=fields)
