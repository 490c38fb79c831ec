"""Clients in a process of their own, to be killed: `client_process.py ADDRESS COUNT GENERATION`.

Each has a connection of its own and streams the answer to GENERATION (the message in hexadecimal). A line
says that all are under way, and another one, in the end, what each was told.
"""

from __future__ import annotations

import asyncio
import json
import sys

from client_record import Record, own_channel, start
from waiting import until

from treadle.api.inference.v1 import generation_pb2, inference_pb2_grpc

FIRST = 64
"""Tokens that each has then: some blocks' worth."""


async def main(address: str, count: int, asked: generation_pb2.Generation) -> None:
    """Streams to the end."""
    channels = [own_channel(address) for _ in range(count)]
    records = [Record() for _ in channels]
    tasks = [
        asyncio.create_task(record.listen(start(inference_pb2_grpc.InferenceServiceStub(channel), asked)))
        for record, channel in zip(records, channels, strict=True)
    ]
    await until(
        lambda: all(record.num_tokens >= FIRST for record in records), "all are under way", timeout_s=60
    )
    print("streaming", flush=True)
    await asyncio.gather(*tasks)
    print(json.dumps([record.told().token_ids for record in records]), flush=True)
    for channel in channels:
        await channel.close()


if __name__ == "__main__":
    target, number, message = sys.argv[1:]
    generation = generation_pb2.Generation.FromString(bytes.fromhex(message))
    asyncio.run(main(target, int(number), generation))
