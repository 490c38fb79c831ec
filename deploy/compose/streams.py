"""Asks a gateway for several answers at once and tells, a line of JSON an event, what arrives.

    python streams.py gateway:50051 smollm2 8 160

It runs in a container on the suite's network, with the client that the images have. Half of the answers
are greedy, half are drawn with a seed: two runs ask the same.
"""

from __future__ import annotations

import asyncio
import json
import sys

from treadle.client import AsyncClient
from treadle.errors import TreadleError

SUBJECTS = ("a loom", "a lighthouse", "a river", "a violin", "a market", "a mountain", "a letter", "a garden")


def tell(**event: object) -> None:
    """One event to standard output."""
    print(json.dumps(event, ensure_ascii=False), flush=True)


async def follow(client: AsyncClient, number: int, max_new_tokens: int) -> None:
    """One answer: each chunk, then the whole of it, or how it failed."""
    subject = SUBJECTS[number % len(SUBJECTS)]
    drawn = {"temperature": 0.8, "seed": 1000 + number} if number % 2 else {"temperature": 0.0}
    stream = client.stream(
        messages=[{"role": "user", "content": f"Tell a long story about {subject}, number {number}."}],
        max_new_tokens=max_new_tokens,
        ignore_eos=True,
        **drawn,
    )
    try:
        async with stream:
            async for chunk in stream:
                tell(event="chunk", stream=number, index=chunk.index, token_ids=chunk.token_ids)
    except TreadleError as error:
        tell(event="failed", stream=number, error=f"{error.code}: {error.message}")
        return
    (choice,) = stream.answer.choices
    tell(
        event="end",
        stream=number,
        token_ids=choice.token_ids,
        text=choice.text,
        finish_reason=choice.finish_reason,
        output_tokens=stream.answer.usage.output_tokens,
    )


async def main(address: str, model: str, number: int, max_new_tokens: int) -> None:
    """All of them at once, over one connection."""
    async with AsyncClient(address, model=model) as client:
        await asyncio.gather(*(follow(client, each, max_new_tokens) for each in range(number)))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
