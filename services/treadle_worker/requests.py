"""The requests that this worker holds, from claim to end."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

from treadle.errors import Internal, TreadleError
from treadle.queue import dirty
from treadle.queue.keys import RequestKeys
from treadle.queue.lanes import Delivery
from treadle.queue.log import EntryId
from treadle.telemetry.tracing import NO_SPAN, Span
from treadle.text.output import OutputText
from treadle.text.tokenizer import Tokenizer
from treadle_worker.convert import error_entry, finished_entry, started_entry, tokens_entry
from treadle_worker.engine_protocol import AddRequest, SequenceOutput, TokenLogprobs
from treadle_worker.jobs import History, Job
from treadle_worker.outgoing import Ending, Outgoing, TokenBatch


class RunningRequest:
    """One request under this worker's epoch: takes the engine's outputs in, gives entries out."""

    def __init__(
        self,
        job: Job,
        delivery: Delivery,
        epoch: int,
        *,
        tokenizer: Tokenizer,
        history: History,
        watchers: set[str],
    ) -> None:
        self.job = job
        self.delivery = delivery
        self.epoch = epoch
        self.engine_id = f"{job.request.tag}@{epoch}"
        """Names this run alone: outputs of an earlier one are not mistaken for its own."""
        self.watchers = watchers
        self.deadline: asyncio.TimerHandle | None = None
        self.misses = 0
        """How often in a row no gateway said that the client is there."""
        self.resumed = False
        """Whether another run had begun it."""
        self.span: Span = NO_SPAN
        """From claim to end."""
        self._delivered = history.token_ids
        self._started = history.started
        self._cached_tokens = history.cached_tokens if history.started else None
        self._num_tokens = len(history.token_ids)
        self._text = self._rebuild(tokenizer)
        self._batch = TokenBatch(self._num_tokens)
        self._ending: Ending | TreadleError | None = None
        self._outgoing: Outgoing | None = None
        self._next_number = 1
        self._flowing = False
        """Whether tokens were written in this run."""
        self._last = history.last

    def _rebuild(self, tokenizer: Tokenizer) -> OutputText:
        """The text's state behind the delivered tokens."""
        job, sampling = self.job, self.job.sampling
        text = OutputText(
            tokenizer,
            prompt_ids=job.prompt_token_ids,
            stop_strings=job.stop_strings,
            include_stop_string=job.include_stop_string,
            skip_special_tokens=not job.include_special_tokens,
            min_tokens=sampling.min_new_tokens,
        )
        delivered = self._delivered
        ended = delivered and delivered[-1] in sampling.stop_token_ids
        if ended and len(delivered) > sampling.min_new_tokens:
            delivered = delivered[:-1]
        text.push(delivered)
        return text

    @property
    def keys(self) -> RequestKeys:
        """Its keys in Redis."""
        return self.job.request

    @property
    def ended(self) -> bool:
        """Whether its end is decided, written or not."""
        return self._ending is not None

    @property
    def ending(self) -> Ending | TreadleError | None:
        """How it ends, once that is decided."""
        return self._ending

    @property
    def num_delivered(self) -> int:
        """Tokens that earlier owners delivered."""
        return len(self._delivered)

    @property
    def num_output_tokens(self) -> int:
        """Tokens of the answer so far, delivered ones included."""
        return self._num_tokens

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that were found in the prefix cache."""
        return self._cached_tokens or 0

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.job.prompt_token_ids) + self._num_tokens

    def start(self) -> AddRequest | None:
        """The engine's command; None where the delivered tokens had ended it before."""
        if self._text.stop_string is not None:
            self._ending = Ending("stop_string", self._text.stop_string)
            return None
        return self.job.to_engine(self.engine_id, self._delivered)

    def accept(self, output: SequenceOutput) -> bool:
        """Takes what a step made; True where the engine must be told to stop."""
        if self.ended:
            return False
        if output.finish_reason == "error":
            self.fail(Internal(f"the engine gave the request up: {output.error}", reason="ENGINE_ERROR"))
            return False
        if output.first_index != self._num_tokens:
            self.fail(
                Internal(
                    f"token {self._num_tokens} was to come next, but {output.first_index} came",
                    reason="ENGINE_ERROR",
                )
            )
            return True
        if self._cached_tokens is None:
            self._cached_tokens = output.num_cached_tokens
        return self._take(output)

    def _take(self, output: SequenceOutput) -> bool:
        ids = output.token_ids
        # The stop token belongs to the answer, its text does not.
        with_text = ids[:-1] if output.finish_reason == "stop_token" else ids
        delta = self._text.push(with_text)
        if delta.stop_string is not None:
            self._add(ids[: delta.num_tokens], delta.text, output.logprobs)
            self._ending = Ending("stop_string", delta.stop_string)
            return output.finish_reason is None
        if output.finish_reason is None:
            self._add(ids, delta.text, output.logprobs)
            return False
        rest = self._text.finish()
        self._add(ids, delta.text + rest.text, output.logprobs)
        if rest.stop_string is not None:
            self._ending = Ending("stop_string", rest.stop_string)
        elif output.finish_reason == "stop_token":
            self._ending = Ending("stop_token", stop_token_id=output.stop_token_id)
        elif output.finish_reason == "length":
            self._ending = Ending("length")
        else:
            self.fail(Internal("the engine dropped the request", reason="ENGINE_ERROR"))
        return False

    def _add(self, ids: list[int], text: str, logprobs: list[TokenLogprobs] | None) -> None:
        self._num_tokens += len(ids)
        self._batch.add(ids, text, (logprobs or [])[: len(ids)])

    def fail(self, error: TreadleError) -> None:
        """Ends it with an error, unless it has ended; tokens that were not written yet are dropped."""
        if not self.ended:
            self._batch = TokenBatch(self._num_tokens)
            self._ending = error

    def outgoing(self) -> Outgoing | None:
        """The entry to write now; the same one until `written` says that it is there."""
        if self._outgoing is None and (following := self._next()) is not None:
            data, is_terminal = following
            self._outgoing = Outgoing(self._next_number, data, is_terminal)
            self._next_number += 1
        return self._outgoing

    @property
    def has_more(self) -> bool:
        """Whether there is anything to write."""
        unsaid = not self._started and self._cached_tokens is not None
        return self._outgoing is not None or bool(self._batch) or unsaid or self.ended

    @property
    def may_gather(self) -> bool:
        """Whether all there is to write is more of an answer that flows: it may wait for further tokens."""
        return self._flowing and bool(self._batch) and self._outgoing is None and not self.ended

    def written(self) -> bytes:
        """The entry on its way has arrived; what to tell the gateways of it."""
        assert self._outgoing is not None, "only what was on its way arrives"
        id_ = EntryId(self.epoch, self._outgoing.number)
        news = dirty.written(self.keys, id_, self._outgoing.data, self._last)
        self._last, self._outgoing = id_, None
        return news

    def _next(self) -> tuple[bytes, bool] | None:
        """Started first, then tokens, the end alone and last; with whether it is the end."""
        failed = isinstance(self._ending, TreadleError)
        if not self._started and self._cached_tokens is not None and not failed:
            self._started = True
            return started_entry(self.job, self._cached_tokens), False
        if self._batch:
            batch, self._batch = self._batch, TokenBatch(self._num_tokens)
            self._flowing = True
            return tokens_entry(batch), False
        if isinstance(self._ending, TreadleError):
            return error_entry(self._ending), True
        if self._ending is not None:
            usage = self._cached_tokens or 0, self._num_tokens
            return finished_entry(self.job, self._ending, *usage), True
        return None


