"""The tokenizer as a process over gRPC, with the packaged model and a registry that the test holds."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from tokenizer_process import (
    Service,
    failure,
    inputs,
)
from tokenizers import Tokenizer as Backend

from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

TEXTS = [
    "Once upon a time,",
    "Grüße 👍🏽 你好 مرحبا — family: 👨‍👩‍👧‍👦",
    "<|im_start|>user\nhi<|im_end|>",
    "1234567890 3.14159\t\n\n    indented",
    "",
]
MESSAGES = [pb.Message(role="system", content="Be brief."), pb.Message(role="user", content="Hello 👍🏽")]
HOSTILE = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


async def test_one_load_for_all_who_come_at_once(service: Service) -> None:
    """First, so that nothing is loaded yet."""
    digest = service.registry.artifacts["smollm2"].digest
    requests = [pb.EncodeRequest(model=name, inputs=inputs("hi")) for name in ["smollm2", digest] * 16]
    answers = await asyncio.gather(*(service.stub.Encode(request, timeout=30) for request in requests))
    assert len({answer.SerializeToString() for answer in answers}) == 1
    assert answers[0].artifact_digest == digest
    assert answers[0].tokenizer_digest == service.registry.artifacts["smollm2"].tokenizer_digest
    assert len(service.logged("tokenizer loaded")) == 1
    print(f"{len(answers)} answers, {service.registry.num_asked} questions to the registry")
    assert 2 <= service.registry.num_asked < 16


async def test_encode_as_the_library(service: Service, oracle: Backend) -> None:
    request = pb.EncodeRequest(
        model="smollm2",
        inputs=inputs(*TEXTS),
        return_offsets=True,
        return_type_ids=True,
        return_attention_mask=True,
    )
    answer = await service.stub.Encode(request, timeout=10)
    assert len(answer.encodings) == len(TEXTS)
    for index, (encoding, text) in enumerate(zip(answer.encodings, TEXTS, strict=True)):
        expected = oracle.encode(text)
        assert list(encoding.ids) == expected.ids
        assert [(offset.start, offset.end) for offset in encoding.offsets] == expected.offsets
        assert list(encoding.type_ids) == expected.type_ids
        assert list(encoding.attention_mask) == [1] * len(expected.ids)
        assert encoding.input_index == index
    last = answer.encodings[1].offsets[-1]
    assert last.end == len(TEXTS[1]) < len(TEXTS[1].encode())


async def test_windows_and_padding(service: Service, oracle: Backend) -> None:
    ids = oracle.encode("the dog sang and " * 20).ids
    request = pb.EncodeRequest(
        model="smollm2",
        inputs=inputs("short", "the dog sang and " * 20),
        truncation=pb.Truncation(max_length=16, stride=4, return_overflowing=True),
    )
    answer = await service.stub.Encode(request, timeout=10)
    rows = [list(encoding.ids) for encoding in answer.encodings if encoding.input_index == 1]
    assert [row[0] for row in rows] == [ids[start] for start in range(0, len(ids) - 4, 12)]
    assert rows[0] + [token for row in rows[1:] for token in row[4:]] == ids
    left = pb.EncodeRequest(
        model="smollm2",
        inputs=inputs("the dog sang and " * 20),
        truncation=pb.Truncation(max_length=5, side=pb.TRUNCATION_SIDE_LEFT),
    )
    assert list((await service.stub.Encode(left, timeout=10)).encodings[0].ids) == ids[-5:]


async def test_pieces_of_a_request_come_in_order(service: Service, oracle: Backend) -> None:
    """A request that several threads work on, a large text and padding among it."""
    rng = random.Random(3)
    texts = [" ".join(rng.choice(TEXTS) for _ in range(rng.randint(1, 40))) for _ in range(300)]
    texts[100] *= 400
    assert len(texts[100]) > 64 << 10
    request = pb.EncodeRequest(model="smollm2", inputs=inputs(*texts), return_word_ids=True)
    answer = await service.stub.Encode(request, timeout=60)
    assert [encoding.input_index for encoding in answer.encodings] == list(range(300))
    expected = oracle.encode_batch(texts)
    assert [list(encoding.ids) for encoding in answer.encodings] == [one.ids for one in expected]
    assert [list(encoding.word_ids) for encoding in answer.encodings] == [one.word_ids for one in expected]
    del texts[100], expected[100]
    padded = pb.EncodeRequest(
        model="smollm2",
        inputs=inputs(*texts),
        padding=pb.Padding(multiple_of=8),
        return_special_tokens_mask=True,
        return_sequence_ids=True,
    )
    answer = await service.stub.Encode(padded, timeout=60)
    (length,) = {len(encoding.ids) for encoding in answer.encodings}
    assert length % 8 == 0
    for encoding, one in zip(answer.encodings, expected, strict=True):
        count = len(one.ids)
        assert list(encoding.ids[:count]) == one.ids
        assert list(encoding.sequence_ids) == [0] * count + [-1] * (length - count)
        assert list(encoding.special_tokens_mask) == [0] * count + [1] * (length - count)
    count = await service.stub.CountTokens(
        pb.CountTokensRequest(model="smollm2", inputs=inputs(*texts)), timeout=60
    )
    assert list(count.counts) == [len(one.ids) for one in expected]
    print(f"{len(texts)} texts of {sum(map(len, texts))} characters, rows of {length}")


async def test_one_text_of_a_pair_is_cut(service: Service, oracle: Backend) -> None:
    first, second = oracle.encode("the dog sang").ids, oracle.encode(" and the river ran on and on").ids
    truncation = pb.Truncation(
        max_length=len(first) + 3,
        stride=1,
        return_overflowing=True,
        strategy=pb.TRUNCATION_STRATEGY_ONLY_SECOND,
    )
    request = pb.EncodeRequest(
        model="smollm2",
        inputs=[pb.EncodeInput(text="the dog sang", pair=" and the river ran on and on")],
        truncation=truncation,
        return_sequence_ids=True,
    )
    answer = await service.stub.Encode(request, timeout=10)
    assert [list(row.ids) for row in answer.encodings] == [
        first + second[start : start + 3] for start in range(0, len(second) - 1, 2)
    ]
    assert {tuple(row.sequence_ids[: len(first) + 1]) for row in answer.encodings} == {
        (0,) * len(first) + (1,)
    }
    truncation.max_length = len(first)
    request.truncation.CopyFrom(truncation)
    error = await failure(service.stub.Encode(request, timeout=10))
    assert [violation.field for violation in error.fields] == ["inputs[0].pair"]


async def test_decode_and_count(service: Service, oracle: Backend) -> None:
    rows = [oracle.encode(text).ids for text in TEXTS]
    rng = random.Random(5)
    rows.append([rng.randrange(oracle.get_vocab_size()) for _ in range(300)])
    for skip in (True, False):
        request = pb.DecodeRequest(
            model="smollm2", inputs=[pb.DecodeInput(ids=row) for row in rows], skip_special_tokens=skip
        )
        answer = await service.stub.Decode(request, timeout=10)
        assert list(answer.texts) == [oracle.decode(row, skip_special_tokens=skip) for row in rows]
    unset = await service.stub.Decode(
        pb.DecodeRequest(model="smollm2", inputs=[pb.DecodeInput(ids=rows[2])]), timeout=10
    )
    assert "<|im_start|>" not in unset.texts[0]
    count = await service.stub.CountTokens(
        pb.CountTokensRequest(model="smollm2", inputs=inputs(*TEXTS)), timeout=10
    )
    assert list(count.counts) == [len(row) for row in rows[:-1]]


async def test_render_chat(service: Service, oracle: Backend) -> None:
    request = pb.RenderChatRequest(model="smollm2", messages=MESSAGES, tokenize=True)
    answer = await service.stub.RenderChat(request, timeout=10)
    assert answer.text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nHello 👍🏽<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert list(answer.ids) == oracle.encode(answer.text, add_special_tokens=False).ids
    start = oracle.token_to_id("<|im_start|>")
    assert list(answer.ids).count(start) == 3
    without = pb.RenderChatRequest(model="smollm2", messages=MESSAGES, add_generation_prompt=False)
    answer = await service.stub.RenderChat(without, timeout=10)
    assert answer.text.endswith("Hello 👍🏽<|im_end|>\n")
    assert not answer.ids


async def test_special_tokens_are_not_doubled(service: Service, tmp_path: Path) -> None:
    """A tokenizer that begins every text with a token, and a template that writes it."""
    backend = Backend.from_file(str(service.folder / "tokenizer.json"))
    from tokenizers import processors

    start = backend.token_to_id("<|im_start|>")
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", start)]
    )
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<|im_start|>"}')
    (tmp_path / "chat_template.jinja").write_text("{{ bos_token }}{{ messages[0].content }}{{ mood }}")
    service.registry.add("beginner", tmp_path, number=2)
    request = pb.RenderChatRequest(
        model="beginner", messages=MESSAGES, template_arguments_json='{"mood": "!"}', tokenize=True
    )
    answer = await service.stub.RenderChat(request, timeout=10)
    assert answer.text == "<|im_start|>Be brief.!"
    assert list(answer.ids).count(start) == 1
    encoded = await service.stub.Encode(
        pb.EncodeRequest(model="beginner", inputs=inputs("Be brief.!")), timeout=10
    )
    assert list(encoded.encodings[0].ids) == list(answer.ids)


async def test_refusals_name_the_field(service: Service) -> None:
    stub, model = service.stub, "smollm2"
    cases = [
        (stub.Encode(pb.EncodeRequest(model="", inputs=inputs("a"))), "model"),
        (stub.Encode(pb.EncodeRequest(model=model)), "inputs"),
        (stub.Encode(pb.EncodeRequest(model=model, inputs=inputs("a") * 1025)), "inputs"),
        (stub.Encode(pb.EncodeRequest(model=model, inputs=inputs("a", "b" * (5 << 20)))), "inputs[1].text"),
        (
            stub.Encode(pb.EncodeRequest(model=model, inputs=inputs("a"), truncation=pb.Truncation())),
            "truncation.max_length",
        ),
        (
            stub.Encode(
                pb.EncodeRequest(
                    model=model, inputs=inputs("a"), truncation=pb.Truncation(max_length=4, stride=1)
                )
            ),
            "truncation.stride",
        ),
        (
            stub.Encode(
                pb.EncodeRequest(
                    model=model,
                    inputs=[pb.EncodeInput(text="a", pair="b")],
                    truncation=pb.Truncation(max_length=4, return_overflowing=True),
                )
            ),
            "inputs[0].pair",
        ),
        (
            stub.Decode(pb.DecodeRequest(model=model, inputs=[pb.DecodeInput(ids=[1, 49152])])),
            "inputs[0].ids[1]",
        ),
        (stub.RenderChat(pb.RenderChatRequest(model=model)), "messages"),
        (
            stub.RenderChat(
                pb.RenderChatRequest(model=model, messages=MESSAGES, template_arguments_json='{"tool": 1}')
            ),
            "template_arguments_json",
        ),
        (
            stub.RenderChat(
                pb.RenderChatRequest(model=model, messages=MESSAGES, template_arguments_json="[1]")
            ),
            "template_arguments_json",
        ),
    ]
    for call, expected in cases:
        error = await failure(call)
        assert error.code == "INVALID_ARGUMENT"
        assert [violation.field for violation in error.fields] == [expected]
    print(f"{len(cases)} refusals")
