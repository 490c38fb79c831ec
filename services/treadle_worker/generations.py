"""A generation that this worker holds: the engine's tokens in; text, stop strings and an end out."""

from __future__ import annotations

from treadle.errors import Internal, TreadleError
from treadle.queue.lanes import Delivery
from treadle.text.output import OutputText
from treadle.text.tokenizer import Tokenizer
from treadle_worker.convert_queue import finished_entry, started_entry, tokens_entry
from treadle_worker.engine_protocol import AddRequest, Ready, SequenceOutput, TokenLogprobs
from treadle_worker.jobs import GenerationJob, History
from treadle_worker.outgoing import Ending, TokenBatch
from treadle_worker.requests import RunningRequest, not_supported

_FINISH_REASONS = {"stop_token": "stop", "stop_string": "stop", "length": "length"}


class RunningGeneration(RunningRequest):
    """Goes on after what earlier owners delivered, and delivers as it comes."""

    job: GenerationJob
    operation = "text_completion"
    """To a worker a chat is token ids like any other prompt."""

    def __init__(
        self,
        job: GenerationJob,
        delivery: Delivery,
        epoch: int,
        *,
        tokenizer: Tokenizer,
        history: History,
        watchers: set[str],
    ) -> None:
        super().__init__(job, delivery, epoch, last=history.last, watchers=watchers)
        self._delivered = history.token_ids
        self._started = history.started
        self._cached_tokens = history.cached_tokens if history.started else None
        self._num_tokens = len(history.token_ids)
        self._text = self._rebuild(tokenizer)
        self._batch = TokenBatch(self._num_tokens)
        self._ending: Ending | None = None
        self._flowing = False
        """Whether tokens were written in this run."""

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
    def num_input_tokens(self) -> int:
        """Of the prompt."""
        return len(self.job.prompt_token_ids)

    @property
    def num_tokens(self) -> int:
        """Prompt and output."""
        return len(self.job.prompt_token_ids) + self._num_tokens

    @property
    def num_delivered(self) -> int:
        """Tokens that earlier owners delivered."""
        return len(self._delivered)

    @property
    def _is_complete(self) -> bool:
        return self._ending is not None

    def usage(self) -> dict[str, str | int | list[str]]:
        """Tokens, and how it ended."""
        said: dict[str, str | int | list[str]] = {
            "gen_ai.usage.output_tokens": self._num_tokens,
            "gen_ai.usage.cache_read.input_tokens": self._cached_tokens or 0,
        }
        if self._ending is not None:
            said["gen_ai.response.finish_reasons"] = [_FINISH_REASONS[self._ending.reason]]
        return said

    def refusal(self, ready: Ready) -> TreadleError | None:
        """An encoder generates nothing."""
        return None if ready.generates else not_supported("generate", ready)

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

    def _drop_unwritten(self) -> None:
        self._batch = TokenBatch(self._num_tokens)

    @property
    def has_more(self) -> bool:
        """Whether there is anything to write."""
        unsaid = not self._started and self._cached_tokens is not None
        return super().has_more or bool(self._batch) or unsaid

    @property
    def may_gather(self) -> bool:
        """Whether all there is to write is more of an answer that flows: it may wait for further tokens."""
        return self._flowing and bool(self._batch) and self._outgoing is None and not self.ended

    def _next(self) -> tuple[bytes, bool] | None:
        """Started first, then tokens, then the end."""
        if not self._started and self._cached_tokens is not None and self.error is None:
            self._started = True
            return started_entry(self.job, self._cached_tokens), False
        if self._batch:
            batch, self._batch = self._batch, TokenBatch(self._num_tokens)
            self._flowing = True
            return tokens_entry(batch), False
        return super()._next()

    def _finished(self) -> bytes:
        assert self._ending is not None, "only what is complete has a good end"
        return finished_entry(self.job, self._ending, self._cached_tokens or 0, self._num_tokens)
