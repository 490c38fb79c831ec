"""A registry that imports from a hub: over gRPC, from the command line, offline, and with a token."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from hub_models import REPOSITORY, SINGLE, bfloat16_shards, model_files
from hub_server import HubServer, hub_server
from registry_stubs import RegistryStubs, answer
from started_service import started
from waiting import until

from treadle.api.registry.v1 import registry_pb2, registry_pb2_grpc, source_pb2
from treadle.errors import (
    Cancelled,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ResourceExhausted,
    TreadleError,
    Unauthenticated,
    Unavailable,
)
from treadle.rpc import from_status, open_channel

TOKEN = "hf_" + "V3rySecretIndeed" * 2


@dataclass
class HubRegistry:
    """A registry's process with a Hugging Face home of its own."""

    stubs: RegistryStubs
    address: str
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def log(self) -> str:
        """What it has logged."""
        return (self.folder / "registry.log").read_text()

    @property
    def cache(self) -> Path:
        """The hub's cache."""
        return self.folder / "hf" / "hub"

    def partial_bytes(self) -> int:
        """What has come of files that are not whole."""
        return sum(path.stat().st_size for path in self.cache.glob("models--*/blobs/*.incomplete"))

    async def imported(self, **source: Any) -> registry_pb2.ImportModelResponse:
        """Imports to the end; raises what the operation says."""
        hub = source_pb2.HubSource(**{"repository": REPOSITORY} | source)
        return await self.stubs.imported(hub=hub)


@contextlib.asynccontextmanager
async def hub_registry(folder: Path, hub: HubServer, **environment: str) -> AsyncIterator[HubRegistry]:
    """The process, until the block's end."""
    variables = {name: "" for name in os.environ if name.startswith(("HF_", "HUGGING"))}
    variables |= {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "hf"),
        "TREADLE_STORE": str(folder / "store"),
        **environment,
    }
    with started("registry", folder / "registry.log", variables) as (process, address):
        async with open_channel(address) as channel:
            stubs = RegistryStubs(
                registry_pb2_grpc.RegistryServiceStub(channel),
                operations_pb2_grpc.OperationsStub(channel),
                folder / "store",
            )
            yield HubRegistry(stubs, address, process, folder)


@pytest.fixture
async def hub() -> AsyncIterator[HubServer]:
    """A hub without repositories."""
    with hub_server() as server:
        yield server


@pytest.fixture
async def registry(tmp_path: Path, hub: HubServer) -> AsyncIterator[HubRegistry]:
    """A registry of that hub."""
    async with hub_registry(tmp_path, hub, HF_HUB_DOWNLOAD_TIMEOUT="1") as made:
        yield made


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    """A repository's files."""
    return model_files()


