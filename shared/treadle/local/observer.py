"""Who is told what the local suite does, so that a terminal can show it."""

from __future__ import annotations

from enum import StrEnum
from typing import Protocol

from treadle.client import ImportProgress


class ServiceState(StrEnum):
    """What a service is doing."""

    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPING = "stopping"
    STOPPED = "stopped"


class Observer(Protocol):
    """Told on the event loop; must not block."""

    def service(self, name: str, state: ServiceState, detail: str = "") -> None:
        """A service changed its state; `detail` is for people."""

    def importing(self, model: str, progress: ImportProgress) -> None:
        """An import went on; its last call has the stage "done"."""

    def note(self, text: str) -> None:
        """Something that people should know."""
