"""What the service does, in plain Python: the servicer converts and calls this."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from treadle.errors import FailedPrecondition
from treadle.text.template_pool import TemplatePool
from treadle.text.tokenizer import TextOrPair
from treadle_tokenizer import bounds, encoding
from treadle_tokenizer.config import TokenizerConfig
from treadle_tokenizer.encoding import EncodeOptions, Row, TokenBudget
from treadle_tokenizer.lanes import Lanes, Piece
from treadle_tokenizer.models import Model, Models

T = TypeVar("T")
R = TypeVar("R")
_PIECE_BYTES = 32 << 10
"""Of the texts that a thread encodes in one go: some milliseconds' work."""


@dataclass(frozen=True, slots=True)
class RenderedChat:
    """A prompt, and its ids where they were asked for."""

    text: str
    ids: Sequence[int] = ()


class TextService:
    """Encodes, decodes, counts and renders. Every method takes an alias or digest and raises TreadleError."""

    def __init__(
        self, config: TokenizerConfig, models: Models, lanes: Lanes, templates: TemplatePool
    ) -> None:
        self._config = config
        self._models = models
        self._lanes = lanes
        self._templates = templates

    async def encode(
        self,
        model: str,
        texts: Sequence[TextOrPair],
        options: EncodeOptions,
        finish: Callable[[list[Row]], T],
        join: Callable[[Model, list[T]], R],
    ) -> R:
        """What `finish` makes of the rows of each piece of the request, and `join` of all in their order.

        Both run in threads, as rows can be long.
        """
        bounds.check_model(model)
        sizes = bounds.check_texts(texts, self._config)
        found = await self._models.get(model)
        budget = TokenBudget(self._config.max_tokens)

        def encoded(start: int, stop: int) -> list[Row] | T:
            rows = encoding.encode(found.tokenizer, texts[start:stop], options, budget, first=start)
            return finish(rows) if options.padding is None else rows

        def joined(parts: list[Any]) -> R:
            if options.padding is None:
                return join(found, parts)
            rows = [row for part in parts for row in part]
            encoding.pad(found.tokenizer, rows, options, budget)
            return join(found, [finish(rows)])

        cuts = _cuts(sizes)
        if len(cuts) == 1:
            return await self._lanes.run(lambda: joined([encoded(0, len(texts))]), size=sum(sizes))
        parts = await self._lanes.run_all(
            [Piece(partial(encoded, start, stop), sum(sizes[start:stop])) for start, stop in cuts]
        )
        # Whatever the size: the text is encoded already, and nobody's large one is to be waited for.
        return await self._lanes.run(lambda: joined(parts), size=0)

    async def decode(
        self, model: str, rows: Sequence[Sequence[int]], *, skip_special_tokens: bool
    ) -> tuple[Model, list[str]]:
        """The text of each row of ids."""
        bounds.check_model(model)
        count = bounds.check_ids(rows, self._config)
        found = await self._models.get(model)

        def work() -> list[str]:
            bounds.check_vocabulary(rows, found.tokenizer)
            decode = found.tokenizer.decode
            return [decode(row, skip_special_tokens=skip_special_tokens) for row in rows]

        return found, await self._lanes.run(work, size=count)

    async def count(
        self, model: str, texts: Sequence[TextOrPair], *, add_special_tokens: bool
    ) -> tuple[Model, list[int]]:
        """How many ids each text or pair has."""
        options = EncodeOptions(add_special_tokens=add_special_tokens)
        return await self.encode(
            model,
            texts,
            options,
            lambda rows: [len(row.ids) for row in rows],
            lambda found, parts: (found, [count for part in parts for count in part]),
        )

    async def render_chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool,
        template_arguments_json: str,
        tokenize: bool,
    ) -> tuple[Model, RenderedChat]:
        """The prompt that the model's template makes of the messages (each with role and content).

        Its ids are without added special tokens: those that the model wants are in the template.
        """
        bounds.check_model(model)
        bounds.check_messages(messages, self._config)
        arguments = bounds.template_arguments(template_arguments_json, self._config)
        found = await self._models.get(model)
        if found.chat_template is None:
            raise FailedPrecondition(
                "the model has no chat template; send the prompt as text", reason="NO_CHAT_TEMPLATE"
            )
        text = await self._templates.render(
            found.chat_template, messages, add_generation_prompt=add_generation_prompt, arguments=arguments
        )
        if not tokenize:
            return found, RenderedChat(text)
        ids = await self._lanes.run(
            lambda: found.tokenizer.encode(text, add_special_tokens=False), size=len(text)
        )
        return found, RenderedChat(text, ids)


def _cuts(sizes: Sequence[int]) -> list[tuple[int, int]]:
    """[start, stop) of the texts of each piece: as many as have `_PIECE_BYTES`, or one that is larger."""
    cuts, start, held = [], 0, 0
    for at, size in enumerate(sizes):
        if at > start and held + size > _PIECE_BYTES:
            cuts.append((start, at))
            start, held = at, 0
        held += size
    cuts.append((start, len(sizes)))
    return cuts
