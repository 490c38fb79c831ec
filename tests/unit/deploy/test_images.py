"""What the Dockerfile and the compose files promise, read from them; no engine is needed."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import AliasChoices
from pydantic_settings import BaseSettings

from treadle.cli.config import CliConfig
from treadle.security import TransportConfig
from treadle_gateway.config import GatewayConfig
from treadle_registry.config import RegistryConfig
from treadle_tokenizer.config import TokenizerConfig
from treadle_trainer.config import TrainerConfig
from treadle_worker.config import EngineConfig, WorkerConfig

ROOT = Path(__file__).resolve().parents[3]
CONFIGS: dict[str, type[BaseSettings]] = {
    "gateway": GatewayConfig,
    "registry": RegistryConfig,
    "tokenizer": TokenizerConfig,
    "trainer": TrainerConfig,
    "worker": WorkerConfig,
}
SERVICES = sorted(CONFIGS)
WITHOUT_TORCH = ("gateway", "registry", "tokenizer")
COMMANDS = ("cli", "model")
OVERRIDES = sorted((ROOT / "deploy/compose").glob("*.yml"))
STORE = "/var/lib/treadle/store"


@dataclass
class Target:
    """A stage of the Dockerfile with what it has from those below it, last words first."""

    parent: Target | None
    instructions: list[tuple[str, str]] = field(default_factory=list)

    def all(self, instruction: str) -> list[str]:
        inherited = self.parent.all(instruction) if self.parent else []
        return inherited + [value for name, value in self.instructions if name == instruction]

    def environment(self) -> dict[str, str]:
        return dict(pair.split("=", 1) for line in self.all("ENV") for pair in line.split())


def read_dockerfile() -> dict[str, Target]:
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    targets: dict[str, Target] = {}
    current = Target(None)
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.strip():
            continue
        name, value = line.strip().split(maxsplit=1)
        if name == "FROM":
            base, _, own = value.split()
            current = targets[own] = Target(targets.get(base))
        else:
            current.instructions.append((name, re.sub(r"\s+", " ", value)))
    return targets


TARGETS = read_dockerfile()
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
COMPOSED: dict[str, dict[str, Any]] = COMPOSE["services"]


def names_of(config: type[BaseSettings]) -> set[str]:
    """The variables that a class of settings reads."""
    found = set()
    for name, info in config.model_fields.items():
        alias = info.validation_alias
        if isinstance(alias, AliasChoices):
            found |= {str(choice) for choice in alias.choices}
        else:
            found.add(str(alias or f"{config.model_config['env_prefix']}{name}".upper()))
    return found


def known_to(service: str) -> set[str]:
    if service in COMMANDS:
        return names_of(CliConfig) | names_of(TransportConfig)
    engine = names_of(EngineConfig) if service == "worker" else set()
    return names_of(CONFIGS[service]) | names_of(TransportConfig) | engine


def unknown(service: str, names: Mapping[str, Any]) -> list[str]:
    """What is written for the service, and what it does not read."""
    return sorted(name for name in names if name.startswith("TREADLE_") and name not in known_to(service))


def seconds(duration: str) -> float:
    match = re.fullmatch(r"(\d+)s", duration)
    assert match, duration
    return float(match[1])


def test_every_service_has_a_target_that_is_confined_and_looked_after():
    checks = 0
    for service in SERVICES:
        target = TARGETS[service]
        assert target.all("USER") == ["10001:10001"], service
        (health,) = target.all("HEALTHCHECK")
        (entrypoint,) = target.all("ENTRYPOINT")
        port = CONFIGS[service].model_fields["address"].default.rpartition(":")[2]
        metrics = CONFIGS[service].model_fields["metrics_address"].default.rpartition(":")[2]
        assert f'"treadle.health", "--timeout", "10", "127.0.0.1:{port}"' in health, service
        assert entrypoint == f'["python", "-m", "treadle_{service}"]'
        assert target.all("EXPOSE") == [f"{port} {metrics}"], service
        assert target.environment()[f"TREADLE_{service.upper()}_ADDRESS"] == f"0.0.0.0:{port}"
        assert COMPOSED[service]["build"]["target"] == service
        assert COMPOSED[service]["healthcheck"]["test"][-1] == f"127.0.0.1:{port}"
        checks += 1
    assert checks == 5
    print(f"{checks} services have a target, a user and a health check")


def test_torch_is_where_it_is_needed_and_nowhere_else():
    found = {}
    for service in SERVICES:
        command = [sys.executable, "deploy/extras.py", "pyproject.toml", "otel", service]
        lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split(
            "\n"
        )
        names = {re.split(r"[^A-Za-z0-9_-]", line)[0] for line in lines if line}
        assert {"grpcio", "prometheus-client", "opentelemetry-sdk"} <= names, service
        found[service] = "torch" in names
        assert ("find_spec('torch')" in " ".join(TARGETS[service].all("RUN"))) == (not found[service])
        assert (TARGETS[service].parent is TARGETS["torch"]) == found[service]
    assert [service for service, torch in found.items() if not torch] == list(WITHOUT_TORCH)
    print(f"{len(found)} lists of requirements, {sum(found.values())} with torch")


def test_an_extra_that_there_is_not_is_an_error():
    command = [sys.executable, "deploy/extras.py", "pyproject.toml", "gatway"]
    assert subprocess.run(command, cwd=ROOT, capture_output=True, check=False).returncode != 0


def test_every_container_is_confined():
    for name, service in COMPOSED.items():
        assert service["read_only"] is True, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service.keys() & {"privileged", "cap_add", "devices", "network_mode", "pid"}, name
        assert service["networks"] == (["private", "edge"] if name == "gateway" else ["private"]), name
    assert COMPOSE["networks"]["private"] == {"internal": True}
    assert COMPOSED.keys() == {*SERVICES, *COMMANDS, "valkey"}
    print(f"{len(COMPOSED)} containers are confined")


def test_only_the_gateway_is_published_and_on_loopback():
    published = {name: service["ports"] for name, service in COMPOSED.items() if "ports" in service}
    assert published == {"gateway": ["${GATEWAY_ADDRESS:-127.0.0.1:50051}:50051"]}
    for override in OVERRIDES:
        services = yaml.safe_load(override.read_text())["services"]
        assert not [name for name, service in services.items() if "ports" in service], override
    assert {file.name for file in OVERRIDES} >= {"keys.yml", "tls.yml", "valkey-packaged.yml"}
    print(f"{len(published)} port is published; {len(OVERRIDES)} overrides publish none")


def test_every_variable_is_a_setting_of_the_service_that_it_is_given_to():
    checked = 0
    for name in (*SERVICES, "cli"):
        environment = TARGETS[name].environment()
        assert unknown(name, environment) == [], f"the Dockerfile's {name}"
        checked += sum(key.startswith("TREADLE_") for key in environment)
    for file in (ROOT / "docker-compose.yml", *OVERRIDES):
        services = yaml.safe_load(file.read_text())["services"]
        for name, service in services.items():
            environment = service.get("environment", {})
            if name in (*SERVICES, *COMMANDS):
                assert unknown(name, environment) == [], f"{file.name}'s {name}"
            checked += sum(key.startswith("TREADLE_") for key in environment)
    assert checked > 50
    print(f"{checked} variables are settings")


@pytest.mark.parametrize("service", SERVICES)
def test_a_misspelt_variable_is_found(service: str):
    misspelt = {f"TREADLE_{service.upper()}_GRACE_PERIOD": "5", "TREADLE_TRUSTED_NETWORKS": "true"}
    right = {f"TREADLE_{service.upper()}_GRACE_PERIOD_S": "5", "TREADLE_TRUSTED_NETWORK": "true"}
    assert unknown(service, misspelt | right) == sorted(misspelt)


def test_a_container_is_given_longer_to_stop_than_its_service_takes():
    for name in SERVICES:
        environment = COMPOSED[name]["environment"]
        grace_s = float(environment[f"TREADLE_{name.upper()}_GRACE_PERIOD_S"])
        assert seconds(COMPOSED[name]["stop_grace_period"]) >= grace_s + 5, name
    print(f"{len(SERVICES)} services can leave by themselves")


def test_the_order_of_the_start():
    healthy, done = {"condition": "service_healthy"}, {"condition": "service_completed_successfully"}
    expected = {
        "model": {"registry": healthy},
        "tokenizer": {"registry": healthy},
        "worker": {"valkey": healthy, "registry": healthy, "model": done},
        "gateway": {"valkey": healthy, "registry": healthy, "tokenizer": healthy},
    }
    found = {name: service["depends_on"] for name, service in COMPOSED.items() if "depends_on" in service}
    assert found == expected
    for conditions in found.values():
        for needed, condition in conditions.items():
            assert ("healthcheck" in COMPOSED[needed]) == (condition == healthy), needed
    print(f"{sum(map(len, found.values()))} conditions in {len(found)} services")


def test_the_store_lies_at_one_place_and_only_the_registry_writes_it():
    assert TARGETS["registry"].environment()["TREADLE_STORE"] == STORE
    mounts = {
        name: volume
        for name, service in COMPOSED.items()
        for volume in service.get("volumes", ())
        if volume.startswith("store:")
    }
    readers = dict.fromkeys(("tokenizer", "worker"), f"store:{STORE}:ro")
    assert mounts == readers | {"registry": f"store:{STORE}"}
    print(f"{len(mounts)} services have the store, 1 writes it")


def test_a_worker_can_be_scaled():
    assert not COMPOSED["worker"].keys() & {"container_name", "ports", "hostname"}
