"""A model's tokenizer: text to ids and back, loaded from an artifact's canonical folder.

A thin wrapper over the `tokenizers` library. It keeps no state between calls (what a tokenizer.json bakes
in of padding and truncation is switched off), so one instance may be used from several threads.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle.text.byte_level import bytes_of_token

MAX_FILE_BYTES = 256 << 20
"""The largest tokenizer.json that is read; the largest known ones have 35 MB."""
MAX_TEXT_CHARACTERS = 16 << 20
"""The longest text that is encoded in one call."""

_NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Up to here decoding is quicker than giving up the interpreter's lock for it.
_SHORT = 1024

TextOrPair = str | tuple[str, str]
"""A text, or two that the tokenizer joins with its special tokens."""


@dataclass(frozen=True, slots=True)
class PaddingToken:
    """What fills a shorter row of a batch."""

    token_id: int
    type_id: int


class Tokenizer:
    """Encodes and decodes; see `load`. Thread-safe.

    `digest` names the tokenizer that made an id; `special_tokens` are the named ones ("bos_token", …) as
    tokenizer_config.json has them, for chat templates.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        digest: str = "",
        special_tokens: Mapping[str, str] | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        baked_in: dict[str, Any] | None = backend.padding
        backend.no_padding()
        backend.no_truncation()
        self._backend = backend
        self.digest = digest
        self.special_tokens = dict(special_tokens or {})
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = 1 + max(vocabulary.values(), default=-1)
        """One more than the largest id that means something."""
        added = backend.get_added_tokens_decoder()
        self.special_ids = frozenset(number for number, token in added.items() if token.special)
        self.bos_token_id = self._named_id("bos_token")
        eos = self._named_id("eos_token")
        self.eos_token_ids = tuple(eos_token_ids) or (() if eos is None else (eos,))
        self.padding = self._padding_token(baked_in)
        """None where the tokenizer has no token to pad with."""
        self.decoder_kinds = _decoder_kinds(backend)
        """The names of the decoder's steps in their order, as tokenizer.json has them."""
        self._token_bytes: dict[int, bytes] = {}

    @classmethod
    def load(cls, folder: Path, *, digest: str = "") -> Tokenizer:
        """Loads tokenizer.json and, where they are there, tokenizer_config.json and generation_config.json.

        Takes up to a second and blocks. Raises FailedPrecondition, reason TOKENIZER_NOT_LOADABLE.
        """
        path = folder / "tokenizer.json"
        try:
            if (size := path.stat().st_size) > MAX_FILE_BYTES:
                raise _not_loadable(f"tokenizer.json has {size} bytes; at most {MAX_FILE_BYTES} are read")
            backend = backend_from_bytes(path.read_bytes())
        except FileNotFoundError:
            raise _not_loadable("the artifact has no tokenizer.json") from None
        except (OSError, ValueError) as error:
            raise _not_loadable(f"tokenizer.json cannot be read: {error}") from error
        config = _read_object(folder / "tokenizer_config.json")
        generation = _read_object(folder / "generation_config.json")
        eos = generation.get("eos_token_id")
        return cls(
            backend,
            digest=digest,
            special_tokens=_special_tokens(config),
            eos_token_ids=[eos]
            if isinstance(eos, int)
            else [item for item in eos or () if type(item) is int],
        )

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The ids of `text`. Special tokens written out in the text become their ids."""
        return self.encode_batch([text], add_special_tokens=add_special_tokens)[0]

    def encode_batch(
        self, texts: Sequence[TextOrPair], *, add_special_tokens: bool = True
    ) -> list[list[int]]:
        """The ids of each text or pair; raises InvalidArgument over `MAX_TEXT_CHARACTERS` in all, and
        FailedPrecondition (TOKENIZER_FAILED) where the model's rules fail on them."""
        _check_length(texts)
        # encode() would hold the interpreter's lock all the while, the batch form does not.
        with _failures():
            rows = self._backend.encode_batch_fast(list(texts), add_special_tokens=add_special_tokens)
        return [row.ids for row in rows]

    def encode_whole(
        self, texts: Sequence[TextOrPair], *, add_special_tokens: bool = True
    ) -> list[tokenizers.Encoding]:
        """The library's records of each: ids, type ids, offsets in code points, sequences."""
        _check_length(texts)
        with _failures():
            return self._backend.encode_batch(list(texts), add_special_tokens=add_special_tokens)

    def num_special_tokens_to_add(self, *, pair: bool = False) -> int:
        """How many special tokens encoding adds to one text, or to a pair."""
        return self._backend.num_special_tokens_to_add(pair)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of `ids`; an id outside the vocabulary adds nothing."""
        with _failures():
            if len(ids) <= _SHORT:
                return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)
            return self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0]

    def token(self, token_id: int) -> str | None:
        """A token as the vocabulary spells it; None where the id means nothing."""
        return self._backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it."""
        return self._backend.token_to_id(token)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token of a byte-level vocabulary adds to the text; nothing for an unknown id."""
        known = self._token_bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id)
            known = b"" if token is None else bytes_of_token(token)
            self._token_bytes[token_id] = known
        return known

    def is_byte_token(self, token_id: int) -> bool:
        """Whether a token is one raw byte of a byte-fallback vocabulary ("<0xE4>")."""
        token = self._backend.id_to_token(token_id)
        return token is not None and _BYTE_TOKEN.fullmatch(token) is not None

    def _named_id(self, name: str) -> int | None:
        token = self.special_tokens.get(name)
        return None if token is None else self._backend.token_to_id(token)

    def _padding_token(self, baked_in: Mapping[str, Any] | None) -> PaddingToken | None:
        if baked_in:
            return PaddingToken(int(baked_in["pad_id"]), int(baked_in["pad_type_id"]))
        pad = self._named_id("pad_token")
        return None if pad is None else PaddingToken(pad, 0)


def backend_from_bytes(content: bytes) -> tokenizers.Tokenizer:
    """The library's tokenizer out of a tokenizer.json; raises ValueError for what is none.

    From bytes, so that the library opens no file of its own choice.
    """
    try:
        return tokenizers.Tokenizer.from_buffer(content)
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        raise ValueError(str(error)[:300]) from None


@contextlib.contextmanager
def _failures() -> Iterator[None]:
    """A tokenizer that loads may still have rules that fail on a text: that is the model's fault."""
    try:
        yield
    except BaseException as error:
        if not _is_the_librarys(error):
            raise
        raise FailedPrecondition(
            f"the model's tokenizer fails on this input: {str(error)[:300]}", reason="TOKENIZER_FAILED"
        ) from None


