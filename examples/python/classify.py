"""Labels texts on an event loop: python classify.py [host:port]"""

import asyncio
import sys

import treadle

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
TEXTS = ("What a lovely day!", "This soup is cold and far too salty.", "", "The train leaves at nine.")


async def main() -> None:
    async with treadle.AsyncClient(ADDRESS) as client:
        model = next(served.name for served in await client.models() if "classify" in served.tasks)
        # The empty text fails alone.
        async for item in client.classify_stream(TEXTS, model=model, top_k=1):
            if item.error is None:
                (best,) = item.answer.labels[0]
                print(f"{best.score:6.1%}  {best.label:<10} {TEXTS[item.index]}")
            else:
                print(f"{item.error.code}: {item.error.message}")


asyncio.run(main())
