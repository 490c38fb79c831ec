"""What to type first, by what the served models can do."""

from __future__ import annotations

from collections.abc import Sequence

from treadle.client import ServedModel

_CLIENT_LINE = (
    "python -c 'import treadle; "
    '[print(chunk.text, end="", flush=True) for chunk in treadle.Client("{address}").stream('
    'messages=[{{"role": "user", "content": "Hello!"}}], model="{model}", max_new_tokens=64)]; print()\''
)
_COMMANDS = {
    "generate": ("chat", 'generate "The loom was"'),
    "embed": ('embed "A loom" "A weaving machine"',),
    "classify": ('classify "What a lovely day!"',),
    "tag": ('tag "Ada Lovelace lived in London."',),
    "rerank": ('rerank "How do I weave?" "A loom holds threads." "Bread needs flour."',),
}
"""The commands of a task. Of those that have none here, `score`, who has the model knows already."""


def first_steps(models: Sequence[ServedModel], address: str) -> list[str]:
    """Lines to paste. A command names its model where several can do it."""
    lines: list[str] = []
    for task, commands in _COMMANDS.items():
        able = [model.name for model in models if task in model.tasks and not model.error]
        if not able:
            continue
        choice = f" --model {able[0]}" if len(able) > 1 else ""
        lines += [f"treadle {command}{choice} --address {address}" for command in commands]
        if task == "generate":
            lines.append(_CLIENT_LINE.format(address=address, model=able[0]))
    return lines
