"""Prompt-lookup speculation: a sequence's next tokens, guessed from what it says already.

Where the last tokens of a sequence stood before (an n-gram of it, the longest one that is found, the latest
place), the tokens that followed them are proposed as its draft. A step checks the whole draft: its chunk
holds the last token and the draft, and a token is drawn at each of these positions as it would be without
a draft. So speculation never changes an answer; it only makes one step give several tokens of it.
(Saxena, "Prompt Lookup Decoding", 2023; vLLM's n-gram proposer.)

When it pays: a step reads all weights whatever it computes, and one more row costs little beside that: some
ROW_COST of a step that computes next to nothing (measured on a CPU, bf16 and int8, 2 to 32 rows: 3% to 9%).
With r rows a token costs (1 + ROW_COST * r) / r, so one more row is worth its cost where the chance that its
token is accepted is above ROW_COST * r / (1 + ROW_COST * r): 8% for a sequence that is alone, 40% where eight
run, 73% where 32 do. The chance is measured, sequence by sequence; one whose drafts are no use makes none,
and tries again with a single token now and then.
"""

from __future__ import annotations

from collections.abc import Sequence as ListOf
from dataclasses import dataclass

ROW_COST = 1 / 12
FIRST_CHANCE = 0.5
"""What is taken for a sequence's chance before anything is known."""
CHANCE_WEIGHT = 0.1
"""Of the newest token in the running average."""
PROBE_INTERVAL = 24
"""Steps without a draft after which a sequence tries again."""
_KEY_BITS = 32


class NgramIndex:
    """Where each n-gram of a growing list of tokens stood last. Each token is looked at once."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"n-grams of {min_ngram} to {max_ngram} tokens")
        self.min_ngram = min_ngram
        self.max_ngram = max_ngram
        self._latest: list[dict[int, int]] = [{} for _ in range(max_ngram + 1)]
        """By length: an n-gram's key to the place of the token behind it."""
        self._num_indexed = 0

    def propose(self, token_ids: ListOf[int], count: int) -> list[int]:
        """`count` tokens that followed the list's longest known end, or none.

        The list is the one of the last call, and what was appended. What follows may be the end itself,
        where it repeats: the draft then goes on with its own tokens.
        """
        length = len(token_ids)
        for end in range(max(self._num_indexed, 1), length):
            for n, key in self._keys(token_ids, end):
                self._latest[n][key] = end
        self._num_indexed = length
        for n, key in reversed(self._keys(token_ids, length)):
            if (start := self._latest[n].get(key)) is not None:
                draft = list(token_ids[start : start + count])
                while len(draft) < count:
                    draft.append(draft[start + len(draft) - length])
                return draft
        return []

    def _keys(self, token_ids: ListOf[int], end: int) -> list[tuple[int, int]]:
        """The n-grams before `end`, short ones first: length and key."""
        keys, key = [], 0
        for n in range(1, min(self.max_ngram, end) + 1):
            key = key << _KEY_BITS | token_ids[end - n]
            if n >= self.min_ngram:
                keys.append((n, key))
        return keys


class Drafting:
    """What speculation remembers of one sequence."""

    def __init__(self, index: NgramIndex) -> None:
        self.index = index
        self.chance = FIRST_CHANCE
        """That a token of a draft is accepted, given that those before it are."""
        self.num_steps_without = 0

    def verified(self, num_draft_tokens: int, num_accepted_tokens: int) -> None:
        """A step checked a draft: each accepted token is a success, the first rejected one a failure."""
        for _ in range(num_accepted_tokens):
            self.chance += CHANCE_WEIGHT * (1 - self.chance)
        if num_accepted_tokens < num_draft_tokens:
            self.chance -= CHANCE_WEIGHT * self.chance


@dataclass(frozen=True, slots=True)
class Speculation:
    """How much is guessed; the settings of an engine."""

    num_speculative_tokens: int = 0
    """The longest draft; 0: none."""
    max_rows: int = 32
    """Tokens of a step, drafts included, beyond which nothing is guessed."""
    min_ngram: int = 2
    max_ngram: int = 4

    def start(self) -> Drafting | None:
        """What to remember of a new sequence; None where nothing is guessed."""
        return Drafting(NgramIndex(self.min_ngram, self.max_ngram)) if self.num_speculative_tokens else None

    def draft(self, drafting: Drafting, token_ids: ListOf[int], *, num_rows: int, room: int) -> list[int]:
        """The draft of a sequence in a step that has `num_rows` tokens by now; of at most `room` tokens."""
        room = min(room, self.num_speculative_tokens, self.max_rows - num_rows)
        count = min(room, self._num_worthwhile(drafting.chance, num_rows))
        if count <= 0:
            drafting.num_steps_without += 1
            if room <= 0 or drafting.num_steps_without < PROBE_INTERVAL:
                return []
            count = 1
        if draft := drafting.index.propose(token_ids, count):
            drafting.num_steps_without = 0
        return draft

    def _num_worthwhile(self, chance: float, num_rows: int) -> int:
        least = ROW_COST * num_rows / (1 + ROW_COST * num_rows)
        count, reached = 0, chance
        while count < self.num_speculative_tokens and reached >= least:
            count, reached = count + 1, reached * chance
        return count
