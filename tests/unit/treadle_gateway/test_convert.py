"""Protobuf to plain Python and back."""

from __future__ import annotations

import pytest

from treadle.api.inference.v1 import generation_pb2
from treadle.api.worker.v1.queue_pb2 import LaneEntry
from treadle.queue.keys import RequestKeys
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.convert import to_generation, to_lane_entry
from treadle_gateway.defaults import complete
from treadle_gateway.generation import ChatMessage, ChatPrompt, TextPrompt, TokenPrompt
from treadle_gateway.models import ServedModel

FULL = generation_pb2.Generation(
    request_id="r1",
    tenant="t",
    model="m",
    profile="p",
    adapter="a",
    priority=generation_pb2.PRIORITY_LOW,
    text="x",
    sampling={
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.125,
        "seed": 2**64 - 1,
        "repetition_penalty": 1.5,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.5,
        "logit_bias": {5: 1.0, 3: -2.0},
        "n": 1,
    },
    stopping={
        "max_new_tokens": 9,
        "min_new_tokens": 2,
        "stop_strings": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "include_stop_string": True,
    },
    output={"logprobs": 0, "include_special_tokens": True},
    disconnect={"mode": generation_pb2.DISCONNECT_MODE_DETACH, "retention": {"seconds": 7}},
    timeout={"seconds": 1, "nanos": 500_000_000},
)
MODEL = ServedModel(Artifact("A", "C", "T", 100, 50, GenerationDefaults(eos_token_ids=(2,))), "p", 50, 100, 1)


def test_every_field_reaches_the_lane_entry():
    generation = complete(to_generation(FULL), MODEL, 3)
    entry = to_lane_entry(generation, RequestKeys("t", "r1"), MODEL, [1, 2, 3], gateway_id="g", timeout_ms=99)
    assert entry.sampling == FULL.sampling
    assert entry.stopping == FULL.stopping
    assert entry.output == FULL.output
    assert entry.retention_ms == 7000
    assert entry.disconnect_mode == generation_pb2.DISCONNECT_MODE_DETACH
    assert entry.priority == generation_pb2.PRIORITY_LOW
    assert generation.timeout_s == 1.5
    unset = [field.name for field in LaneEntry.DESCRIPTOR.fields if not getattr(entry, field.name)]
    # The codec stamps the version; adapters and traces are not there yet.
    assert unset == ["version", "adapter", "traceparent"]


def test_unset_is_none_and_the_tenant_is_named():
    generation = to_generation(generation_pb2.Generation())
    sampling, stopping = generation.sampling, generation.stopping
    for name in ("temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "n"):
        assert getattr(sampling, name) is None
    assert (stopping.max_new_tokens, stopping.min_new_tokens) == (None, None)
    assert (generation.prompt, generation.output.logprobs, generation.retention_s) == (None, None, None)
    assert (generation.timeout_s, generation.tenant) == (None, "default")


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"text": ""}, TextPrompt("")),
        ({"token_ids": {"ids": [1, 2], "tokenizer_digest": "d"}}, TokenPrompt((1, 2), "d")),
        (
            {"chat": {"messages": [{"role": "r", "content": "c"}], "add_generation_prompt": False}},
            ChatPrompt((ChatMessage("r", "c"),), False),
        ),
        ({"chat": {"template_arguments_json": "{}"}}, ChatPrompt((), None, "{}")),
    ],
)
def test_each_prompt(fields, prompt):
    assert to_generation(generation_pb2.Generation(**fields)).prompt == prompt


def test_the_payload_is_all_but_the_id_and_the_time():
    digest = to_generation(FULL).payload_digest
    other = generation_pb2.Generation()
    other.CopyFrom(FULL)
    other.request_id = "r2"
    other.ClearField("timeout")
    # Maps have no order, and a digest must not have one either.
    other.sampling.logit_bias.clear()
    for token_id in (3, 5):
        other.sampling.logit_bias[token_id] = FULL.sampling.logit_bias[token_id]
    assert to_generation(other).payload_digest == digest
    changed = 0
    for field in FULL.DESCRIPTOR.fields:
        if field.name in ("request_id", "timeout") or not FULL.HasField("prompt"):
            continue
        changing = generation_pb2.Generation()
        changing.CopyFrom(FULL)
        changing.ClearField(field.name)
        if changing != FULL:
            assert to_generation(changing).payload_digest != digest, field.name
            changed += 1
    assert changed == 10
    unnamed, named = (
        generation_pb2.Generation(text="x"),
        generation_pb2.Generation(text="x", tenant="default"),
    )
    assert to_generation(unnamed).payload_digest == to_generation(named).payload_digest
