"""Truncation, windows and padding against the library's own, which keeps its settings in the tokenizer."""

from __future__ import annotations

import contextlib
import random
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle.text.tokenizer import Tokenizer
from treadle_tokenizer import encoding
from treadle_tokenizer.encoding import EncodeOptions, Padding, Row, TokenBudget
from treadle_tokenizer.windows import Strategy, Truncation, windows

WORDS = ["the", "quick", "dogs", "fox", "unheard", "river", ".", "👍", "lazyly"]
MANY = 1 << 20
SETTINGS = settings(
    max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
text = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


EVERYTHING = dict.fromkeys(
    ["offsets", "type_ids", "attention_mask", "word_ids", "sequence_ids", "special_tokens_mask"], True
)


def encode(
    tokenizer: Tokenizer, texts: list[str | tuple[str, str]], options: EncodeOptions, *, max_tokens: int
) -> list[Row]:
    budget = TokenBudget(max_tokens)
    rows = encoding.encode(tokenizer, texts, options, budget)
    encoding.pad(tokenizer, rows, options, budget)
    return rows


def as_row(index: int, row: Encoding) -> Row:
    return Row(
        index,
        row.ids,
        row.offsets,
        row.type_ids,
        row.attention_mask,
        [-1 if word is None else word for word in row.word_ids],
        [-1 if text is None else text for text in row.sequence_ids],
        row.special_tokens_mask,
    )


@SETTINGS
@given(
    inputs=st.lists(text | st.tuples(text, text), min_size=1, max_size=4),
    max_length=st.integers(4, 16) | st.none(),
    left=st.booleans(),
    add=st.booleans(),
    padding=st.tuples(st.integers(0, 20), st.integers(1, 8), st.booleans()) | st.none(),
)
def test_against_the_library(
    tokenizer: Tokenizer,
    backend: Backend,
    inputs: list[str | tuple[str, str]],
    max_length: int | None,
    left: bool,
    add: bool,
    padding: tuple[int, int, bool] | None,
) -> None:
    backend.no_truncation()
    backend.no_padding()
    if max_length is not None:
        backend.enable_truncation(max_length, direction="left" if left else "right")
    if padding is not None:
        length, multiple, pad_left = padding
        backend.enable_padding(
            direction="left" if pad_left else "right",
            length=length or None,
            pad_to_multiple_of=multiple,
            pad_id=0,
            pad_token="[PAD]",
        )
    options = EncodeOptions(
        add_special_tokens=add,
        truncation=None if max_length is None else Truncation(max_length, left=left),
        padding=None if padding is None else Padding(padding[0] or None, padding[1], padding[2]),
        **EVERYTHING,
    )
    expected = [as_row(*pair) for pair in enumerate(backend.encode_batch(inputs, add_special_tokens=add))]
    assert encode(tokenizer, inputs, options, max_tokens=MANY) == expected


@SETTINGS
@given(
    inputs=st.lists(text, min_size=1, max_size=3),
    max_length=st.integers(5, 10),
    stride=st.integers(0, 2),
    left=st.booleans(),
    add=st.booleans(),
)
def test_windows_against_the_library(
    tokenizer: Tokenizer,
    backend: Backend,
    inputs: list[str],
    max_length: int,
    stride: int,
    left: bool,
    add: bool,
) -> None:
    backend.enable_truncation(max_length, stride=stride, direction="left" if left else "right")
    expected = [
        as_row(index, window)
        for index, whole in enumerate(backend.encode_batch(inputs, add_special_tokens=add))
        for window in [whole, *whole.overflowing]
    ]
    truncation = Truncation(max_length, left=left, stride=stride, return_overflowing=True)
    options = EncodeOptions(add, truncation, **EVERYTHING)
    rows = encode(tokenizer, inputs, options, max_tokens=MANY)
    assert rows == expected


@SETTINGS
@given(
    pairs=st.lists(st.tuples(text, text), min_size=1, max_size=3),
    max_length=st.integers(5, 14),
    stride=st.integers(0, 3),
    left=st.booleans(),
    overflowing=st.booleans(),
    add=st.booleans(),
    strategy=st.sampled_from([Strategy.ONLY_FIRST, Strategy.ONLY_SECOND]),
)
def test_one_text_of_a_pair_against_the_library(
    tokenizer: Tokenizer,
    backend: Backend,
    pairs: list[tuple[str, str]],
    max_length: int,
    stride: int,
    left: bool,
    overflowing: bool,
    add: bool,
    strategy: Strategy,
) -> None:
    """Also where nothing can be cut: then both refuse."""
    truncation = Truncation(max_length, left, stride if overflowing else 0, overflowing, strategy)
    options = EncodeOptions(add, truncation, **EVERYTHING)
    for pair in pairs:
        rows, refused = [], ""
        try:
            rows = encode(tokenizer, [pair], options, max_tokens=MANY)
        except InvalidArgument as error:
            refused = error.fields[0].field
        direction = "left" if left else "right"
        backend.enable_truncation(
            max_length, stride=truncation.stride, strategy=strategy.value, direction=direction
        )
        whole = None
        with contextlib.suppress(BaseException):
            whole = backend.encode_batch([pair], add_special_tokens=add)[0]
        if whole is None:
            expected = "inputs[0].text" if strategy == Strategy.ONLY_FIRST else "inputs[0].pair"
            assert refused in (expected, "truncation.stride"), (pair, rows)
            continue
        windows = [whole, *whole.overflowing] if overflowing else [whole]
        assert rows == [as_row(0, window) for window in windows]


def test_a_single_text_has_no_second(tokenizer: Tokenizer) -> None:
    options = EncodeOptions(truncation=Truncation(4, strategy=Strategy.ONLY_SECOND))
    assert len(encode(tokenizer, ["the dog"], options, max_tokens=MANY)[0].ids) == 4
    with pytest.raises(InvalidArgument) as caught:
        encode(tokenizer, ["the", "the dog sleeps"], options, max_tokens=MANY)
    assert caught.value.fields[0].field == "inputs[1].pair"


def test_windows_cover_the_text(tokenizer: Tokenizer) -> None:
    rng = random.Random(3)
    content = " ".join(rng.choice(WORDS) for _ in range(200))
    whole = tokenizer.encode(content, add_special_tokens=False)
    truncation = Truncation(17, stride=5, return_overflowing=True)
    rows = encode(tokenizer, [content], EncodeOptions(truncation=truncation), max_tokens=MANY)
    inner = [row.ids[1:-1] for row in rows]
    assert inner[0] + [token for window in inner[1:] for token in window[5:]] == whole
    assert all(row.ids[0] == 2 and row.ids[-1] == 3 for row in rows)
    print(f"{len(rows)} windows of {len(whole)} tokens")
    assert len(rows) > 15


def test_only_what_was_asked_for(tokenizer: Tokenizer) -> None:
    (plain,) = encode(tokenizer, ["the dog"], EncodeOptions(), max_tokens=MANY)
    assert (plain.offsets, plain.type_ids, plain.attention_mask) == ([], [], [])
    (cut,) = encode(tokenizer, ["the dog"], EncodeOptions(truncation=Truncation(3)), max_tokens=MANY)
    assert (cut.offsets, cut.type_ids, cut.attention_mask) == ([], [], [])
    assert cut.ids == plain.ids[:2] + plain.ids[-1:]


@pytest.mark.parametrize(
    ("truncation", "field"),
    [
        (Truncation(2), "truncation.max_length"),
        (Truncation(6, stride=4, return_overflowing=True), "truncation.stride"),
    ],
)
def test_no_room(tokenizer: Tokenizer, truncation: Truncation, field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        encode(tokenizer, ["the dog " * 9], EncodeOptions(truncation=truncation), max_tokens=MANY)
    assert [violation.field for violation in caught.value.fields] == [field]


@pytest.mark.parametrize(
    "options",
    [
        EncodeOptions(),
        EncodeOptions(offsets=True),
        EncodeOptions(truncation=Truncation(40, stride=37, return_overflowing=True)),
        EncodeOptions(truncation=Truncation(4), padding=Padding(length=1 << 30)),
        EncodeOptions(truncation=Truncation(4), padding=Padding(multiple_of=1 << 30)),
    ],
)
def test_tokens_are_bounded(tokenizer: Tokenizer, options: EncodeOptions) -> None:
    with pytest.raises(InvalidArgument, match="at most 150") as caught:
        encode(tokenizer, ["the dog " * 100], options, max_tokens=150)
    assert [violation.field for violation in caught.value.fields] == ["inputs"]


def test_padding_to_the_longest_is_bounded(tokenizer: Tokenizer) -> None:
    texts = ["the dog " * 50, *["the"] * 50]
    assert len(encode(tokenizer, texts, EncodeOptions(), max_tokens=300)) == 51
    with pytest.raises(InvalidArgument):
        encode(tokenizer, texts, EncodeOptions(padding=Padding()), max_tokens=300)


def test_no_padding_token(backend: Backend) -> None:
    with pytest.raises(FailedPrecondition) as caught:
        encode(Tokenizer(backend), ["the"], EncodeOptions(padding=Padding()), max_tokens=MANY)
    assert caught.value.reason == "NO_PADDING_TOKEN"


def test_a_window_a_token_costs_its_row_and_not_its_ids_alone(tokenizer: Tokenizer) -> None:
    special = tokenizer.num_special_tokens_to_add()
    truncation = Truncation(special + 1, return_overflowing=True)
    options = EncodeOptions(truncation=truncation)
    texts: list[str | tuple[str, str]] = ["the dog " * 50]
    rows = encode(tokenizer, texts, options, max_tokens=MANY)
    ids = sum(len(row.ids) for row in rows)
    assert len(rows) >= 100
    with pytest.raises(InvalidArgument, match="padding and windows included"):
        encode(tokenizer, texts, options, max_tokens=2 * ids)
    print(f"{len(rows)} windows of {special + 1} tokens are refused within {2 * ids}")


def test_windows_are_made_as_they_are_asked_for() -> None:
    """All of those of this pair together have four million positions."""
    count = 2000
    sequences = [0] * count + [1] * count
    truncation = Truncation(count + 1, return_overflowing=True, strategy=Strategy.ONLY_FIRST)
    tracemalloc.start()
    try:
        made = iter(windows(sequences, truncation, of=0))
        assert next(made) == [0, *range(count, 2 * count)]
        assert next(made) == [1, *range(count, 2 * count)]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(1 for _ in made) == count - 2
    assert peak < 2 << 20
    print(f"two of {count} windows: {peak >> 10} KiB at most")


class _Unread:
    """An encoding of many tokens, of which no list may be made."""

    def __len__(self) -> int:
        return 1000


class _Library:
    def encode_whole(self, texts: list[str], *, add_special_tokens: bool) -> list[_Unread]:
        return [_Unread() for _ in texts]


def test_too_many_tokens_are_refused_before_a_list_is_made_of_them() -> None:
    library: object = _Library()
    options = EncodeOptions(offsets=True)
    with pytest.raises(InvalidArgument, match="make 1000 tokens"):
        encoding.encode(library, ["the"], options, TokenBudget(999))  # type: ignore[arg-type]
