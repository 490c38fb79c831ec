"""Texts to embed, each behind the prompt that the model's folder puts before it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from treadle.errors import invalid_field
from treadle_gateway.encoded import EncodedText, EncodeOptions
from treadle_gateway.tasks.texts import SHORTEN_OR_TRUNCATE, TextEncoder
from treadle_gateway.tasks.work import WorkInput


async def encode_prompted(
    encoder: TextEncoder,
    prompt: str,
    texts: Sequence[str],
    fields: Sequence[str],
    *,
    truncate: bool,
    way_out: str = SHORTEN_OR_TRUNCATE,
) -> list[WorkInput]:
    """The texts as a worker gets them; where the folder says so, the prompt's own tokens are not pooled.

    `fields` names each text as the client knows it, and `way_out` says what to do with one that is too long.
    """
    skips = encoder.model.artifact.facts.skip_prompt and bool(prompt)
    asked: list[tuple[str, str | None]] = [(prompt + text, None) for text in texts]
    if skips:
        # Stripped: a space at its end may be a token of its own here, and part of the text's first one there.
        asked.append((prompt.strip(), None))

    def field(theirs: str) -> str:
        found = re.match(r"inputs\[(\d+)\]", theirs)
        return fields[min(int(found[1]), len(fields) - 1)] if found else fields[0].partition("[")[0]

    options = EncodeOptions(encoder.cut(truncate), special_tokens=skips)
    encoded = list(await encoder.encode(asked, options, field))
    first, behind = _length(encoded.pop()) if skips else (0, 0)
    inputs = []
    for name, one in zip(fields, encoded, strict=True):
        inputs.append(encoder.work_input(name, one, first=first, way_out=way_out))
        if skips and first + behind >= len(one.ids):
            raise invalid_field(
                name,
                f"has no token of its own among its {len(one.ids)}: the prompt takes them; choose another",
            )
    return inputs


def _length(prompt: EncodedText) -> tuple[int, int]:
    """The tokens that a prompt puts before a text, special ones at its beginning included; and one behind.

    As sentence-transformers counts them: those of the prompt alone, but for a special one at its end.
    """
    behind = 1 if len(prompt.special) and prompt.special[-1] else 0
    return len(prompt.ids) - behind, behind
