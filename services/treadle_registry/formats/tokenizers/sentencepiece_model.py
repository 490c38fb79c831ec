"""What a SentencePiece model file holds: its pieces, and how it was trained and normalises.

The file is a protobuf message (ModelProto). It is read here, field by field, instead of by a generated class:
so a count is checked before anything is allocated for it, and a file of a few megabytes cannot become
gigabytes of objects. Field numbers and defaults are those of sentencepiece_model.proto.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import TypeVar

from treadle_registry.formats.tokenizers.files import (
    MAX_TOKEN_CHARACTERS,
    MAX_TOKENS,
    corrupt,
    read_bytes,
    unsupported,
)

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
Value = int | memoryview
E = TypeVar("E", bound=IntEnum)


class PieceType(IntEnum):
    """What a piece is."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


class ModelType(IntEnum):
    """How a text is cut into pieces."""

    UNIGRAM = 1
    BPE = 2
    WORD = 3
    CHAR = 4


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text ("▁" for a space), log-probability or rank, and type."""

    text: str
    score: float
    type: PieceType


@dataclass(slots=True)
class SentencePieceModel:
    """A model file, decoded; an id of -1 means that there is no such piece."""

    pieces: list[Piece] = field(default_factory=list)
    type: ModelType = ModelType.UNIGRAM
    byte_fallback: bool = False
    unk_id: int = 0
    bos_id: int = 1
    eos_id: int = 2
    pad_id: int = -1
    charsmap: bytes = b""
    """The normaliser's compiled rules."""
    add_dummy_prefix: bool = True
    remove_extra_whitespaces: bool = True

    def text_of(self, number: int) -> str | None:
        """The piece with an id; None where there is none."""
        return self.pieces[number].text if 0 <= number < len(self.pieces) else None


class _Malformed(ValueError):
    pass


def read_sentencepiece(path: Path) -> SentencePieceModel:
    """Reads a model file.

    Raises InvalidArgument (CORRUPT_TOKENIZER), and FailedPrecondition (UNSUPPORTED_TOKENIZER) for settings
    that cannot be rebuilt.
    """
    content = read_bytes(path)
    if content[:1] in (b"{", b"["):
        raise unsupported(f"{path.name} is JSON, as Mistral's Tekken files are, and no SentencePiece model")
    model = SentencePieceModel()
    try:
        for number, value in _fields(memoryview(content)):
            if number == 1:
                if len(model.pieces) == MAX_TOKENS:
                    raise _Malformed(f"it has more than {MAX_TOKENS} pieces")
                model.pieces.append(_piece(_message(value)))
            elif number == 2:
                _take_trainer(model, _message(value), path.name)
            elif number == 3:
                _take_normalizer(model, _message(value), path.name)
        _check(model)
    except (_Malformed, UnicodeDecodeError) as error:
        raise corrupt(path.name, f"it is no SentencePiece model ({error})") from error
    if any(piece.type == PieceType.UNUSED for piece in model.pieces):
        raise unsupported(f"{path.name} has pieces that are marked as unused, which cannot be rebuilt")
    return model


def _piece(message: memoryview) -> Piece:
    text, score, kind = "", 0.0, PieceType.NORMAL
    for number, value in _fields(message):
        if number == 1:
            text = bytes(_message(value)).decode()
        elif number == 2:
            if len(_message(value)) != 4:
                raise _Malformed("a score is no float")
            (score,) = struct.unpack("<f", _message(value))
        elif number == 3:
            kind = _member(PieceType, value)
    if not 0 < len(text) <= MAX_TOKEN_CHARACTERS:
        raise _Malformed(f"a piece has {len(text)} characters")
    if not -1e30 < score < 1e30:
        raise _Malformed(f"a piece has the score {score}")
    return Piece(text, score, kind)


def _take_trainer(model: SentencePieceModel, message: memoryview, name: str) -> None:
    ids = {40: "unk_id", 41: "bos_id", 42: "eos_id", 43: "pad_id"}
    for number, value in _fields(message):
        if number == 3:
            model.type = _member(ModelType, value)
        elif number == 35:
            model.byte_fallback = bool(_number(value))
        elif number in ids:
            setattr(model, ids[number], _signed(value))
        elif number == 24 and _number(value):
            raise unsupported(f"{name} has its spaces at the ends of words, which cannot be rebuilt")
    if model.type not in (ModelType.UNIGRAM, ModelType.BPE):
        raise unsupported(f"{name} is a model of {model.type.name.lower()}s; BPE and Unigram are rebuilt")


def _take_normalizer(model: SentencePieceModel, message: memoryview, name: str) -> None:
    for number, value in _fields(message):
        if number == 2:
            model.charsmap = bytes(_message(value))
        elif number == 3:
            model.add_dummy_prefix = bool(_number(value))
        elif number == 4:
            model.remove_extra_whitespaces = bool(_number(value))
        elif number == 5 and not _number(value):
            raise unsupported(f"{name} does not escape its spaces, which cannot be rebuilt")


def _check(model: SentencePieceModel) -> None:
    if not model.pieces:
        raise _Malformed("it has no pieces")
    if len({piece.text for piece in model.pieces}) != len(model.pieces):
        raise _Malformed("it has a piece twice")
    unknown = [at for at, piece in enumerate(model.pieces) if piece.type == PieceType.UNKNOWN]
    if unknown != [model.unk_id]:
        raise _Malformed(f"its unknown pieces are {unknown[:3]}, and unk_id is {model.unk_id}")
    num_bytes = sum(piece.type == PieceType.BYTE for piece in model.pieces)
    if num_bytes != (256 if model.byte_fallback else 0):
        raise _Malformed(f"it has {num_bytes} pieces for bytes")


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """Number and value of each field of a message: an integer, or the bytes of anything else."""
    at, end = 0, len(message)
    while at < end:
        key, at = _varint(message, at)
        number, kind = key >> 3, key & 7
        if number == 0:
            raise _Malformed("a field has no number")
        if kind == _VARINT:
            value, at = _varint(message, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise _Malformed(f"a field is of the kind {kind}")
        if size > end - at:
            raise _Malformed("it ends within a field")
        yield number, message[at : at + size]
        at += size


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        if at == len(message):
            raise _Malformed("it ends within a number")
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise _Malformed("a number has more than 64 bits")


def _message(value: Value) -> memoryview:
    if isinstance(value, int):
        raise _Malformed("a number is where a text should be")
    return value


def _number(value: Value) -> int:
    if not isinstance(value, int):
        raise _Malformed("a text is where a number should be")
    return value


def _signed(value: Value) -> int:
    """An int32, which is written with 64 bits where it is negative."""
    number = _number(value) & 0xFFFFFFFF
    return number - (1 << 32) if number >= 1 << 31 else number


def _member(kind: type[E], value: Value) -> E:
    try:
        return kind(_number(value))
    except ValueError as error:
        raise _Malformed(f"{value} is no {kind.__name__}") from error
