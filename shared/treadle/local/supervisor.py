"""Starts services, keeps them running, stops them in order."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from treadle.local.observer import Observer
from treadle.local.service import ManagedService, ServiceSpec


class Supervisor:
    """The services of a local suite, each a child process that dies with this one, however it dies.

    Use it on an event loop in the main thread: the kernel ends the children with the thread that started
    them. Leaving the block of `async with` stops everything.
    """

    def __init__(self, logs: Path, observer: Observer) -> None:
        """Each service logs to `<logs>/<name>.log`."""
        self._logs = logs
        self._observer = observer
        self._services: dict[str, ManagedService] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Supervisor:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    def start(self, *specs: ServiceSpec) -> None:
        """Starts services at once; `ready` waits for them."""
        for spec in specs:
            service = ManagedService(spec, self._logs / f"{spec.name}.log", self._observer)
            self._services[spec.name] = service
            self._tasks[spec.name] = asyncio.create_task(service.run(), name=f"service {spec.name}")

    async def ready(self, *names: str) -> None:
        """Waits until the named services, or all, are ready; raises the error of any that was given up."""
        waiting = [
            asyncio.create_task(self._services[name].ready.wait()) for name in names or tuple(self._services)
        ]
        everything = asyncio.gather(*waiting)
        watched: list[asyncio.Future[Any]] = [everything, *self._tasks.values()]
        try:
            await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            self._raise_failures()
            await everything
        finally:
            everything.cancel()
            await asyncio.gather(everything, return_exceptions=True)

    async def wait(self) -> None:
        """Waits until a service is given up, and raises its error."""
        await asyncio.wait(self._tasks.values(), return_when=asyncio.FIRST_COMPLETED)
        self._raise_failures()

    def _raise_failures(self) -> None:
        for task in self._tasks.values():
            if task.done() and not task.cancelled() and (error := task.exception()):
                raise error

    async def stop(self) -> None:
        """Stops stage by stage, the highest first; when it is cancelled, all at once and at the hard."""
        try:
            for stage in sorted({service.spec.stage for service in self._services.values()}, reverse=True):
                await asyncio.gather(
                    *(self._stop_one(name) for name, s in self._services.items() if s.spec.stage == stage)
                )
        finally:
            self._kill(self._services.values())
            for task in self._tasks.values():
                task.cancel()
            await asyncio.gather(*self._tasks.values(), return_exceptions=True)
            self._services.clear()
            self._tasks.clear()

    async def _stop_one(self, name: str) -> None:
        await self._services[name].stop()
        self._tasks[name].cancel()

    @staticmethod
    def _kill(services: Iterable[ManagedService]) -> None:
        for service in services:
            service.kill()
