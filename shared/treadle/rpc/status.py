"""The suite's errors as `google.rpc.Status` with details, and back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import grpc
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import DecodeError, Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from treadle.errors import BY_CODE, FieldViolation, Internal, TreadleError

ERROR_DOMAIN = "treadle"
STATUS_METADATA_KEY = "grpc-status-details-bin"

MAX_STATUS_BYTES = 4096
"""Status travels in HTTP/2 trailers, which peers bound at 8 KiB or less."""

_MAX_MESSAGE = 512
_BROKEN = (grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.CANCELLED)
"""What a lost connection looks like beside UNAVAILABLE, when no servicer had a say in it."""
_MAX_VALUE = 256
_MAX_METADATA_BYTES = 1024
_MORE = "…"
_MAX_FIELDS_BYTES = 2048


def to_status(error: BaseException) -> status_pb2.Status:
    """The Status of an error, under 4 KiB; what is not a TreadleError is INTERNAL and says no more."""
    if not isinstance(error, TreadleError):
        error = Internal("internal error; the service's log has the details")
    details: list[Message] = [
        error_details_pb2.ErrorInfo(
            reason=error.reason,
            domain=ERROR_DOMAIN,
            metadata=_metadata(error.metadata),
        )
    ]
    if error.fields:
        details.append(_bad_request(error.fields))
    if error.retry_after_s is not None:
        delay = duration_pb2.Duration()
        delay.FromNanoseconds(int(error.retry_after_s * 1e9))
        details.append(error_details_pb2.RetryInfo(retry_delay=delay))
    status = status_pb2.Status(
        code=code_pb2.Code.Value(error.code), message=_cut(error.message, _MAX_MESSAGE)
    )
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        if status.ByteSize() + packed.ByteSize() + 8 <= MAX_STATUS_BYTES:
            status.details.append(packed)
    return status


def _metadata(facts: Mapping[str, str]) -> dict[str, str]:
    """As many of the facts as leave room for the rest of the status, the first ones first."""
    kept: dict[str, str] = {}
    room = _MAX_METADATA_BYTES
    for key, value in facts.items():
        cut = _cut(value, _MAX_VALUE)
        room -= len(key.encode()) + len(cut.encode())
        if room < 0:
            break
        kept[key] = cut
    return kept


def _bad_request(fields: Sequence[FieldViolation]) -> error_details_pb2.BadRequest:
    """As many of the violations as leave room for the rest of the status."""
    bad = error_details_pb2.BadRequest()
    for violation in fields:
        bad.field_violations.add(
            field=_cut(violation.field, 256), description=_cut(violation.description, 512)
        )
        if bad.ByteSize() > _MAX_FIELDS_BYTES:
            del bad.field_violations[-1]
            break
    return bad


def from_status(status: status_pb2.Status) -> TreadleError:
    """The error that a Status means; an unknown code is INTERNAL."""
    kind = (
        BY_CODE.get(code_pb2.Code.Name(status.code), Internal)
        if status.code in code_pb2.Code.values()
        else Internal
    )
    reason, metadata, fields, retry = "", {}, [], None
    for packed in status.details:
        info, bad, delay = (
            error_details_pb2.ErrorInfo(),
            error_details_pb2.BadRequest(),
            error_details_pb2.RetryInfo(),
        )
        if packed.Unpack(info):
            reason, metadata = info.reason, dict(info.metadata)
        elif packed.Unpack(bad):
            fields = [FieldViolation(entry.field, entry.description) for entry in bad.field_violations]
        elif packed.Unpack(delay):
            retry = delay.retry_delay.ToNanoseconds() / 1e9
    return kind(status.message, reason=reason, fields=fields, retry_after_s=retry, metadata=metadata)


def from_rpc_error(error: grpc.aio.AioRpcError) -> TreadleError:
    """The error that a failed call means, with its details where the server sent them."""
    for key, value in error.trailing_metadata() or ():
        if key == STATUS_METADATA_KEY and isinstance(value, bytes):
            status = status_pb2.Status()
            try:
                status.ParseFromString(value)
            except DecodeError:
                break
            return from_status(status)
    kind = BY_CODE.get(error.code().name, Internal)
    return kind(error.details() or error.code().name)


def is_loss(error: grpc.aio.AioRpcError) -> bool:
    """Whether a call failed because its connection was lost, or nobody was there to take it."""
    if error.code() is grpc.StatusCode.UNAVAILABLE:
        return True
    by_servicer = any(key == STATUS_METADATA_KEY for key, _ in error.trailing_metadata() or ())
    return not by_servicer and error.code() in _BROKEN


async def abort(context: grpc.aio.ServicerContext[Message, Message], error: BaseException) -> None:
    """Ends the call with the error's status and details; always raises."""
    status = to_status(error)
    code = next(code for code in grpc.StatusCode if code.value[0] == status.code)
    await context.abort(code, status.message, ((STATUS_METADATA_KEY, status.SerializeToString()),))


def _cut(text: str, size: int) -> str:
    """The text in at most `size` bytes of UTF-8: gRPC sends a byte that is not ASCII as three. Half a
    character, as a file's name may have it, becomes a question mark."""
    encoded = text.encode(errors="replace")
    if len(encoded) <= size:
        return encoded.decode()
    return encoded[: size - len(_MORE.encode())].decode(errors="ignore") + _MORE
