"""From an answer's ids to the text that its client gets: decoding and stop strings together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.text.incremental import IncrementalDecoder
from treadle.text.stop_strings import StopStringMatcher
from treadle.text.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TextDelta:
    """What some more ids add to an answer."""

    text: str
    """Text that cannot change any more."""
    num_tokens: int
    """How many of the pushed ids belong to the answer: all, or those up to and with the one that completed
    a stop string."""
    stop_string: str | None = None
    """The stop string that ended the answer."""


class OutputText:
    """The text of one choice.

    Push ids as the engine makes them, without the end-of-text or stop token that ended the answer (its id
    belongs to the answer, its text does not); `finish` when there are no more. After a stop string was found,
    further ids give nothing and count for nothing.

    To go on with an answer that another process began, push the ids that were delivered: the text that comes
    back is the text that was delivered, however they were cut then.

    `min_tokens`: a stop string that is complete before the answer has so many tokens is text like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop_strings: Sequence[str] = (),
        include_stop_string: bool = False,
        skip_special_tokens: bool = True,
        min_tokens: int = 0,
    ) -> None:
        self._decoder = IncrementalDecoder(
            tokenizer, prompt_ids=prompt_ids, skip_special_tokens=skip_special_tokens
        )
        self._matcher = StopStringMatcher(stop_strings, include_stop_string=include_stop_string)
        self._min_tokens = min_tokens
        self._num_tokens = 0
        self._finished = False

    @property
    def stop_string(self) -> str | None:
        """The stop string that ended the answer, once there is one."""
        return self._matcher.matched

    @property
    def num_tokens(self) -> int:
        """The answer's tokens so far."""
        return self._num_tokens

    def push(self, ids: Sequence[int]) -> TextDelta:
        """Takes the next ids; each costs constant time."""
        if not self._matcher.watches and not self._finished:
            self._num_tokens += len(ids)
            return TextDelta(self._decoder.push(ids), len(ids))
        pieces: list[str] = []
        kept = 0
        for token_id in ids:
            if self.stop_string is not None or self._finished:
                break
            kept += 1
            self._num_tokens += 1
            text = self._decoder.push((token_id,))
            pieces.append(self._matcher.push(text, may_match=self._num_tokens >= self._min_tokens))
        return TextDelta("".join(pieces), kept, self.stop_string)

    def finish(self) -> TextDelta:
        """What was held back; even an unfinished character may complete a stop string."""
        if self._finished or self.stop_string is not None:
            return TextDelta("", 0, self.stop_string)
        self._finished = True
        may_match = self._num_tokens >= self._min_tokens
        text = self._matcher.push(self._decoder.flush(), may_match=may_match)
        if self.stop_string is None:
            text += self._matcher.flush()
        return TextDelta(text, 0, self.stop_string)
