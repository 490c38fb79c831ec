"""What the files of sentence-transformers say of an encoder, as its releases 2 to 6 write them.

    modules.json                          what a text passes through, one module after another
    <n>_<Module>/config.json              a module's settings
    sentence_bert_config.json             of the first module: the longest text, lower case
    config_sentence_transformers.json     prompts, similarity, what a cross-encoder's number becomes

https://sbert.net/docs/package_reference/base/modules.html
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from treadle.errors import FailedPrecondition, InvalidArgument
from treadle_registry.formats.json_files import read_json, read_json_list
from treadle_registry.store.task_facts import TaskFacts

MODULES = "modules.json"
SETTINGS = "config_sentence_transformers.json"
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
INPUTS = tuple(f"sentence_{kind}_config.json" for kind in _KINDS)
"""The first that is there is read, whatever the model's type."""
_CHAINS = (("Transformer",), ("Transformer", "Pooling"), ("Transformer", "Pooling", "Normalize"))
_PACKAGE = "sentence_transformers."
_FLAGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}
"""How releases before 6 say `pooling_mode`."""
_POOLINGS = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
_SIMILARITIES = ("cosine", "dot")
_ACTIVATIONS = {"sigmoid": "torch.nn.modules.activation.Sigmoid", "": "torch.nn.modules.linear.Identity"}
_NORMALIZED = "sentence_embedding"
_MAX_LENGTH = 1 << 24
"""As many as config.json may have positions: the canonical file says the model's own where no other does."""
_MAX_PROMPTS, _MAX_PROMPT_NAME, _MAX_PROMPT = 64, 64, 8192
"""Characters of a name and of a prompt."""
_MAX_ALL_PROMPTS = 128 << 10
"""Bytes of all prompts as JSON: they go through every line and message that tells of the artifact."""


@dataclass(frozen=True, slots=True)
class SentenceFiles:
    """What they say; the defaults are a folder's that has none of them."""

    pooling: str = ""
    """"mean", "cls" or "last"."""
    normalize: bool = False
    skip_prompt: bool = False
    max_seq_length: int | None = None
    lower_case: bool = False
    """Texts are lower-cased before the tokenizer's own normaliser."""
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt_name: str = ""
    similarity: str = "cosine"
    activation: str = ""
    """The class that a cross-encoder's number goes through; empty: they do not say."""


def read_sentence_files(files: Mapping[str, Path], hidden_size: int, *, is_classifier: bool) -> SentenceFiles:
    """Reads those that are among a folder's `files`.

    Raises FailedPrecondition (UNSUPPORTED_MODULE, UNSUPPORTED_POOLING, UNSUPPORTED_SIMILARITY) for what no
    code here computes, and InvalidArgument (CORRUPT_CONFIG, MISSING_FILE) for what cannot be.
    """
    said: dict[str, Any] = {}
    if MODULES in files:
        said |= _chain(files, hidden_size, is_classifier)
    for name in INPUTS:
        if name in files:
            said |= _input(_Object(name, read_json(files[name], name=name)))
            break
    if SETTINGS in files:
        said |= _settings(_Object(SETTINGS, read_json(files[SETTINGS], name=SETTINGS)))
    return SentenceFiles(**said)


def sentence_files(facts: TaskFacts) -> dict[str, Any]:
    """The same in these files' words, as the canonical folder has them: names and JSON values.

    Read again they say just that, and sentence-transformers loads the folder as the model that it was.
    """
    files: dict[str, Any] = {
        INPUTS[0]: {"max_seq_length": facts.max_input_tokens, "do_lower_case": False},
    }
    if "embed" in facts.tasks:
        files[SETTINGS] = {
            "model_type": "SentenceTransformer",
            "prompts": dict(facts.prompts),
            "default_prompt_name": facts.default_prompt_name or None,
            "similarity_fn_name": facts.similarity,
        }
    elif "rerank" in facts.tasks:
        activation = _ACTIVATIONS[facts.rank_activation]
        files[SETTINGS] = {"model_type": "CrossEncoder", "activation_fn": activation}
        # Release 6 reads the activation only beside modules, and by them what the model is.
        files[INPUTS[0]]["transformer_task"] = "sequence-classification"
        files[MODULES] = _modules(("Transformer",))
    if facts.pooling:
        files[MODULES] = _modules(_CHAINS[2 if facts.normalize else 1])
        mode = next(mode for mode, pooling in _POOLINGS.items() if pooling == facts.pooling)
        # Older releases do not know `pooling_mode`.
        files["1_Pooling/config.json"] = {
            "word_embedding_dimension": facts.embedding_dimensions,
            **{flag: each == mode for flag, each in _FLAGS.items()},
            "include_prompt": not facts.skip_prompt,
        }
    return files


