"""Clients that share nothing with the suite but its contracts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from node_project import NodeProject, Ran
from running_suite import Suite

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def node() -> NodeProject:
    """The example client in Node."""
    return NodeProject.installed(ROOT / "examples" / "node")


@pytest.fixture
def example(node: NodeProject, suite: Suite) -> Callable[..., Ran]:
    """Runs one of the example's programs against the suite: `example("chat.js", "--tokens", "8")`."""

    def run(program: str, *arguments: str, **environment: str) -> Ran:
        address = {"TREADLE_ADDRESS": suite.addresses["gateway"]}
        return node.run(node.folder / program, arguments, address | environment)

    return run
