"""Where things lie: the peers' environments, the models, the results."""

from __future__ import annotations

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1]
RESULTS = BENCHMARKS / "results"
MODELS = BENCHMARKS / ".models"
DATA = BENCHMARKS.parents[1] / "shared" / "data"
"""Traces and texts that may lie beside the checkout; every script takes another path."""
_PEERS = BENCHMARKS / ".peers"


class MissingPeer(Exception):
    """An engine to compare with has no environment here; the message says how to get one."""


def environment(name: str) -> Path:
    """A peer's virtual environment; raises MissingPeer where `make bench-peers` has not made it."""
    if not (_PEERS / name / ".installed").exists():
        raise MissingPeer(
            f"{name} is not installed here: run `make bench-peers`; until then it counts as missing"
        )
    return _PEERS / name


def python(name: str) -> Path:
    """The interpreter of a peer's environment; raises MissingPeer."""
    return environment(name) / "bin" / "python"


def results(*, quick: bool) -> Path:
    """Where results are written: trial runs must not take the place of measurements."""
    return RESULTS / "quick" if quick else RESULTS
