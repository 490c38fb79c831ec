"""A megabyte for every kind of tokenizer: others are answered meanwhile, and memory does not grow."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
import tokenizer_folders as folders
from tokenizer_process import Service, inputs

from treadle.api.tokenizer.v1 import tokenizer_pb2 as pb

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.slow]

TEXTS = {
    "one letter": "a" * (1 << 20),
    "spaces": " " * (1 << 20),
    "emoji": "👩‍🚀🇩🇪👍🏽 " * (1 << 15),
}
ROUNDS = 3
MIB = 1 << 20


def t5(folder: Path) -> Path:
    folder.mkdir()
    folders.trained_sentencepiece(folder / "spiece.model", pad_id=0, eos_id=1, unk_id=2, bos_id=-1)
    return folders.write_config(folder, "t5", None)


def roberta(folder: Path) -> Path:
    specials = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return folders.byte_level(folder, "RobertaTokenizer", "roberta", specials)


KINDS = {
    "WordPiece": folders.minilm_vocabulary,
    "byte-level BPE": roberta,
    "SentencePiece BPE": folders.mistral_model,
    "Unigram": t5,
}


async def test_a_megabyte_neither_blocks_nor_stays(service: Service, tmp_path: Path) -> None:
    for number, (kind, make) in enumerate(KINDS.items(), 20):
        folder = folders.canonical(make(tmp_path / kind), tmp_path / f"{kind}-canonical")
        service.registry.add(kind, folder, number=number)
    process = psutil.Process(service.process.pid)
    resident: list[int] = []
    for _ in range(ROUNDS):
        for kind in KINDS:
            for name, text in TEXTS.items():
                served, tokens = await _beside(service, kind, text)
                if not resident:
                    print(f"{kind}, 1 MB of {name}: {tokens} tokens, {served} small requests meanwhile")
                assert served > 0, (kind, name)
                assert tokens > 0
        resident.append(process.memory_info().rss)
    print("resident after each round:", [size // MIB for size in resident], "MiB")
    assert max(resident[1:]) < resident[0] * 1.25 + 64 * MIB
    assert max(resident) < 1536 * MIB


async def _beside(service: Service, kind: str, text: str) -> tuple[int, int]:
    """Small requests that were answered before the large one, and its tokens."""
    small = pb.EncodeRequest(model=kind, inputs=inputs("hello there"))
    expected = await service.stub.Encode(small, timeout=30)
    # Two at once: the second waits for the first, and nobody else for either.
    large = pb.CountTokensRequest(model=kind, inputs=inputs(text))
    calls = [asyncio.ensure_future(service.stub.CountTokens(large, timeout=120)) for _ in range(2)]
    served = 0
    while not all(call.done() for call in calls):
        answer = await service.stub.Encode(small, timeout=30)
        assert answer.encodings[0].ids == expected.encodings[0].ids
        served += not all(call.done() for call in calls)
    counts = [(await call).counts[0] for call in calls]
    assert counts[0] == counts[1]
    return served, counts[0]
