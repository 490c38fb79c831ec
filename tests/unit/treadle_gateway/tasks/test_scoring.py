"""Score: where the continuation begins, what stands for no context, and what cannot be scored."""

from __future__ import annotations

import random
import struct

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from treadle.errors import FailedPrecondition, Internal, InvalidArgument
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.deadlines import Deadline
from treadle_gateway.encoded import EncodedText, EncodedTexts
from treadle_gateway.generation import TokenPrompt
from treadle_gateway.models import ServedModel
from treadle_gateway.tasks import scoring
from treadle_gateway.tasks.task import ScoreInput, ScoreTask
from treadle_gateway.tasks.texts import TextEncoder


def task(*inputs: ScoreInput) -> ScoreTask:
    return ScoreTask(inputs=inputs)


@pytest.fixture(autouse=True)
def decoder(tokenizer) -> None:
    """A decoder's tokenizer adds nothing."""
    tokenizer.special = False


def ids(*token_ids: int, digest: str = "") -> TokenPrompt:
    return TokenPrompt(token_ids, digest)


async def test_the_continuation_is_what_the_whole_has_beyond_the_context(plan, tokenizer):
    made = await plan(scoring, task(ScoreInput("one two", " three four"), ScoreInput("a ", "b")))
    assert [(list(one.ids), one.first) for one in made.inputs] == [([13, 13, 15, 14], 2), ([11, 11], 1)]
    ((texts, _),) = tokenizer.asked
    assert [text for text, _ in texts] == ["one two", "one two three four", "a", "a b"]


@pytest.mark.parametrize(
    ("defaults", "first"),
    [({"bos_token_id": 5, "eos_token_ids": (6,)}, 5), ({"eos_token_ids": (6, 7)}, 6)],
)
async def test_no_context_is_the_token_that_texts_begin_with(plan, defaults, first):
    inputs = task(ScoreInput("", "one"), ScoreInput("  ", "one"), ScoreInput(continuation_ids=ids(9, 8)))
    made = await plan(scoring, inputs, defaults=defaults)
    assert [(list(one.ids), one.first) for one in made.inputs] == [
        ([first, 13], 1),
        ([first, 13], 1),
        ([first, 9, 8], 1),
    ]


async def test_without_such_a_token_a_context_is_asked_for(plan):
    with pytest.raises(FailedPrecondition, match=r"inputs\[1\].context.*send a context") as caught:
        await plan(scoring, task(ScoreInput("a", " b"), ScoreInput("", "one")))
    assert caught.value.reason == "NO_BEGINNING_TOKEN"
    assert [one.field for one in caught.value.fields] == ["inputs[1].context"]


async def test_ids_are_taken_as_they_are_and_bounded(plan, tokenizer):
    made = await plan(scoring, task(ScoreInput("", "", ids(3, 4), ids(5, digest="sha256:t"))))
    assert [(list(one.ids), one.first) for one in made.inputs] == [([3, 4, 5], 2)]
    assert not tokenizer.asked
    with pytest.raises(InvalidArgument) as caught:
        await plan(scoring, task(ScoreInput("", "", ids(3, 100), ids(5, 7, 101))))
    assert [one.field for one in caught.value.fields] == [
        "inputs[0].context_token_ids.ids[1]",
        "inputs[0].continuation_token_ids.ids[2]",
    ]
    with pytest.raises(FailedPrecondition) as mismatch:
        await plan(scoring, task(ScoreInput("", "", None, ids(5, digest="sha256:other"))))
    assert mismatch.value.reason == "TOKENIZER_MISMATCH"


async def test_a_continuation_without_tokens_and_one_too_long(plan):
    with pytest.raises(InvalidArgument, match=r"inputs\[0\].continuation: adds no token"):
        await plan(scoring, task(ScoreInput("one", " ")))
    with pytest.raises(
        InvalidArgument, match=r"inputs\[0\]: has 41 tokens, .* at most 20; shorten its context"
    ):
        await plan(scoring, task(ScoreInput("one", " word" * 40)))


