"""A hub on loopback, and the client that talks to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_machine import HubMachine
from hub_models import REPOSITORY, model_files
from hub_server import HubServer, hub_server
from huggingface_hub import constants

from treadle_registry.sources import hub_client, hub_download
from treadle_registry.sources.hub_client import HubClient


@pytest.fixture
def hub() -> Iterator[HubServer]:
    """A hub without repositories."""
    with hub_server() as server:
        yield server


@pytest.fixture(scope="session")
def files() -> dict[str, bytes]:
    """A repository's files."""
    return model_files()


@pytest.fixture
def commit(hub: HubServer, files: dict[str, bytes]) -> str:
    """Of `river/sea`, branch main and tag v1."""
    return hub.add(REPOSITORY, files, "main", "v1")


@pytest.fixture
def client(hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HubClient:
    """A client in this process, in no hurry to wait and with nothing of the machine's own."""
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_client, "_PAUSES_S", (0.01, 0.01))
    monkeypatch.setattr(hub_download, "_FIRST_PAUSE_S", 0.005)
    return HubClient(cache=tmp_path / "hf" / "hub")


@pytest.fixture
def machine(hub: HubServer, tmp_path: Path) -> HubMachine:
    """Imports in processes of their own."""
    return HubMachine(tmp_path, hub)
