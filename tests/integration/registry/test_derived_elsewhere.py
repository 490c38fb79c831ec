"""What was derived in one registry, in another one: fetched by it, or brought as a folder."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
from lying_registry import lying
from peft_folder import lora_tensors, write_adapter
from registry_stubs import RegistryStubs, open_registry
from small_folder import write_model

from treadle.api.registry.v1 import artifact_pb2, derivation_pb2, registry_pb2, source_pb2
from treadle.client import RegistryClient
from treadle.errors import TreadleError

QUANTISED = ("int8", "int4", "mxfp4")


def source(model: str) -> source_pb2.RegistrySource:
    return source_pb2.RegistrySource(remote="far", model=model)


async def derived(registry: RegistryStubs, model: str, alias: str = "", **kind: Any) -> Any:
    operation = await registry.call(
        "DeriveArtifact", model=model, alias=alias, derivation=artifact_pb2.Derivation(**kind)
    )
    return await registry.response(operation, derivation_pb2.DeriveArtifactResponse())


@pytest.fixture
async def far(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RegistryStubs]:
    """Another registry with the model "small"."""
    async with open_registry(tmp_path / "far") as made:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{made.port}")
        await made.imported(folder=str(write_model(tmp_path / "model", template="{{ 1 }}")), alias="small")
        yield made


@pytest.fixture
def kinds(tmp_path: Path) -> dict[str, dict[str, Any]]:
    """Every kind of derivation."""
    adapter = write_adapter(tmp_path / "adapter", lora_tensors(7))
    return {
        **{name: {"quantization": name} for name in QUANTISED},
        **{name: {"dtype": name} for name in ("float32", "float16")},
        "merged": {"adapter_merge": artifact_pb2.AdapterMerge(folder=str(adapter))},
    }


async def test_the_same_artifact_comes(
    far: RegistryStubs, client: RegistryStubs, kinds: dict[str, dict[str, Any]]
):
    for name, kind in kinds.items():
        there = (await derived(far, "small", name, **kind)).artifact
        checked = (await client.imported(registry=source(name), validate_only=True)).artifact
        assert (checked.parent_digest, checked.derivation) == (there.parent_digest, there.derivation)
        come = await client.imported(registry=source(name), alias=name)
        assert not come.already_present
        here = come.artifact
        assert here.location != there.location
        here.location = there.location
        assert here == there
        assert here.parent_digest
        assert here.HasField("derivation")
        assert (await client.imported(registry=source(name))).already_present
    verified = await client.response(
        await client.call("VerifyArtifact"), registry_pb2.VerifyArtifactResponse()
    )
    assert (verified.verified_artifacts, list(verified.damaged_files)) == (len(kinds), [])
    print(f"{len(kinds)} kinds of derivations came, {verified.verified_bytes} bytes")


async def test_through_a_third_registry(
    far: RegistryStubs, client: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    there = (await derived(far, "small", "few", quantization="int4")).artifact
    await client.imported(registry=source("few"), alias="few")
    monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{client.port}")
    async with open_registry(tmp_path / "third") as third:
        here = (await third.imported(registry=source("few"))).artifact
    assert (here.digest, here.derivation) == (there.digest, there.derivation)


Change = Callable[[artifact_pb2.Artifact, artifact_pb2.Artifact], object]


def claims(**kind: Any) -> Change:
    return lambda artifact, other: artifact.derivation.CopyFrom(artifact_pb2.Derivation(**kind))


LIES: dict[str, tuple[str, Change, str]] = {
    "other bits": ("int8", claims(quantization="int4"), "DERIVATION_MISMATCH"),
    "a type for bits": ("int8", claims(dtype="float32"), "DERIVATION_MISMATCH"),
    "bits for a type": ("float32", claims(quantization="int8"), "DERIVATION_MISMATCH"),
    "another type": ("float32", claims(dtype="float16"), "DERIVATION_MISMATCH"),
    "a type that is none": ("float32", claims(dtype="float31"), "BAD_REMOTE_ARTIFACT"),
    "nothing": ("int8", lambda artifact, other: artifact.derivation.Clear(), "BAD_REMOTE_ARTIFACT"),
    "no derivation": (
        "int8",
        lambda artifact, other: artifact.ClearField("derivation"),
        "BAD_REMOTE_ARTIFACT",
    ),
    "that it was imported": (
        "float32",
        lambda artifact, other: (
            artifact.ClearField("derivation"),
            artifact.ClearField("parent_digest"),
            artifact.source_files.extend(artifact.files),
        ),
        "DIGEST_MISMATCH",
    ),
    "its own parent": (
        "int8",
        lambda artifact, other: setattr(artifact, "parent_digest", artifact.digest),
        "BAD_REMOTE_ARTIFACT",
    ),
    "a parent that is no digest": (
        "int8",
        lambda artifact, other: setattr(artifact, "parent_digest", "../x"),
        "BAD_REMOTE_ARTIFACT",
    ),
    "another's adapter": (
        "merged",
        lambda artifact, other: setattr(artifact.derivation.adapter_merge, "digest", other.digest),
        "DERIVATION_MISMATCH",
    ),
    "an adapter without files": (
        "merged",
        lambda artifact, other: artifact.ClearField("source_files"),
        "DERIVATION_MISMATCH",
    ),
    "an adapter for bits": (
        "int8",
        claims(adapter_merge=artifact_pb2.AdapterMerge(folder="/x", digest="sha256:" + "0" * 64)),
        "DERIVATION_MISMATCH",
    ),
    "another's weights": (
        "int8",
        lambda artifact, other: next(
            file for file in artifact.files if file.path == "model.safetensors"
        ).CopyFrom(next(file for file in other.files if file.path == "model.safetensors")),
        "DIGEST_MISMATCH",
    ),
}


async def test_lies_are_not_published(
    far: RegistryStubs, tmp_path: Path, kinds: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
):
    other = (await far.call("ResolveModel", model="small")).artifact
    for name in ("int8", "float32", "merged"):
        await derived(far, "small", name, **kinds[name])
    told = 0
    change: list[Change] = []
    async with lying(far.registry, lambda artifact: change[0](artifact, other)) as port:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{port}")
        async with open_registry(tmp_path / "near") as client:
            for case, (name, lie, reason) in LIES.items():
                change[:] = [lie]
                with pytest.raises(TreadleError) as caught:
                    await client.imported(registry=source(name))
                print(f"{case}: {caught.value.code} {caught.value.message!r}")
                assert (caught.value.code, caught.value.reason) == ("DATA_LOSS", reason), case
                assert not (await client.call("ListArtifacts")).artifacts, case
                assert list((client.store / "tmp").iterdir()) == [], case
                told += 1
    assert told == len(LIES)


async def test_a_lie_of_the_parent_is_not_what_is_derived_here(
    far: RegistryStubs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """int8 of one model as that of another: nobody can see it, and who derives here gets what is right."""
    folder = write_model(tmp_path / "other", seed=1)
    parent = (await far.imported(folder=str(folder), alias="other")).artifact
    wrong = (await derived(far, "small", "few", quantization="int8")).artifact
    right = (await derived(far, "other", quantization="int8")).artifact

    def change(artifact: artifact_pb2.Artifact) -> None:
        artifact.parent_digest = parent.digest

    async with lying(far.registry, change) as port:
        monkeypatch.setenv("TREADLE_REGISTRY_REMOTES", f"far=127.0.0.1:{port}")
        async with open_registry(tmp_path / "near") as client:
            assert (await client.imported(registry=source("few"))).artifact.digest == wrong.digest
            await client.imported(folder=str(folder), alias="other")
            made = await derived(client, "other", quantization="int8")
            assert (made.artifact.digest, made.already_present) == (right.digest, False)
            assert (await derived(client, "other", quantization="int8")).already_present


@pytest.mark.parametrize("quantization", QUANTISED)
async def test_a_downloaded_folder_is_the_same_model(
    far: RegistryStubs, client: RegistryStubs, tmp_path: Path, quantization: str
):
    """Downloaded, then imported as a folder, there and in another registry, and uploaded."""
    there = (await derived(far, "small", "few", quantization=quantization)).artifact
    folder = tmp_path / "downloaded"
    async with RegistryClient(far.address) as asking:
        downloaded = await asking.download_model("few", folder)
    assert downloaded.artifact_digest == there.digest
    back = await far.imported(folder=str(folder))
    assert back.already_present
    assert back.artifact == there
    imported = (await client.imported(folder=str(folder), alias="folder")).artifact
    assert imported.digest == there.digest
    assert imported.files == there.files
    assert imported.facts == there.facts
    assert not imported.HasField("derivation")
    async with open_registry(tmp_path / "third") as third, RegistryClient(third.address) as sending:
        *_, last = [progress async for progress in sending.upload_model(folder, alias="few")]
        assert last.artifact is not None
        assert last.artifact.compute_digest == there.compute_digest
        assert last.artifact.digest == there.digest
        assert last.artifact.quantization == quantization
        assert not last.already_present
    print(f"{quantization}: {downloaded.received_bytes} bytes, 4 times the digest {there.digest}")
