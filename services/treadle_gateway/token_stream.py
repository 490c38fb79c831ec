"""A log's entries as the chunks that a client gets: each token once, in order, without a gap."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass

from google.rpc.status_pb2 import Status

from treadle.api.inference.v1.generation_pb2 import Finished, Started, TokenDelta
from treadle.api.worker.v1.queue_pb2 import Terminal
from treadle.errors import DataLoss, FailedPrecondition
from treadle.queue.log import LogEntry
from treadle_gateway.cursor import Cursor
from treadle_gateway.deadlines import Deadline, out_of_time
from treadle_gateway.subscriptions import Subscription

logger = logging.getLogger(__name__)

Body = Started | TokenDelta | Finished
"""What a worker wrote goes to the client as it is: the log's messages are the contract's."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What the client gets, and the cursor behind it."""

    cursor: Cursor
    body: Body


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended with an error."""

    status: Status


class TokenStream:
    """Turns entries into chunks, from a cursor on."""

    def __init__(self, cursor: Cursor) -> None:
        self._cursor = cursor
        self._started = cursor != Cursor()
        self.duplicates = 0
        """Entries that said again what had been said, and were dropped."""

    def accept(self, entries: Iterable[LogEntry]) -> list[Chunk | Failed]:
        """The chunks of the next entries; raises DataLoss (TOKENS_MISSING) at a gap, and
        FailedPrecondition (TASK_HAS_NO_STREAM) where it is a task's log."""
        chunks: list[Chunk | Failed] = []
        for id_, entry in entries:
            if id_ <= self._cursor.last:
                self.duplicates += 1
                continue
            self._cursor = Cursor(id_, self._cursor.next_index)
            match entry.WhichOneof("entry"):
                case "started":
                    chunks += self._begin(entry.started)
                case "tokens":
                    chunks += self._append(entry.tokens)
                case "terminal":
                    chunks.append(self._end(entry.terminal))
                    break
                case _:
                    # "queued" and "fence" are between gateway and workers.
                    continue
        return chunks

    def _end(self, terminal: Terminal) -> Chunk | Failed:
        match terminal.WhichOneof("outcome"):
            case "finished":
                return Chunk(self._cursor, terminal.finished)
            case "task_result":
                raise FailedPrecondition(
                    "the request is a task, whose answer comes whole; call its method again with this "
                    "request_id and the same payload",
                    reason="TASK_HAS_NO_STREAM",
                )
            case _:
                return Failed(terminal.error)

    def _begin(self, started: Started) -> list[Chunk | Failed]:
        if self._started:
            self.duplicates += 1
            return []
        self._started = True
        return [Chunk(self._cursor, started)]

    def _append(self, tokens: TokenDelta) -> list[Chunk | Failed]:
        expected = self._cursor.next_index
        if tokens.index > expected:
            raise DataLoss(
                f"token {expected} was to come next, but {tokens.index} came", reason="TOKENS_MISSING"
            )
        if tokens.index < expected:
            # A delivered token never changes: whoever writes it a second time is not believed.
            self.duplicates += 1
            logger.warning("tokens came twice", extra={"index": tokens.index, "expected": expected})
            if tokens.index + len(tokens.token_ids) > expected:
                raise DataLoss(
                    f"tokens {tokens.index} on came again, with further ones behind", reason="TOKENS_MIXED"
                )
            return []
        self._cursor = Cursor(self._cursor.last, expected + len(tokens.token_ids))
        return [Chunk(self._cursor, tokens)]


async def follow(
    subscription: Subscription, cursor: Cursor, deadline: Deadline
) -> AsyncIterator[Chunk | Failed]:
    """The chunks after the cursor, up to the request's end.

    Raises DeadlineExceeded, and what the subscription raises.
    """
    stream = TokenStream(cursor)
    # One timer for the whole answer, and none for each of its entries.
    with deadline.tells(lambda: subscription.fail(out_of_time())):
        while True:
            if deadline.passed:
                raise out_of_time()
            for chunk in stream.accept(await subscription.next()):
                yield chunk
                if isinstance(chunk, Failed) or isinstance(chunk.body, Finished):
                    return
