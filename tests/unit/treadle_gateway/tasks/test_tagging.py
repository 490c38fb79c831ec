"""Spans as Transformers' token classification pipeline makes them, over random labels of random texts."""

from __future__ import annotations

import random
import struct
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, TokenClassificationPipeline
from transformers.pipelines.token_classification import AggregationStrategy

from treadle.errors import Internal
from treadle_gateway.artifact import Artifact, GenerationDefaults, TaskFacts
from treadle_gateway.deadlines import Deadline
from treadle_gateway.encoded import EncodedText, EncodedTexts
from treadle_gateway.models import ServedModel
from treadle_gateway.tasks import tagging
from treadle_gateway.tasks.task import Aggregation, TagTask, TextInput
from treadle_gateway.tasks.texts import TextEncoder

LABELS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC", "MISC", "X-Y-Z")
WORDS = "Berlin Angela Merkel visited unbelievable constitutional places in Timbuktu yesterday".split()
STRATEGIES = {
    Aggregation.NONE: AggregationStrategy.NONE,
    Aggregation.SIMPLE: AggregationStrategy.SIMPLE,
    Aggregation.FIRST: AggregationStrategy.FIRST,
    Aggregation.MAX: AggregationStrategy.MAX,
}


def word_piece() -> Tokenizer:
    """Cuts words into pieces of a few letters."""
    pieces = sorted({word.lower()[:4] for word in WORDS} | set("abcdefghijklmnopqrstuvwxyz.,'-"))
    pieces += [f"##{word.lower()[at : at + 3]}" for word in WORDS for at in range(4, len(word), 3)]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    vocabulary = {
        piece: number for number, piece in enumerate(["[UNK]", "[CLS]", "[SEP]", *dict.fromkeys(pieces)])
    }
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", continuing_subword_prefix="##"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def byte_level() -> Tokenizer:
    """Bytes and the pairs that come often."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3, trainer)
    tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0), trim_offsets=True)
    return tokenizer


class LocalTokenizer:
    """The tokenizer service's answers, made here."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def encode_texts(self, model, texts, options, *, timeout_s):
        rows = []
        for text, _ in texts:
            encoding = self.tokenizer.encode(text)
            rows.append(
                EncodedText(
                    ids=encoding.ids,
                    starts=[start for start, _ in encoding.offsets],
                    ends=[end for _, end in encoding.offsets],
                    word_ids=[-1 if word is None else word for word in encoding.word_ids],
                    special=encoding.special_tokens_mask,
                )
            )
        return EncodedTexts(rows, "sha256:t")


def pipeline(tokenizer: Tokenizer, unknown: str) -> TokenClassificationPipeline:
    """The pipeline without its model: what it does with logits needs none."""
    made = object.__new__(TokenClassificationPipeline)
    made.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token=unknown)
    made.model = SimpleNamespace(config=SimpleNamespace(id2label=dict(enumerate(LABELS))))
    return made


def theirs(made, encoding, text: str, scores, strategy: AggregationStrategy, ignored: list[str]):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entities = made.gather_pre_entities(
            text,
            np.array(encoding.ids),
            scores,
            [(int(start), int(end)) for start, end in encoding.offsets],
            np.array(encoding.special_tokens_mask),
            strategy,
        )
        grouped = made.aggregate(entities, strategy)
    return [
        (one["start"], one["end"], label, float(one["score"]))
        for one in grouped
        if (label := one.get("entity") or one["entity_group"]) not in ignored
    ]


def model(model_type: str) -> ServedModel:
    facts = TaskFacts(tasks=("tag",), labels=LABELS)
    artifact = Artifact("sha256:a", "sha256:c", "sha256:t", 0, 0, GenerationDefaults(), model_type, facts)
    return ServedModel(artifact, "p", 0, 0, 1)


async def plan_of(tokenizer: Tokenizer, model_type: str, task: TagTask):
    encoder = TextEncoder(LocalTokenizer(tokenizer), model(model_type), Deadline(10), timeout_s=1)
    return await tagging.plan(task, encoder)


def sentence(rng: random.Random) -> str:
    words = [rng.choice((str.title, str.lower))(rng.choice(WORDS)) for _ in range(rng.randrange(1, 9))]
    return "".join(word + rng.choice((" ", " ", ", ", ".", "-")) for word in words).rstrip(" -")


@pytest.mark.parametrize(
    ("made", "model_type", "unknown"), [(word_piece, "bert", "[UNK]"), (byte_level, "roberta", "<unk>")]
)
async def test_spans_are_the_pipelines(rng, made, model_type, unknown):
    tokenizer = made()
    their_pipeline = pipeline(tokenizer, unknown)
    chances = np.random.default_rng(rng.randrange(2**32))
    compared, spans, joined = 0, 0, 0
    for _ in range(60):
        texts = [sentence(rng) for _ in range(rng.randrange(1, 4))]
        if model_type == "bert":
            texts[0] += " über 漢 ok"
        encodings = [tokenizer.encode(text) for text in texts]
        scores = []
        for encoding in encodings:
            logits = chances.normal(size=(len(encoding.ids), len(LABELS))).astype(np.float32) * 2
            exponents = np.exp(logits - logits.max(-1, keepdims=True))
            scores.append(exponents / exponents.sum(-1, keepdims=True))
        data = b"".join(
            struct.pack("<If", row.argmax(), row.max()) for text_scores in scores for row in text_scores
        )
        for ours, strategy in STRATEGIES.items():
            for include_outside in (False, True):
                task = TagTask(
                    inputs=tuple(map(TextInput, texts)), aggregation=ours, include_outside=include_outside
                )
                rows = (await plan_of(tokenizer, model_type, task)).read(data).rows
                for text, encoding, text_scores, row in zip(texts, encodings, scores, rows, strict=True):
                    ignored = [] if include_outside else ["O"]
                    wanted = theirs(their_pipeline, encoding, text, text_scores, strategy, ignored)
                    found = [(span.start, span.end, span.label, span.score) for span in row]
                    assert [one[:3] for one in found] == [one[:3] for one in wanted], (text, ours)
                    assert [one[3] for one in found] == pytest.approx([one[3] for one in wanted], abs=1e-6)
                    compared, spans = compared + 1, spans + len(found)
                    joined += len(encoding.ids) - len(found) if include_outside else 0
    assert spans > 1000
    assert joined > 500
    print(f"{model_type}: {compared} texts, {spans} spans as the pipeline's; {joined} tokens joined others")


async def test_a_label_that_the_model_has_not_and_another_size_are_the_workers_fault():
    task = TagTask(inputs=(TextInput("Berlin"),))
    plan = await plan_of(word_piece(), "bert", task)
    count = len(plan.inputs[0].ids)
    assert plan.read(struct.pack("<If", 1, 0.5) * count).rows
    for data in (b"", bytes(8 * count + 1), struct.pack("<If", len(LABELS), 0.5) * count):
        with pytest.raises(Internal) as caught:
            plan.read(data)
        assert caught.value.reason == "RESULT_MALFORMED"


async def test_no_aggregation_is_the_simple_one_and_special_tokens_have_no_spans():
    task = TagTask(inputs=(TextInput("Berlin"),))
    plan = await plan_of(word_piece(), "bert", task)
    count = len(plan.inputs[0].ids)
    ((span,),) = plan.read(struct.pack("<If", 4, 0.5) * count).rows
    assert (span.start, span.end, span.label, span.score) == (0, 6, "LOC", 0.5)