async def test_greedy_is_when_each_token_was_the_likeliest(plan):
    made = await plan(
        scoring, task(ScoreInput("", "", ids(3), ids(5, 6)), ScoreInput("", "", ids(3), ids(7)))
    )
    data = b"".join(struct.pack("<If", *one) for one in ((5, -0.5), (6, -1.5), (8, -2.0)))
    first, second = made.read(data).rows
    assert (first.ids, list(first.logprobs), first.greedy) == ([5, 6], [-0.5, -1.5], True)
    assert (second.ids, list(second.logprobs), second.greedy) == ([7], [-2.0], False)
    for wrong in (b"", data[:-8], data + data):
        with pytest.raises(Internal):
            made.read(wrong)


def harness_pair(tokenizer: Tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """What lm-evaluation-harness documents: trailing spaces move, and the whole is cut at the context."""
    spaces = len(context) - len(context.rstrip())
    if spaces:
        continuation, context = context[-spaces:] + continuation, context[:-spaces]
    whole = tokenizer.encode(context + continuation).ids
    return whole, whole[len(tokenizer.encode(context).ids) :]


class Packaged:
    """The packaged model's tokenizer."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    async def encode_texts(self, model, texts, options, *, timeout_s):
        assert options.special_tokens
        encoded = [self.tokenizer.encode(text) for text, _ in texts]
        rows = [EncodedText(one.ids, special=one.special_tokens_mask) for one in encoded]
        return EncodedTexts(rows, "sha256:t")


async def test_ids_are_the_harness_ones_for_a_real_tokenizer(rng: random.Random, smollm2_folder):
    real = Tokenizer.from_file(str(smollm2_folder / "tokenizer.json"))
    words = "The capital of France is Paris , it said . 2024 naïve 漢字 \n\n def f(x):  return".split(" ")
    pairs = []
    for _ in range(500):
        context, continuation = (
            "".join(
                rng.choice(words) + rng.choice((" ", " ", "", "  ", "\n")) for _ in range(rng.randrange(1, 9))
            )
            for _ in range(2)
        )
        whole, beyond = harness_pair(real, context, continuation)
        if context.strip() and continuation and beyond:
            pairs.append((ScoreInput(context, continuation), whole, beyond))
    artifact = Artifact("sha256:a", "sha256:c", "sha256:t", 0, 0, GenerationDefaults())
    encoder = TextEncoder(Packaged(real), ServedModel(artifact, "p", 0, 0, 1), Deadline(10), timeout_s=1)
    made = await scoring.plan(task(*(one for one, _, _ in pairs)), encoder)
    for work, (_, whole, beyond) in zip(made.inputs, pairs, strict=True):
        assert list(work.ids[work.first :]) == beyond
        assert len(work.ids) - work.first == len(beyond)
        # Where the boundary falls into a token the context's own ids stand before it.
        assert len(work.ids) == len(whole)
    assert len(pairs) > 300
    print(f"{len(pairs)} pairs as lm-evaluation-harness cuts them")


@pytest.mark.parametrize("before", ["", "<s>"])
@pytest.mark.parametrize("behind", ["", "</s>"])
async def test_what_a_tokenizer_puts_behind_a_text_is_no_part_of_it(before: str, behind: str):
    """As of a Llama with add_eos_token; the same token written out is text."""
    vocabulary = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<s>", "</s>"])
    special = [(token, vocabulary[token]) for token in (before, behind) if token]
    made.post_processor = processors.TemplateProcessing(f"{before} $A {behind}".strip(), None, special)
    artifact = Artifact("sha256:a", "sha256:c", "sha256:t", 0, 0, GenerationDefaults(bos_token_id=0))
    encoder = TextEncoder(Packaged(made), ServedModel(artifact, "p", 0, 0, 1), Deadline(10), timeout_s=1)
    inputs = [ScoreInput("a b", " c"), ScoreInput("", "b c"), ScoreInput("a", " </s>")]
    plan = await scoring.plan(task(*inputs), encoder)
    first = [0] if before else []
    assert [(list(one.ids), one.first) for one in plan.inputs] == [
        ([*first, 2, 3, 4], len(first) + 2),
        ([0, 3, 4], 1),
        ([*first, 2, 1], len(first) + 1),
    ]
    with pytest.raises(InvalidArgument, match="adds no token"):
        await scoring.plan(task(ScoreInput("a", " ")), encoder)
    print(f"{before or 'nothing'} before, {behind or 'nothing'} behind: {len(inputs)} inputs")
