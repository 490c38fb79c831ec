"""Random encoders with tokenizers of their own, as Hugging Face folders: what transformers loads, too."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXT = Path(__file__).parents[1] / "data" / "shakespeare.txt"
VOCABULARY = 900
CONTEXT = 128
"""Tokens that a text may have, special ones included."""
_SIZES = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
_DISTILBERT = {"dim": 48, "hidden_dim": 96, "n_layers": 2, "n_heads": 4}


def write_encoder(
    folder: Path, kind: str, head: str, labels: Sequence[str] = (), *, seed: int = 7, **config: object
) -> None:
    """A folder of "bert", "roberta" or "distilbert"; `head`: "Model", "ForSequenceClassification" or
    "ForTokenClassification". Every parameter is random."""
    folder.mkdir(parents=True, exist_ok=True)
    roberta = kind == "roberta"
    specials = ("<s>", "<pad>", "</s>", "<unk>") if roberta else ("[CLS]", "[PAD]", "[SEP]", "[UNK]")
    tokenizer = _byte_level(specials) if roberta else _word_piece(specials)
    tokenizer.save(str(folder / "tokenizer.json"))
    names = dict(zip(("cls_token", "pad_token", "sep_token", "unk_token"), specials, strict=True))
    limits = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": CONTEXT}
    (folder / "tokenizer_config.json").write_text(json.dumps(names | limits))
    sizes = _DISTILBERT if kind == "distilbert" else _SIZES
    pad = tokenizer.token_to_id(specials[1])
    prefix = {"bert": "Bert", "roberta": "Roberta", "distilbert": "DistilBert"}[kind]
    made = getattr(transformers, f"{prefix}Config")(
        vocab_size=tokenizer.get_vocab_size(),
        max_position_embeddings=CONTEXT + pad + 1 if roberta else CONTEXT,
        pad_token_id=pad,
        **(sizes | config),
        **({"id2label": dict(enumerate(labels))} if labels else {}),
        **({"label2id": {label: number for number, label in enumerate(labels)}} if labels else {}),
    )
    model = getattr(transformers, f"{prefix}{head}")(made)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = torch.randn(parameter.shape, generator=generator)
            norm = "LayerNorm" in name or "layer_norm" in name
            one = 1.0 if norm and name.endswith("weight") else 0.0
            parameter.copy_(one + spread * (0.3 if norm else 2.0 / parameter.shape[-1] ** 0.5))
    model.save_pretrained(folder)


def _trained(tokenizer: tokenizers.Tokenizer, trainer: object) -> tokenizers.Tokenizer:
    tokenizer.train([str(TEXT)], trainer)
    return tokenizer


def _word_piece(specials: Sequence[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    _trained(
        tokenizer,
        trainers.WordPieceTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[*specials[1:2], *specials[3:], *specials[:1], specials[2]],
            show_progress=False,
        ),
    )
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]"))
    tokenizer.post_processor = processors.BertProcessing(sep, cls)
    return tokenizer


def _byte_level(specials: Sequence[str]) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    _trained(
        tokenizer,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=list(specials),
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    cls, sep = ((token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>"))
    tokenizer.post_processor = processors.RobertaProcessing(sep, cls, add_prefix_space=False)
    return tokenizer
