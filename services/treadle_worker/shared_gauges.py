"""Gauges that several models of one name share: two engines serve one alias while it moves."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import Gauge

Value = float | Callable[[], float]


class SharedGauge:
    """A labelled gauge whose value is made of what each holder of a name says: their sum, or the largest."""

    def __init__(self, gauge: Gauge, combine: Callable[[Iterable[float]], float]) -> None:
        self._gauge = gauge
        self._combine = combine
        self._said: dict[str, dict[object, Value]] = {}
        self._asked: set[str] = set()
        """Names of which a holder is asked at each scrape."""

    def say(self, name: str, holder: object, value: Value) -> None:
        """What `holder` adds to the gauge of `name`: a number, or what is asked at each scrape."""
        self._said.setdefault(name, {})[holder] = value
        if callable(value) and name not in self._asked:
            self._asked.add(name)
            self._gauge.labels(name).set_function(lambda: self._value(name))
        self._set(name)

    def forget(self, name: str, holder: object) -> None:
        """`holder` is gone; with the last one of a name its line goes."""
        said = self._said.get(name, {})
        said.pop(holder, None)
        if said:
            self._set(name)
        elif self._said.pop(name, None) is not None:
            self._asked.discard(name)
            self._gauge.remove(name)

    def _set(self, name: str) -> None:
        if name not in self._asked:
            self._gauge.labels(name).set(self._value(name))

    def _value(self, name: str) -> float:
        # At a scrape this is another thread.
        return self._combine([one() if callable(one) else one for one in list(self._said[name].values())])
