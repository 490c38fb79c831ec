"""Real services with small models in the store, and an alias that leads to one of them or to both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import grpc
from service_process import ServiceProcess
from service_stack import ServiceStack, service_stack
from tiny_model import write_tiny_model
from waiting import until

from treadle.api.inference.v1 import inference_pb2, inference_pb2_grpc
from treadle.api.registry.v1 import deployment_pb2, lease_pb2, registry_pb2, registry_pb2_grpc
from treadle.local.ports import free_ports
from treadle.rpc import open_channel
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store

ALIAS = "prod"
TIMEOUT_S = 60
LEASE_S = 3.0


@dataclass
class Rollout:
    """The stack as a test asks it."""

    stack: ServiceStack
    a: str
    b: str
    spare: str
    """For a test that damages it."""
    registry: registry_pb2_grpc.RegistryServiceAsyncStub
    gateway: inference_pb2_grpc.InferenceServiceAsyncStub

    async def call(self, method: str, **fields: object) -> object:
        """One RPC of the registry."""
        module = {"AcquireLease": lease_pb2, "ListLeases": lease_pb2}.get(method, registry_pb2)
        if "Deployment" in method:
            module = deployment_pb2
        request = getattr(module, f"{method}Request")(**fields)
        return await getattr(self.registry, method)(request, timeout=TIMEOUT_S)

    async def deployment(self, alias: str = ALIAS) -> deployment_pb2.Deployment:
        return (await self.call("GetDeployment", alias=alias)).deployment

    async def serving(self, alias: str = ALIAS) -> list[str]:
        """The artifacts that requests go to now."""
        return [target.artifact_digest for target in (await self.deployment(alias)).serving]

    async def meaning(self, alias: str = ALIAS) -> str:
        """What the alias means now."""
        return (await self.call("ResolveModel", model=alias)).artifact.digest

    async def settled_on(self, *digests: str, alias: str = ALIAS) -> None:
        """Waits until requests go to these artifacts, and the alias means the first."""

        async def moved() -> bool:
            serving = await self.serving(alias)
            return serving == list(digests) and await self.meaning(alias) == digests[0]

        await until(moved, f"{alias} leads to {digests}", 90, 0.1)

    async def leases(self, digest: str = "") -> list[lease_pb2.Lease]:
        return list((await self.call("ListLeases", artifact_digest=digest)).leases)

    async def states(self, digest: str) -> list[str]:
        """What workers say of an artifact, by the registry."""
        names = [lease_pb2.ServingState.Name(lease.serving.state) for lease in await self.leases(digest)]
        return sorted(name.removeprefix("SERVING_STATE_") for name in names)

    async def listed(self) -> dict[tuple[str, str], int]:
        """What the gateway says that can be asked for: names and artifacts with their workers."""
        response = await self.gateway.ListModels(inference_pb2.ListModelsRequest(), timeout=TIMEOUT_S)
        return {(model.model, model.artifact_digest): model.ready_workers for model in response.models}

    def workers(self, count: int, models: str = ALIAS, **environment: str) -> list[ServiceProcess]:
        """More workers, started."""
        ports = free_ports(2 * count)
        taken = len(self.stack.of("worker"))
        found = []
        for number in range(count):
            address, metrics = (f"127.0.0.1:{ports.pop()}" for _ in range(2))
            settings = {"TREADLE_WORKER_MODELS": models} | environment
            service = self.stack.add(f"worker-{taken + number + 1}", address, metrics, settings)
            service.start()
            found.append(service)
        return found

    def end(self, services: Sequence[ServiceProcess]) -> None:
        """Ends workers for good."""
        for service in services:
            if service.alive:
                service.kill()
            self.stack.services.pop(service.name, None)


@contextlib.contextmanager
def rollout_services(
    folder: Path, environment: Mapping[str, str]
) -> Iterator[tuple[ServiceStack, list[str]]]:
    """Registry, tokenizer and gateway, and the digests of three models."""
    store = Store.open(folder / "store")
    digests = []
    for seed in (5, 6, 7):
        write_tiny_model(folder / f"seed-{seed}", seed)
        published = import_source(store, LocalSource("folder", str(folder / f"seed-{seed}")))
        digests.append(published.manifest.digest)
    counts = {"registry": 1, "tokenizer": 1, "gateway": 1}
    settings = {"TREADLE_WORKER_LEASE_S": f"{LEASE_S:g}"} | dict(environment)
    with service_stack(folder, counts, settings) as stack:
        yield stack, digests


@contextlib.asynccontextmanager
async def connected(stack: ServiceStack, digests: Sequence[str]) -> AsyncIterator[Rollout]:
    """The stack's clients."""
    async with (
        open_channel(stack["registry-1"].address) as registry,
        open_channel(stack["gateway-1"].address) as gateway,
    ):
        yield Rollout(
            stack,
            *digests,
            registry_pb2_grpc.RegistryServiceStub(registry),
            inference_pb2_grpc.InferenceServiceStub(gateway),
        )


@dataclass(frozen=True)
class Answer:
    """One request's outcome."""

    request_id: str
    prompt: str
    digest: str
    text: str
    failure: str = ""


@dataclass
class Load:
    """Clients that ask one after the other until they are stopped; every answer is kept."""

    rollout: Rollout
    prompts: Sequence[str]
    model: str = ALIAS
    max_new_tokens: int = 24
    answers: list[Answer] = field(default_factory=list)
    _stopping: bool = False

    @contextlib.asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[None]:
        """Runs while the block does; what has begun is finished."""
        tasks = [asyncio.create_task(self._client(number)) for number in range(clients)]
        try:
            yield
        finally:
            self._stopping = True
            await asyncio.gather(*tasks)

    async def _client(self, number: int) -> None:
        asked = 0
        while not self._stopping:
            prompt = self.prompts[(number + asked) % len(self.prompts)]
            request_id = f"load-{id(self):x}-{number}-{asked}"
            self.answers.append(await ask(self.rollout, prompt, self.model, request_id, self.max_new_tokens))
            asked += 1

    async def until_more(self, count: int, digest: str = "") -> None:
        """Waits for so many more answers, of one artifact or of any."""

        def answered() -> int:
            return sum(digest in ("", one.digest) for one in self.answers)

        before = answered()
        await until(lambda: answered() >= before + count, f"{count} more answers of {digest or 'any'}", 90)


async def ask(
    rollout: Rollout, prompt: str, model: str, request_id: str = "", max_new_tokens: int = 24
) -> Answer:
    """A greedy answer, streamed; which artifact it is of is what its first chunk says."""
    generation = {
        "model": model,
        "text": prompt,
        "request_id": request_id,
        "sampling": {"temperature": 0.0},
        "stopping": {"max_new_tokens": max_new_tokens, "ignore_eos": True},
    }
    digest, texts = "", []
    try:
        request = inference_pb2.GenerateStreamRequest(generation=generation)
        async for response in rollout.gateway.GenerateStream(request, timeout=TIMEOUT_S):
            chunk = response.chunk
            if chunk.HasField("started"):
                digest = chunk.started.artifact_digest
            elif chunk.HasField("tokens"):
                texts.append(chunk.tokens.text)
    except grpc.aio.AioRpcError as error:
        return Answer(request_id, prompt, digest, "".join(texts), f"{error.code().name}: {error.details()}")
    return Answer(request_id, prompt, digest, "".join(texts))
