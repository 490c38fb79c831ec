"""Gauges of a name that two engines share for a while."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry

from treadle_worker.engine_protocol import EngineStats
from treadle_worker.metrics import WorkerMetrics


def test_two_engines_of_a_name_are_counted_together_and_one_that_goes_takes_its_own():
    registry = CollectorRegistry()
    metrics = WorkerMetrics(registry)

    def value(name: str) -> float | None:
        return registry.get_sample_value(f"treadle:{name}", {"model_name": "prod"})

    old, new = metrics.model("prod"), metrics.model("prod")
    for model, size in ((old, 100.0), (new, 50.0)):
        assert value("model_ready") == (0 if model is old else 1)
        model.engine_ready(partial(float, size))
    old.step(EngineStats(num_running=3, num_blocks=10, num_free_blocks=2, num_steps=1))
    new.step(EngineStats(num_running=2, num_blocks=10, num_free_blocks=9, num_steps=1))
    old.backlog(4, 1.5)
    new.backlog(1, 2.5)
    assert value("num_requests_running") == 5
    assert value("kv_cache_usage_perc") == 0.8
    assert value("engine_resident_memory_bytes") == 150
    assert (value("lane_requests_waiting"), value("lane_oldest_waiting_age_seconds")) == (5, 2.5)
    old.engine_gone()
    old.close()
    assert value("model_ready") == 1
    assert value("num_requests_running") == 2
    assert value("engine_resident_memory_bytes") == 50
    assert value("engine_steps_total") == 2
    new.engine_gone()
    assert (value("model_ready"), value("engine_resident_memory_bytes")) == (0, 0)
    new.close()
    assert value("model_ready") is None
    # What was counted stays; and a name that comes back begins anew.
    assert value("engine_steps_total") == 2
    metrics.model("prod").engine_ready(partial(float, 7.0))
    assert (value("model_ready"), value("engine_resident_memory_bytes")) == (1, 7)
