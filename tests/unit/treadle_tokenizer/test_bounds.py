"""Every bound names its field."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from treadle.errors import InvalidArgument
from treadle.text.tokenizer import Tokenizer
from treadle_tokenizer import bounds
from treadle_tokenizer.config import TokenizerConfig

CONFIG = TokenizerConfig(
    max_inputs=3,
    max_text_bytes=10,
    max_request_bytes=20,
    max_tokens=5,
    max_messages=2,
    max_template_arguments_bytes=20,
)


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("check", "field"),
    [
        (lambda: bounds.check_model(""), "model"),
        (lambda: bounds.check_model("m" * 257), "model"),
        (lambda: bounds.check_texts([], CONFIG), "inputs"),
        (lambda: bounds.check_texts(["a"] * 4, CONFIG), "inputs"),
        (lambda: bounds.check_texts(["a", "a" * 11], CONFIG), "inputs[1].text"),
        (lambda: bounds.check_texts(["é" * 6], CONFIG), "inputs[0].text"),
        (lambda: bounds.check_texts([("a", "a" * 10)], CONFIG), "inputs[0].pair"),
        (lambda: bounds.check_texts([("a" * 10, "a")], CONFIG), "inputs[0].text"),
        (lambda: bounds.check_texts(["a" * 10] * 3, CONFIG), "inputs"),
        (lambda: bounds.check_ids([[1, 2, 3], [4, 5, 6]], CONFIG), "inputs"),
        (lambda: bounds.check_ids([], CONFIG), "inputs"),
        (lambda: bounds.check_messages([], CONFIG), "messages"),
        (lambda: bounds.check_messages([message("user", "")] * 3, CONFIG), "messages"),
        (lambda: bounds.check_messages([message("user", ""), message("", "")], CONFIG), "messages[1].role"),
        (lambda: bounds.check_messages([message("r" * 65, "")], CONFIG), "messages[0].role"),
        (lambda: bounds.check_messages([message("a", "b" * 6)] * 2, CONFIG), "messages[1].content"),
        *(
            (lambda text=text: bounds.template_arguments(text, CONFIG), "template_arguments_json")
            for text in ("[]", "{", "1", '{"a": NaN}', "[" * 20, '{"a": "0123456789abcdef"}')
        ),
    ],
)
def test_refused(check: Callable[[], object], field: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check()
    assert [violation.field for violation in caught.value.fields] == [field]


def test_taken() -> None:
    bounds.check_model("m" * 256)
    assert bounds.check_texts(["a" * 10, ("é", "b" * 8)], CONFIG) == [10, 10]
    assert bounds.check_ids([[1, 2], [], [3, 4, 5]], CONFIG) == 5
    assert bounds.check_messages([message("user", "é" * 3), message("x", "abcd")], CONFIG) == 10
    assert bounds.template_arguments("", CONFIG) == {}
    assert bounds.template_arguments('{"a": [1, null]}', CONFIG) == {"a": [1, None]}


def test_deep_json_is_refused() -> None:
    deep = "[" * 50_000
    with pytest.raises(InvalidArgument):
        bounds.template_arguments(deep, TokenizerConfig(max_template_arguments_bytes=1 << 20))


def test_ids_outside_the_vocabulary(tokenizer: Tokenizer) -> None:
    bounds.check_vocabulary([[0, tokenizer.vocab_size - 1], []], tokenizer)
    with pytest.raises(InvalidArgument) as caught:
        bounds.check_vocabulary([[0], [1, 2, tokenizer.vocab_size]], tokenizer)
    assert [violation.field for violation in caught.value.fields] == ["inputs[1].ids[2]"]


def test_settings_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TREADLE_TOKENIZER_ADDRESS", "127.0.0.1:7")
    monkeypatch.setenv("TREADLE_REGISTRY_ADDRESS", "127.0.0.1:8")
    config = TokenizerConfig()
    assert (config.address, config.registry_address) == ("127.0.0.1:7", "127.0.0.1:8")
