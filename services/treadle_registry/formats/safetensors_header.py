"""Takes a safetensors header apart entry by entry, so that what it holds never exists as objects all at once.

A header may have a hundred megabytes: as JSON's own objects those can be gigabytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

MAX_HEADER = 100_000_000
"""As the format's own reader has it: https://github.com/huggingface/safetensors."""
_MAX_ENTRY = 2000
"""Characters of a tensor's entry, which is flat: a dtype, a shape, two offsets."""
_METADATA = "__metadata__"

_SPACE = re.compile(r"[ \t\r\n]*+")
_PLAIN = r'[^"\\\x00-\x1f]*+'
_ESCAPE = r'\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})'
_STRING = re.compile(f'"{_PLAIN}(?:{_ESCAPE}{_PLAIN})*+"')


def header_entries(text: str) -> Iterator[tuple[str, object]]:
    """Names and entries in the order of the header, without its metadata; raises ValueError when it is wrong.

    A name that is there twice is given twice.
    """
    return _Cursor(text).entries()


class _Cursor:
    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0
        self._skip_space()

    def entries(self) -> Iterator[tuple[str, object]]:
        self._expect("{", "it is not an object")
        if not self._take("}"):
            while True:
                name = self._string()
                self._expect(":", f"no ':' follows {name[:100]!r}")
                if name == _METADATA:
                    self._skip_metadata()
                else:
                    yield name, self._entry(name)
                if not self._take(","):
                    break
            self._expect("}", "it is cut off, or has a value that is none")
        if self._at != len(self._text):
            raise ValueError("something follows it")

    def _entry(self, name: str) -> object:
        text, start = self._text, self._at
        end = text.find("}", start, start + _MAX_ENTRY)
        if not text.startswith("{", start) or end < 0:
            raise ValueError(f"the entry of {name[:100]!r} is not a dtype, a shape and two offsets")
        self._at = end + 1
        self._skip_space()
        return json.loads(text[start : end + 1])

    def _skip_metadata(self) -> None:
        """Strings by strings; nothing here reads them."""
        self._expect("{", "its __metadata__ is not an object")
        if self._take("}"):
            return
        while True:
            self._skip_string()
            self._expect(":", "its __metadata__ is not of strings")
            self._skip_string()
            if not self._take(","):
                break
        self._expect("}", "its __metadata__ is not of strings")

    def _string(self) -> str:
        start = self._at
        end = self._skip_string()
        name: str = json.loads(self._text[start:end])
        # Half a character can be escaped, and written nowhere else.
        if not name.isascii():
            name.encode()
        return name

    def _skip_string(self) -> int:
        match = _STRING.match(self._text, self._at)
        if match is None:
            raise ValueError(f"no string is at its character {self._at}")
        self._at = match.end()
        self._skip_space()
        return match.end()

    def _expect(self, mark: str, otherwise: str) -> None:
        if not self._take(mark):
            raise ValueError(otherwise)

    def _take(self, mark: str) -> bool:
        if not self._text.startswith(mark, self._at):
            return False
        self._at += 1
        self._skip_space()
        return True

    def _skip_space(self) -> None:
        match = _SPACE.match(self._text, self._at)
        assert match is not None
        self._at = match.end()
