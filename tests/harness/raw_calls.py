"""A running suite asked in raw bytes, and looked at from outside."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import psutil
from grpc_health.v1 import health_pb2, health_pb2_grpc
from running_suite import Suite

from treadle.api.inference.v1 import inference_pb2
from treadle.client import ModelSource, RegistryClient
from treadle.errors import TreadleError
from treadle.rpc import from_rpc_error

_PARTS = ("treadle_gateway", "treadle_registry", "treadle_tokenizer", "treadle_trainer", "treadle_worker")
CAPITAL = inference_pb2.GenerateRequest(
    generation={
        "model": "smollm2",
        "text": "The capital of France is",
        "stopping": {"max_new_tokens": 2},
        "sampling": {"temperature": 0.0},
    }
).SerializeToString()
"""A good request; its answer begins with " Paris"."""
_UNBOUND = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]


@dataclass
class Asker:
    """Asks the services of one suite."""

    suite: Suite
    channels: dict[str, grpc.aio.Channel]

    async def ask(self, service: str, method: str, data: bytes, timeout_s: float = 30) -> bytes:
        """One unary call; raises TreadleError."""
        call = self.channels[service].unary_unary(f"/{METHODS[service]}/{method}")
        return await _answered(call(data, timeout=timeout_s))

    async def read(self, method: str, data: bytes, timeout_s: float = 30) -> list[bytes]:
        """The whole stream of a call of the gateway; raises TreadleError."""
        call = self.channels["gateway"].unary_stream(f"/{METHODS['gateway']}/{method}")

        async def whole() -> list[bytes]:
            return [message async for message in call(data, timeout=timeout_s)]

        return await _answered(whole())

    async def batch(self, items: list[bytes], timeout_s: float = 120) -> dict[int, Any]:
        """The answers to a batch by their items' places; raises TreadleError."""
        call = self.channels["gateway"].stream_stream(f"/{METHODS['gateway']}/BatchGenerate")

        async def whole() -> dict[int, Any]:
            found = {}
            async for message in call(iter(items), timeout=timeout_s):
                answer = inference_pb2.BatchGenerateResponse.FromString(message)
                found[answer.index] = answer
            return found

        return await _answered(whole())

    async def health_s(self, service: str) -> float:
        """How long the service takes to say that it lives."""
        started = time.perf_counter()
        stub = health_pb2_grpc.HealthStub(self.channels[service])
        answer = await stub.Check(health_pb2.HealthCheckRequest(service="liveness"), timeout=10)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
        return time.perf_counter() - started

    async def still_serves(self) -> None:
        """A real answer of the served model."""
        answer = inference_pb2.GenerateResponse.FromString(await self.ask("gateway", "Generate", CAPITAL))
        assert answer.choices[0].text.startswith(" Paris")

    def processes(self) -> dict[int, str]:
        """The suite's lasting processes: services, engine, Redis; not the children that may be killed.

        A child that was forked and has not begun its own program yet still has its parent's command.
        """
        holder = psutil.Process(int((self.suite.home / "run" / "lock").read_text()))
        found = {}
        for process in holder.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                command = " ".join(process.cmdline())
                if "job_process" in command or "template_process" in command:
                    continue
                if (parent := process.parent()) is not None and parent.cmdline() == process.cmdline():
                    continue
                if "valkey-server" in command or any(part in command for part in _PARTS):
                    found[process.pid] = command
        return found

    def resident_bytes(self, service: str) -> int:
        """Memory of a service's process."""
        (pid,) = (pid for pid, line in self.processes().items() if line.endswith(f"-m treadle_{service}"))
        return int(psutil.Process(pid).memory_info().rss)


METHODS = {
    "gateway": "treadle.api.inference.v1.InferenceService",
    "registry": "treadle.api.registry.v1.RegistryService",
    "tokenizer": "treadle.api.tokenizer.v1.TokenizerService",
    "worker": "treadle.api.worker.v1.WorkerService",
}


async def _answered(call: Any) -> Any:
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@contextlib.asynccontextmanager
async def asking(suite: Suite) -> AsyncIterator[Asker]:
    """Raw channels to every service, without a bound on what may be sent."""
    async with contextlib.AsyncExitStack() as stack:
        channels = {
            service: await stack.enter_async_context(
                grpc.aio.insecure_channel(suite.addresses[service], options=_UNBOUND)
            )
            for service in METHODS
        }
        yield Asker(suite, channels)


async def _import_all(suite: Suite, folders: dict[str, Path]) -> dict[str, str]:
    digests = {}
    async with RegistryClient(suite.addresses["registry"]) as registry:
        for alias, folder in folders.items():
            async for progress in registry.import_model(ModelSource("folder", str(folder)), alias=alias):
                if progress.artifact is not None:
                    digests[alias] = progress.artifact.digest
    return digests


async def _remove_all(suite: Suite, digests: dict[str, str]) -> None:
    async with RegistryClient(suite.addresses["registry"]) as registry:
        for alias in digests:
            await registry.delete_alias(alias)
        for digest in set(digests.values()):
            with contextlib.suppress(TreadleError):
                await registry.delete_artifact(digest)


@contextlib.asynccontextmanager
async def importing(suite: Suite, folders: dict[str, Path]) -> AsyncIterator[dict[str, str]]:
    """As `imported`, where a loop runs already."""
    digests = await _import_all(suite, folders)
    try:
        yield digests
    finally:
        await _remove_all(suite, digests)


@contextlib.contextmanager
def imported(suite: Suite, folders: dict[str, Path]) -> Iterator[dict[str, str]]:
    """Models in the suite's store under their names, for as long as the block lasts; gives their digests."""
    digests = asyncio.run(_import_all(suite, folders))
    try:
        yield digests
    finally:
        asyncio.run(_remove_all(suite, digests))


async def _location(suite: Suite, model: str) -> Path:
    async with RegistryClient(suite.addresses["registry"]) as registry:
        return Path((await registry.resolve(model)).location)


def copy_of_served(suite: Suite, target: Path, template: str) -> Path:
    """The served model with another chat template: the same workers answer for it."""
    shutil.copytree(asyncio.run(_location(suite, "smollm2")), target)
    for path in target.iterdir():
        path.chmod(0o644)
    (target / "chat_template.jinja").write_text(template)
    return target
