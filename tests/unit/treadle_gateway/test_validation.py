"""Every field of a request: what is refused, under which name, and that what is allowed passes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from treadle.errors import InvalidArgument, TreadleError, Unimplemented
from treadle_gateway.config import GatewayConfig
from treadle_gateway.generation import (
    ChatMessage,
    ChatPrompt,
    Generation,
    Output,
    Sampling,
    Stopping,
    TextPrompt,
    TokenPrompt,
)
from treadle_gateway.validation import validate
from treadle_gateway.violations import MAX_VIOLATIONS

LIMITS = GatewayConfig(max_prompt_bytes=1000)
GOOD = Generation(model="tiny", tenant="default", prompt=TextPrompt("Hello"))
NAN, INF = math.nan, math.inf


def chat(*messages: ChatMessage, arguments: str = "") -> dict[str, object]:
    return {"prompt": ChatPrompt(messages or (ChatMessage("user", "x"),), template_arguments_json=arguments)}


def sampling(**fields) -> dict[str, object]:
    return {"sampling": Sampling(**fields)}


def stopping(**fields) -> dict[str, object]:
    return {"stopping": Stopping(**fields)}


BAD = [
    ({"request_id": "a b"}, "request_id"),
    ({"request_id": "x" * 129}, "request_id"),
    ({"request_id": "é"}, "request_id"),
    ({"request_id": "a\n"}, "request_id"),
    ({"request_id": "{a}"}, "request_id"),
    ({"tenant": "a:b"}, "tenant"),
    ({"tenant": "x" * 65}, "tenant"),
    ({"model": ""}, "model"),
    ({"model": "x" * 257}, "model"),
    ({"model": "a\nb"}, "model"),
    ({"profile": "x" * 257}, "profile"),
    ({"adapter": "x" * 257}, "adapter"),
    ({"priority": 4}, "priority"),
    ({"priority": -1}, "priority"),
    ({"prompt": None}, "prompt"),
    ({"prompt": TextPrompt("")}, "text"),
    ({"prompt": TextPrompt("é" * 501)}, "text"),
    ({"prompt": TokenPrompt(())}, "token_ids.ids"),
    ({"prompt": TokenPrompt((1,), "x" * 257)}, "token_ids.tokenizer_digest"),
    ({"prompt": ChatPrompt(())}, "chat.messages"),
    (chat(*[ChatMessage("user", "")] * 1025), "chat.messages"),
    (chat(ChatMessage("user", "x"), ChatMessage("", "x")), "chat.messages[1].role"),
    (chat(ChatMessage("r" * 65, "x")), "chat.messages[0].role"),
    (chat(ChatMessage("user", "x" * 600), ChatMessage("user", "x" * 600)), "chat.messages"),
    (chat(arguments="[1]"), "chat.template_arguments_json"),
    (chat(arguments="{"), "chat.template_arguments_json"),
    (chat(arguments='{"a": NaN}'), "chat.template_arguments_json"),
    (chat(arguments='{"a": "' + "x" * 17_000 + '"}'), "chat.template_arguments_json"),
    (chat(arguments='{"a": ' + "[" * 8_000 + "]" * 8_000 + "}"), "chat.template_arguments_json"),
    (chat(arguments='{"a": ' + "1" * 5_000 + "}"), "chat.template_arguments_json"),
    *[(sampling(temperature=value), "sampling.temperature") for value in (NAN, INF, -INF, -0.1, 101.0)],
    *[(sampling(top_p=value), "sampling.top_p") for value in (NAN, INF, 0.0, -0.5, 2.0, 1.001)],
    *[(sampling(min_p=value), "sampling.min_p") for value in (NAN, INF, -0.5, 1.001)],
    *[
        (sampling(repetition_penalty=value), "sampling.repetition_penalty")
        for value in (NAN, INF, 0.0, -1.0, 101.0)
    ],
    *[(sampling(presence_penalty=value), "sampling.presence_penalty") for value in (NAN, INF, -101.0, 101.0)],
    *[
        (sampling(frequency_penalty=value), "sampling.frequency_penalty")
        for value in (NAN, -INF, -101.0, 101.0)
    ],
    # A client's −5 arrives so, where its language lets it through.
    (sampling(top_k=2**32 - 5), "sampling.top_k"),
    (sampling(seed=2**64), "sampling.seed"),
    (sampling(n=0), "sampling.n"),
    *[(sampling(logit_bias={7: value}), "sampling.logit_bias[7]") for value in (NAN, INF, -100.5, 101.0)],
    (sampling(logit_bias=dict.fromkeys(range(1025), 1.0)), "sampling.logit_bias"),
    (stopping(max_new_tokens=0), "stopping.max_new_tokens"),
    (stopping(max_new_tokens=4, min_new_tokens=5), "stopping.min_new_tokens"),
    (stopping(stop_strings=("a",) * 17), "stopping.stop_strings"),
    (stopping(stop_strings=("a",) * 10_000), "stopping.stop_strings"),
    (stopping(stop_strings=("a", "")), "stopping.stop_strings[1]"),
    (stopping(stop_strings=("é" * 129,)), "stopping.stop_strings[0]"),
    (stopping(stop_token_ids=(1,) * 257), "stopping.stop_token_ids"),
    ({"output": Output(logprobs=21)}, "output.logprobs"),
    ({"disconnect_mode": 3}, "disconnect.mode"),
    ({"disconnect_mode": 2, "retention_s": 0.0}, "disconnect.retention"),
    ({"disconnect_mode": 2, "retention_s": 3601.0}, "disconnect.retention"),
    ({"disconnect_mode": 1, "retention_s": 5.0}, "disconnect.retention"),
    ({"timeout_s": 0.0}, "timeout"),
    ({"timeout_s": -1.0}, "timeout"),
    ({"timeout_s": 3601.0}, "timeout"),
]


@pytest.mark.parametrize(("change", "field"), BAD)
def test_a_bad_field_is_named_alone(change, field):
    with pytest.raises(InvalidArgument) as caught:
        validate(replace(GOOD, **change), LIMITS)
    assert [one.field for one in caught.value.fields] == [f"generation.{field}"]
    assert caught.value.message.startswith(f"generation.{field}: ")
    assert len(caught.value.message) < 500


def test_all_that_is_wrong_is_said_at_once_within_a_bound():
    bad = replace(GOOD, request_id="a b", **sampling(top_p=0.0, min_p=2.0), timeout_s=-1.0)
    with pytest.raises(InvalidArgument, match=r"\(and 3 more\)") as caught:
        validate(bad, LIMITS)
    assert len(caught.value.fields) == 4
    with pytest.raises(InvalidArgument) as caught:
        validate(replace(GOOD, **sampling(logit_bias=dict.fromkeys(range(1000), NAN))), LIMITS)
    assert len(caught.value.fields) == MAX_VIOLATIONS


@pytest.mark.parametrize(("change", "field"), [({"adapter": "a"}, "adapter"), (sampling(n=2), "sampling.n")])
def test_what_has_no_code_yet_is_said(change, field):
    with pytest.raises(Unimplemented) as caught:
        validate(replace(GOOD, **change), LIMITS)
    assert [one.field for one in caught.value.fields] == [f"generation.{field}"]


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"request_id": "a.B_c:d-9", "tenant": "t.1-_"},
        {"model": "sha256:" + "0" * 64, "profile": "p-0123", "priority": 3},
        {"prompt": TokenPrompt((0,))},
        chat(ChatMessage("user", ""), arguments='{"enable_thinking": false}'),
        sampling(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0, seed=2**64 - 1, n=1),
        sampling(temperature=100.0, top_p=1e-9, min_p=1.0, repetition_penalty=0.1, presence_penalty=-100.0),
        sampling(logit_bias=dict.fromkeys(range(1024), -100.0)),
        stopping(max_new_tokens=1, min_new_tokens=1, stop_strings=("a",) * 16, stop_token_ids=(1,) * 256),
        {"output": Output(logprobs=20)},
        {"disconnect_mode": 2, "retention_s": 3600.0, "timeout_s": 3600.0},
    ],
)
def test_what_is_allowed_passes(change):
    validate(replace(GOOD, **change), LIMITS)


numbers = st.none() | st.floats() | st.integers(-10, 2**64)


@given(
    temperature=numbers,
    top_p=numbers,
    min_p=numbers,
    penalties=st.tuples(numbers, numbers, numbers),
    bias=st.dictionaries(st.integers(0, 2**32 - 1), st.floats(), max_size=40),
    strings=st.lists(st.text(max_size=300), max_size=20),
)
def test_what_passes_is_within_every_bound(temperature, top_p, min_p, penalties, bias, strings):
    repetition, presence, frequency = penalties
    asked = replace(
        GOOD,
        sampling=Sampling(
            temperature=temperature,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            presence_penalty=presence,
            frequency_penalty=frequency,
            logit_bias=bias,
        ),
        stopping=Stopping(stop_strings=tuple(strings)),
    )
    fine = (
        (temperature is None or 0 <= temperature <= 100)
        and (top_p is None or 0 < top_p <= 1)
        and (min_p is None or 0 <= min_p <= 1)
        and (repetition is None or 0 < repetition <= 100)
        and all(value is None or -100 <= value <= 100 for value in (presence, frequency))
        and all(-100 <= value <= 100 for value in bias.values())
        and len(strings) <= 16
        and all(0 < len(string.encode()) <= 256 for string in strings)
    )
    if fine:
        validate(asked, LIMITS)
    else:
        with pytest.raises(InvalidArgument) as caught:
            validate(asked, LIMITS)
        assert 1 <= len(caught.value.fields) <= MAX_VIOLATIONS


@given(st.text(max_size=140), st.text(max_size=80))
def test_names_that_pass_are_safe_in_keys(request_id, tenant):
    try:
        validate(replace(GOOD, request_id=request_id, tenant=tenant), LIMITS)
    except TreadleError:
        return
    assert request_id.isascii()
    assert tenant.isascii()
    assert not set(request_id + tenant) & set("{} \n*?[]")
    assert ":" not in tenant
