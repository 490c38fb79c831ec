"""Folders without a tokenizer.json: what becomes of theirs, and what is refused."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizer_folders as folders
from small_folder import write_model

from treadle.errors import FailedPrecondition, InvalidArgument, TreadleError
from treadle.text.tokenizer import Tokenizer
from treadle_registry.formats.huggingface_folder import HuggingFaceFolder
from treadle_registry.formats.json_files import read_json
from treadle_registry.formats.tokenizers import sentencepiece_model
from treadle_registry.formats.tokenizers.sentencepiece_model import read_sentencepiece

VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "river", "##s", "É"]
Write = Callable[[Path], object]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model whose tokenizer is not there."""
    made = write_model(tmp_path / "model")
    (made / "tokenizer.json").unlink()
    return made


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return folders.trained_sentencepiece(
        tmp_path_factory.mktemp("spm") / "tokenizer.model", model_type="bpe", byte_fallback=True
    )


def say(folder: Path, **config: object) -> None:
    path = folder / "tokenizer_config.json"
    said = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(said | config))


def test_wordpiece_keeps_its_settings_and_source(folder: Path, tmp_path: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    say(folder, tokenizer_class="BertTokenizerFast", do_lower_case=False)
    model = HuggingFaceFolder(folder)
    assert {"vocab.txt", "tokenizer_config.json"} <= model.files.keys()
    parts = model.check()
    (tmp_path / "tokenizer.json").write_bytes(parts.tokenizer_json)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(parts.tokenizer_config)))
    tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.encode("the rivers É é") == [2, 5, 6, 7, 8, 1, 3]
    assert tokenizer.padding is not None
    assert tokenizer.padding.token_id == 0
    assert parts.tokenizer_config["sep_token"] == "[SEP]"


def test_sentencepiece_through_the_folder(folder: Path, model_file: Path) -> None:
    (folder / "tokenizer.model").write_bytes(model_file.read_bytes())
    model = HuggingFaceFolder(folder)
    assert "tokenizer.model" in model.files
    parts = model.check()
    assert parts.tokenizer["model"]["type"] == "BPE"
    assert parts.tokenizer_config["bos_token"] == "<s>"
    again = HuggingFaceFolder(folder).check()
    assert again.tokenizer_json == parts.tokenizer_json


def test_a_tokenizer_json_goes_first(folder: Path) -> None:
    (folder / "vocab.txt").write_text("nothing")
    small = write_model(folder.parent / "other")
    (folder / "tokenizer.json").write_bytes((small / "tokenizer.json").read_bytes())
    assert HuggingFaceFolder(folder).check().tokenizer["model"]["type"] == "WordLevel"


def test_added_tokens_have_the_ids_that_are_told(folder: Path) -> None:
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY))
    (folder / "added_tokens.json").write_text(json.dumps({"<one>": 9, "<two>": 10}))
    say(folder, tokenizer_class="BertTokenizer", additional_special_tokens=["<three>"])
    parts = HuggingFaceFolder(folder).check()
    added = {token["content"]: token["id"] for token in parts.tokenizer["added_tokens"]}
    assert (added["<one>"], added["<two>"], added["<three>"]) == (9, 10, 11)
    (folder / "added_tokens.json").write_text(json.dumps({"<one>": 12}))
    with pytest.raises(InvalidArgument, match="'<one>' is 12 there and 9") as caught:
        HuggingFaceFolder(folder).check()
    assert caught.value.reason == "CORRUPT_TOKENIZER"


def text(name: str, content: str | bytes) -> Write:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def both(*writes: Write) -> Write:
    return lambda folder: [write(folder) for write in writes]


WORDS = text("vocab.txt", "\n".join(VOCABULARY))
VOCAB = text("vocab.json", json.dumps({"a": 0, "b": 1, "ab": 2}))
MERGES = text("merges.txt", "#version: 0.2\na b\n")
MANY = json.dumps(dict.fromkeys(map(str, range(10)), 0))