def _modules(kinds: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            "idx": number,
            "name": str(number),
            "path": f"{number}_{kind}" if number else "",
            "type": f"{_PACKAGE}models.{kind}",
        }
        for number, kind in enumerate(kinds)
    ]


def rank_activation(activation: str, where: str) -> str:
    """ "sigmoid", or "" for a number that stays as it is; raises FailedPrecondition for another class."""
    for name, known in _ACTIVATIONS.items():
        if activation.startswith("torch.") and activation.rpartition(".")[2] == known.rpartition(".")[2]:
            return name
    raise FailedPrecondition(
        f"{where} puts a cross-encoder's number through {activation!r:.100}; supported: "
        f"{', '.join(_ACTIVATIONS.values())}. Name one of these",
        reason="UNSUPPORTED_ACTIVATION",
    )


def lower_cased(normalizer: object) -> dict[str, Any]:
    """The `normalizer` of tokenizer.json, after lower-casing, as a folder's do_lower_case means it."""
    lower = {"type": "Lowercase"}
    if normalizer is None or normalizer == lower:
        return lower
    steps = (
        normalizer["normalizers"]
        if isinstance(normalizer, dict) and "normalizers" in normalizer
        else [normalizer]
    )
    return {"type": "Sequence", "normalizers": steps if lower in steps else [lower, *steps]}


class _Object:
    """A file's values, checked as they are read; null is as if nothing were said."""

    def __init__(self, name: str, raw: Mapping[str, Any]) -> None:
        self.name, self.raw = name, raw

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        value = self.raw.get(key)
        if value is None:
            return default
        if type(value) is not kind:
            words = {bool: "true or false", int: "a whole number", str: "a text", dict: "an object"}
            raise self.corrupt(f"{key} must be {words[kind]}; got {value!r:.80}")
        return value

    def corrupt(self, what: str) -> InvalidArgument:
        return InvalidArgument(f"{self.name}: {what}; take the model's own file", reason="CORRUPT_CONFIG")


def _chain(files: Mapping[str, Path], hidden_size: int, is_classifier: bool) -> dict[str, Any]:
    entries = [_module(entry) for entry in read_json_list(files[MODULES], name=MODULES)]
    kinds = tuple(kind for kind, _ in entries)
    if kinds not in (_CHAINS[:1] if is_classifier else _CHAINS):
        raise _unsupported_modules(kinds, is_classifier)
    folders = [folder for _, folder in entries]
    if folders[0]:
        raise FailedPrecondition(
            f"{MODULES}: the model lies in the folder {folders[0]!r:.80}; put its files at the top, and "
            '"" as the path of the Transformer',
            reason="UNSUPPORTED_MODULE",
        )
    said: dict[str, Any] = {}
    if len(kinds) > 1:
        said |= _pooling(_config_of(files, folders[1], required=True), hidden_size)
    if len(kinds) > 2:
        _check_normalize(_config_of(files, folders[2], required=False))
        said["normalize"] = True
    return said


def _module(entry: object) -> tuple[str, str]:
    """The class's own name and the module's folder; raises FailedPrecondition for code of the model's own."""
    named = _Object(MODULES, entry if isinstance(entry, dict) else {})
    kind, folder = named.get("type", str), named.get("path", str, "")
    if kind is None:
        raise named.corrupt("each module must be an object with a type and a path")
    if not kind.startswith(_PACKAGE):
        raise FailedPrecondition(
            f"{MODULES} asks for {kind!r:.100}, which is code of the model's own and never run; supported "
            f"are sentence-transformers' modules {', '.join(_CHAINS[-1])}",
            reason="UNSUPPORTED_MODULE",
        )
    return kind.rpartition(".")[2], folder


def _unsupported_modules(kinds: Sequence[str], is_classifier: bool) -> FailedPrecondition:
    known = _CHAINS[0] if is_classifier else _CHAINS[-1]
    strange = next((kind for kind in kinds if kind not in known), "")
    found = f"the module {strange[:100]}" if strange else f"the modules {', '.join(kinds)[:200] or 'of none'}"
    behind = "a classifier is its Transformer alone" if is_classifier else "in this order, the last optional"
    return FailedPrecondition(
        f"{MODULES} has {found}; supported: {', '.join(known)} ({behind}). Take a model without it, or "
        f"import the encoder alone, without {MODULES}, and do the rest where the vectors arrive",
        reason="UNSUPPORTED_MODULE",
    )


def _config_of(files: Mapping[str, Path], folder: str, *, required: bool) -> _Object:
    name = f"{folder}/config.json"
    if name in files:
        return _Object(name, read_json(files[name], name=name))
    if required:
        raise InvalidArgument(
            f"{name[:100]} is missing, which {MODULES} names; it must lie in a folder that is called as in "
            "1_Pooling/config.json",
            reason="MISSING_FILE",
        )
    return _Object(name, {})


