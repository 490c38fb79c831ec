"""A client of OpenAI's streaming completions, just large enough to time them: ids in, tokens counted."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any


class ServerRefused(Exception):
    """An answer that is no stream; the message is the server's."""


async def stream(address: str, model: str, prompt: list[int], new_tokens: int) -> AsyncIterator[int]:
    """How many tokens came, event by event; greedy, past the end of text. Raises ServerRefused and OSError.

    An event that does not tell its tokens' ids has one.
    """
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": new_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
    }
    async for event in _events(address, "/v1/completions", body):
        for choice in event.get("choices", ()):
            ids = choice.get("token_ids")
            # llama.cpp's last event has the reason of the end, and no token.
            count = len(ids) if ids is not None else int(bool(choice.get("text")))
            if count:
                yield count


async def is_healthy(address: str) -> bool:
    """Whether the server says that it is ready."""
    host, _, port = address.rpartition(":")
    try:
        reader, writer = await asyncio.open_connection(host, int(port))
    except OSError:
        return False
    try:
        writer.write(_request("GET", address, "/health", b""))
        return b" 200 " in await reader.readline()
    except OSError:
        return False
    finally:
        writer.close()


async def _events(address: str, path: str, body: object) -> AsyncIterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(_request("POST", address, path, json.dumps(body).encode()))
        status = await reader.readline()
        while (await reader.readline()).strip():
            pass  # headers: both servers stream in chunks
        if b" 200 " not in status:
            text = (await reader.read(1000)).decode(errors="replace")
            raise ServerRefused(f"{status.decode().strip()}: {text.strip()}")
        pending = b""
        async for chunk in _chunks(reader):
            *lines, pending = (pending + chunk).split(b"\n")
            for line in lines:
                data = line.removeprefix(b"data:").strip()
                if data and data != b"[DONE]" and line.startswith(b"data:"):
                    yield json.loads(data)
    finally:
        writer.close()


async def _chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """The parts of a chunked body, without their frames."""
    while size := int(await reader.readline() or b"0", 16):
        yield await reader.readexactly(size)
        await reader.readexactly(2)


def _request(method: str, address: str, path: str, body: bytes) -> bytes:
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body
