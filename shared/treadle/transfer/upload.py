"""A file to a registry."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import grpc

from treadle.api.registry.v1 import registry_pb2_grpc, transfer_pb2
from treadle.errors import DeadlineExceeded, FailedPrecondition, TreadleError, Unavailable
from treadle.models.stored_folder import StoredFile
from treadle.rpc import from_rpc_error
from treadle.transfer.blocking import run_blocking
from treadle.transfer.retries import Retries

CHUNK = 1 << 20
"""Bytes of a message; the contract allows no more."""
ACCEPTED = "upload-accepted"
"""In the initial metadata of an upload that the registry takes, once it has the first message."""
WRONG_OFFSET = "WRONG_OFFSET"
"""The reason of a refusal that says where the upload goes on."""
_IDLE_S = 300.0
"""For one chunk: the registry hashes what it had before it takes the first one."""
_END_S = 600.0
"""For the registry to make the file durable."""


async def upload_file(
    stub: registry_pb2_grpc.RegistryServiceStub,
    path: Path,
    file: StoredFile,
    *,
    progress: Callable[[int], None] = lambda _: None,
) -> int:
    """Sends the file at `path` and gives the bytes that went over the network: 0 where it was there.

    Goes on from what an earlier try, of whichever process, has brought there. `progress` is told how many
    more bytes are there. Raises what the registry raises, DataLoss (CHECKSUM_MISMATCH) where the file is not
    that of its digest any more, Unavailable once the registry has been away for half a minute, and OSError.
    """
    upload, retries = _Upload(stub, path, file, progress), Retries()
    while True:
        before = upload.committed
        try:
            if not await upload.look():
                await upload.send()
            return upload.sent
        except (grpc.aio.AioRpcError, DeadlineExceeded) as error:
            if upload.committed > before:
                retries.progress()
            await retries.pause(_retried(error))


class _Upload:
    """One file on its way: `committed` bytes are there for certain, up to `at` they were sent."""

    def __init__(
        self,
        stub: registry_pb2_grpc.RegistryServiceStub,
        path: Path,
        file: StoredFile,
        progress: Callable[[int], None],
    ) -> None:
        self._stub, self._path, self._file, self._progress = stub, path, file, progress
        self.sent = self.at = self.committed = 0

    async def look(self) -> bool:
        """Asks how much is there; whether it is all."""
        request = transfer_pb2.GetUploadRequest(digest=self._file.digest)
        found = await self._stub.GetUpload(request, timeout=_IDLE_S)
        self.committed = self._file.size if found.complete else found.committed_bytes
        self._reached(self.committed)
        return found.complete

    def _reached(self, at: int) -> None:
        self._progress(at - self.at)
        self.at = at

    async def send(self) -> None:
        """Sends the rest."""
        call = self._stub.UploadBlob()
        file = await run_blocking(None, self._path.open, "rb", buffering=0)
        try:
            # The call raises why it ended early, where it did: no write says it.
            with contextlib.suppress(asyncio.InvalidStateError):
                await self._write(call, file)
            async with asyncio.timeout(_END_S):
                response = await call
            self._reached(response.committed_bytes)
        except TimeoutError:
            raise DeadlineExceeded(
                f"the registry took nothing of {self._file.path} for minutes", reason="STALLED"
            ) from None
        finally:
            call.cancel()
            file.close()

    async def _write(
        self,
        call: grpc.aio.StreamUnaryCall[transfer_pb2.UploadBlobRequest, transfer_pb2.UploadBlobResponse],
        file: io.FileIO,
    ) -> None:
        await run_blocking(None, file.seek, self.at)
        opening = transfer_pb2.UploadBlobRequest(
            digest=self._file.digest, total_bytes=self._file.size, offset=self.at
        )
        async with asyncio.timeout(_IDLE_S):
            await call.write(opening)
            # The reason of a refusal that comes while this side sends would be lost.
            if not any(key == ACCEPTED for key, _ in await call.initial_metadata()):
                return
        while self.at < self._file.size:
            data = await run_blocking(None, file.read, min(CHUNK, self._file.size - self.at))
            if not data:
                raise FailedPrecondition(f"{self._path} became shorter while it was sent; send it again")
            async with asyncio.timeout(_IDLE_S):
                await call.write(transfer_pb2.UploadBlobRequest(offset=self.at, data=data))
            self.sent += len(data)
            self._reached(self.at + len(data))
        await call.done_writing()


def _retried(error: grpc.aio.AioRpcError | TreadleError) -> grpc.aio.AioRpcError | TreadleError:
    """The error; one that only says that the upload goes on elsewhere is no reason to give it up."""
    if isinstance(error, grpc.aio.AioRpcError):
        failure = from_rpc_error(error)
        if failure.reason == WRONG_OFFSET:
            return Unavailable(failure.message, reason=WRONG_OFFSET)
    return error
