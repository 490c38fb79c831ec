"""Token ids to text as they arrive, never half a character.

Each `push` gives the text that can no longer change; what may still change (the first bytes of a
character, a run of raw bytes) is held back. All pieces and the flush together are what decoding all ids at
once gives, and how the ids were cut into pushes makes no difference. So a decoder that is fed the ids of an
answer once more stands where the first one stood.
"""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Sequence

from treadle.text.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"

# A character has at most four bytes, and a token at least one: a longer tail of replacement characters
# is not a character that has yet to be completed.
_MAX_UNFINISHED_TOKENS = 4
# Whole-word vocabularies need one token before the first to know that it is not the first.
_CONTEXT_TOKENS = 16


class IncrementalDecoder:
    """The text of one answer, token by token; constant work a token, however long the answer.

    `prompt_ids`: the prompt or its tail. Its text is not given out; it only says what stands before the
    answer, so that a first word keeps its leading space. Without it the answer is decoded as a text of its
    own. Ids outside the vocabulary add nothing.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        skipped = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._pieces: _Pieces
        if set(tokenizer.decoder_kinds) in ({"ByteLevel"}, {"ByteLevel", "Fuse"}):
            self._pieces = _BytePieces(tokenizer, skipped)
        else:
            self._pieces = _WindowPieces(tokenizer, skipped, prompt_ids[-_CONTEXT_TOKENS:])

    def push(self, ids: Sequence[int]) -> str:
        """Takes the next ids; gives the text that they made certain."""
        return self._pieces.push(ids)

    def flush(self) -> str:
        """What was held back, an unfinished character as U+FFFD; the decoder is at its end."""
        return self._pieces.flush()


class _Pieces(ABC):
    """How the text of further tokens is found; those that are skipped, and unknown ids, add nothing."""

    @abstractmethod
    def push(self, ids: Sequence[int]) -> str: ...

    @abstractmethod
    def flush(self) -> str: ...


class _BytePieces(_Pieces):
    """Byte-level vocabularies: the tokens' bytes through an incremental UTF-8 decoder."""

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int]) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._skipped = skipped
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, ids: Sequence[int]) -> str:
        return self._utf8.decode(b"".join([self._bytes_of(one) for one in ids if one not in self._skipped]))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowPieces(_Pieces):
    """Every other decoder: what a token adds to the text of a short window before it.

    The window is the last token that was given out and, where that one has no text of its own, the last
    one that had: decoders ask whether a token is the first, and some of them what the one before it was.
    """

    def __init__(self, tokenizer: Tokenizer, skipped: frozenset[int], context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = skipped
        self._byte_runs = "ByteFallback" in tokenizer.decoder_kinds
        self._unfinished_bytes = "ByteLevel" in tokenizer.decoder_kinds
        self._anchor: int | None = None
        self._window: list[int] = []
        self._window_text = ""
        self._held: list[int] = []
        for token_id in context:
            if self._counts(token_id):
                self._slide(token_id)

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push(token_id) for token_id in ids if self._counts(token_id)])

    def _counts(self, token_id: int) -> bool:
        return token_id not in self._skipped and self._tokenizer.token(token_id) is not None

    def _push(self, token_id: int) -> str:
        self._held.append(token_id)
        # One bad byte changes the text of its whole run, so a run is given out when it is over. Nothing is
        # decoded meanwhile: a long run costs no more than its length.
        if self._byte_runs and self._tokenizer.is_byte_token(token_id):
            return ""
        text = self._decode([*self._window, *self._held])
        if self._unfinished_bytes and text.endswith(REPLACEMENT) and len(self._held) < _MAX_UNFINISHED_TOKENS:
            return ""
        return self._give_out(text)

    def flush(self) -> str:
        return self._give_out(self._decode([*self._window, *self._held])) if self._held else ""

    def _give_out(self, text: str) -> str:
        piece = text[len(self._window_text) :]
        self._slide(self._held[-1])
        self._held.clear()
        return piece

    def _slide(self, last: int) -> None:
        if self._decode([last]):
            self._anchor, self._window = last, [last]
        else:
            self._window = [last] if self._anchor is None else [self._anchor, last]
        self._window_text = self._decode(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)