class RequestTable:
    """One model's requests, by what the engine, the lanes and the gateways call them."""

    def __init__(self) -> None:
        self._by_engine_id: dict[str, RunningRequest] = {}
        self._by_keys: dict[RequestKeys, RunningRequest] = {}

    def __len__(self) -> int:
        return len(self._by_keys)

    def __iter__(self) -> Iterator[RunningRequest]:
        return iter(list(self._by_keys.values()))

    def add(self, request: RunningRequest) -> None:
        """Takes a request in; one with the same keys must be removed before."""
        self._by_engine_id[request.engine_id] = request
        self._by_keys[request.keys] = request

    def remove(self, request: RunningRequest) -> None:
        """Forgets a request, and its deadline; one that is not there is no error."""
        if request.deadline is not None:
            request.deadline.cancel()
            request.deadline = None
        if self._by_engine_id.pop(request.engine_id, None) is not None:
            del self._by_keys[request.keys]

    def by_engine_id(self, engine_id: str) -> RunningRequest | None:
        """The request that an output is about; None for one that was dropped."""
        return self._by_engine_id.get(engine_id)

    def by_keys(self, keys: RequestKeys) -> RunningRequest | None:
        """The request that a notice is about."""
        return self._by_keys.get(keys)

    @property
    def entry_ids(self) -> set[tuple[str, str]]:
        """(lane, entry id) of every request."""
        return {(request.delivery.lane, request.delivery.entry_id) for request in self}
