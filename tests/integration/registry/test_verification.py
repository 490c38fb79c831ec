"""VerifyArtifact: every file is hashed again, and what is damaged is named."""

from __future__ import annotations

from pathlib import Path

import pytest
from damage import flip
from google.longrunning import operations_proto_pb2
from registry_stubs import RegistryStubs, write_folder

from treadle.api.registry.v1 import registry_pb2
from treadle.errors import InvalidArgument, NotFound


async def verified(client: RegistryStubs, digest: str = "") -> registry_pb2.VerifyArtifactResponse:
    operation = await client.call("VerifyArtifact", digest=digest)
    return await client.response(operation, registry_pb2.VerifyArtifactResponse())


async def test_a_whole_store(client: RegistryStubs, tmp_path: Path):
    artifacts = [
        (await client.imported(folder=str(write_folder(tmp_path / str(seed), seed)))).artifact
        for seed in range(3)
    ]
    files = {file.digest: file.bytes for one in artifacts for file in (*one.files, *one.source_files)}
    everything = await verified(client)
    assert everything.verified_artifacts == 3
    assert not everything.damaged_files
    assert everything.verified_bytes == sum(files.values()), "a file of several artifacts is read once"
    one = await verified(client, artifacts[1].digest)
    assert (one.verified_artifacts, one.verified_bytes) == (1, artifacts[1].total_bytes)


async def test_what_is_damaged(client: RegistryStubs, tmp_path: Path):
    artifacts = [
        (await client.imported(folder=str(write_folder(tmp_path / str(seed), seed)))).artifact
        for seed in range(2)
    ]
    first, second = (Path(artifact.location) for artifact in artifacts)
    flip(first / "model.safetensors")
    # Both have this one.
    flip(first / "config.json")
    (second / "generation_config.json").unlink()
    (second / "stranger.txt").write_text("?")
    found = {
        (file.artifact_digest, file.path): (file.expected_digest, file.found_digest)
        for file in (await verified(client)).damaged_files
    }
    due = {file.path: file.digest for file in artifacts[1].files}
    assert found.keys() == {
        (artifacts[0].digest, "canonical/model.safetensors"),
        (artifacts[0].digest, "canonical/config.json"),
        (artifacts[1].digest, "canonical/config.json"),
        (artifacts[1].digest, "canonical/generation_config.json"),
        (artifacts[1].digest, "canonical/stranger.txt"),
    }
    assert found[artifacts[1].digest, "canonical/generation_config.json"] == (
        due["generation_config.json"],
        "",
    )
    assert found[artifacts[1].digest, "canonical/stranger.txt"][0] == ""
    assert (await verified(client, artifacts[1].digest)).damaged_files
    for artifact, seed in zip(artifacts, range(2), strict=True):
        await client.imported(folder=str(write_folder(tmp_path / f"again-{seed}", seed)))
        assert not (await verified(client, artifact.digest)).damaged_files
    print(f"{len(found)} damaged files were found and put right")


async def test_what_cannot_be_verified(client: RegistryStubs):
    with pytest.raises(NotFound):
        await client.call("VerifyArtifact", digest="sha256:" + "0" * 64)
    with pytest.raises(InvalidArgument) as caught:
        await client.call("VerifyArtifact", digest="smollm2")
    assert caught.value.fields[0].field == "digest"


async def test_the_same_request_is_the_same_operation(client: RegistryStubs, tmp_path: Path):
    digest = (await client.imported(folder=str(write_folder(tmp_path / "m")))).artifact.digest
    first, again = [await client.call("VerifyArtifact", request_id="r", digest=digest) for _ in range(2)]
    assert first.name == again.name
    metadata = registry_pb2.VerifyArtifactMetadata()
    ended = await client.finished(first)
    assert ended.metadata.Unpack(metadata)
    assert metadata.done_bytes == metadata.total_bytes > 0
    assert (metadata.done_artifacts, metadata.total_artifacts) == (1, 1)
    listed = await client.operations.ListOperations(operations_proto_pb2.ListOperationsRequest())
    assert listed.operations[0].name == first.name
