"""A task's texts as ids: through the tokenizer, and within what the model takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from treadle.errors import invalid_field
from treadle.models.families import reads_type_ids
from treadle_gateway.clients import Tokenizer
from treadle_gateway.deadlines import Deadline
from treadle_gateway.encoded import Cut, EncodedText, EncodeOptions, Texts
from treadle_gateway.models import ServedModel
from treadle_gateway.tasks.work import WorkInput
from treadle_gateway.tokenizing import ask_tokenizer

SHORTEN_OR_TRUNCATE = "shorten it, or set truncate"


class TextEncoder:
    """Encodes for one model, within one request's time."""

    def __init__(
        self, tokenizer: Tokenizer, model: ServedModel, deadline: Deadline, *, timeout_s: float
    ) -> None:
        self._tokenizer = tokenizer
        self._deadline = deadline
        self._timeout_s = timeout_s
        self.model = model
        known = [length for length in (model.artifact.facts.max_input_tokens, model.max_model_len) if length]
        self.max_length = min(known, default=0)
        """Tokens of a text or pair, special ones included; 0: nobody says."""
        self.has_types = reads_type_ids(model.artifact.model_type)
        """Whether the model reads type ids."""

    def cut(self, truncate: bool, *, second_only: bool = False) -> Cut | None:
        """How texts are cut where that is wanted."""
        return Cut(self.max_length, second_only) if truncate and self.max_length else None

    async def encode(
        self, texts: Texts, options: EncodeOptions, field: Callable[[str], str]
    ) -> Sequence[EncodedText]:
        """The texts in their order.

        `field` names what of the client's request a field of the tokenizer's was made from
        ("inputs[3].text", "inputs[3].pair", "inputs", …). Raises as ask_tokenizer does.
        """
        encoded = await ask_tokenizer(
            lambda digest, limit_s: self._tokenizer.encode_texts(digest, texts, options, timeout_s=limit_s),
            self.model,
            self._deadline,
            timeout_s=self._timeout_s,
            rename=lambda theirs: "context.model" if theirs == "model" else field(theirs),
        )
        return encoded.texts

    def work_input(
        self, field: str, encoded: EncodedText, *, first: int = 0, way_out: str = SHORTEN_OR_TRUNCATE
    ) -> WorkInput:
        """The encoded text as a worker gets it; raises InvalidArgument where the model cannot take it."""
        self.check(field, encoded.ids, way_out)
        return WorkInput(encoded.ids, encoded.type_ids if any(encoded.type_ids) else (), first)

    def check(self, field: str, ids: Sequence[int], way_out: str) -> None:
        """Raises InvalidArgument for no ids, for too many, and for one outside the vocabulary."""
        count, vocab_size = len(ids), self.model.vocab_size
        if not count:
            raise invalid_field(field, "has no tokens; send a text that has at least one")
        if self.max_length and count > self.max_length:
            raise invalid_field(
                field, f"has {count} tokens, but the model takes at most {self.max_length}; {way_out}"
            )
        if vocab_size and max(ids) >= vocab_size:
            raise invalid_field(
                field,
                f"has token {max(ids)}, which the model has no row for: its vocabulary is {vocab_size}",
            )


def input_field(theirs: str) -> str:
    """The field's name where the tokenizer's inputs are the client's own."""
    return "truncate" if theirs.startswith("truncation") else theirs