@pytest.mark.parametrize(
    ("write", "reason", "named"),
    [
        (lambda folder: None, "MISSING_FILE", "tokenizer.json, or else"),
        (text("tekken.json", "{}"), "UNSUPPORTED_TOKENIZER", "tekken.json"),
        (VOCAB, "MISSING_FILE", "vocab.json without merges.txt"),
        (text("vocab.bpe", "a b"), "MISSING_FILE", "vocab.bpe without encoder.json"),
        (text("vocab.txt", "a\nb"), "CORRUPT_TOKENIZER", "vocab.txt"),
        (text("vocab.txt", b"\xff\xfe"), "CORRUPT_TOKENIZER", "vocab.txt"),
        (text("vocab.txt", "a" * 2000 + "\n[UNK]"), "CORRUPT_TOKENIZER", "vocab.txt"),
        (both(WORDS, lambda folder: say(folder, do_lower_case="yes")), "CORRUPT_TOKENIZER", "do_lower_case"),
        (both(WORDS, lambda folder: say(folder, cls_token=None)), "CORRUPT_TOKENIZER", "cls_token"),
        (both(WORDS, lambda folder: say(folder, cls_token=7)), "CORRUPT_TOKENIZER", "cls_token"),
        (
            both(
                text("vocab.txt", "\n".join([*VOCABULARY, "[C:0"])),
                lambda folder: say(folder, cls_token="[C:0"),
            ),
            "CORRUPT_TOKENIZER",
            "vocab.txt",
        ),
        (
            both(WORDS, lambda folder: say(folder, added_tokens_decoder={"x": "y"})),
            "CORRUPT_TOKENIZER",
            "added_tokens",
        ),
        (
            both(WORDS, lambda folder: say(folder, tokenizer_class="MPNetTokenizer")),
            "UNSUPPORTED_TOKENIZER",
            "MPNetTokenizer",
        ),
        (both(MERGES, text("vocab.json", "[1]")), "CORRUPT_TOKENIZER", "vocab.json"),
        (both(MERGES, text("vocab.json", "{")), "CORRUPT_TOKENIZER", "vocab.json"),
        (both(MERGES, text("vocab.json", MANY)), "CORRUPT_TOKENIZER", "the same id"),
        (both(MERGES, text("vocab.json", '{"a": -1}')), "CORRUPT_TOKENIZER", "the id of 'a'"),
        (both(MERGES, text("vocab.json", '{"\\ud800": 1}')), "CORRUPT_TOKENIZER", "half a character"),
        (both(MERGES, text("vocab.json", "[" * 100_000)), "CORRUPT_TOKENIZER", "vocab.json"),
        (both(VOCAB, text("merges.txt", "a b c")), "CORRUPT_TOKENIZER", "merges.txt"),
        (both(VOCAB, text("merges.txt", "a x")), "UNSUPPORTED_TOKENIZER|CORRUPT_TOKENIZER", "merges.txt"),
        (text("tokenizer.model", b""), "CORRUPT_TOKENIZER", "tokenizer.model"),
        (text("tokenizer.model", b"IQ== 0\nIg== 1\n"), "CORRUPT_TOKENIZER", "tokenizer.model"),
        (text("spiece.model", b'{"vocab": []}'), "UNSUPPORTED_TOKENIZER", "Tekken"),
    ],
)
def test_refusals(folder: Path, write: Write, reason: str, named: str) -> None:
    say(folder)
    write(folder)
    if "tokenizer_class" not in read_json(folder / "tokenizer_config.json"):
        kind = "BertTokenizer" if (folder / "vocab.txt").exists() else "GPT2TokenizerFast"
        say(folder, **({} if list(folder.glob("*.model")) else {"tokenizer_class": kind}))
    with pytest.raises((InvalidArgument, FailedPrecondition)) as caught:
        HuggingFaceFolder(folder).check()
    assert caught.value.reason in reason.split("|"), caught.value
    assert named in caught.value.message, caught.value.message
    assert "take" in caught.value.message


def piece(content: str, score: float, kind: int) -> bytes:
    data = content.encode()
    body = b"\x0a" + bytes([len(data)]) + data + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kind])
    return b"\x0a" + bytes([len(body)]) + body


