"""What every service of a suite counts, read at its metrics address as a scraper does."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from waiting import until


@dataclass(frozen=True)
class Scrape:
    """One look at one service."""

    text: str
    samples: dict[tuple[str, frozenset[tuple[str, str]]], float]

    def value(self, name: str, **labels: str) -> float:
        """The sum of the samples of that name whose labels are, or contain, these; 0 where there are none."""
        wanted = set(labels.items())
        return sum(
            value
            for (sample, has), value in self.samples.items()
            if sample == f"treadle:{name}" and wanted <= has
        )

    def labels(self, name: str) -> set[frozenset[tuple[str, str]]]:
        """The labels of every sample of that name."""
        return {has for sample, has in self.samples if sample == f"treadle:{name}"}

    @property
    def names(self) -> set[str]:
        """Of all samples, without their prefix."""
        return {name.removeprefix("treadle:") for name, _ in self.samples if name.startswith("treadle:")}


def scrape(address: str) -> Scrape:
    """Reads a service's metrics; what Prometheus 2 accepts is what is asked for."""
    accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;version=0.0.4;q=0.4"
    request = urllib.request.Request(f"http://{address}/metrics", headers={"Accept": accept})
    with urllib.request.urlopen(request, timeout=10) as response:
        text = response.read().decode()
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
    return Scrape(text, samples)


class MetricsView:
    """Looks at the services of a suite, by their replicas' names."""

    def __init__(self, home: Path) -> None:
        targets = json.loads((home / "run" / "metrics-targets.json").read_text())
        self.addresses: dict[str, str] = {
            target["labels"]["replica"]: target["targets"][0] for target in targets
        }
        self.services: dict[str, str] = {
            target["labels"]["replica"]: target["labels"]["service"] for target in targets
        }

    def look(self, replica: str) -> Scrape:
        """What it counts now."""
        return scrape(self.addresses[replica])

    async def until(
        self, replica: str, condition: Callable[[Scrape], bool], what: str, timeout_s: float = 30.0
    ) -> Scrape:
        """Looks until the condition holds, and returns that look."""
        found: list[Scrape] = []

        def holds() -> bool:
            found[:] = [self.look(replica)]
            return condition(found[0])

        await until(holds, what, timeout_s, every_s=0.05)
        return found[0]
