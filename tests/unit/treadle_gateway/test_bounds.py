"""What the model bounds: ids and lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle_gateway.artifact import Artifact, GenerationDefaults
from treadle_gateway.bounds import check_ids, check_lengths
from treadle_gateway.generation import ChatPrompt, Generation, Sampling, Stopping, TextPrompt, TokenPrompt
from treadle_gateway.models import ServedModel

MODEL = ServedModel(
    artifact=Artifact("sha256:a", "sha256:c", "sha256:t", 100, 50, GenerationDefaults()),
    profile="p",
    max_model_len=50,
    vocab_size=100,
    ready_workers=1,
)
GOOD = Generation(model="tiny", prompt=TokenPrompt((0, 99)))


def fields_of(check, *arguments) -> list[str]:
    with pytest.raises(InvalidArgument) as caught:
        check(*arguments)
    return [one.field for one in caught.value.fields]


def test_ids_outside_the_vocabulary_are_named_by_their_place():
    bad = Generation(
        prompt=TokenPrompt((1, 100, 2, 2**32 - 1)),
        sampling=Sampling(logit_bias={99: 1.0, 100: 1.0}),
        stopping=Stopping(stop_token_ids=(99, 101)),
    )
    assert fields_of(check_ids, bad, MODEL) == [
        "generation.token_ids.ids[1]",
        "generation.token_ids.ids[3]",
        "generation.sampling.logit_bias[100]",
        "generation.stopping.stop_token_ids[1]",
    ]
    check_ids(replace(GOOD, stopping=Stopping(stop_token_ids=(0, 99))), MODEL)


def test_another_tokenizers_ids_are_refused():
    with pytest.raises(FailedPrecondition) as caught:
        check_ids(replace(GOOD, prompt=TokenPrompt((1,), "sha256:other")), MODEL)
    assert caught.value.reason == "TOKENIZER_MISMATCH"
    check_ids(replace(GOOD, prompt=TokenPrompt((1,), "sha256:t")), MODEL)


@pytest.mark.parametrize(
    ("prompt", "field"),
    [
        (TextPrompt("x"), "generation.text"),
        (ChatPrompt(()), "generation.chat.messages"),
        (TokenPrompt((1,)), "generation.token_ids.ids"),
    ],
)
def test_a_prompt_that_does_not_fit_is_named_by_its_field(prompt, field):
    asked = replace(GOOD, prompt=prompt)
    assert fields_of(check_lengths, asked, [], MODEL) == [field]
    assert fields_of(check_lengths, asked, [1] * 50, MODEL) == [field]
    assert fields_of(check_lengths, asked, [100], MODEL) == [field]
    check_lengths(asked, [1] * 49, MODEL)


def test_more_tokens_than_the_context_leaves_are_refused():
    asked = replace(GOOD, stopping=Stopping(max_new_tokens=11))
    check_lengths(asked, [1] * 39, MODEL)
    with pytest.raises(InvalidArgument, match="must be at most 10"):
        check_lengths(asked, [1] * 40, MODEL)
    least = replace(GOOD, stopping=Stopping(min_new_tokens=11))
    assert fields_of(check_lengths, least, [1] * 40, MODEL) == ["generation.stopping.min_new_tokens"]