UNKNOWN = piece("<unk>", 0, 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (piece("a", 0, 1), "CORRUPT_TOKENIZER"),  # no unknown piece
        (UNKNOWN + piece("a", 0, 1) * 2, "CORRUPT_TOKENIZER"),
        (UNKNOWN + piece("a", float("nan"), 1), "CORRUPT_TOKENIZER"),
        (UNKNOWN + piece("a", float("-inf"), 1), "CORRUPT_TOKENIZER"),
        (UNKNOWN + piece("a", 0, 9), "CORRUPT_TOKENIZER"),
        (UNKNOWN + piece("a", 0, 5), "UNSUPPORTED_TOKENIZER"),  # unused
        (UNKNOWN + piece("<0x00>", 0, 6), "CORRUPT_TOKENIZER"),  # a byte alone
        (UNKNOWN + piece("a", -1, 1) + b"\x12\x02\x18\x03", "UNSUPPORTED_TOKENIZER"),  # words
        (UNKNOWN + piece("a", -1, 1) + b"\x12\x03\xc0\x01\x01", "UNSUPPORTED_TOKENIZER"),  # suffixes
        (UNKNOWN + piece("a", -1, 1) + b"\x1a\x02\x28\x00", "UNSUPPORTED_TOKENIZER"),  # spaces as such
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "CORRUPT_TOKENIZER"),  # 2**64 - 1 bytes
        (b"\x0a" + b"\xff" * 11, "CORRUPT_TOKENIZER"),
        (b"\x0a\x06\x0a\x7fabcd", "CORRUPT_TOKENIZER"),
        (b"\x08\x01", "CORRUPT_TOKENIZER"),
        (b"\x0b\x01", "CORRUPT_TOKENIZER"),  # a group
        (b"\x0a\x03\x0a\x01\xff", "CORRUPT_TOKENIZER"),
    ],
)
def test_hostile_models(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises((InvalidArgument, FailedPrecondition)) as caught:
        read_sentencepiece(path)
    assert caught.value.reason == reason
    assert "tokenizer.model" in caught.value.message


def test_a_count_is_checked_before_it_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sentencepiece_model, "MAX_TOKENS", 100)
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"".join(piece(f"{number}", 0, 1) for number in range(101)))
    with pytest.raises(InvalidArgument, match="more than 100 pieces"):
        read_sentencepiece(path)


def test_a_normaliser_that_is_none(tmp_path: Path) -> None:
    made = tmp_path / "model"
    made.mkdir()
    folders.write_config(made, "xlm", {})
    for charsmap in (b"\x01", b"\xff\xff\xff\xff", b"\x08\x00\x00\x00\xff\xff\xff\xff\xff\xff\xff\xff"):
        normalizer = b"\x12" + bytes([len(charsmap)]) + charsmap
        content = UNKNOWN + piece("a", -1, 1) + b"\x1a" + bytes([len(normalizer)]) + normalizer
        (made / "tokenizer.model").write_bytes(content)
        with pytest.raises(InvalidArgument) as caught:
            folders.rebuilt(made)
        assert caught.value.reason == "CORRUPT_TOKENIZER"


def test_a_normaliser_that_fails_on_an_added_token(tmp_path: Path) -> None:
    """The library panics, which is no Exception, as it normalises the token that is added."""
    made = tmp_path / "model"
    made.mkdir()
    added = {"1": {"content": "a", "special": False}}
    folders.write_config(made, "llama", {"added_tokens_decoder": added})
    normalizer = b"\x12\x04" + bytes(4)
    content = UNKNOWN + piece("a", -1, 1) + b"\x1a" + bytes([len(normalizer)]) + normalizer
    (made / "tokenizer.model").write_bytes(content)
    with pytest.raises(InvalidArgument, match=r"tokenizer\.model") as caught:
        folders.rebuilt(made)
    assert caught.value.reason == "CORRUPT_TOKENIZER"


def test_damaged_models_are_refused_or_read(tmp_path: Path, model_file: Path, rng: random.Random) -> None:
    """Cut, and with bytes changed: never another error, and never longer than a moment."""
    good = model_file.read_bytes()
    made = tmp_path / "model"
    made.mkdir()
    folders.write_config(made, "llama", {})
    refused = 0
    for _ in range(300):
        data = bytearray(good)
        if rng.random() < 0.3:
            del data[rng.randrange(len(data)) :]
        for _ in range(rng.randint(1, 4)):
            if data:
                data[rng.randrange(len(data))] = rng.randrange(256)
        (made / "tokenizer.model").write_bytes(data)
        try:
            folders.rebuilt(made)
        except TreadleError:
            refused += 1
    print(f"{refused} of 300 damaged models refused")
    assert 50 < refused < 300
