"""Runs many prompts at once on an event loop: python batch.py [host:port]"""

import asyncio
import sys

import treadle

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
COLOURS = ("red", "green", "blue", "yellow", "violet", "white")


async def main() -> None:
    requests = [
        treadle.GenerationRequest(
            prompt=f"Some things that are {colour}:", max_new_tokens=12, temperature=0.0
        )
        for colour in COLOURS
    ]
    async with treadle.AsyncClient(ADDRESS, model="smollm2") as client:
        async for item in client.batch(requests):
            text = item.answer.text if item.answer else f"failed: {item.error}"
            print(f"{COLOURS[item.index]:<8} {' '.join(text.split())}")


asyncio.run(main())
