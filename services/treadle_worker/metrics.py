"""What a worker counts, model by model.

The engine sends its own counts with each step, and they begin anew with each engine: here they are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treadle_worker.engine_protocol import DeviceMemory, EngineStats
from treadle_worker.shared_gauges import SharedGauge

_WAIT_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_FREE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)


class WorkerMetrics:
    """Every metric of the worker's own; `model` gives those of one model, their label filled in."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(
            name: str, documentation: str, combine: Callable[[Iterable[float]], float] = sum
        ) -> SharedGauge:
            made = Gauge(f"treadle:{name}", documentation, ["model_name"], registry=registry)
            return SharedGauge(made, combine)

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"treadle:{name}", documentation, ["model_name", *labels], registry=registry)

        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"treadle:{name}", documentation, ["model_name"], buckets=buckets, registry=registry
            )

        self.running = gauge("num_requests_running", "Requests in the engine that hold KV blocks.")
        self.waiting = gauge(
            "num_requests_waiting", "Requests in the engine that hold none, preempted ones included."
        )
        self.cache_usage = gauge("kv_cache_usage_perc", "KV blocks in use; 1 is all of them.", max)
        self.lane_waiting = gauge(
            "lane_requests_waiting", "Requests in the model's lanes that no worker has claimed."
        )
        self.lane_age = gauge(
            "lane_oldest_waiting_age_seconds",
            "Age of the oldest request that no worker has claimed; 0 where none waits.",
            max,
        )
        self.ready = gauge("model_ready", "1 while an engine serves the model, else 0.", max)
        self.resident = gauge("engine_resident_memory_bytes", "Resident memory of the engine's process.")
        self.device_allocated = gauge(
            "engine_device_memory_allocated_bytes", "Of the accelerator, in the engine's tensors; 0 on a CPU."
        )
        self.device_reserved = gauge(
            "engine_device_memory_reserved_bytes",
            "Of the accelerator, in the engine's tensors or kept for the next ones; 0 on a CPU.",
        )
        self.device_peak = gauge(
            "engine_device_memory_peak_bytes",
            "The most of the accelerator that was in the engine's tensors since it became ready; 0 on a CPU.",
        )
        self.gauges = (
            self.running,
            self.waiting,
            self.cache_usage,
            self.lane_waiting,
            self.lane_age,
            self.ready,
            self.resident,
            self.device_allocated,
            self.device_reserved,
            self.device_peak,
        )
        self.engine_starts = counter("engine_starts", "Engines that became ready.")
        self.steps = counter("engine_steps", "Steps of the engine.")
        self.preemptions = counter("num_preemptions", "Requests whose KV blocks were taken for another.")
        self.prefix_queries = counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache.")
        self.prefix_hits = counter("prefix_cache_hits", "Prompt tokens found in the prefix cache.")
        self.prompt_tokens = counter(
            "prompt_tokens", "Prompt tokens that the engine took in; again after a takeover."
        )
        self.generation_tokens = counter("generation_tokens", "Tokens that the engine sampled.")
        self.draft_tokens = counter(
            "spec_decode_num_draft_tokens", "Tokens that speculation guessed and a step checked."
        )
        self.accepted_tokens = counter(
            "spec_decode_num_accepted_tokens", "Tokens that an answer got sooner by speculation."
        )
        self.turns = counter(
            "engine_turn_seconds", "Of the device, had by this engine while another one wanted it."
        )
        self.turns_waited = counter(
            "engine_turn_waited_seconds", "In which the engine had work and another one had the device."
        )
        self.task_inputs = counter(
            "engine_task_inputs", "Texts, or pairs of them, that were computed for a task.", "task"
        )
        self.task_tokens = counter("engine_task_tokens", "Tokens of those texts.", "task")
        self.queue_time = histogram(
            "request_queue_time_seconds",
            "From a request's arrival in its lane to its first step in an engine; takeovers are left out.",
            _WAIT_BUCKETS,
        )
        self.cancel_to_free = histogram(
            "cancel_to_free_seconds",
            "From a cancellation (by call, by a client that left, by deadline) to its blocks being free.",
            _FREE_BUCKETS,
        )
        self.redeliveries = counter(
            "redeliveries",
            "Requests that another held before: it died (death), or gave them back (hand_back).",
            "cause",
        )
        self.ends = counter(
            "request_ends",
            "Requests that left this worker: finished, failed, cancelled, fenced (another took them), "
            "vanished (Redis lost them) or handed_back.",
            "outcome",
        )

    def model(self, name: str) -> ModelMetrics:
        """The metrics of one model."""
        return ModelMetrics(self, name)


