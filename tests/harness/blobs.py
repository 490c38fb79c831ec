"""Blobs as a test sends them to a registry."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from pathlib import Path

import grpc
from registry_stubs import RegistryStubs, answer

from treadle.api.registry.v1 import transfer_pb2
from treadle.models.stored_folder import StoredFile
from treadle.transfer.upload import ACCEPTED
from treadle_registry.store.store import Store
from treadle_registry.store.uploads import Uploads

CHUNK = 1 << 20


def digest_of(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def write(path: Path, content: bytes) -> StoredFile:
    path.write_bytes(content)
    return StoredFile(path.name, digest_of(content), len(content))


def messages(content: bytes, offset: int = 0, **fields: object) -> list[transfer_pb2.UploadBlobRequest]:
    """An upload from `offset` on, as a client sends it: an opening without data, and chunks."""
    pieces = [
        transfer_pb2.UploadBlobRequest(offset=at, data=content[at : at + CHUNK])
        for at in range(offset, len(content), CHUNK)
    ]
    first = {"digest": digest_of(content), "total_bytes": len(content), "offset": offset} | fields
    return [transfer_pb2.UploadBlobRequest(**first), *pieces]


async def upload(client: RegistryStubs, requests: list[transfer_pb2.UploadBlobRequest]) -> int:
    call = client.registry.UploadBlob(timeout=60)
    with contextlib.suppress(asyncio.InvalidStateError):
        for request in requests:
            await call.write(request)
            if not any(key == ACCEPTED for key, _ in await call.initial_metadata()):
                break
        await call.done_writing()
    return (await answer(call)).committed_bytes


def publish(store: Path, file: StoredFile) -> None:
    """Makes an uploaded file one of the store's, as an import does; such files are no model."""
    made = Store(store)
    blob = made.blob_path(file.digest)
    blob.parent.mkdir(exist_ok=True)
    blob.hardlink_to(Uploads(made, 1 << 40).path(file.digest))


async def begun_upload(client: RegistryStubs, content: bytes) -> grpc.aio.StreamUnaryCall:
    call = client.registry.UploadBlob(timeout=60)
    for message in messages(content)[:2]:
        await call.write(message)
    return call