def _pooling(config: _Object, hidden_size: int) -> dict[str, Any]:
    modes = config.raw.get("pooling_mode")
    if modes is None:
        modes = [mode for flag, mode in _FLAGS.items() if config.get(flag, bool, False)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not all(isinstance(mode, str) for mode in modes):
        raise config.corrupt(f"pooling_mode must be a mode's name; got {modes!r:.80}")
    if len(modes) != 1 or modes[0] not in _POOLINGS:
        raise FailedPrecondition(
            f"{config.name}: pooling by {' and '.join(modes)[:100] or 'nothing'}; supported is one of "
            f"{', '.join(_POOLINGS)}. Take a model with one of these",
            reason="UNSUPPORTED_POOLING",
        )
    for key in ("embedding_dimension", "word_embedding_dimension"):
        if (size := config.get(key, int)) not in (None, hidden_size):
            raise config.corrupt(
                f"{key} must be config.json's hidden size, {hidden_size}; got {str(size)[:20]}"
            )
    return {
        "pooling": _POOLINGS[modes[0]],
        "skip_prompt": not config.get("include_prompt", bool, True),
    }


def _check_normalize(config: _Object) -> None:
    for key in ("module_input_name", "module_output_name"):
        if (name := config.get(key, str)) not in (None, _NORMALIZED):
            raise FailedPrecondition(
                f"{config.name}: {key} is {name!r:.80}; only the text's own vector is normalised",
                reason="UNSUPPORTED_MODULE",
            )


def _input(config: _Object) -> dict[str, Any]:
    length = config.get("max_seq_length", int)
    if length is not None and not 0 < length <= _MAX_LENGTH:
        raise config.corrupt(f"max_seq_length must be 1 to {_MAX_LENGTH}; got {str(length)[:20]}")
    return {"max_seq_length": length, "lower_case": config.get("do_lower_case", bool, False)}


def _settings(config: _Object) -> dict[str, Any]:
    kind = config.get("model_type", str, "SentenceTransformer")
    if kind not in ("SentenceTransformer", "CrossEncoder"):
        raise FailedPrecondition(
            f"{SETTINGS} says that the model is a {kind!r:.80}, whose vectors are not one a text; supported: "
            "SentenceTransformer, CrossEncoder",
            reason="UNSUPPORTED_MODULE",
        )
    if (cut := config.get("truncate_dim", int)) is not None:
        raise FailedPrecondition(
            f"{SETTINGS} cuts every vector to truncate_dim = {str(cut)[:20]} numbers; take that line out, "
            "and ask for as many dimensions in each request",
            reason="UNSUPPORTED_POOLING",
        )
    similarity = config.get("similarity_fn_name", str, _SIMILARITIES[0])
    if similarity not in _SIMILARITIES:
        raise FailedPrecondition(
            f"{SETTINGS}: similarity_fn_name is {similarity!r:.80}; supported: {', '.join(_SIMILARITIES)}. "
            "Set it to null where the vectors are compared elsewhere",
            reason="UNSUPPORTED_SIMILARITY",
        )
    prompts = _prompts(config)
    default = config.get("default_prompt_name", str, "")
    if default and default not in prompts:
        raise config.corrupt(f"default_prompt_name is {default!r:.80}, and prompts has no such name")
    return {
        "prompts": prompts,
        "default_prompt_name": default,
        "similarity": similarity,
        "activation": config.get("activation_fn", str, ""),
    }


def _prompts(config: _Object) -> dict[str, str]:
    raw = config.get("prompts", dict, {})
    if len(raw) > _MAX_PROMPTS:
        raise config.corrupt(f"prompts has {len(raw)} entries; at most {_MAX_PROMPTS} are taken")
    # A name without a text is one of the two that sentence-transformers always writes.
    prompts = {name: "" if text is None else text for name, text in raw.items()}
    for name, text in prompts.items():
        if not isinstance(text, str) or len(text) > _MAX_PROMPT:
            raise config.corrupt(
                f"the prompt {name!r:.80} must be a text of at most {_MAX_PROMPT} characters"
            )
        if not 0 < len(name) <= _MAX_PROMPT_NAME:
            raise config.corrupt(
                f"a prompt's name must have 1 to {_MAX_PROMPT_NAME} characters; got {name!r:.80}"
            )
    if (size := len(json.dumps(prompts))) > _MAX_ALL_PROMPTS:
        raise config.corrupt(f"prompts has {size} bytes; at most {_MAX_ALL_PROMPTS} are taken")
    return prompts
