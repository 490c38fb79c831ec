"""The watch over real gRPC: followers that come, go, sleep, and outlive their registry."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest
from pretended_worker import READY, deploy, lease
from registry_stubs import RegistryStubs, open_registry, stubs_of, write_folder
from waiting import until

from treadle.api.registry.v1 import registry_pb2
from treadle.client import RegistryClient
from treadle.errors import Unavailable
from treadle.rpc import from_rpc_error, open_channel
from treadle_registry.config import RegistryConfig
from treadle_registry.serving import serving


class Follower:
    """What a client of the watch knows."""

    def __init__(self) -> None:
        self.version = ""
        self.aliases: dict[str, str] = {}
        self.deployments: dict[str, Any] = {}
        self.resets = self.told = 0
        self._complete = False

    def take(self, change: registry_pb2.WatchModelsResponse) -> None:
        self.told += 1
        self.version = change.version
        match change.WhichOneof("change"):
            case "reset":
                self.resets, self._complete = self.resets + 1, False
                self.aliases.clear()
                self.deployments.clear()
            case "complete":
                self._complete = True
            case "alias":
                self.aliases[change.alias.name] = change.alias.artifact_digest
            case "deleted_alias":
                self.aliases.pop(change.deleted_alias, None)
            case "deployment":
                self.deployments[change.deployment.alias] = change.deployment
            case "deleted_deployment":
                self.deployments.pop(change.deleted_deployment, None)

    @contextlib.asynccontextmanager
    async def following(self, client: RegistryStubs) -> AsyncIterator[asyncio.Task[None]]:
        """Until the block ends; the task raises what the stream ends with."""
        call = client.registry.WatchModels(registry_pb2.WatchModelsRequest(version=self.version))

        async def follow() -> None:
            async for change in call:
                self.take(change)

        task = asyncio.create_task(follow())
        try:
            yield task
        finally:
            call.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def knows(self, client: RegistryStubs) -> bool:
        """Whether it has what the lists have."""
        aliases = (await client.call("ListAliases", page_size=500)).aliases
        deployments = (await client.call("ListDeployments", page_size=500)).deployments
        return (
            self._complete
            and self.aliases == {alias.name: alias.artifact_digest for alias in aliases}
            and self.deployments == {one.alias: one for one in deployments}
        )


async def two_models(client: RegistryStubs, folder: Path) -> list[str]:
    return [
        (await client.imported(folder=str(write_folder(folder / f"m{number}", number)))).artifact.digest
        for number in range(2)
    ]


async def test_followers_that_come_and_go_know_what_there_is(
    client: RegistryStubs, tmp_path: Path, rng: random.Random
):
    digests = await two_models(client, tmp_path)
    stays, returns = Follower(), Follower()
    changes = 0
    async with stays.following(client):
        for _ in range(8):
            async with returns.following(client):
                await until(lambda: returns.knows(client), "the follower knows all")
            for _ in range(rng.randrange(1, 12)):
                name = f"m{rng.randrange(4)}"
                with contextlib.suppress(Exception):
                    match rng.randrange(4):
                        case 0:
                            await client.call("SetAlias", name=name, artifact_digest=rng.choice(digests))
                        case 1:
                            await deploy(client, name, rng.choice(digests))
                        case 2:
                            await client.call("DeleteDeployment", alias=name)
                        case 3:
                            await client.call("DeleteAlias", name=name)
                    changes += 1
        await until(lambda: stays.knows(client), "the other follower knows all")
    assert (stays.resets, returns.resets) == (1, 1)
    assert changes > 10
    print(f"{changes} changes; {stays.told} and {returns.told} told")


async def test_a_change_of_the_workers_is_told(client: RegistryStubs, tmp_path: Path):
    digests = await two_models(client, tmp_path)
    follower = Follower()
    async with follower.following(client):
        await deploy(client, "prod", digests[0])
        held = await lease(client, digests[0], "prod", READY, time_to_live={"seconds": 1})
        await until(lambda: follower.aliases.get("prod") == digests[0], "the alias is told")

        def ready() -> list[int]:
            return [line.ready_workers for line in follower.deployments["prod"].status]

        await until(lambda: ready() == [1], "the worker is told")
        told = follower.told
        for _ in range(3):
            await client.call("RenewLease", lease_id=held.lease_id)
        await until(lambda: ready() == [0], "the worker's end is told")
        assert follower.told == told + 1
    print(f"{follower.told} told")


async def test_a_follower_that_sleeps_costs_nothing_and_catches_up(client: RegistryStubs, tmp_path: Path):
    digests = await two_models(client, tmp_path)
    sleeper, call = Follower(), client.registry.WatchModels(registry_pb2.WatchModelsRequest())
    while sleeper.version == "":
        sleeper.take(await call.read())
    moves = 0
    for _ in range(20):
        await asyncio.gather(
            *(
                client.call("SetAlias", name=f"m{number % 20}", artifact_digest=digests[number % 2])
                for number in range(moves, moves + 51)
            )
        )
        moves += 51
    await client.call("SetAlias", name="last", artifact_digest=digests[0])
    while "last" not in sleeper.aliases:
        sleeper.take(await asyncio.wait_for(call.read(), 10))
    assert await sleeper.knows(client)
    call.cancel()
    print(f"{moves} moves, {sleeper.told} told to who slept")


async def test_the_end_of_the_registry_ends_the_watch_and_the_next_one_begins_anew(tmp_path: Path):
    follower, digests = Follower(), list[str]()
    ended = 0
    for number in range(3):
        registry = contextlib.AsyncExitStack()
        config = RegistryConfig(address="127.0.0.1:0", store=tmp_path / "store", grace_period_s=60.0)
        server = await registry.enter_async_context(serving(config))
        address = f"127.0.0.1:{server.port}"
        async with open_channel(address) as channel:
            client = stubs_of(channel, config.store, address)
            digests = digests or await two_models(client, tmp_path)
            await client.call("SetAlias", name=f"m{number}", artifact_digest=digests[0])
            async with follower.following(client) as following:
                await until(partial(follower.knows, client), "the follower knows all")
                stopping = asyncio.create_task(registry.aclose())
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await asyncio.wait_for(following, 20)
                await asyncio.wait_for(stopping, 20)
        error = from_rpc_error(caught.value)
        assert isinstance(error, Unavailable)
        assert (error.reason, error.retry_after_s) == ("SHUTTING_DOWN", 1.0)
        ended += 1
    assert (follower.resets, ended) == (3, 3)
    print(f"{ended} watches ended with their registry")


async def test_the_client_follows_across_restarts(tmp_path: Path):
    store, seen = tmp_path / "store", []
    async with open_registry(store) as client:
        digests = await two_models(client, tmp_path)
        await client.call("SetAlias", name="first", artifact_digest=digests[0])
        address = client.address
        registry = RegistryClient(address)
        watch = registry.watch_models()
        async for change in watch:
            if change.complete:
                break
            seen.append(change.alias and change.alias.name)
        heard = asyncio.create_task(anext(watch))
    async with open_registry(store, address=address) as client:
        assert (await asyncio.wait_for(heard, 20)).reset
        await client.call("SetAlias", name="second", artifact_digest=digests[1])
        async for change in watch:
            if change.alias is not None and change.alias.name == "second":
                break
        await watch.aclose()
        await registry.close()
    assert seen == [None, "first"]
