"""Models as people type them."""

from __future__ import annotations

from treadle.client import RegistryClient
from treadle.errors import NotFound, invalid_field


async def full_name(client: RegistryClient, name: str) -> str:
    """`name`, or the one digest that starts with it."""
    start = name.removeprefix("sha256:")
    if len(start) == 64 or name in [entry.name for entry in await client.aliases()]:
        return name
    matching = [
        artifact.digest
        for artifact in await client.artifacts()
        if artifact.digest.removeprefix("sha256:").startswith(start)
    ]
    if len(matching) > 1:
        raise invalid_field("name", f"{name!r} starts {len(matching)} digests; give more of it")
    if not matching:
        raise NotFound(f"the store has no alias and no digest {name!r}", reason="MODEL_NOT_FOUND")
    return matching[0]
