"""Counters whose number somebody keeps anyway: read when they are asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector


class CountedElsewhere(Collector):
    """A counter without labels; `read` is called in the thread of the scrape, and must only read."""

    def __init__(
        self, name: str, documentation: str, read: Callable[[], float], *, registry: CollectorRegistry
    ) -> None:
        self._name = name
        self._documentation = documentation
        self._read = read
        registry.register(self)

    def describe(self) -> Iterable[Metric]:
        """The name, without asking for the number."""
        return [CounterMetricFamily(self._name, self._documentation)]

    def collect(self) -> Iterable[Metric]:
        """The number now."""
        return [CounterMetricFamily(self._name, self._documentation, value=self._read())]