def _is_the_librarys(error: BaseException) -> bool:
    """Whether the library raised it: a plain Exception, or a panic, which is none and would pass by."""
    return type(error) in (Exception, ValueError) or type(error).__name__ == "PanicException"


def _check_length(texts: Sequence[TextOrPair]) -> None:
    length = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
    if length > MAX_TEXT_CHARACTERS:
        raise InvalidArgument(
            f"{length} characters are too many to encode at once; send at most {MAX_TEXT_CHARACTERS}",
            reason="TEXT_TOO_LONG",
        )


def _not_loadable(what: str) -> FailedPrecondition:
    return FailedPrecondition(what, reason="TOKENIZER_NOT_LOADABLE")


def _read_object(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is no such file."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise _not_loadable(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise _not_loadable(f"{path.name} is not a JSON object")
    return value


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """The named special tokens; a token is a string or an object with the string as its content."""
    found = {}
    for name in _NAMED_SPECIAL_TOKENS:
        value = config.get(name)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            found[name] = content
    return found


def _decoder_kinds(backend: tokenizers.Tokenizer) -> tuple[str, ...]:
    if backend.decoder is None:
        return ()
    state = json.loads(backend.decoder.__getstate__())
    steps = state["decoders"] if state["type"] == "Sequence" else [state]
    return tuple(str(step["type"]) for step in steps)
