"""What a gateway counts of the requests that it answers; calls are counted beside it, by the interceptor."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from treadle.errors import TreadleError

_FIRST_TOKEN = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_TASK = (0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_BETWEEN_TOKENS = (0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.75, 1.0, 2.5, 5.0, 15.0)
_WHOLE = (0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 240.0, 600.0, 1800.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000)


class GatewayMetrics:
    """Every metric of the gateway's own, under vLLM's names where it has one.

    `model_name` is what the client asked for, once it is known that there is such a model; before that, and
    for a request that fails on the way there, it is empty: no client makes a series.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def histogram(name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                f"treadle:{name}", documentation, ["model_name"], buckets=buckets, registry=registry
            )

        def counter(name: str, documentation: str, *labels: str) -> Counter:
            return Counter(f"treadle:{name}", documentation, labels, registry=registry)

        self.first_token = histogram(
            "time_to_first_token_seconds", "From a request's arrival to its first token.", _FIRST_TOKEN
        )
        self.between_tokens = histogram(
            "inter_token_latency_seconds",
            "Between two messages of tokens of one answer; a message may carry several.",
            _BETWEEN_TOKENS,
        )
        self.whole = histogram(
            "e2e_request_latency_seconds", "From a request's arrival to the end of its answer.", _WHOLE
        )
        self.prompt_tokens = histogram("request_prompt_tokens", "Tokens of a prompt.", _TOKENS)
        self.generation_tokens = histogram("request_generation_tokens", "Tokens of an answer.", _TOKENS)
        self.success = counter(
            "request_success",
            "Requests whose answer is complete, by how it ended: stop or length.",
            "model_name",
            "finished_reason",
        )
        self.failure = counter(
            "request_failure",
            "Requests that ended without a complete answer, by the status' reason.",
            "model_name",
            "reason",
        )
        self.task_requests = counter("task_requests", "Tasks whose answer is complete.", "model_name", "task")
        self.task_inputs = counter(
            "task_inputs",
            "Texts, pairs and continuations of the tasks that were queued.",
            "model_name",
            "task",
        )
        self.task_prompt_tokens = counter(
            "task_prompt_tokens", "Tokens of them, as they were queued.", "model_name", "task"
        )
        self.task_latency = Histogram(
            "treadle:task_latency_seconds",
            "From a task's arrival to its answer.",
            ["model_name", "task"],
            buckets=_TASK,
            registry=registry,
        )
        self.resumes = counter(
            "request_resumes", "Answers that a client picked up again: Attach, and a retry of a request."
        )
        self.held = Gauge(
            "treadle:gateway_requests_held",
            "Requests and attached streams that the gateway holds.",
            registry=registry,
        )

    def refused(self, error: TreadleError) -> None:
        """A request was not taken."""
        self.failure.labels("", error.reason).inc()
