"""A metrics endpoint over a registry of its own, and raw requests to it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
from prometheus_client import CollectorRegistry, Counter


@dataclass(frozen=True)
class Answer:
    """What came back; status 0: the connection was closed unanswered."""

    status: int
    headers: dict[str, str]
    body: bytes


def parse(data: bytes) -> Answer:
    if not data:
        return Answer(0, {}, b"")
    head, _, body = data.partition(b"\r\n\r\n")
    line, *fields = head.decode().split("\r\n")
    headers = {name.lower(): value for name, _, value in (field.partition(": ") for field in fields)}
    assert int(headers["content-length"]) == len(body)
    assert headers["connection"] == "close"
    return Answer(int(line.split(" ")[1]), headers, body)


@pytest.fixture
def registry() -> CollectorRegistry:
    """One counter, at 7."""
    registry = CollectorRegistry()
    Counter("treadle:seen", "Seen.", registry=registry).inc(7)
    return registry


@pytest.fixture
def ask() -> Callable[..., Awaitable[Answer]]:
    """Sends bytes to a port and reads to the end; the peer's reset counts as the end."""

    async def ask(port: int, data: bytes, tls: ssl.SSLContext | None = None) -> Answer:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls)
        received = b""
        try:
            writer.write(data)
            async with asyncio.timeout(20):
                while part := await reader.read(1 << 16):
                    received += part
        except ConnectionError:
            pass
        finally:
            writer.transport.abort()
        return parse(received)

    return ask


@pytest.fixture
def get() -> Callable[..., bytes]:
    """The bytes of a request."""

    def get(target: str = "/metrics", method: str = "GET", **headers: str) -> bytes:
        fields = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
        return f"{method} {target} HTTP/1.1\r\nHost: here\r\n{fields}\r\n".encode("latin-1")

    return get
