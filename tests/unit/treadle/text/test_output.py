"""Ids to text and stop strings together: where the answer ends, and going on with a half-done one."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.text.output import OutputText, TextDelta
from treadle.text.tokenizer import Tokenizer

SETTINGS = settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TEXT = "Once upon a time there was a dog, and the dog sang. 👍🏽 The end."


def drain(output: OutputText, ids: Sequence[int], *, size: int = 1) -> list[TextDelta]:
    return [output.push(ids[at : at + size]) for at in range(0, len(ids), size)] + [output.finish()]


def test_without_stop_strings(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    deltas = drain(OutputText(tokenizer), ids)
    assert "".join(delta.text for delta in deltas) == tokenizer.decode(ids)
    assert [delta.num_tokens for delta in deltas] == [1] * len(ids) + [0]
    assert all(delta.stop_string is None for delta in deltas)


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize("include", [True, False])
def test_stop_string(tokenizer: Tokenizer, size: int, include: bool) -> None:
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    output = OutputText(tokenizer, stop_strings=["dog sa", "never"], include_stop_string=include)
    deltas = drain(output, ids, size=size)
    at = whole.index("dog sa")
    assert "".join(delta.text for delta in deltas) == whole[: at + 6 if include else at]
    assert output.stop_string == deltas[-1].stop_string == "dog sa"
    kept = sum(delta.num_tokens for delta in deltas)
    assert kept == output.num_tokens
    # The first so many tokens have the stop string, one fewer have not.
    assert "dog sa" in tokenizer.decode(ids[:kept])
    assert "dog sa" not in tokenizer.decode(ids[: kept - 1])
    assert 0 < kept < len(ids)


@SETTINGS
@given(
    data=st.data(),
    stops=st.lists(st.sampled_from(["dog", "e", " the", "👍", ". T", "\ufffd"]), max_size=3),
    include=st.booleans(),
    split=st.integers(0, 60),
)
def test_another_process_goes_on(
    tokenizer: Tokenizer, data: st.DataObject, stops: list[str], include: bool, split: int
) -> None:
    ids = tokenizer.encode(TEXT) + data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=20))
    cut_short = ids[:split]
    first = OutputText(tokenizer, stop_strings=stops, include_stop_string=include)
    delivered = "".join(first.push([number]).text for number in cut_short)
    second = OutputText(tokenizer, stop_strings=stops, include_stop_string=include)
    replayed = second.push(cut_short)
    assert replayed.text == delivered
    assert replayed.num_tokens == first.num_tokens
    rest = ids[split:]
    assert drain(second, rest) == drain(first, rest)


def test_stop_string_waits_for_the_least_length(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("1 1 1 1", add_special_tokens=False)
    ends = [size for size in range(1, len(ids) + 1) if tokenizer.decode(ids[:size]).endswith("1")]
    assert len(ends) == 4
    for min_tokens, expected in (
        (0, ends[0]),
        (ends[0], ends[0]),
        (ends[0] + 1, ends[1]),
        (ends[2], ends[2]),
    ):
        output = OutputText(tokenizer, stop_strings=["1"], min_tokens=min_tokens)
        text = "".join(delta.text for delta in drain(output, ids))
        assert output.num_tokens == expected
        assert text == tokenizer.decode(ids[:expected])[:-1]


def test_special_tokens_in_the_text(built_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = built_tokenizers["byte_level_bpe"]
    ids = tokenizer.encode("one<|end|>two[tool]")
    for skip, expected in ((True, "onetwo"), (False, "one<|end|>two[tool]")):
        deltas = drain(OutputText(tokenizer, skip_special_tokens=skip), ids)
        assert "".join(delta.text for delta in deltas) == expected
    # A special token can be a stop string only where it is part of the text.
    shown = OutputText(tokenizer, stop_strings=["<|end|>"], skip_special_tokens=False)
    assert "".join(delta.text for delta in drain(shown, ids)) == "one"
    assert shown.stop_string == "<|end|>"


def test_stop_string_in_what_the_end_gives(built_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = built_tokenizers["byte_fallback_bpe"]
    ids = tokenizer.encode("so 你")
    output = OutputText(tokenizer, stop_strings=["你"])
    assert output.push(ids).text == "so "
    assert output.finish() == TextDelta("", 0, "你")
    assert output.finish() == TextDelta("", 0, "你")
    assert output.push(ids) == TextDelta("", 0, "你")
