"""One set of services for all of these tests; each starts its own workers."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator

import pytest
from queue_view import QueueView
from rollout_stack import ALIAS, Rollout, connected, rollout_services
from service_stack import ServiceStack
from waiting import until

from treadle.queue.connection import connect


@pytest.fixture(scope="package")
def services(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServiceStack, list[str]]]:
    with rollout_services(tmp_path_factory.mktemp("rollout"), {}) as found:
        yield found


@pytest.fixture
async def rollout(services: tuple[ServiceStack, list[str]]) -> AsyncIterator[Rollout]:
    """No workers, no deployment, no lease; the alias means the first model."""
    stack, digests = services
    stack.restore()
    async with connected(stack, digests) as found:
        for deployment in (await found.call("ListDeployments")).deployments:
            await found.call("DeleteDeployment", alias=deployment.alias)

        async def no_leases() -> bool:
            return not await found.leases()

        await until(no_leases, "no worker of an earlier test holds a lease")
        await found.call("SetAlias", name=ALIAS, artifact_digest=found.a)
        yield found
        found.end(stack.of("worker"))


@pytest.fixture
async def queue(rollout: Rollout) -> AsyncIterator[QueueView]:
    client = connect(rollout.stack.redis_url)
    yield QueueView(client)
    await client.aclose()


@pytest.fixture
def prompts() -> list[str]:
    words = "king queen night sword heart good sweet fair love death time away".split()
    return [" ".join(words[number : number + 4]) for number in range(9)]


@pytest.fixture(autouse=True)
def quiet_grpc() -> None:
    """Channels to the dead complain."""
    logging.getLogger("grpc").setLevel(logging.CRITICAL)
