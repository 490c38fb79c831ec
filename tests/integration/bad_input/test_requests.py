"""Every bad request at the front door: its status, its field, the way out, and the suite still serving.

Requests go as bytes, so that also what no generated stub would send is sent.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest
from raw_calls import CAPITAL, Asker, copy_of_served, imported
from running_suite import Suite
from small_folder import write_model

from treadle.api.inference.v1 import generation_pb2, inference_pb2
from treadle.errors import TreadleError
from treadle.rpc import from_status

NAN, INF = math.nan, math.inf
VOCABULARY, CONTEXT = 49152, 8192

TEMPLATE = """\
{%- set what = messages[0].content -%}
{%- if what == 'loop' -%}
{%- for a in range(99999) -%}{%- for b in range(99999) -%}{%- endfor -%}{%- endfor -%}
{%- elif what == 'gigabyte' -%}{{ 'a' * 10 ** 9 }}
{%- elif what == 'centre' -%}{{ 'a'.center(10 ** 9) }}
{%- elif what == 'range' -%}{{ range(10 ** 9) | list }}
{%- elif what == 'doubling' -%}{%- set ns = namespace(s='aaaaaaaa') -%}
{%- for i in range(60) -%}{%- set ns.s = ns.s + ns.s -%}{%- endfor -%}
{%- elif what == 'attributes' -%}{{ ''.__class__.__mro__[1].__subclasses__() }}
{%- elif what == 'filter' -%}{{ (messages | attr('__class__')).__mro__ }}
{%- elif what == 'globals' -%}{{ raise_exception.__globals__['json'].codecs.open('/etc/passwd') }}
{%- elif what == 'refuse' -%}{{ raise_exception('🙂' * 5000) }}
{%- else -%}{{ what }}{{ mood }}
{%- endif -%}
"""


def varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    encoded = b""
    while value > 127:
        encoded += bytes([value & 127 | 128])
        value >>= 7
    return encoded + bytes([value])


def wire(number: int, content: bytes | int) -> bytes:
    """One field as it travels: bytes of any kind, or a number that may be negative."""
    if isinstance(content, int):
        return varint(number << 3) + varint(content)
    return varint(number << 3 | 2) + varint(len(content)) + content


def raw(*parts: bytes) -> bytes:
    """A request for the model whose Generation goes on with `parts`."""
    return wire(1, wire(3, b"smollm2") + b"".join(parts))


def asked(**fields: object) -> bytes:
    """A request by the generated stubs."""
    generation = {"model": "smollm2", "stopping": {"max_new_tokens": 2}, "sampling": {"temperature": 0.0}}
    if not {"text", "token_ids", "chat"} & fields.keys():
        generation["text"] = "Hello"
    made = generation_pb2.Generation(**(generation | fields))
    return inference_pb2.GenerateRequest(generation=made).SerializeToString()


def chat(content: str, model: str = "smollm2", **fields: object) -> bytes:
    return asked(model=model, chat={"messages": [{"role": "user", "content": content}]} | fields)


@dataclass(frozen=True)
class Bad:
    """A request, and what must be said of it."""

    data: bytes = field(repr=False)
    code: str
    reason: str
    field: str = ""
    words: str = ""
    """Part of the way out."""
    at_once: bool = False


def invalid(data: bytes, field: str, words: str) -> Bad:
    return Bad(data, "INVALID_ARGUMENT", "INVALID_FIELD", f"generation.{field}", words)


def malformed(data: bytes) -> Bad:
    return Bad(data, "INVALID_ARGUMENT", "MALFORMED_MESSAGE", "", "valid UTF-8")


def flood(data: bytes, field: str) -> Bad:
    return Bad(data, "INVALID_ARGUMENT", "TOO_MANY_ELEMENTS", f"generation.{field}", "send fewer")


def unknown(name: str) -> Bad:
    return Bad(asked(model=name), "NOT_FOUND", "MODEL_NOT_FOUND", "generation.model", "ListModels")


def failed(content: str) -> Bad:
    data = chat(content, "hostile")
    return Bad(data, "FAILED_PRECONDITION", "CHAT_TEMPLATE_FAILED", "", "chat template failed")


def arguments(text: str, words: str, reason: str = "INVALID_FIELD", model: str = "smollm2") -> Bad:
    data = chat("hello", model, template_arguments_json=text)
    return Bad(data, "INVALID_ARGUMENT", reason, "generation.chat.template_arguments_json", words)


IDS, STOPPING, SAMPLING = "token_ids.ids", "stopping", "sampling"
HELLO = wire(7, b"Hello")
LONG = "word " * (CONTEXT + 1)
BAD: dict[str, Bad] = {
    "no prompt": invalid(raw(), "prompt", "set one of text, token_ids and chat"),
    "empty text": invalid(asked(text=""), "text", "must not be empty"),
    "empty ids": invalid(asked(token_ids={}), IDS, "at least one"),
    "empty chat": invalid(asked(chat={}), "chat.messages", "1 to 1024 messages"),
    "a message without a role": invalid(
        asked(chat={"messages": [{"content": "x"}]}), "chat.messages[0].role", "such as"
    ),
    "id past the vocabulary": invalid(
        asked(token_ids={"ids": [1, VOCABULARY]}), f"{IDS}[1]", f"below the vocabulary's size, {VOCABULARY}"
    ),
    "largest id": invalid(asked(token_ids={"ids": [2**32 - 1]}), f"{IDS}[0]", "below the vocabulary's"),
    # uint32 on the wire has no sign: a negative number arrives as a very large one.
    "negative id": invalid(raw(wire(8, wire(1, -1))), f"{IDS}[0]", "below the vocabulary's"),
    "negative id, packed": invalid(
        raw(wire(8, wire(1, varint(7) + varint(-5)))), f"{IDS}[1]", "below the vocabulary's"
    ),
    "text longer than the context": invalid(asked(text=LONG), "text", "Shorten it"),
    "ids longer than the context": invalid(
        asked(token_ids={"ids": [1] * CONTEXT}), IDS, f"at most {CONTEXT - 1}"
    ),
    "chat longer than the context": invalid(chat(LONG), "chat.messages", "Shorten it"),
    "text of 5 MB": invalid(asked(text="a" * (5 << 20)), "text", "Shorten the prompt"),
    "no new tokens": invalid(
        asked(stopping={"max_new_tokens": 0}), f"{STOPPING}.max_new_tokens", "Leave it unset"
    ),
    "negative new tokens": invalid(
        raw(HELLO, wire(11, wire(1, -5))), f"{STOPPING}.max_new_tokens", "Leave it unset"
    ),
    "more new tokens than fit": invalid(
        asked(stopping={"max_new_tokens": CONTEXT}), f"{STOPPING}.max_new_tokens", "Leave it unset"
    ),
    "huge new tokens": invalid(
        asked(stopping={"max_new_tokens": 2**32 - 1}), f"{STOPPING}.max_new_tokens", "shorten the prompt"
    ),
    "huge least new tokens": invalid(
        asked(stopping={"min_new_tokens": 2**32 - 1}), f"{STOPPING}.min_new_tokens", "what the context leaves"
    ),
    **{
        f"temperature {value}": invalid(
            asked(sampling={"temperature": value}), f"{SAMPLING}.temperature", "0 is greedy"
        )
        for value in (NAN, INF, -INF, -1.0)
    },
    **{
        f"top_p {value}": invalid(asked(sampling={"top_p": value}), f"{SAMPLING}.top_p", "1 keeps all tokens")
        for value in (0.0, 2.0, -0.5, NAN, INF)
    },
    "top_k -5": invalid(raw(HELLO, wire(10, wire(2, -5))), f"{SAMPLING}.top_k", "0 keeps all tokens"),
    "min_p 2": invalid(asked(sampling={"min_p": 2.0}), f"{SAMPLING}.min_p", "0 keeps all tokens"),
    "repetition penalty 0": invalid(
        asked(sampling={"repetition_penalty": 0.0}), f"{SAMPLING}.repetition_penalty", "1 is off"
    ),
    "presence penalty infinite": invalid(
        asked(sampling={"presence_penalty": INF}), f"{SAMPLING}.presence_penalty", "0 is off"
    ),
    "frequency penalty NaN": invalid(
        asked(sampling={"frequency_penalty": NAN}), f"{SAMPLING}.frequency_penalty", "0 is off"
    ),
    "bias past the vocabulary": invalid(
        asked(sampling={"logit_bias": {VOCABULARY: 1.0}}),
        f"{SAMPLING}.logit_bias[{VOCABULARY}]",
        "below the vocabulary's",
    ),
    "bias NaN": invalid(asked(sampling={"logit_bias": {7: NAN}}), f"{SAMPLING}.logit_bias[7]", "0 is off"),
    "stop id past the vocabulary": invalid(
        asked(stopping={"stop_token_ids": [0, VOCABULARY]}),
        f"{STOPPING}.stop_token_ids[1]",
        "below the vocabulary's",
    ),
    "10,000 stop strings": invalid(
        asked(stopping={"stop_strings": [f"stop {number}" for number in range(10_000)]}),
        f"{STOPPING}.stop_strings",
        "Send the ones that matter",
    ),
    "an empty stop string": invalid(
        asked(stopping={"stop_strings": [""]}), f"{STOPPING}.stop_strings[0]", "1 to 256 bytes"
    ),
    "a thousand logprobs": invalid(asked(output={"logprobs": 1000}), "output.logprobs", "at most 20"),
    "a timeout of no time": invalid(asked(timeout={"seconds": 0}), "timeout", "Leave it unset"),
    "a timeout out of every range": invalid(
        asked(timeout={"seconds": -(2**63)}), "timeout", "Leave it unset"
    ),
    "a request_id with spaces": invalid(asked(request_id="a b"), "request_id", "Leave it empty"),
    "a priority that is none": invalid(raw(HELLO, wire(6, -7)), "priority", "leave it unset"),
    "no model": invalid(asked(model=""), "model", "ListModels"),
    "a model of 300 letters": invalid(asked(model="m" * 300), "model", "at most 256"),
    "a model with NUL": invalid(asked(model="a\0b"), "model", "printable"),
    "an unknown model": unknown("nobody"),
    "an unknown digest": unknown("sha256:" + "0" * 64),
    "a model that is a path": invalid(asked(model="../../../etc/passwd"), "model", "ListModels"),
    "a model in other letters": invalid(asked(model="ｓｍｏｌｌｍ２"), "model", "ListModels"),
    "a model that nobody serves": Bad(
        asked(model="asleep"), "UNAVAILABLE", "MODEL_NOT_SERVED", "", "start one that serves it", at_once=True
    ),
    "another tokenizer's ids": Bad(
        asked(token_ids={"ids": [1], "tokenizer_digest": "sha256:other"}),
        "FAILED_PRECONDITION",
        "TOKENIZER_MISMATCH",
        "generation.token_ids.tokenizer_digest",
        "tokenise with the model's own",
    ),
    "garbage": malformed(b"\xff\xff\xff\xff"),
    "half a message": malformed(asked()[:-3]),
    "text that is not UTF-8": malformed(raw(wire(7, b"Hell\xff\xfe"))),
    "a name that is not UTF-8": malformed(wire(1, wire(3, b"\xc3\x28") + HELLO)),
    "half a character in the text": malformed(raw(wire(7, b"\xed\xa0\x80"))),
    "seven million messages": flood(raw(wire(9, b"\x0a\x00" * 7_000_000)), "chat.messages"),
    "fourteen million ids": flood(raw(wire(8, wire(1, b"\x01" * 14_000_000))), IDS),
    "seven million stop strings": flood(
        raw(HELLO, wire(11, b"\x1a\x00" * 7_000_000)), "stopping.stop_strings"
    ),
    "a template that loops": failed("loop"),
    "a template of a gigabyte": failed("gigabyte"),
    "a template that centres": failed("centre"),
    "a template with a long range": failed("range"),
    "a template that doubles": failed("doubling"),
    "a template that reaches for attributes": failed("attributes"),
    "a template that filters for attributes": failed("filter"),
    "a template that reaches for globals": failed("globals"),
    "a template that refuses": Bad(
        chat("refuse", "hostile"), "INVALID_ARGUMENT", "CHAT_TEMPLATE_FAILED", "", "refuses the messages"
    ),
    "arguments that are none": arguments("[1]", "a JSON object"),
    "arguments cut short": arguments('{"a": ', "a JSON object"),
    "arguments without end": arguments('{"a": ' + "[" * 8_000 + "}", "a JSON object"),
    "arguments that are not numbers": arguments('{"a": NaN}', "a JSON object"),
    "arguments of 20 KB": arguments('{"a": "' + "x" * 20_000 + '"}', "at most 16384 bytes"),
    "an argument that the template does not take": arguments(
        '{"tone": 1}', "it takes: mood", "CHAT_TEMPLATE_FAILED", "hostile"
    ),
    "an argument in the messages' place": arguments(
        '{"messages": []}', "it takes: mood", "CHAT_TEMPLATE_FAILED", "hostile"
    ),
    "an argument that is an attribute": arguments(
        '{"__class__": 1}', "it takes: mood", "CHAT_TEMPLATE_FAILED", "hostile"
    ),
}


@pytest.fixture(scope="module", autouse=True)
def models(suite: Suite, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A model that nobody serves, and the served one with a template of a stranger's."""
    root: Path = tmp_path_factory.mktemp("models")
    folders = {
        "asleep": write_model(root / "asleep"),
        "hostile": copy_of_served(suite, root / "hostile", TEMPLATE),
    }
    with imported(suite, folders):
        yield