class ModelMetrics:
    """One model's metrics; everything here is a few additions."""

    def __init__(self, metrics: WorkerMetrics, name: str) -> None:
        self.name = name
        self.queue_time = metrics.queue_time.labels(name)
        self.cancel_to_free = metrics.cancel_to_free.labels(name)
        self._metrics = metrics
        self._engine_starts = metrics.engine_starts.labels(name)
        self._counters = {
            "num_steps": metrics.steps.labels(name),
            "num_preemptions": metrics.preemptions.labels(name),
            "prefix_cache_queries": metrics.prefix_queries.labels(name),
            "prefix_cache_hits": metrics.prefix_hits.labels(name),
            "num_prompt_tokens": metrics.prompt_tokens.labels(name),
            "num_output_tokens": metrics.generation_tokens.labels(name),
            "num_draft_tokens": metrics.draft_tokens.labels(name),
            "num_accepted_tokens": metrics.accepted_tokens.labels(name),
        }
        self._redeliveries = {
            cause: metrics.redeliveries.labels(name, cause) for cause in ("death", "hand_back")
        }
        self._ends = {
            outcome: metrics.ends.labels(name, outcome)
            for outcome in ("finished", "failed", "cancelled", "fenced", "vanished", "handed_back")
        }
        self._turns = metrics.turns.labels(name)
        self._turns_waited = metrics.turns_waited.labels(name)
        self._turns_seen = (0.0, 0.0)
        self._seen = EngineStats()
        self.engine_gone()

    def _say(self, gauge: SharedGauge, value: float | Callable[[], float]) -> None:
        gauge.say(self.name, self, value)

    def close(self) -> None:
        """The model is no longer served here: what was counted stays, what is so now goes."""
        for gauge in self._metrics.gauges:
            gauge.forget(self.name, self)

    def engine_ready(
        self, resident_bytes: Callable[[], float], device_memory: DeviceMemory | None = None
    ) -> None:
        """Another engine begins; `resident_bytes` is asked at each scrape, in its thread."""
        self._seen, self._turns_seen = EngineStats(), (0.0, 0.0)
        self._engine_starts.inc()
        self._say(self._metrics.ready, 1)
        self._say(self._metrics.resident, resident_bytes)
        self._device_memory(device_memory or DeviceMemory())

    def engine_gone(self) -> None:
        """The engine has ended: nothing runs or waits in it."""
        # Of the lanes the other workers go on telling.
        for gauge in self._metrics.gauges:
            self._say(gauge, 0)

    def step(self, stats: EngineStats) -> None:
        """What the engine says of itself with each step."""
        before, self._seen = self._seen, stats
        self._say(self._metrics.running, stats.num_running)
        self._say(self._metrics.waiting, stats.num_waiting)
        if stats.num_blocks:
            self._say(self._metrics.cache_usage, 1 - stats.num_free_blocks / stats.num_blocks)
        if stats.device_memory != before.device_memory:
            self._device_memory(stats.device_memory)
        for name, counter in self._counters.items():
            if more := getattr(stats, name) - getattr(before, name):
                counter.inc(more)

    def turns(self, used_s: float, waited_s: float) -> None:
        """What the engine had of a shared device so far, and how long it waited for it."""
        before, self._turns_seen = self._turns_seen, (used_s, waited_s)
        self._turns.inc(used_s - before[0])
        self._turns_waited.inc(waited_s - before[1])

    def _device_memory(self, memory: DeviceMemory) -> None:
        self._say(self._metrics.device_allocated, memory.allocated_bytes)
        self._say(self._metrics.device_reserved, memory.reserved_bytes)
        self._say(self._metrics.device_peak, memory.peak_bytes)

    def computed(self, task: str, num_inputs: int, num_tokens: int) -> None:
        """The engine has answered a task."""
        self._metrics.task_inputs.labels(self.name, task).inc(num_inputs)
        self._metrics.task_tokens.labels(self.name, task).inc(num_tokens)

    def backlog(self, waiting: int, oldest_age_s: float) -> None:
        """What lies in the model's lanes, unclaimed."""
        self._say(self._metrics.lane_waiting, waiting)
        self._say(self._metrics.lane_age, oldest_age_s)

    def redelivered(self, count: int, *, handed_back: bool) -> None:
        """Requests of another worker were taken over."""
        self._redeliveries["hand_back" if handed_back else "death"].inc(count)

    def ended(self, outcome: str) -> None:
        """A request left this worker."""
        self._ends[outcome].inc()
