"""Messages to plain Python and back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from treadle.api.registry.v1 import artifact_pb2
from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb
from treadle.errors import InvalidArgument, invalid_field
from treadle.models.stored_folder import StoredFile, StoredFolder
from treadle.rpc.channel import MAX_MESSAGE_BYTES
from treadle.text.tokenizer import TextOrPair
from treadle_tokenizer.encoding import EncodeOptions, Padding, Row
from treadle_tokenizer.models import Artifact, Model
from treadle_tokenizer.windows import Strategy, Truncation

_DIGESTS_BYTES = 256


def texts(inputs: Iterable[pb.EncodeInput]) -> list[TextOrPair]:
    """The texts and pairs to encode."""
    return [(entry.text, entry.pair) if entry.HasField("pair") else entry.text for entry in inputs]


def encode_options(request: pb.EncodeRequest) -> EncodeOptions:
    """The options; raises InvalidArgument for those that contradict each other."""
    return EncodeOptions(
        add_special_tokens=request.add_special_tokens if request.HasField("add_special_tokens") else True,
        truncation=_truncation(request) if request.HasField("truncation") else None,
        padding=_padding(request.padding) if request.HasField("padding") else None,
        offsets=request.return_offsets,
        type_ids=request.return_type_ids,
        attention_mask=request.return_attention_mask,
        word_ids=request.return_word_ids,
        sequence_ids=request.return_sequence_ids,
        special_tokens_mask=request.return_special_tokens_mask,
    )


_STRATEGIES = {
    pb.TRUNCATION_STRATEGY_UNSPECIFIED: Strategy.LONGEST_FIRST,
    pb.TRUNCATION_STRATEGY_LONGEST_FIRST: Strategy.LONGEST_FIRST,
    pb.TRUNCATION_STRATEGY_ONLY_FIRST: Strategy.ONLY_FIRST,
    pb.TRUNCATION_STRATEGY_ONLY_SECOND: Strategy.ONLY_SECOND,
}


def _truncation(request: pb.EncodeRequest) -> Truncation:
    message = request.truncation
    if message.max_length < 1:
        raise invalid_field("truncation.max_length", "must be at least 1")
    if message.stride and not message.return_overflowing:
        raise invalid_field(
            "truncation.stride", "is what windows share; set return_overflowing to get them, or leave it out"
        )
    strategy = _STRATEGIES.get(message.strategy)
    if strategy is None:
        raise invalid_field("truncation.strategy", f"is no strategy: {message.strategy}")
    if message.return_overflowing and strategy == Strategy.LONGEST_FIRST:
        for index, entry in enumerate(request.inputs):
            if entry.HasField("pair"):
                raise invalid_field(
                    f"inputs[{index}].pair",
                    "windows of a pair are of one of its texts: set truncation.strategy to ONLY_FIRST or "
                    "ONLY_SECOND, or leave return_overflowing out",
                )
    return Truncation(
        max_length=message.max_length,
        left=_is_left(message.side, "truncation.side"),
        stride=message.stride,
        return_overflowing=message.return_overflowing,
        strategy=strategy,
    )


def _padding(message: pb.Padding) -> Padding:
    return Padding(
        length=message.length or None,
        multiple_of=message.multiple_of or 1,
        left=_is_left(message.side, "padding.side"),
    )


def _is_left(side: pb.TruncationSide.ValueType, field: str) -> bool:
    if side not in pb.TruncationSide.values():
        raise invalid_field(field, f"is no side: {side}")
    return side == pb.TRUNCATION_SIDE_LEFT


def encodings(rows: Iterable[Row]) -> pb.EncodeResponse:
    """An answer with some of its rows."""
    response = pb.EncodeResponse()
    for row in rows:
        encoding = response.encodings.add(input_index=row.input_index)
        # Quicker than giving the lists to the constructor.
        encoding.ids.extend(row.ids)
        if row.offsets:
            add = encoding.offsets.add
            for start, end in row.offsets:
                add(start=start, end=end)
        encoding.type_ids.extend(row.type_ids)
        encoding.attention_mask.extend(row.attention_mask)
        encoding.word_ids.extend(row.word_ids)
        encoding.sequence_ids.extend(row.sequence_ids)
        encoding.special_tokens_mask.extend(row.special_tokens_mask)
    return response


def encode_response(model: Model, parts: Sequence[pb.EncodeResponse]) -> pb.EncodeResponse:
    """The answer out of its parts; raises InvalidArgument where it would be larger than a message may be."""
    if (size := sum(part.ByteSize() for part in parts)) > MAX_MESSAGE_BYTES - _DIGESTS_BYTES:
        raise InvalidArgument(
            f"the answer would have {size} bytes, at most {MAX_MESSAGE_BYTES} can be sent; send fewer inputs",
            reason="ANSWER_TOO_LARGE",
        )
    response, *others = parts
    for part in others:
        response.MergeFrom(part)
    response.artifact_digest = model.artifact_digest
    response.tokenizer_digest = model.tokenizer.digest
    return response


def to_artifact(message: artifact_pb2.Artifact) -> Artifact:
    """What the tokenizer needs of the registry's answer."""
    files = tuple(StoredFile(file.path, file.digest, file.bytes) for file in message.files)
    return Artifact(
        digest=message.digest,
        tokenizer_digest=message.tokenizer_digest,
        presentation_digest=message.presentation_digest,
        folder=StoredFolder(Path(message.location), message.digest, files),
    )