def check(error: TreadleError, bad: Bad) -> None:
    assert (error.code, error.reason) == (bad.code, bad.reason), error.message
    assert [violation.field for violation in error.fields][:1] == ([bad.field] if bad.field else [])
    said = " ".join([error.message, *(violation.description for violation in error.fields)])
    assert bad.words in said, said
    assert (error.retry_after_s is not None) == (bad.code == "UNAVAILABLE")


async def watched(asker: Asker, call: Callable[[], object]) -> tuple[TreadleError, float]:
    """The call's error, and the longest that the services took meanwhile to say that they live."""
    slowest = 0.0
    task = asyncio.ensure_future(call())  # type: ignore[arg-type]
    while not task.done():
        for service in ("gateway", "tokenizer"):
            slowest = max(slowest, await asker.health_s(service))
    with pytest.raises(TreadleError) as caught:
        await task
    return caught.value, slowest


async def test_each_alone(asker: Asker):
    """Generate and GenerateStream; after each a real answer, from the same processes."""
    processes = asker.processes()
    assert len(processes) >= 7
    slowest, asked_for = {}, 0
    for name, bad in BAD.items():
        for call in (
            lambda data=bad.data: asker.ask("gateway", "Generate", data),
            lambda data=bad.data: asker.read("GenerateStream", data),
        ):
            started = time.perf_counter()
            error, slowest[name] = await watched(asker, call)
            print(f"{name}: {error.code} {error.message[:110]!r}")
            check(error, bad)
            assert not bad.at_once or time.perf_counter() - started < 2
            asked_for += 1
        await asker.still_serves()
        assert asker.processes() == processes, name
    worst = max(slowest, key=slowest.__getitem__)
    print(f"{asked_for} bad requests of {len(BAD)} kinds; the slowest sign of life: {slowest[worst]:.3f} s")
    assert slowest[worst] < 1, worst


