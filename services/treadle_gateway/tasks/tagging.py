"""Tag: the label of each token, made spans of characters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from treadle.models.families import has_word_pieces
from treadle_gateway.encoded import EncodedText, EncodeOptions
from treadle_gateway.tasks.result_bytes import malformed, pairs
from treadle_gateway.tasks.spans import StartsWord, spans
from treadle_gateway.tasks.task import Aggregation, TagTask, TextInput
from treadle_gateway.tasks.texts import TextEncoder, input_field
from treadle_gateway.tasks.work import Plan, Span, TaggedTexts, TagWork


async def plan(task: TagTask, encoder: TextEncoder) -> Plan:
    """The work; raises InvalidArgument."""
    texts = [(one.text, None) for one in task.inputs]
    options = EncodeOptions(encoder.cut(task.truncate), offsets=True, special_tokens=True)
    encoded = await encoder.encode(texts, options, input_field)
    inputs = [encoder.work_input(f"inputs[{number}].text", one) for number, one in enumerate(encoded)]
    artifact = encoder.model.artifact
    reader = _Reader(task, artifact.facts.labels, encoded, has_word_pieces(artifact.model_type))
    return Plan(inputs, TagWork(), reader.read)


@dataclass(frozen=True, slots=True)
class _Reader:
    task: TagTask
    labels: tuple[str, ...]
    encoded: Sequence[EncodedText]
    knows_words: bool

    def read(self, data: bytes) -> TaggedTexts:
        best, numbers = pairs(data, sum(len(one.ids) for one in self.encoded))
        if max(best, default=0) >= len(self.labels):
            raise malformed(f"names label {max(best)}, and the model has {len(self.labels)}")
        rows, at = [], 0
        for asked, encoded in zip(self.task.inputs, self.encoded, strict=True):
            end = at + len(encoded.ids)
            rows.append(self._spans(asked, encoded, best[at:end], numbers[at:end]))
            at = end
        return TaggedTexts(rows)

    def _spans(
        self, asked: TextInput, encoded: EncodedText, best: Sequence[int], numbers: Sequence[float]
    ) -> list[Span]:
        places = [place for place, special in enumerate(encoded.special) if not special]
        tokens = [
            Span(encoded.starts[place], encoded.ends[place], self.labels[best[place]], numbers[place])
            for place in places
        ]
        starts_word = (
            _by_word_ids([encoded.word_ids[place] for place in places])
            if self.knows_words
            else _by_spaces(asked.text, tokens)
        )
        return spans(
            tokens,
            Aggregation(self.task.aggregation or Aggregation.SIMPLE),
            starts_word,
            include_outside=self.task.include_outside,
        )


def _by_word_ids(word_ids: Sequence[int]) -> StartsWord:
    return lambda place: word_ids[place] != word_ids[place - 1]


def _by_spaces(text: str, tokens: Sequence[Span]) -> StartsWord:
    def starts_word(place: int) -> bool:
        start = tokens[place].start
        return start == 0 or " " in text[start - 1 : start + 1]

    return starts_word
