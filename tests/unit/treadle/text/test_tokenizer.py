"""Loading an artifact's tokenizer, and ids there and back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle.text import tokenizer as module
from treadle.text.byte_level import BYTE_OF_CHARACTER
from treadle.text.tokenizer import PaddingToken, Tokenizer


def save(folder: Path, backend: Backend, **files: object) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_load(tmp_path: Path, byte_level_backend: Backend) -> None:
    folder = save(
        tmp_path,
        byte_level_backend,
        tokenizer_config={"bos_token": "<|start|>", "eos_token": {"content": "<|end|>", "special": True}},
        generation_config={"eos_token_id": [1, 2]},
    )
    tokenizer = Tokenizer.load(folder, digest="sha256:abc")
    assert tokenizer.digest == "sha256:abc"
    assert tokenizer.special_tokens == {"bos_token": "<|start|>", "eos_token": "<|end|>"}
    assert tokenizer.bos_token_id == byte_level_backend.token_to_id("<|start|>")
    assert tokenizer.eos_token_ids == (1, 2)
    assert tokenizer.special_ids == {
        byte_level_backend.token_to_id(token) for token in ("<|start|>", "<|end|>", "[tool]")
    }
    assert tokenizer.vocab_size == len(byte_level_backend.get_vocab())
    assert tokenizer.padding is None


def test_end_of_text_without_generation_config(tmp_path: Path, byte_level_backend: Backend) -> None:
    folder = save(tmp_path, byte_level_backend, tokenizer_config={"eos_token": "<|end|>"})
    assert Tokenizer.load(folder).eos_token_ids == (byte_level_backend.token_to_id("<|end|>"),)
    assert Tokenizer.load(save(tmp_path, byte_level_backend, tokenizer_config={})).eos_token_ids == ()


def test_baked_in_padding_and_truncation_are_off(built_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = built_tokenizers["word_piece"]
    short, long = tokenizer.encode_batch(["the dog", "the dog " * 100])
    assert len(short) == 4
    assert len(long) == 202
    assert tokenizer.padding == PaddingToken(0, 0)


def test_special_tokens_are_added_only_when_asked(built_tokenizers: dict[str, Tokenizer]) -> None:
    tokenizer = built_tokenizers["word_piece"]
    with_them = tokenizer.encode("the dog")
    assert with_them[1:-1] == tokenizer.encode("the dog", add_special_tokens=False)
    assert tokenizer.num_special_tokens_to_add() == 2
    assert tokenizer.num_special_tokens_to_add(pair=True) == 3
    assert tokenizer.decode(with_them) == "the dog"
    assert tokenizer.decode(with_them, skip_special_tokens=False) == "[CLS] the dog [SEP]"


def test_offsets_are_code_points(tokenizer: Tokenizer) -> None:
    text = "dog 👍🏽 dog"
    encoding = tokenizer.encode_whole([text], add_special_tokens=False)[0]
    assert encoding.offsets[-1][1] == len(text) == 10
    assert all(0 <= start <= end <= len(text) for start, end in encoding.offsets)


@pytest.mark.parametrize("size", [10, 5000])
def test_long_decode_equals_short_ones(tokenizer: Tokenizer, size: int) -> None:
    ids = [number % tokenizer.vocab_size for number in range(7, 7 + size)]
    assert tokenizer.decode(ids) == tokenizer._backend.decode(ids)


def test_ids_outside_the_vocabulary_add_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.token(tokenizer.vocab_size) is None
    assert tokenizer.decode([tokenizer.vocab_size, tokenizer.vocab_size + 70]) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size) == b""
    assert tokenizer.token(tokenizer.vocab_size - 1) is not None


def test_text_length_is_bounded(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TEXT_CHARACTERS", 10)
    assert tokenizer.encode("a" * 10)
    with pytest.raises(InvalidArgument) as caught:
        tokenizer.encode_batch(["a" * 6, "b" * 5])
    assert caught.value.reason == "TEXT_TOO_LONG"
    with pytest.raises(InvalidArgument):
        tokenizer.encode_whole([("a" * 6, "b" * 5)])


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer.json"),
        ({"tokenizer.json": "{}"}, "cannot be read"),
        ({"tokenizer.json": "no json"}, "cannot be read"),
    ],
)
def test_not_loadable(tmp_path: Path, files: dict[str, str], message: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(FailedPrecondition, match=message) as caught:
        Tokenizer.load(tmp_path)
    assert caught.value.reason == "TOKENIZER_NOT_LOADABLE"


@pytest.mark.parametrize("content", ["[]", "{"])
def test_bad_config_beside_it(tmp_path: Path, byte_level_backend: Backend, content: str) -> None:
    save(tmp_path, byte_level_backend)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(FailedPrecondition, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_byte_alphabet() -> None:
    from tokenizers.pre_tokenizers import ByteLevel

    assert set(BYTE_OF_CHARACTER) == set(ByteLevel.alphabet())
    assert sorted(BYTE_OF_CHARACTER.values()) == list(range(256))
    assert BYTE_OF_CHARACTER["Ġ"] == 0x20
    assert BYTE_OF_CHARACTER["Ċ"] == 0x0A
