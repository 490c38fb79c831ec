"""A registry that is killed at any moment of a rollout: what it says after is what it said before."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path
from typing import Any

import pytest
from pretended_worker import DRAINING, LOADING, READY, becomes, deploy, lease
from registry_stubs import RegistryStubs, open_registry, stubs_of, write_folder
from started_service import started

from treadle.errors import TreadleError
from treadle.rpc import open_channel

KILLS = 8


class Witness:
    """What the registry has answered, and what it may say of an alias therefore."""

    def __init__(self) -> None:
        self.ready: set[str] = set()
        """Artifacts that a worker has said to be ready for, whether that was answered or not."""
        self.leases: dict[str, Any] = {}
        self.means = ""
        self.moves = self.calls = 0

    async def rolls_out(self, client: RegistryStubs, digests: list[str], rng: random.Random) -> None:
        """Promotes one after the other, as workers do, until the registry is gone."""
        while True:
            digest = rng.choice([one for one in digests if one != self.means])
            await client.call("PromoteAlias", name="prod", model=digest)
            held = await self.held(client, digest, LOADING)
            self.ready.add(digest)
            await becomes(client, held, READY)
            resolved = await client.call("ResolveModel", model="prod")
            assert resolved.artifact.digest == digest
            self.means, self.moves = digest, self.moves + 1
            for other, old in list(self.leases.items()):
                if other != digest:
                    await becomes(client, old, DRAINING)
                    await client.call("ReleaseLease", lease_id=old.lease_id)
                    del self.leases[other]

    async def held(self, client: RegistryStubs, digest: str, state: int) -> Any:
        """A lease under a request_id of its own, so that one whose answer was lost is found again."""
        with contextlib.suppress(TreadleError):
            if known := self.leases.get(digest):
                return await becomes(client, known, state)
        self.calls += 1
        self.leases[digest] = await lease(
            client, digest, "prod", state, request_id=f"{digest}-{self.calls}", time_to_live={"seconds": 2}
        )
        return self.leases[digest]

    async def checks(self, client: RegistryStubs) -> None:
        """After a death: nothing that was answered is undone, nothing that never was ready is served."""
        deployment = (await client.call("GetDeployment", alias="prod")).deployment
        resolved = (await client.call("ResolveModel", model="prod")).artifact.digest
        assert resolved in self.ready
        assert {target.artifact_digest for target in deployment.serving} <= self.ready
        history = (await client.call("GetAliasHistory", name="prod", page_size=500)).entries
        assert history[0].artifact_digest == resolved
        if deployment.settled:
            assert resolved == deployment.targets[0].artifact_digest
        moved = {entry.artifact_digest for entry in history}
        assert self.means in moved
        self.means = resolved


@pytest.mark.slow
async def test_killed_in_the_middle_of_rollouts(tmp_path: Path, rng: random.Random):
    store = tmp_path / "store"
    async with open_registry(store) as client:
        digests = []
        for number in range(3):
            source = write_folder(tmp_path / f"m{number}", number)
            digests.append((await client.imported(folder=str(source))).artifact.digest)
        await deploy(client, "prod", digests[0], replicas=8)
        witness = Witness()
        witness.ready.add(digests[0])
        await becomes(client, await witness.held(client, digests[0], LOADING), READY)
        witness.means = digests[0]
    for number in range(KILLS):
        with started("registry", tmp_path / f"{number}.log", environment(store)) as (process, address):
            async with open_channel(address) as channel:
                client = stubs_of(channel, store, address)
                await witness.checks(client)
                rolling = asyncio.create_task(witness.rolls_out(client, digests, rng))
                await asyncio.sleep(rng.uniform(0.05, 0.6))
                process.kill()
                with pytest.raises(TreadleError):
                    await asyncio.wait_for(rolling, 30)
    async with open_registry(store) as client:
        await witness.checks(client)
    print(f"killed {KILLS} times within {witness.moves} moves of the alias")
    assert witness.moves > KILLS


def environment(store: Path) -> dict[str, str]:
    return {"TREADLE_STORE": str(store), "TREADLE_REGISTRY_METRICS_ADDRESS": ""}