async def test_all_in_one_batch_among_good_ones(asker: Asker):
    """A bad item fails alone; what cannot be decoded too."""
    processes = asker.processes()
    items = [data for bad in BAD.values() for data in (bad.data, CAPITAL)]
    answers = await asker.batch(items)
    assert sorted(answers) == list(range(2 * len(BAD)))
    for number, (name, bad) in enumerate(BAD.items()):
        assert answers[2 * number].HasField("error"), name
        check(from_status(answers[2 * number].error), bad)
        assert answers[2 * number + 1].response.choices[0].text.startswith(" Paris"), name
    print(f"{len(BAD)} bad items among {len(BAD)} good ones")
    assert asker.processes() == processes


async def test_a_message_of_64_megabytes(asker: Asker):
    """It is refused before any code of ours sees it, and none of it is kept."""
    await asker.still_serves()
    data = raw(wire(7, b"a" * (64 << 20)))
    for service, method in (("gateway", "Generate"), ("tokenizer", "Encode"), ("registry", "ImportModel")):
        before = asker.resident_bytes(service)
        for _ in range(3):
            error, slowest = await watched(asker, lambda: asker.ask(service, method, data))  # noqa: B023
            assert error.code == "RESOURCE_EXHAUSTED"
            assert f"{len(data)} vs. {16 << 20}" in error.message
            assert slowest < 1
        grown = asker.resident_bytes(service) - before
        print(f"{service}: {error.message!r}; {grown / 1e6:+.0f} MB after three")
        # A whole one that was kept would show.
        assert grown < 48 << 20
    with pytest.raises(TreadleError) as caught:
        await asker.read("GenerateStream", data)
    assert caught.value.code == "RESOURCE_EXHAUSTED"
    with pytest.raises(grpc.RpcError) as ended:
        await asyncio.to_thread(
            _batch_with_blocking_client, asker.suite.addresses["gateway"], [CAPITAL, data]
        )
    assert ended.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await asker.still_serves()


def _batch_with_blocking_client(address: str, items: list[bytes]) -> None:
    """To grpc.aio's client the end of a call that it still writes to is INTERNAL, whatever was said."""
    options = [("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(address, options=options) as channel:
        call = channel.stream_stream("/treadle.api.inference.v1.InferenceService/BatchGenerate")
        for _ in call(iter(items), timeout=30):
            pass
