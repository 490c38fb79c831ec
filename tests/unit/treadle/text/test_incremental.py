"""Pieces and flush together are the decode of the whole, for every kind of tokenizer and any ids."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.text.incremental import REPLACEMENT, IncrementalDecoder
from treadle.text.tokenizer import Tokenizer

HARD_TEXTS = [
    "plain words, and more words",
    "  leading and  double   spaces \n\n\t",
    "family: 👨‍👩‍👧‍👦 flag: 🇩🇪 tone: 👍🏽 heart: ❤️",
    "مرحبا بالعالم ‏שלום עולם‎",
    "汉字𠮷野家、カタカナ、한국어",
    "é́̂ combining Å Å ﬁ ½",
    "a\ufffdb real replacement \ufffd\ufffd",
    "<|start|>user<|end|> [tool] née Zoë",
]

SETTINGS = settings(
    max_examples=50,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

hard_text = st.one_of(
    st.text(max_size=40),
    st.text(alphabet="a 👨‍👩‍👧🇩🇪👍🏽ﷺא汉字𠮷\u0301\u200d\u200f\ufffd", max_size=40),
    st.lists(st.sampled_from([*HARD_TEXTS, "<|end|>", "[tool]", " "]), max_size=4).map("".join),
)


def cut(ids: Sequence[int], seed: int) -> list[list[int]]:
    """The ids in random pieces."""
    rng, pieces, at = random.Random(seed), [], 0
    while at < len(ids):
        size = rng.choice((1, 1, 1, 2, 3, 7))
        pieces.append(list(ids[at : at + size]))
        at += size
    return pieces


def check(tokenizer: Tokenizer, ids: Sequence[int], *, seed: int, skip: bool) -> None:
    """What holds of any ids: pieces make the whole, and the cut makes no difference."""
    whole = tokenizer.decode(ids, skip_special_tokens=skip)
    decoder = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    one_by_one = [decoder.push([number]) for number in ids]
    end = decoder.flush()
    assert "".join(one_by_one) + end == whole
    again = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    position = 0
    for piece in cut(ids, seed):
        text = again.push(piece)
        assert text == "".join(one_by_one[position : position + len(piece)])
        position += len(piece)
    assert again.flush() == end


@pytest.mark.parametrize("skip", [True, False])
@SETTINGS
@given(text=hard_text, seed=st.integers(0, 99))
def test_text(tokenizer: Tokenizer, text: str, skip: bool, seed: int) -> None:
    check(tokenizer, tokenizer.encode(text), seed=seed, skip=skip)


@SETTINGS
@given(data=st.data(), seed=st.integers(0, 99), skip=st.booleans())
def test_any_ids(tokenizer: Tokenizer, data: st.DataObject, skip: bool, seed: int) -> None:
    # Past the vocabulary too: an embedding may have more rows than the tokenizer has tokens.
    number = st.integers(0, tokenizer.vocab_size + 5)
    check(tokenizer, data.draw(st.lists(number, max_size=30)), seed=seed, skip=skip)


@SETTINGS
@given(data=st.data(), seed=st.integers(0, 99), skip=st.booleans())
def test_raw_bytes(tokenizer: Tokenizer, data: st.DataObject, skip: bool, seed: int) -> None:
    """Runs of single bytes, most of them no UTF-8, with other tokens in between."""
    single = [number for number in range(tokenizer.vocab_size) if is_single_byte(tokenizer, number)]
    others = st.integers(0, tokenizer.vocab_size - 1)
    ids = st.lists(st.sampled_from(single) | others if single else others, max_size=30)
    check(tokenizer, data.draw(ids), seed=seed, skip=skip)


def is_single_byte(tokenizer: Tokenizer, token_id: int) -> bool:
    if tokenizer.is_byte_token(token_id):
        return True
    byte_level = "ByteLevel" in tokenizer.decoder_kinds
    return byte_level and len(tokenizer.token_bytes(token_id)) == 1


@pytest.mark.parametrize("text", HARD_TEXTS)
def test_no_piece_has_half_a_character(tokenizer: Tokenizer, text: str) -> None:
    if "\ufffd" in text:
        text = text.replace("\ufffd", "")
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids)
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push([number]) for number in ids]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + decoder.flush() == whole


def test_characters_of_several_tokens_come_whole(built_tokenizers: dict[str, Tokenizer]) -> None:
    counts = {}
    for name in ("byte_level_bpe", "byte_fallback_bpe"):
        tokenizer = built_tokenizers[name]
        ids = tokenizer.encode("x👍🏽y𠮷z")
        decoder = IncrementalDecoder(tokenizer)
        pieces = [decoder.push([number]) for number in ids]
        counts[name] = pieces.count("")
        assert "".join(pieces) + decoder.flush() == "x👍🏽y𠮷z"
    print(f"tokens that completed no character: {counts}")
    assert all(count >= 6 for count in counts.values())


def test_unfinished_character_comes_with_the_flush(built_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = built_tokenizers["byte_level_bpe"]
    ids = tokenizer.encode("ok 👍")[:-1]
    decoder = IncrementalDecoder(tokenizer)
    assert decoder.push(ids) == "ok "
    assert decoder.flush() == REPLACEMENT


@pytest.mark.parametrize(
    ("name", "alone", "after_prompt"),
    [
        ("byte_fallback_bpe", "dog", " dog"),
        ("metaspace_unigram", "dog", " dog"),
        ("word_piece", "dog", " dog"),
        ("suffix_bpe", "dog", " dog"),
    ],
)
def test_prompt_gives_the_leading_space(
    built_tokenizers: dict[str, Tokenizer], name: str, alone: str, after_prompt: str
) -> None:
    tokenizer = built_tokenizers[name]
    ids = tokenizer.encode("dog", add_special_tokens=False)
    prompt = tokenizer.encode("the lazy", add_special_tokens=False)
    without = IncrementalDecoder(tokenizer)
    assert without.push(ids) + without.flush() == alone
    behind = IncrementalDecoder(tokenizer, prompt_ids=prompt)
    assert behind.push(ids) + behind.flush() == after_prompt


@SETTINGS
@given(prompt=hard_text, text=hard_text, skip=st.booleans())
def test_after_a_prompt(tokenizer: Tokenizer, prompt: str, text: str, skip: bool) -> None:
    """What comes after a prompt is what the prompt and the answer decode to, less the prompt."""
    before = tokenizer.encode(f"{prompt}dog", add_special_tokens=False)
    ids = tokenizer.encode(text, add_special_tokens=False)
    if tokenizer.is_byte_token(before[-1]) or (ids and tokenizer.is_byte_token(ids[0])):
        return
    decoder = IncrementalDecoder(tokenizer, prompt_ids=before, skip_special_tokens=skip)
    answer = decoder.push(ids) + decoder.flush()
    together = tokenizer.decode([*before, *ids], skip_special_tokens=skip)
    assert tokenizer.decode(before, skip_special_tokens=skip) + answer == together


def test_long_answers_cost_the_same_a_token(tokenizer: Tokenizer) -> None:
    """What is decoded at a time stays short, also in runs that are given out late or never."""
    longest = 0
    decode = tokenizer.decode

    class Watched(Tokenizer):
        def __init__(self) -> None:
            self.__dict__.update(tokenizer.__dict__)

        def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
            nonlocal longest
            longest = max(longest, len(ids))
            return decode(ids, skip_special_tokens=skip_special_tokens)

    rng = random.Random(7)
    ids = [rng.randrange(tokenizer.vocab_size) for _ in range(3000)]
    unfinished = next((n for n in range(tokenizer.vocab_size) if is_first_of_three(tokenizer, n)), None)
    if unfinished is not None and not tokenizer.is_byte_token(unfinished):
        ids += [unfinished] * 3000
    decoder = IncrementalDecoder(Watched())
    started = time.perf_counter()
    text = decoder.push(ids) + decoder.flush()
    each = (time.perf_counter() - started) / len(ids)
    print(f"{len(ids)} ids, longest window {longest}, {each * 1e6:.1f} µs each")
    assert text == decode(ids)
    assert longest < 32


def is_first_of_three(tokenizer: Tokenizer, token_id: int) -> bool:
    if tokenizer.is_byte_token(token_id):
        return tokenizer.token(token_id) == "<0xE4>"
    return "ByteLevel" in tokenizer.decoder_kinds and tokenizer.token_bytes(token_id) == b"\xe4"


@SETTINGS
@given(text=hard_text, seed=st.integers(0, 99), skip=st.booleans())
def test_packaged_model(smollm2: Tokenizer, text: str, seed: int, skip: bool) -> None:
    check(smollm2, smollm2.encode(text), seed=seed, skip=skip)


@SETTINGS
@given(
    ids=st.lists(st.integers(0, 49151) | st.integers(0, 300), max_size=40),
    seed=st.integers(0, 99),
    skip=st.booleans(),
)
def test_packaged_model_any_ids(smollm2: Tokenizer, ids: list[int], seed: int, skip: bool) -> None:
    check(smollm2, ids, seed=seed, skip=skip)
