"""Streams one chat answer with the Python client: python chat_stream.py [host:port]"""

import sys

import treadle

address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
messages = [{"role": "user", "content": "What is a loom? Answer in one sentence."}]

with treadle.Client(address, model="smollm2") as client:
    with client.stream(messages=messages, temperature=0.0, max_new_tokens=60) as stream:
        for chunk in stream:
            print(chunk.text, end="", flush=True)
    usage = stream.answer.usage
    print(f"\n{usage.prompt_tokens} tokens read, {usage.output_tokens} made")
