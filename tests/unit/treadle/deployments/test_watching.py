"""The registry's watch: the whole state, changes, and what a registry that goes away leaves known."""

from __future__ import annotations

import asyncio
import contextlib

import pytest
from waiting import until

from treadle.api.registry.v1 import registry_pb2
from treadle.deployments import Deployment, KnownModels, ModelWatch, ServingConfiguration, Target, watching
from treadle.errors import Unavailable

Change = registry_pb2.WatchModelsResponse


class Script:
    """Each connection gets the next list of changes; an error ends it, an event is waited for."""

    def __init__(self, *connections: list[Change | Exception | asyncio.Event]) -> None:
        self.connections = list(connections)
        self.versions: list[str] = []

    async def watch(self, version: str):
        self.versions.append(version)
        if not self.connections:
            await asyncio.Event().wait()
        for change in self.connections.pop(0):
            if isinstance(change, Exception):
                raise change
            if isinstance(change, asyncio.Event):
                await change.wait()
            yield change


def alias(name: str, digest: str, version: str = "") -> Change:
    return Change(version=version, alias={"name": name, "artifact_digest": digest})


@contextlib.asynccontextmanager
async def running(script: Script, told: list[str]):
    async def changed(known: KnownModels, name: str) -> None:
        told.append(name)

    watch = ModelWatch(script.watch, changed)
    task = asyncio.create_task(watch.run())
    try:
        yield watch
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(watching, "_FIRST_PAUSE_S", 0.01)


async def test_the_state_is_known_once_it_is_whole_and_goes_on_where_it_was(monkeypatch):
    away = Unavailable("away")
    whole = [Change(reset=True), alias("x", "1"), Change(complete=True, version="7")]
    deployment = {
        "alias": "x",
        "targets": [{"artifact_digest": "2", "configuration": {"dtype": "float32"}, "weight": 3}],
        "serving": [{"artifact_digest": "1"}],
    }
    changes = [Change(version="8", deployment=deployment), Change(version="9", deployment=deployment)]
    script = Script([Change(reset=True), alias("y", "9"), away], [*whole, away], [*changes, away])
    told: list[str] = []
    async with running(script, told) as watch:
        await until(lambda: len(script.versions) == 4, "four connections")
        assert script.versions == ["", "", "7", "9"]
        assert watch.known.aliases == {"x": "1"}
        targets = (Target("2", ServingConfiguration("float32"), 3),)
        assert watch.known.deployments == {"x": Deployment("x", targets, (Target("1"),), 1)}
    # The half of a state is told to nobody, and what is as it was neither.
    assert told == ["", "x"]


async def test_a_reset_forgets_what_is_not_named_again():
    first = [Change(reset=True), alias("x", "1"), alias("y", "1"), Change(complete=True, version="1")]
    gone = [Change(version="2", deleted_alias="y"), alias("z", "3", "3")]
    again = [Change(reset=True), alias("z", "4"), Change(complete=True, version="9")]
    script = Script([*first, *gone, Unavailable("away")], [*again, Unavailable("away")])
    told: list[str] = []
    async with running(script, told) as watch:
        await until(lambda: len(script.versions) == 3, "three connections")
        assert watch.known.aliases == {"z": "4"}
    assert told == ["", "y", "z", ""]
    assert script.versions == ["", "3", "9"]


async def test_a_registry_that_says_nothing_is_asked_again(monkeypatch):
    monkeypatch.setattr(watching, "_SILENT_S", 0.05)
    whole = [Change(reset=True), alias("x", "1"), Change(complete=True, version="1")]
    # What says that nothing is new changes nothing, and where to go on from.
    script = Script([*whole, Change(version="2"), asyncio.Event()], [Unavailable("away")])
    told: list[str] = []
    async with running(script, told) as watch:
        await until(lambda: len(script.versions) >= 3, "it asks again")
        assert script.versions[:3] == ["", "2", "2"]
        assert watch.known.aliases == {"x": "1"}
    assert told == [""]


async def test_a_registry_that_is_away_from_the_beginning_is_said_to_be():
    async with running(Script([Unavailable("away")]), []) as watch:
        await asyncio.wait_for(watch.asked.wait(), 5)
        assert watch.known is None


async def test_a_fault_of_whoever_is_told_ends_no_watch():
    faults, told = 0, []

    async def changed(known: KnownModels, name: str) -> None:
        nonlocal faults
        if not faults:
            faults += 1
            raise KeyError(name)
        told.append((name, dict(known.aliases)))

    script = Script(
        [Change(reset=True), Change(complete=True, version="1"), alias("x", "1", "2")],
        [Change(reset=True), alias("x", "1"), Change(complete=True, version="2"), alias("x", "2", "3")],
    )
    watch = ModelWatch(script.watch, changed)
    task = asyncio.create_task(watch.run())
    try:
        await until(lambda: len(told) == 2, "the watch goes on")
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert faults == 1
    assert told == [("", {"x": "1"}), ("x", {"x": "2"})]
    assert script.versions == ["", ""]