async def test_an_import_tells_what_has_come(hub: HubServer, registry: HubRegistry, files: dict[str, bytes]):
    commit = hub.add(REPOSITORY, files)
    size = len(files[SINGLE])
    hub.fail("stall", SINGLE, at=size // 2, times=1000)
    source = source_pb2.HubSource(repository=REPOSITORY)
    operation = await registry.stubs.import_model(request_id="r-1", hub=source, alias="sea")
    metadata = registry_pb2.ImportModelMetadata()

    async def half() -> bool:
        get = operations_proto_pb2.GetOperationRequest(name=operation.name)
        found = await answer(registry.stubs.operations.GetOperation(get))
        assert not found.done, found
        assert found.metadata.Unpack(metadata)
        return metadata.stage == registry_pb2.IMPORT_STAGE_DOWNLOADING and metadata.done_bytes > 1000

    await until(half, "the download is told of")
    assert size < metadata.total_bytes < size + 2000
    assert (metadata.done_files, metadata.total_files) == (6, 7)
    assert metadata.source == f"hub:{REPOSITORY}"
    hub.released.set()
    response = await registry.stubs.response(operation, registry_pb2.ImportModelResponse())
    assert response.alias == "sea"
    assert response.artifact.source == f"hub:{REPOSITORY}@{commit}"
    assert response.artifact.facts.license == "apache-2.0"
    assert (await registry.imported(local_files_only=True)).already_present
    print(f"{metadata.done_bytes} of {metadata.total_bytes} bytes, {metadata.done_files} of 7 files")


async def test_errors_are_statuses_with_reasons(
    hub: HubServer, registry: HubRegistry, files: dict[str, bytes]
):
    hub.add(REPOSITORY, files)
    hub.add("river/gated", files, gated=True)
    hub.add("river/pickle", {name: data for name, data in files.items() if name != SINGLE})
    expected: list[tuple[dict[str, Any], type[TreadleError], str]] = [
        ({"repository": "nobody/nothing"}, NotFound, "REPOSITORY_NOT_FOUND"),
        ({"revision": "v9"}, NotFound, "REVISION_NOT_FOUND"),
        ({"variant": "fp16"}, NotFound, "VARIANT_NOT_FOUND"),
        ({"gguf_file": "m.gguf"}, NotFound, "HUB_FILE_NOT_FOUND"),
        ({"local_files_only": True}, NotFound, "FILE_NOT_CACHED"),
        ({"repository": "river/gated"}, Unauthenticated, "GATED_REPOSITORY"),
        ({"repository": "river/pickle"}, InvalidArgument, "PICKLE_WEIGHTS"),
    ]
    for source, kind, reason in expected:
        with pytest.raises(kind) as raised:
            await registry.imported(**source)
        assert raised.value.reason == reason
        if kind is not Unauthenticated:
            assert raised.value.fields[0].field == "hub"
    hub.fail("status", "/api/models", status=429, headers={"Retry-After": "77"})
    with pytest.raises(ResourceExhausted) as limited:
        await registry.imported()
    assert (limited.value.reason, limited.value.retry_after_s) == ("HUB_RATE_LIMITED", 77)
    hub.stop()
    with pytest.raises(Unavailable, match="HF_HUB_OFFLINE") as away:
        await registry.imported()
    assert away.value.reason == "HUB_UNREACHABLE"
    assert not list((registry.folder / "store" / "artifacts").iterdir())
    assert not list((registry.folder / "store" / "tmp").iterdir())
    print(f"{len(expected) + 2} refusals, nothing half done")


@pytest.mark.parametrize(
    ("source", "field"),
    [
        ({"repository": "http://127.0.0.1/a"}, "hub.repository"),
        ({"repository": "../a"}, "hub.repository"),
        ({"repository": ""}, "hub.repository"),
        ({"revision": "../main"}, "hub.revision"),
        ({"variant": "a/b"}, "hub.variant"),
        ({"gguf_file": "../m.gguf"}, "hub.gguf_file"),
    ],
)
async def test_what_is_no_name_is_refused_at_once(
    hub: HubServer, registry: HubRegistry, source: dict[str, Any], field: str
):
    with pytest.raises(InvalidArgument) as raised:
        await registry.stubs.import_model(hub=source_pb2.HubSource(**{"repository": REPOSITORY} | source))
    assert raised.value.fields[0].field == field
    assert not hub.requests


async def test_offline_by_the_environment(hub: HubServer, tmp_path: Path, files: dict[str, bytes]):
    hub.add(REPOSITORY, bfloat16_shards(files, 2))
    async with hub_registry(tmp_path, hub) as online:
        digest = (await online.imported()).artifact.digest
        await online.stubs.call("DeleteArtifact", digest=digest)
    before = len(hub.requests)
    async with hub_registry(tmp_path, hub, HF_HUB_OFFLINE="1") as offline:
        assert (await offline.imported()).artifact.digest == digest
        with pytest.raises(NotFound, match="'v2'") as raised:
            await offline.imported(revision="v2")
    assert raised.value.reason == "FILE_NOT_CACHED"
    sent = len(hub.requests) - before
    assert before > 5
    assert sent == 0
    print(f"{before} requests online, {sent} offline")


async def test_cancelled_and_taken_up_again(hub: HubServer, registry: HubRegistry, files: dict[str, bytes]):
    hub.add(REPOSITORY, files)
    size = len(files[SINGLE])
    hub.fail("stall", SINGLE, at=size // 2, times=1000)
    operation = await registry.stubs.import_model(hub=source_pb2.HubSource(repository=REPOSITORY))
    await until(lambda: registry.partial_bytes() == size // 2, "half of the weights is there")
    cancel = operations_proto_pb2.CancelOperationRequest(name=operation.name)
    await answer(registry.stubs.operations.CancelOperation(cancel))
    with pytest.raises(Cancelled):
        await registry.stubs.response(operation, registry_pb2.ImportModelResponse())
    assert not psutil.Process(registry.process.pid).children()
    hub.faults.clear()
    before = hub.sent(SINGLE)
    assert (await registry.imported()).artifact.digest
    assert hub.sent(SINGLE) - before == size - size // 2
    print(f"{hub.sent(SINGLE) - before} of {size} bytes after the cancellation")


@pytest.mark.parametrize("where", ["HF_TOKEN", "HF_TOKEN_PATH", "TREADLE_REGISTRY_HUB_TOKEN_FILE"])
async def test_a_token_is_seen_by_the_hub_alone(
    hub: HubServer, tmp_path: Path, files: dict[str, bytes], where: str
):
    hub.tokens.add(TOKEN)
    hub.add("river/mine", files, gated=True)
    hub.repositories["river/mine"].readers.add(TOKEN)
    hub.add("river/theirs", files, gated=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "token").write_text(TOKEN + "\n")
    value = TOKEN if where == "HF_TOKEN" else str(tmp_path / "secret" / "token")
    said: list[str] = []
    size = len(files[SINGLE])
    (tmp_path / "run").mkdir()
    async with hub_registry(tmp_path / "run", hub, **{where: value}) as registry:
        for repository, faults, kind in [
            ("river/theirs", [], PermissionDenied),
            ("river/mine", [hub.fail("status", "/api/models/river/mine", times=50, status=500)], Unavailable),
            ("river/nothing", [], NotFound),
        ]:
            with pytest.raises(kind) as raised:
                await registry.imported(repository=repository)
            said.append(
                f"{raised.value!r} {raised.value.message} {raised.value.metadata} {raised.value.fields}"
            )
            hub.faults = [fault for fault in hub.faults if fault not in faults]
        hub.fail("stall", SINGLE, at=size // 2)
        operation = await registry.stubs.import_model(hub=source_pb2.HubSource(repository="river/mine"))
        await until(lambda: registry.partial_bytes() == size // 2, "half of the weights is there")
        service = psutil.Process(registry.process.pid)
        running = [service, *service.children(recursive=True)]
        said += [" ".join(process.cmdline()) for process in running]
        assert len(running) > 1
        hub.released.set()
        await registry.stubs.response(operation, registry_pb2.ImportModelResponse())
        listed = await answer(
            registry.stubs.operations.ListOperations(
                operations_proto_pb2.ListOperationsRequest(name="operations")
            )
        )
        assert len(listed.operations) == 4
        said.append(str(listed))
        said.append(registry.log)
    written = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    found = [path for path in written if TOKEN.encode() in path.read_bytes()]
    assert not found
    assert not [text for text in said if TOKEN in text]
    assert {request.token for request in hub.requests if "/resolve/" in request.path} == {TOKEN}
    assert {request.token for request in hub.requests if request.host == "cdn"} == {""}
    print(f"{len(written)} files and {len(said)} texts without the token, {len(hub.requests)} requests")


def started_import(registry: HubRegistry, *arguments: str) -> subprocess.Popen[str]:
    """`treadle models import`, running."""
    command = [sys.executable, "-m", "treadle.cli.main", "models", "import", *arguments]
    return subprocess.Popen(
        [*command, "--registry", registry.address],
        env=os.environ | {"COLUMNS": "200", "TREADLE_HOME": str(registry.folder / "home")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def treadle(registry: HubRegistry, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`treadle models import`, from its start to its end."""
    with started_import(registry, *arguments) as process:
        output, errors = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


async def test_the_command_line(hub: HubServer, registry: HubRegistry, files: dict[str, bytes]):
    hub.add(REPOSITORY, bfloat16_shards(files, 1) | bfloat16_shards(files, 1, "bf16"), "main", "v1")
    missing = treadle(registry, f"hub:{REPOSITORY}@v1", "--offline")
    assert missing.returncode != 0
    assert "FILE_NOT_CACHED" in missing.stderr + missing.stdout or "has no revision 'v1'" in missing.stderr
    hub.fail("stall", SINGLE, at=1000)
    with started_import(registry, f"hub:{REPOSITORY}@v1", "--alias", "sea") as process:
        assert process.stderr is not None
        assert any("downloading" in line for line in process.stderr)
        hub.released.set()
        first, rest = process.communicate(timeout=60)
    assert process.returncode == 0, rest
    assert first.startswith("sha256:")
    again = treadle(registry, f"hub:{REPOSITORY}", "--revision", "v1", "--variant", "bf16")
    assert again.stdout.split()[0] == first.split()[0]
    before = len(hub.requests)
    offline = treadle(registry, f"hub:{REPOSITORY}@v1", "--offline")
    assert "the store had it before" in offline.stdout
    assert len(hub.requests) == before
    for arguments in (["./folder", "--variant", "fp16"], [f"hub:{REPOSITORY}@v1", "--revision", "v1"]):
        refused = treadle(registry, *arguments)
        assert refused.returncode != 0
        assert "Traceback" not in refused.stderr
    print(f"{len(hub.requests)} requests; {missing.stderr.strip()}")


async def test_a_repository_is_inspected_from_its_headers(hub: HubServer, registry: HubRegistry):
    files = model_files(seed=3, hidden_size=256, intermediate_size=1024, num_hidden_layers=6)
    hub.add(REPOSITORY, bfloat16_shards(files, 3), "v1")
    hub.add(
        "river/strange", files | {"config.json": files["config.json"].replace(b'"llama"', b'"delta_net"')}
    )

    async def inspected(**source: Any) -> Any:
        asked = source_pb2.HubSource(**{"repository": REPOSITORY} | source)
        return await registry.stubs.call("InspectModel", hub=asked)

    found = await inspected(revision="v1")
    sizes = {file.path: file.bytes for file in found.files}
    shards = [name for name in sizes if name.endswith(".safetensors")]
    assert len(shards) == 3
    assert found.facts.parameters == sum(share.parameters for share in found.facts.dtypes)
    assert [share.dtype for share in found.facts.dtypes] == ["BF16"]
    assert not found.HasField("refusal")
    came = sum(hub.sent(name) for name in shards)
    assert 0 < came < sum(sizes[name] for name in shards) / 4, "headers are a small part of the weights"
    assert not registry.cache.exists() or not list(registry.cache.glob("models--*/blobs/*")), (
        "nothing is kept"
    )
    strange = await inspected(repository="river/strange")
    assert strange.facts.model_type == "delta_net"
    assert strange.facts.parameters == found.facts.parameters
    assert error_reason(strange.refusal) == "UNSUPPORTED_ARCHITECTURE"
    with pytest.raises(NotFound, match="no revision 'main'"):
        await inspected(local_files_only=True)
    imported = await registry.imported(revision="v1")
    assert imported.artifact.facts.parameters == found.facts.parameters
    print(f"{came} of {sum(sizes[name] for name in shards)} bytes of weights came for the headers")


def error_reason(status: Any) -> str:
    """The stable reason of a status."""
    return from_status(status).reason
