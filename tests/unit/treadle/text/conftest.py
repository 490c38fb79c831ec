"""Small tokenizers of every kind, built here, and the packaged model's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from treadle.text.tokenizer import Tokenizer

CORPUS = [
    "The quick brown fox jumps over the lazy dog, and the dog sleeps on.",
    "Once upon a time there was a town where it rained; people sang all the same.",
    "strings of words, words of strings: word, sword, swords, sworded, wordy",
    "I'm here, you're there, they've gone. 1234567890 2024-01-31",
    "def add(a, b):\n    return a + b\n\n\n",
    "Grüße aus Köln — déjà vu, naïve café",
    "你好世界，今天天气很好。",
    "नमस्ते दुनिया",
]
SPECIALS = ["<|start|>", "<|end|>", "[tool]"]


def byte_level_bpe() -> Backend:
    """As GPT-2, Llama 3, Qwen and SmolLM2 are built."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_tokens([AddedToken("née Zoë", normalized=False)])
    return backend


def byte_fallback_bpe() -> Backend:
    """As Llama 2 and Mistral are built: "▁" for the space, unknown characters as raw bytes."""
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")],
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    latin = [text for text in CORPUS if text.isascii()]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=["<unk>", *byte_tokens], show_progress=False)
    backend.train_from_iterator([f"▁{text.replace(' ', '▁')}" for text in latin], trainer)
    # Trained as special tokens so that they get ids, the bytes are ordinary ones in the end.
    state = _without_special_bytes(backend)
    state.add_special_tokens(SPECIALS)
    return state


def _without_special_bytes(backend: Backend) -> Backend:
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == "<unk>"]
    return Backend.from_str(json.dumps(state))


def metaspace_unigram() -> Backend:
    """As T5 and XLM-R are built."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def word_piece() -> Backend:
    """As BERT is built, with a pair's special tokens, padding and truncation baked in."""
    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=300, special_tokens=["[PAD]", "[UNK]", "[CLS]", "[SEP]", *SPECIALS], show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    backend.enable_padding(length=128, pad_id=0, pad_token="[PAD]")
    backend.enable_truncation(128)
    return backend


def suffix_bpe() -> Backend:
    """As the first GPT and CLIP are built: a word's end is marked."""
    backend = Backend(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.BPEDecoder(suffix="</w>")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIALS], end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


BUILDERS = [byte_level_bpe, byte_fallback_bpe, metaspace_unigram, word_piece, suffix_bpe]


@pytest.fixture(scope="session")
def built_tokenizers() -> dict[str, Tokenizer]:
    """Every kind, by the name of its builder."""
    return {builder.__name__: Tokenizer(builder()) for builder in BUILDERS}


@pytest.fixture(scope="session", params=[builder.__name__ for builder in BUILDERS])
def tokenizer(request: pytest.FixtureRequest, built_tokenizers: dict[str, Tokenizer]) -> Tokenizer:
    """Each of the built tokenizers in turn."""
    return built_tokenizers[request.param]


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Tokenizer:
    """The packaged model's tokenizer."""
    return Tokenizer.load(smollm2_folder, digest="sha256:smollm2")


@pytest.fixture
def byte_level_backend() -> Backend:
    """A byte-level tokenizer of the library, to be saved as an artifact's."""
    return byte_level_bpe()
