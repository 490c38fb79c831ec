"""Metrics over HTTP, in a thread of its own: a scrape takes nothing from the service's event loop."""

from __future__ import annotations

import asyncio
import http
import io
import logging
import socket
import ssl
import threading
from collections.abc import Callable
from email.message import Message
from http.client import HTTPException, parse_headers
from types import TracebackType
from typing import Any, Self

from prometheus_client import CollectorRegistry, make_wsgi_app

from treadle.errors import PermissionDenied, TreadleError, Unauthenticated, Unavailable, invalid_field

logger = logging.getLogger(__name__)

PATH = "/metrics"

MAX_CONNECTIONS = 16
"""At once; one more is closed unanswered."""
MAX_HEAD_BYTES = 16 << 10
"""Of a request: its line and its headers. A body is not read."""
DEADLINE_S = 10.0
"""From a connection to its end, TLS's handshake included."""
_STOP_S = 5.0
_PAUSE_S = 0.5


class MetricsEndpoint:
    """Serves `GET /metrics` of a registry on "host:port"; an async context manager.

    `authorize` is given the Authorization header ("" without one), in the endpoint's thread; it raises
    Unauthenticated (401) or PermissionDenied (403). Each connection answers one request and is closed.
    """

    def __init__(
        self,
        address: str,
        registry: CollectorRegistry,
        *,
        ssl_context: ssl.SSLContext | None = None,
        authorize: Callable[[str], None] | None = None,
    ) -> None:
        self.port = 0
        """The bound port, while it serves."""
        self._address = address
        self._app = make_wsgi_app(registry)
        self._ssl_context = ssl_context
        self._authorize = authorize
        self._stop = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop
        self._thread: threading.Thread | None = None

    async def __aenter__(self) -> Self:
        """Binds and serves; raises Unavailable (ADDRESS_IN_USE) where that cannot be."""
        listener = _listen(self._address)
        self.port = listener.getsockname()[1]
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, args=(listener,), name="metrics", daemon=True)
        self._thread.start()
        logger.info("metrics are served", extra={"address": self._address, "port": self.port})
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
            await asyncio.to_thread(self._thread.join, _STOP_S)

    def _run(self, listener: socket.socket) -> None:
        with listener, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve(listener))

    async def _serve(self, listener: socket.socket) -> None:
        accepting = asyncio.create_task(self._accept(listener))
        await self._stop.wait()
        # Whatever still runs is cancelled with the loop.
        accepting.cancel()

    async def _accept(self, listener: socket.socket) -> None:
        connections: set[asyncio.Task[None]] = set()
        while True:
            try:
                connection, _ = await self._loop.sock_accept(listener)
            except OSError:
                logger.exception("a scrape cannot be accepted")
                await asyncio.sleep(_PAUSE_S)
                continue
            if len(connections) >= MAX_CONNECTIONS:
                connection.close()
                continue
            task = asyncio.create_task(self._connected(connection))
            connections.add(task)
            task.add_done_callback(connections.discard)

    async def _connected(self, connection: socket.socket) -> None:
        try:
            async with asyncio.timeout(DEADLINE_S):
                await self._exchange(connection)
        except (TimeoutError, OSError) as error:
            logger.debug("a scrape was cut short", extra={"cause": str(error)})
        except Exception:
            logger.exception("a scrape failed")
        finally:
            connection.close()

    async def _exchange(self, connection: socket.socket) -> None:
        reader = asyncio.StreamReader(limit=MAX_HEAD_BYTES)
        protocol = asyncio.StreamReaderProtocol(reader)
        transport, _ = await self._loop.connect_accepted_socket(
            lambda: protocol, connection, ssl=self._ssl_context
        )
        writer = asyncio.StreamWriter(transport, protocol, reader, self._loop)
        try:
            writer.write(await self._answer(reader))
            await writer.drain()
            writer.close()
            await writer.wait_closed()
        finally:
            transport.abort()

    async def _answer(self, reader: asyncio.StreamReader) -> bytes:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            method, target, headers = _parse(head)
        except asyncio.LimitOverrunError:
            return _plain(http.HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        except asyncio.IncompleteReadError:
            return b""
        except (ValueError, HTTPException):
            return _plain(http.HTTPStatus.BAD_REQUEST)
        path, _, query = target.partition("?")
        if path != PATH:
            return _plain(http.HTTPStatus.NOT_FOUND)
        if method != "GET":
            return _plain(http.HTTPStatus.METHOD_NOT_ALLOWED, ("Allow", "GET"))
        if self._authorize is not None:
            try:
                self._authorize(headers.get("Authorization", ""))
            except Unauthenticated as error:
                return _plain(http.HTTPStatus.UNAUTHORIZED, ("WWW-Authenticate", "Bearer"), error=error)
            except PermissionDenied as error:
                return _plain(http.HTTPStatus.FORBIDDEN, error=error)
        try:
            return self._metrics(query, headers)
        except Exception:
            logger.exception("a scrape failed")
            return _plain(http.HTTPStatus.INTERNAL_SERVER_ERROR)

    def _metrics(self, query: str, headers: Message) -> bytes:
        """The registry's text, packed where the scraper takes that."""
        # Accept is not handed on: as OpenMetrics, prometheus_client writes "treadle_" for "treadle:".
        environ = {"REQUEST_METHOD": "GET", "PATH_INFO": PATH, "QUERY_STRING": query}
        if "Accept-Encoding" in headers:
            environ["HTTP_ACCEPT_ENCODING"] = headers["Accept-Encoding"]
        started: list[tuple[str, list[tuple[str, str]]]] = []

        def start_response(status: str, fields: list[tuple[str, str]], *_: Any) -> None:
            started.append((status, fields))

        body = b"".join(self._app(environ, start_response))
        ((status, fields),) = started
        return _response(status, fields, body)


def _listen(address: str) -> socket.socket:
    host, separator, port = address.rpartition(":")
    host = host.strip("[]")
    if not separator or not port.isdecimal() or int(port) > 65535:
        raise invalid_field("metrics_address", f'must be "host:port", or empty for none; got {address!r}')
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, int(port)), family=family, backlog=MAX_CONNECTIONS)
    except OSError as error:
        raise Unavailable(
            f"metrics cannot be served on {address}: {error.strerror}; is another process using the port? "
            "Name another address, or an empty one for none",
            reason="ADDRESS_IN_USE",
        ) from error
    # The loop's accept would wait in the kernel, and every connection with it.
    listener.setblocking(False)
    return listener


def _parse(head: bytes) -> tuple[str, str, Message]:
    line, _, rest = head.partition(b"\r\n")
    method, target, version = line.decode("ascii").split(" ")
    if not version.startswith("HTTP/1."):
        raise ValueError(version)
    return method, target, parse_headers(io.BytesIO(rest))


def _plain(status: http.HTTPStatus, *fields: tuple[str, str], error: TreadleError | None = None) -> bytes:
    text = status.phrase if error is None else error.message
    return _response(
        f"{status.value} {status.phrase}",
        [("Content-Type", "text/plain; charset=utf-8"), *fields],
        f"{text}\n".encode(),
    )


def _response(status: str, fields: list[tuple[str, str]], body: bytes) -> bytes:
    lines = [
        f"HTTP/1.1 {status}",
        *(f"{name}: {value}" for name, value in fields),
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    return "\r\n".join([*lines, "", ""]).encode() + body
