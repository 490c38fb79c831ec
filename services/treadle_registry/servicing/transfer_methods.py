"""Blobs in chunks."""

# ruff: noqa: N802 - RPCs are named by the contract

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from treadle.api.registry.v1 import registry_pb2_grpc, transfer_pb2
from treadle.errors import DeadlineExceeded
from treadle.transfer.upload import ACCEPTED
from treadle_registry.transfers import IDLE_S, Transfers, UploadChunk


class TransferMethods(registry_pb2_grpc.RegistryServiceServicer):
    """Uploads and downloads."""

    _transfers: Transfers

    async def GetUpload(
        self, request: transfer_pb2.GetUploadRequest, context: object
    ) -> transfer_pb2.GetUploadResponse:
        """How much of a blob is here."""
        arrived = await self._transfers.arrived(request.digest)
        return transfer_pb2.GetUploadResponse(committed_bytes=arrived.size, complete=arrived.complete)

    async def UploadBlob(
        self, request_iterator: AsyncIterator[transfer_pb2.UploadBlobRequest], context: Any
    ) -> transfer_pb2.UploadBlobResponse:
        """Takes a blob, or the rest of one."""

        async def accepted() -> None:
            # A client that waits for these hears of a refusal, which one that is sending may not.
            await context.send_initial_metadata(((ACCEPTED, "1"),))

        committed = await self._transfers.upload(_chunks(request_iterator), accepted)
        return transfer_pb2.UploadBlobResponse(committed_bytes=committed)

    # It writes by itself and does not yield, so that a client that takes nothing is noticed.
    async def DownloadBlob(  # type: ignore[override]
        self, request: transfer_pb2.DownloadBlobRequest, context: Any
    ) -> None:
        """Sends a blob, no faster than the client takes it."""
        async with contextlib.aclosing(self._transfers.download(request.digest, request.offset)) as chunks:
            async for chunk in chunks:
                response = transfer_pb2.DownloadBlobResponse(
                    offset=chunk.offset, data=chunk.data, total_bytes=chunk.total_bytes
                )
                await _write(context, response, stalled=chunks.aclose)


async def _write(
    context: Any, response: transfer_pb2.DownloadBlobResponse, stalled: Callable[[], Awaitable[None]]
) -> None:
    """Sends one message; `stalled` is called where the client does not take it, which ends the call, too."""
    writing = asyncio.ensure_future(context.write(response))
    try:
        if not (await asyncio.wait({writing}, timeout=IDLE_S))[0]:
            # Its place is another's from here on; but no status can be sent while a message waits.
            await stalled()
            await writing
            raise DeadlineExceeded(
                f"nothing was taken for {IDLE_S:.0f} s; go on from where you are", reason="STALLED"
            )
        await writing
    finally:
        writing.cancel()
        await asyncio.gather(writing, return_exceptions=True)


async def _chunks(requests: AsyncIterator[transfer_pb2.UploadBlobRequest]) -> AsyncIterator[UploadChunk]:
    async for request in requests:
        yield UploadChunk(request.digest, request.total_bytes, request.offset, request.data)
