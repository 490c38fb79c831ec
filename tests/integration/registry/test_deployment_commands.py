"""`treadle models deploy`, `promote`, `rollback`, `leases`, `evict`, as a person types them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from google.rpc import code_pb2, status_pb2
from pretended_worker import FAILED, LOADING, READY, becomes, deploy, lease, serving
from registry_stubs import RegistryStubs, open_registry, write_folder
from waiting import until

from treadle.cli.rollout import wait_until_settled
from treadle.client import Deployment, DeploymentTarget, RegistryClient, ServingConfiguration
from treadle.errors import FailedPrecondition, NotFound
from treadle.process import child_command


@dataclass
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Commands:
    """Runs `treadle models …` against a registry."""

    client: RegistryStubs

    async def run(self, *words: str) -> Ended:
        process = await asyncio.create_subprocess_exec(
            *child_command([sys.executable, "-m", "treadle.cli.main", "models", *words]),
            env=os.environ
            | {
                "TREADLE_REGISTRY_ADDRESS": self.client.address,
                "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            },
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        out, err = await asyncio.wait_for(process.communicate(), 60)
        return Ended(process.returncode or 0, out.decode(), err.decode())

    async def wanted(self, digest: str) -> None:
        """Until the deployment wants it."""

        async def is_wanted() -> bool:
            found = (await self.client.call("ListDeployments")).deployments
            return any(target.artifact_digest == digest for one in found for target in one.targets)

        await until(is_wanted, "the command has said what it wants")


async def _models(client: RegistryStubs, folder: Path) -> list[str]:
    return [
        (await client.imported(folder=str(write_folder(folder / f"m{number}", number)))).artifact.digest
        for number in range(2)
    ]


async def test_from_deploy_to_undeploy(tmp_path: Path):
    async with open_registry(tmp_path / "store", lease_unknown_s=0) as client:
        treadle = Commands(client)
        first, second = await _models(client, tmp_path)
        deploying = asyncio.create_task(treadle.run("deploy", "prod", first[:20], "--warm-up", "hello"))
        await treadle.wanted(first)
        assert not deploying.done()
        await becomes(client, await lease(client, first, "prod", LOADING), READY)
        deployed = await deploying
        assert (deployed.code, deployed.out) == (0, f"prod -> {first}  served\n")
        assert "waiting for a worker" in deployed.err
        assert "done" in deployed.err

        at_once = await treadle.run("promote", "prod", second, "--no-wait")
        assert f"{second} as soon as a worker is ready; it means {first} until then" in at_once.out
        refused = await treadle.run("alias", "prod", second)
        assert (refused.code, "NO_WORKER_READY" in refused.err) == (1, True)
        late = await treadle.run("promote", "prod", second, "--timeout", "1")
        assert (late.code, "DEADLINE_EXCEEDED" in late.err) == (1, True)
        promoting = asyncio.create_task(treadle.run("promote", "prod", second))
        new = await lease(client, second, "prod", LOADING, holder="worker-2")
        await becomes(client, new, READY)
        assert (await promoting).out == f"prod -> {second}\n"
        listed = json.loads((await treadle.run("deployments", "--json")).out)
        assert [(one["alias"], one["settled"], one["replicas"]) for one in listed] == [("prod", True, 1)]
        shown = (await treadle.run("deployments")).out
        assert "1 ready of 1" in shown
        assert "let go" in shown
        held = (await treadle.run("leases", second)).out
        assert ("worker-2" in held, "ready" in held) == (True, True)
        back = await treadle.run("rollback", "prod")
        assert back.out == f"prod -> {first}\n"
        history = (await treadle.run("history", "prod")).out.splitlines()
        assert [line.split()[-1] for line in history[1:]] == [first, second, first]
        assert (await treadle.run("undeploy", "prod")).code == 0
        assert "nothing is deployed" in (await treadle.run("deployments")).err
        assert (await client.call("ResolveModel", model="prod")).artifact.digest == first


async def test_a_rollout_that_fails_is_told(tmp_path: Path):
    async with open_registry(tmp_path / "store") as client:
        first, second = await _models(client, tmp_path)
        treadle = Commands(client)
        deploying = asyncio.create_task(treadle.run("deploy", "prod", first))
        await treadle.wanted(first)
        held = await lease(client, first, "prod", LOADING)
        error: Any = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="no memory for the cache")
        await becomes(client, held, FAILED, error=error)
        failed = await deploying
        assert failed.code == 1
        assert "no memory for the cache" in failed.err
        assert "ROLLOUT_FAILED" in failed.err
        waiting = asyncio.create_task(treadle.run("deploy", "prod", second))
        await treadle.wanted(second)
        await deploy(client, "prod", first)
        assert "ROLLOUT_REPLACED" in (await waiting).err


async def test_a_deployment_that_is_gone_is_not_waited_for(tmp_path: Path):
    """Also where it went before anybody watched."""
    async with open_registry(tmp_path / "store") as client:
        first, _ = await _models(client, tmp_path)
        async with RegistryClient(client.address) as asking:
            wanted = await asking.set_deployment(Deployment("prod", (DeploymentTarget(first),)))
            await asking.delete_deployment("prod")
            with pytest.raises(NotFound):
                await wait_until_settled(asking, wanted, 60.0)


async def test_targets_that_differ_in_the_cache_alone_are_told_apart(tmp_path: Path):
    async with open_registry(tmp_path / "store") as client:
        first, _ = await _models(client, tmp_path)
        plain, small = (ServingConfiguration("bfloat16", cache_dtype=kind) for kind in ("bfloat16", "int8"))
        async with RegistryClient(client.address) as asking:
            wanted = await asking.set_deployment(
                Deployment("prod", tuple(DeploymentTarget(first, one, 1) for one in (plain, small)))
            )
            await lease(client, first, "prod", READY)
            error: Any = status_pb2.Status(code=code_pb2.RESOURCE_EXHAUSTED, message="no such cache")
            failed = serving("prod", FAILED, error=error)
            failed.configuration.cache_dtype = "int8"
            await client.call("AcquireLease", artifact_digest=first, holder="other", serving=failed)
            with pytest.raises(FailedPrecondition, match="no such cache") as caught:
                await wait_until_settled(asking, wanted, 60.0)
            assert caught.value.reason == "ROLLOUT_FAILED"


async def test_evict(tmp_path: Path):
    async with open_registry(tmp_path / "store", lease_unknown_s=0) as client:
        treadle = Commands(client)
        first, second = await _models(client, tmp_path)
        await client.call("SetAlias", name="prod", artifact_digest=first)
        dry = await treadle.run("evict", "--to", "0MB", "--dry-run")
        lines = {line.split()[0]: line for line in dry.out.splitlines()[1:]}
        assert "aliased as prod" in lines[first[:19]]
        assert "would go" in lines[second[:19]]
        assert len((await client.call("ListArtifacts")).artifacts) == 2
        done = await treadle.run("evict", "--to", "0")
        assert "deleted" in done.out
        assert len((await client.call("ListArtifacts")).artifacts) == 1
        assert "must be a size" in (await treadle.run("evict", "--to", "much")).err
