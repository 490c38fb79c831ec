"""Deployments, leases and promotion over real gRPC."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from google.rpc import code_pb2, status_pb2
from pretended_worker import (
    DRAINING,
    FAILED,
    LOADING,
    READY,
    SECOND,
    becomes,
    deploy,
    lease,
    serving,
    targets,
)
from registry_stubs import RegistryStubs, open_registry, write_folder
from waiting import until

from treadle.api.registry.v1 import deployment_pb2, lease_pb2
from treadle.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from treadle.models.profile import ServingProfile


async def imported(client: RegistryStubs, folder: Path, count: int) -> list[str]:
    """The digests of so many different models."""
    found = []
    for number in range(count):
        source = write_folder(folder / f"source{number}", number)
        found.append((await client.imported(folder=str(source))).artifact.digest)
    return found


async def test_a_rollout_from_nothing_to_a_second_model(client: RegistryStubs, tmp_path: Path):
    first, second = await imported(client, tmp_path, 2)
    wanted = await deploy(client, "prod", first, warm_up_prompts=["hello"])
    assert (wanted.replicas, wanted.settled, list(wanted.serving)) == (1, False, [])
    with pytest.raises(NotFound):
        await client.call("ResolveModel", model="prod")
    old = await lease(client, first, "prod", LOADING)
    with pytest.raises(ResourceExhausted) as caught:
        await lease(client, first, "prod", LOADING)
    assert caught.value.reason == "REPLICAS_TAKEN"
    await becomes(client, old, READY)
    now = (await client.call("GetDeployment", alias="prod")).deployment
    assert (now.settled, now.targets, now.etag) == (True, now.serving, wanted.etag)
    compute = (await client.call("ResolveModel", model="prod")).artifact.compute_digest
    assert [(line.profile, line.ready_workers) for line in now.status] == [
        (ServingProfile(compute, "bfloat16").id, 1)
    ]
    with pytest.raises(FailedPrecondition) as refused:
        await client.call("SetAlias", name="prod", artifact_digest=second)
    assert refused.value.reason == "NO_WORKER_READY"
    promoted = await client.call("PromoteAlias", name="prod", model=second)
    assert promoted.alias.artifact_digest == first
    assert list(promoted.deployment.warm_up_prompts) == ["hello"]
    new = await lease(client, second, "prod", LOADING)
    await becomes(
        client, new, FAILED, error=status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="no memory")
    )
    failed = (await client.call("GetDeployment", alias="prod")).deployment
    errors = {line.artifact_digest: line.error for line in failed.status if line.failed_workers}
    assert (errors[second].code, errors[second].message) == (code_pb2.RESOURCE_EXHAUSTED, "no memory")
    assert (await client.call("ResolveModel", model="prod")).artifact.digest == first
    await becomes(client, new, READY)
    resolved = await client.call("ResolveModel", model="prod")
    assert (resolved.artifact.digest, resolved.alias.artifact_digest) == (second, second)
    await becomes(client, old, DRAINING)
    await client.call("ReleaseLease", lease_id=old.lease_id)
    back = await client.call("RollBackAlias", name="prod")
    assert back.deployment.targets[0].artifact_digest == first
    assert (await client.call("ResolveModel", model="prod")).artifact.digest == second
    await lease(client, first, "prod")
    assert (await client.call("ResolveModel", model="prod")).artifact.digest == first
    history = (await client.call("GetAliasHistory", name="prod")).entries
    assert [entry.artifact_digest for entry in history] == [first, second, first]
    with pytest.raises(FailedPrecondition) as deployed:
        await client.call("DeleteAlias", name="prod")
    assert deployed.value.reason == "ALIAS_DEPLOYED"
    await client.call("DeleteDeployment", alias="prod")
    assert not (await client.call("ListDeployments")).deployments
    assert (await client.call("ResolveModel", model="prod")).artifact.digest == first
    print(f"{len(history)} moves of the alias")


async def test_of_many_who_swap_at_once_one_wins(client: RegistryStubs, tmp_path: Path):
    digests = await imported(client, tmp_path, 3)
    first = await deploy(client, "prod", digests[0])
    won = lost = 0
    etag = first.etag
    for _ in range(5):
        tries = await asyncio.gather(
            *(
                deploy(client, "prod", *pair, etag=etag)
                for pair in ((digests[1],), (digests[2],), digests[:2])
            ),
            client.call("DeleteDeployment", alias="prod", etag="stale"),
            return_exceptions=True,
        )
        refused = [one for one in tries if isinstance(one, Aborted)]
        assert {one.reason for one in refused} == {"ETAG_MISMATCH"}
        (winner,) = [one for one in tries if not isinstance(one, BaseException)]
        won, lost, etag = won + 1, lost + len(refused), winner.etag
        await client.call("DeleteDeployment", alias="prod", etag=etag)
        etag = (await deploy(client, "prod", digests[0])).etag
    await client.call("DeleteDeployment", alias="prod")
    alias = (await client.call("SetAlias", name="free", artifact_digest=digests[0])).alias
    moves = await asyncio.gather(
        *(client.call("PromoteAlias", name="free", model=digest, etag=alias.etag) for digest in digests[1:]),
        client.call("RollBackAlias", name="free", etag="x"),
        return_exceptions=True,
    )
    lost += sum(isinstance(move, Aborted) for move in moves)
    assert sum(isinstance(move, BaseException) for move in moves) == 2
    print(f"{won} won, {lost} lost")
    assert (won, lost) == (5, 17)


async def test_of_many_workers_no_more_than_wanted_get_a_place(client: RegistryStubs, tmp_path: Path):
    digests = await imported(client, tmp_path, 2)
    await deploy(client, "prod", *digests, replicas=3)
    tries = await asyncio.gather(
        *(
            lease(client, digest, "prod", LOADING, holder=f"w{number}")
            for digest in digests
            for number in range(20)
        ),
        return_exceptions=True,
    )
    given = [one for one in tries if not isinstance(one, BaseException)]
    assert {one.reason for one in tries if isinstance(one, ResourceExhausted)} == {"REPLICAS_TAKEN"}
    assert len(given) == 6
    listed = (await client.call("ListLeases")).leases
    assert {one.lease_id for one in listed} == {one.lease_id for one in given}
    page = await client.call("ListLeases", artifact_digest=digests[0], page_size=2)
    rest = await client.call("ListLeases", artifact_digest=digests[0], page_token=page.next_page_token)
    assert (len(page.leases), len(rest.leases), rest.next_page_token) == (2, 1, "")
    await asyncio.gather(*(becomes(client, one, READY) for one in given))
    now = (await client.call("GetDeployment", alias="prod")).deployment
    assert [line.ready_workers for line in now.status] == [3, 3]
    assert now.settled
    print(f"{len(tries)} workers came at once, {len(given)} got a place")


async def test_leases_end_by_themselves(client: RegistryStubs, tmp_path: Path):
    (digest,) = await imported(client, tmp_path, 1)
    await deploy(client, "prod", digest)
    held = await lease(client, digest, "prod", time_to_live=SECOND)
    with pytest.raises(FailedPrecondition) as caught:
        await client.call("DeleteArtifact", digest=digest)
    assert "leased by worker" in caught.value.message

    async def has_none() -> bool:
        now = (await client.call("GetDeployment", alias="prod")).deployment
        return [line.ready_workers for line in now.status] == [0]

    took_s = await until(has_none, "the lease has lapsed")
    assert took_s > 0.5
    with pytest.raises(NotFound) as gone:
        await becomes(client, held, READY)
    assert gone.value.reason == "LEASE_NOT_FOUND"
    assert (await client.call("GetDeployment", alias="prod")).deployment.settled
    await client.call("DeleteDeployment", alias="prod")
    await client.call("DeleteAlias", name="prod")
    await client.call("DeleteArtifact", digest=digest)
    with pytest.raises(NotFound):
        await lease(client, digest, "prod")
    print(f"a lease of 1 s was gone after {took_s:.2f} s")


@pytest.mark.parametrize(
    ("method", "fields", "field"),
    [
        ("SetDeployment", {}, "deployment.alias"),
        ("SetDeployment", {"deployment": deployment_pb2.Deployment(alias="a")}, "deployment.targets"),
        (
            "SetDeployment",
            {"deployment": deployment_pb2.Deployment(alias="a", targets=targets("x"))},
            "deployment.targets[0].artifact_digest",
        ),
        ("GetDeployment", {"alias": "../x"}, "alias"),
        ("ListDeployments", {"page_size": -1}, "page_size"),
        ("ListDeployments", {"page_token": "x"}, "page_token"),
        ("PromoteAlias", {"name": "", "model": "x"}, "name"),
        ("PromoteAlias", {"name": "a", "model": "a b"}, "model"),
        ("RollBackAlias", {"name": "a", "steps": 2**31}, "steps"),
        ("AcquireLease", {"holder": "w"}, "artifact_digest"),
        ("AcquireLease", {"holder": "w", "serving": lease_pb2.ServingLease(alias="a")}, "serving.state"),
        ("RenewLease", {"lease_id": "x", "serving": lease_pb2.ServingLease()}, "serving.state"),
        ("ListLeases", {"artifact_digest": "x"}, "artifact_digest"),
    ],
)
async def test_bad_requests_name_their_field(client: RegistryStubs, method, fields, field):
    with pytest.raises(InvalidArgument) as caught:
        await client.call(method, **fields)
    assert caught.value.fields[0].field == field


async def test_an_import_does_not_move_what_workers_serve(client: RegistryStubs, tmp_path: Path):
    (digest,) = await imported(client, tmp_path, 1)
    await deploy(client, "prod", digest)
    await lease(client, digest, "prod")
    other = write_folder(tmp_path / "other", 99)
    with pytest.raises(FailedPrecondition) as caught:
        await client.imported(folder=str(other), alias="prod")
    assert caught.value.reason == "NO_WORKER_READY"
    assert (await client.call("ResolveModel", model="prod")).artifact.digest == digest
    # The model is there all the same, and the error says how to go on.
    brought = caught.value.metadata["artifact_digest"]
    assert brought != digest
    assert {one.digest for one in (await client.call("ListArtifacts")).artifacts} == {digest, brought}
    assert f"in the store as {brought}" in caught.value.message
    assert f"treadle models promote prod {brought[:19]}" in caught.value.message
    promoted = await client.call("PromoteAlias", name="prod", model=brought)
    assert promoted.deployment.targets[0].artifact_digest == brought
    await lease(client, brought, "prod", READY)
    assert (await client.call("ResolveModel", model="prod")).artifact.digest == brought


async def test_leases_and_deployments_outlive_the_registry(tmp_path: Path):
    async with open_registry(tmp_path / "store") as client:
        digests = await imported(client, tmp_path, 2)
        await deploy(client, "prod", digests[0])
        held = await lease(client, digests[0], "prod", time_to_live={"seconds": 30})
        promoted = (await client.call("PromoteAlias", name="prod", model=digests[1])).deployment
    async with open_registry(tmp_path / "store") as client:
        assert (await client.call("GetDeployment", alias="prod")).deployment == promoted
        assert (await becomes(client, held, DRAINING)).lease_id == held.lease_id
        new = await lease(client, digests[1], "prod")
        assert (await client.call("ResolveModel", model="prod")).artifact.digest == digests[1]
        assert new.serving == serving("prod", READY)
