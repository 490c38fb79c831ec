"""Models that embed, sort, judge and tag beside the decoder "tiny"; all of one worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import grpc
import pytest

from treadle.api.inference.v1 import inference_pb2
from treadle.api.registry.v1 import artifact_pb2
from treadle.api.worker.v1.queue_pb2 import LoadedProfile
from treadle.errors import TreadleError
from treadle.queue.workers import beat
from treadle.rpc import from_rpc_error

FACTS: dict[str, dict[str, Any]] = {
    "vectors": {
        "tasks": ["embed", "rerank"],
        "pooling": "mean",
        "normalize": True,
        "embedding_dimensions": 4,
        "prompts": {"query": "q: ", "document": "d: "},
        "max_input_tokens": 64,
    },
    "sorter": {"tasks": ["classify"], "labels": ["bad", "so-so", "good"], "max_input_tokens": 64},
    "judge": {
        "tasks": ["classify", "rerank"],
        "labels": ["LABEL_0"],
        "rank_activation": "sigmoid",
        "max_input_tokens": 64,
    },
    "tagger": {"tasks": ["tag"], "labels": ["O", "B-X", "I-X"], "max_input_tokens": 64},
}


def artifact(name: str, facts: dict[str, Any]) -> artifact_pb2.Artifact:
    return artifact_pb2.Artifact(
        digest=f"sha256:{name}",
        compute_digest=f"sha256:c-{name}",
        tokenizer_digest="sha256:tokenizer",
        facts={"vocab_size": 300, "context_length": 64, "model_type": "bert"},
        task_facts=facts,
    )


@pytest.fixture
async def models(worker, fake_registry, redis) -> None:
    """The worker has them ready."""
    await make_ready(FACTS, worker, fake_registry, redis)


async def make_ready(known: dict[str, dict[str, Any]], worker, fake_registry, redis) -> None:
    """The registry knows models by their facts, and the worker has them ready."""
    heartbeat = worker.heartbeat()
    ready = heartbeat.profiles[0]
    for name, facts in known.items():
        made = artifact(name, facts)
        fake_registry.others |= {name: made, f"sha256:{name}": made}
        loaded = LoadedProfile()
        loaded.CopyFrom(ready)
        loaded.profile, loaded.artifact_digest = f"p-{name}", f"sha256:{name}"
        loaded.compute_digest, loaded.model_name, loaded.max_model_len = f"sha256:c-{name}", name, 64
        heartbeat.profiles.append(loaded)
        worker.profiles.append(loaded.profile)
    await beat(redis, heartbeat)


def requests(kind: str, request_id: str = "", **fields: Any) -> Any:
    """A good request of a task."""
    texts = [{"text": "one two"}, {"text": "three"}]
    model, good = {
        "Embed": ("vectors", {"inputs": texts}),
        "Classify": ("sorter", {"inputs": texts}),
        "Tag": ("tagger", {"inputs": texts}),
        "Rerank": ("judge", {"query": "what", "documents": ["this", "that", "those"]}),
        "Score": ("tiny", {"inputs": [{"context": "a", "continuation": " bc"}]}),
    }[kind]
    context = {"model": model, "request_id": request_id} | fields.pop("context", {})
    return getattr(inference_pb2, f"{kind}Request")(context=context, **(good | fields))


@pytest.fixture
def request_of() -> Callable[..., Any]:
    return requests


@pytest.fixture
def ready(worker, fake_registry, redis) -> Callable[..., Any]:
    """Makes models ready: their facts by name."""
    return lambda **known: make_ready(known, worker, fake_registry, redis)


@pytest.fixture
def failure() -> Callable[..., Any]:
    """How a call fails."""

    async def failure(call: Any) -> TreadleError:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        return from_rpc_error(caught.value)

    return failure
