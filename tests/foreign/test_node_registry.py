"""A model store from Node: uploads that go on, an import, a watch, downloads, planning, refusals."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from node_project import NodeProject
from registry_stubs import write_folder

from treadle_registry.config import RegistryConfig
from treadle_registry.serving import serving

STORES = Path(__file__).with_name("stores.js")

Ask = Callable[..., Awaitable[list[Any]]]


@pytest.fixture
async def ask(node: NodeProject, tmp_path: Path) -> AsyncIterator[Ask]:
    """What the example makes of a command, against a registry on an empty store."""
    async with serving(RegistryConfig(address="127.0.0.1:0", store=tmp_path / "store")) as server:

        async def run(command: str, **argument: object) -> list[Any]:
            environment = {"TREADLE_ADDRESS": f"127.0.0.1:{server.port}"}
            ran = await asyncio.to_thread(node.run, STORES, [command, json.dumps(argument)], environment)
            assert ran.returncode == 0, ran.stderr
            return ran.values

        yield run


async def test_a_model_goes_up_is_named_and_comes_down(ask: Ask, tmp_path: Path):
    folder = write_folder(tmp_path / "model")
    (imported,) = await ask("importFolder", folder=str(folder), alias="node")
    artifact = imported["artifact"]
    assert artifact["facts"]["modelType"] == "llama"
    notices = await ask("watchUntil", alias="node", digest=artifact["digest"])
    assert [notice["change"] for notice in notices] == ["reset", "alias"]
    (resolved,) = await ask("call", method="ResolveModel", message={"model": "node"})
    assert resolved["artifact"]["digest"] == artifact["digest"]
    came = 0
    for file in artifact["files"]:
        path = tmp_path / "down"
        assert await ask("download", digest=file["digest"], path=str(path)) == [True]
        assert f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" == file["digest"]
        came += path.stat().st_size
    assert came == sum(file["bytes"] for file in artifact["files"]) > 0
    (again,) = await ask("upload", path=str(folder / "model.safetensors"))
    assert again["sent"] == 0, "what the store has is not sent again"
    print(f"{came} bytes of {len(artifact['files'])} files came down as they are")


async def test_a_plan_and_an_estimate(ask: Ask, tmp_path: Path):
    await ask("importFolder", folder=str(write_folder(tmp_path / "model")), alias="node")
    (estimate,) = await ask("call", method="EstimateMemory", message={"model": "node", "contextLength": 128})
    assert estimate["totalBytes"] >= estimate["weightBytes"] + estimate["cacheBytes"] > 0
    message = {"model": "node", "freeMemory": {"0": 1 << 30, "cpu": 1 << 30}}
    (plan,) = await ask("call", method="PlanDeviceMap", message=message)
    assert plan["deviceMap"] == {"": "0"}


async def test_refusals_have_a_reason_and_a_field(ask: Ask, tmp_path: Path):
    hub = {"hub": {"repository": "../../etc", "revision": "main"}}
    (refused,) = await ask("call", method="ImportModel", message=hub)
    assert (refused["error"]["code"], refused["error"]["fields"]) == ("INVALID_ARGUMENT", ["hub.repository"])
    message = {"name": "node", "artifactDigest": "sha256:" + "0" * 64}
    (unknown,) = await ask("call", method="SetAlias", message=message)
    assert (unknown["error"]["code"], unknown["error"]["reason"]) == ("NOT_FOUND", "MODEL_NOT_FOUND")
    (absent,) = await ask("download", digest="sha256:" + "0" * 64, path=str(tmp_path / "none"))
    assert absent["error"]["code"] == "NOT_FOUND"
