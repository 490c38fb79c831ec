"""The five services of the suite as processes: their commands, addresses and stages."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence

from treadle.local.home import Home
from treadle.local.ports import LOOPBACK, choose, free_ports
from treadle.local.probe import health_probe
from treadle.local.service import ServiceSpec
from treadle.security import Credentials

DEFAULT_GATEWAY_PORT = 50051
_GRACE_S = 10.0
_STAGES = {"registry": 1, "tokenizer": 2, "trainer": 2, "worker": 2, "gateway": 3}
"""The gateway stops first and lets its streams end; Valkey, at stage 0, stops last."""


def worker_names(workers: int) -> list[str]:
    """ "worker", "worker-2", ..."""
    return ["worker", *(f"worker-{number}" for number in range(2, workers + 1))]


def choose_addresses(port: int | None, workers: int) -> dict[str, str]:
    """A loopback address a service; the gateway's port is `port`, or 50051 when that is None and free."""
    gateway = choose(DEFAULT_GATEWAY_PORT if port is None else port, required=port is not None)
    names = ["registry", "tokenizer", "trainer", *worker_names(workers)]
    ports = [number for number in free_ports(len(names) + 1) if number != gateway]
    return {"gateway": f"{LOOPBACK}:{gateway}"} | {
        name: f"{LOOPBACK}:{number}" for name, number in zip(names, ports, strict=False)
    }


def choose_metrics_addresses(addresses: Mapping[str, str]) -> dict[str, str]:
    """Another loopback address for each service, where its metrics are."""
    chosen = set(addresses.values())
    free = [f"{LOOPBACK}:{port}" for port in free_ports(2 * len(addresses))]
    return dict(zip(addresses, (address for address in free if address not in chosen), strict=False))


def service_specs(
    home: Home,
    addresses: Mapping[str, str],
    metrics_addresses: Mapping[str, str],
    redis_url: str,
    models: Sequence[str],
    inherited: Mapping[str, str],
    credentials: Credentials,
) -> dict[str, ServiceSpec]:
    """Each service's spec, by its name in `addresses`; `models` are the aliases that every worker serves."""
    workers = [name for name in addresses if name.startswith("worker")]
    shared = dict(inherited) | {
        "TREADLE_REDIS_URL": redis_url,
        "TREADLE_STORE": str(home.store),
        "TREADLE_WORKER_MODELS": ",".join(models),
        # A module in the folder where the command was typed must not stand in for one of the suite's.
        "PYTHONSAFEPATH": "1",
    }
    for kind in _STAGES:
        shared[f"TREADLE_{kind.upper()}_ADDRESS"] = addresses[kind]
        shared.setdefault(f"TREADLE_{kind.upper()}_GRACE_PERIOD_S", str(_GRACE_S))
    if len(workers) > 1:
        shared.setdefault("TREADLE_ENGINE_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // len(workers))))
    specs = {}
    for name, address in addresses.items():
        kind = name.partition("-")[0]
        own = {
            f"TREADLE_{kind.upper()}_ADDRESS": address,
            f"TREADLE_{kind.upper()}_METRICS_ADDRESS": metrics_addresses[name],
        }
        if kind == "worker":
            own["TREADLE_WORKER_NAME"] = name
        specs[name] = ServiceSpec(
            name=name,
            command=(sys.executable, "-m", f"treadle_{kind}"),
            probe=health_probe(address, credentials),
            environment=shared | own,
            stage=_STAGES[kind],
        )
    return specs
