"""SentencePiece, BPE and Unigram, as a tokenizer.json.

Two ways lead there. For classes whose Transformers tokenizer has a pipeline of its own (XLM-RoBERTa, T5,
ALBERT) that pipeline is made. For all others the model file says how: the result is SentencePiece's own for
each stretch of text between special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)

from treadle_registry.formats.tokenizers.files import MAX_TOKENS, check_vocabulary, corrupt
from treadle_registry.formats.tokenizers.sentencepiece_model import (
    ModelType,
    PieceType,
    SentencePieceModel,
)
from treadle_registry.formats.tokenizers.special_tokens import SpecialTokens, enclosing, flag, template

XLM_ROBERTA, T5, ALBERT = "XLMRobertaTokenizer", "T5Tokenizer", "AlbertTokenizer"
LLAMA = ("LlamaTokenizer", "GemmaTokenizer", "CodeLlamaTokenizer")
CLASSES = (*LLAMA, XLM_ROBERTA, T5, ALBERT)
_SPACE = "▁"
_MAX_EXTRA_IDS = 10_000
_MAX_MERGES = 8 * MAX_TOKENS


def defaults(model: SentencePieceModel, kind: str) -> dict[str, str]:
    """The special tokens of a class; where it has none of its own, those of the model file."""
    if kind == XLM_ROBERTA:
        ends = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
        return ends | {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}
    if kind == T5:
        return {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    if kind == ALBERT:
        ends = {"bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
        return ends | {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "[MASK]"}
    numbers = {"bos": model.bos_id, "eos": model.eos_id, "unk": model.unk_id, "pad": model.pad_id}
    return {
        f"{name}_token": text
        for name, number in numbers.items()
        if (text := model.text_of(number)) is not None
    }


def sentencepiece(
    model: SentencePieceModel, name: str, config: Mapping[str, Any], tokens: SpecialTokens, kind: str
) -> tokenizers.Tokenizer:
    """The tokenizer of a class, from the model in the file `name`.

    Raises InvalidArgument (CORRUPT_TOKENIZER).
    """
    if kind in (XLM_ROBERTA, T5, ALBERT) and model.type != ModelType.UNIGRAM:
        raise corrupt(name, f"it is a BPE model, and {kind} has a Unigram model")
    backend = tokenizers.Tokenizer(_model(model, name, tokens, kind, config))
    if model.charsmap:
        try:
            charsmap = [normalizers.Precompiled(model.charsmap)]
        except Exception as error:
            raise corrupt(name, f"its normaliser cannot be read ({str(error)[:200]})") from error
    else:
        charsmap = []
    if kind in (XLM_ROBERTA, T5, ALBERT):
        _as_the_class(backend, charsmap, config, kind)
    else:
        _as_the_file(backend, charsmap, model, always=flag(config, "legacy", True))
    _add_tokens(backend, model, tokens, kind, config)
    backend.post_processor = _post_processor(backend, config, tokens, kind)
    return backend


def _post_processor(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], tokens: SpecialTokens, kind: str
) -> Any:
    bos, eos = tokens.content("bos_token"), tokens.content("eos_token")
    if kind == XLM_ROBERTA:
        single = [f"{bos}:0", "$A:0", f"{eos}:0"]
        return template(backend, single, [*single, f"{eos}:0", "$B:0", f"{eos}:0"])
    if kind == T5:
        single = ["$A:0", f"{eos}:0"]
        return template(backend, single, [*single, "$B:0", f"{eos}:0"])
    if kind == ALBERT:
        first, between = tokens.content("cls_token"), tokens.content("sep_token")
        single = [f"{first}:0", "$A:0", f"{between}:0"]
        return template(backend, single, [*single, "$B:1", f"{between}:1"])
    adds_bos = flag(config, "add_bos_token", kind in LLAMA)
    adds_eos = flag(config, "add_eos_token", False)
    return enclosing(backend, bos if adds_bos else None, eos if adds_eos else None)


def _model(
    model: SentencePieceModel, name: str, tokens: SpecialTokens, kind: str, config: Mapping[str, Any]
) -> models.Model:
    texts = _texts(model, tokens)
    scores = [piece.score for piece in model.pieces]
    unknown = model.unk_id
    if kind == XLM_ROBERTA:
        # fairseq's four come first; of the file's own three the unknown one is the first.
        ends = [tokens.content(f"{each}_token") or "" for each in ("bos", "pad", "eos", "unk", "mask")]
        texts, scores, unknown = [*ends[:4], *texts[3:], ends[4]], [0.0] * 4 + scores[3:] + [0.0], 3
    elif kind == T5:
        extra = _extra_ids(config)
        texts, scores = texts + extra, scores + [0.0] * len(extra)
    vocabulary = {text: number for number, text in enumerate(texts)}
    if len(vocabulary) != len(texts):
        raise corrupt(name, "it has a token twice, with the special ones")
    check_vocabulary(name, vocabulary)
    try:
        if model.type == ModelType.UNIGRAM:
            return models.Unigram(
                list(zip(texts, scores, strict=True)), unk_id=unknown, byte_fallback=model.byte_fallback
            )
        return models.BPE(
            vocab=vocabulary,
            merges=_merges(model, name, texts),
            unk_token=texts[unknown],
            fuse_unk=True,
            byte_fallback=model.byte_fallback,
            # User-defined pieces come to the model one by one, and no merge makes them.
            ignore_merges=bool(_user_defined(model)),
        )
    except Exception as error:
        raise corrupt(name, str(error)[:200]) from error


def _texts(model: SentencePieceModel, tokens: SpecialTokens) -> list[str]:
    """The pieces' texts, with the names that added tokens give to their placeholders."""
    texts = [piece.text for piece in model.pieces]
    known = set(texts)
    for number, token in tokens.placed.items():
        if number < len(texts) and token.content not in known:
            texts[number] = token.content
    return texts


def _merges(model: SentencePieceModel, name: str, texts: Sequence[str]) -> list[tuple[str, str]]:
    """Every two pieces that make a third one, the best score first.

    SentencePiece keeps no merges: it joins the neighbours whose joined piece has the best score.
    """
    normal = {
        piece.text
        for piece, text in zip(model.pieces, texts, strict=True)
        if piece.type == PieceType.NORMAL and piece.text == text
    }
    ranked = []
    for number, piece in enumerate(model.pieces):
        if piece.text not in normal:
            continue
        for at in range(1, len(piece.text)):
            left, right = piece.text[:at], piece.text[at:]
            if left in normal and right in normal:
                ranked.append((-piece.score, number, at, left, right))
        if len(ranked) > _MAX_MERGES:
            raise corrupt(name, f"its pieces make more than {_MAX_MERGES} merges")
    return [(left, right) for *_, left, right in sorted(ranked)]


def _user_defined(model: SentencePieceModel) -> list[str]:
    return [piece.text for piece in model.pieces if piece.type == PieceType.USER_DEFINED]


def _as_the_class(
    backend: tokenizers.Tokenizer, charsmap: list[Any], config: Mapping[str, Any], kind: str
) -> None:
    """Words between spaces, each with a "▁" before it."""
    steps = list(charsmap)
    if kind == ALBERT:
        quotes: list[Any] = [normalizers.Replace("``", '"'), normalizers.Replace("''", '"')]
        if not flag(config, "keep_accents", False):
            quotes += [normalizers.NFKD(), normalizers.StripAccents()]
        if flag(config, "do_lower_case", True):
            quotes.append(normalizers.Lowercase())
        steps = quotes + steps
    if steps:
        backend.normalizer = normalizers.Sequence(steps)
    prefixed = kind == T5 or flag(config, "add_prefix_space", True)
    scheme = "always" if prefixed else "never"
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(_SPACE, prepend_scheme=scheme)]
    )
    backend.decoder = decoders.Metaspace(_SPACE, prepend_scheme=scheme)


def _as_the_file(
    backend: tokenizers.Tokenizer, charsmap: list[Any], model: SentencePieceModel, *, always: bool
) -> None:
    """SentencePiece's normaliser. `always`: each stretch between special tokens gets the dummy prefix."""
    steps = list(charsmap)
    if model.remove_extra_whitespaces:
        # Runs first: looking for a run at the text's end would take the square of its length.
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Replace(Regex(r"\A | \z"), "")]
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])
    cuts: list[Any] = []
    if model.add_dummy_prefix:
        # By a space, which the normaliser has left none of: before a "▁" that is there no "▁" would be put.
        scheme = "always" if always else "first"
        cuts += [
            pre_tokenizers.Metaspace(" ", prepend_scheme=scheme, split=False),
            pre_tokenizers.Metaspace(_SPACE, prepend_scheme="never", split=False),
        ]
    if own := _user_defined(model):
        longest_first = "|".join(re.escape(text) for text in sorted(own, key=len, reverse=True))
        cuts.append(pre_tokenizers.Split(Regex(longest_first), "isolated"))
    if cuts:
        backend.pre_tokenizer = pre_tokenizers.Sequence(cuts)
    steps = [decoders.Replace(_SPACE, " ")]
    if model.byte_fallback:
        steps.append(decoders.ByteFallback())
    steps.append(decoders.Fuse())
    if model.add_dummy_prefix:
        steps.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(steps)


def _add_tokens(
    backend: tokenizers.Tokenizer,
    model: SentencePieceModel,
    tokens: SpecialTokens,
    kind: str,
    config: Mapping[str, Any],
) -> None:
    """Control pieces are special tokens; so are T5's sentinels. Told ones come first: they know better."""
    tokens.add_to(backend)
    texts = _texts(model, tokens)
    control = [
        text for text, piece in zip(texts, model.pieces, strict=True) if piece.type == PieceType.CONTROL
    ]
    if kind == T5:
        control += _extra_ids(config)
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    added = [AddedToken(text, special=True, normalized=False) for text in control if text not in known]
    if kind in (XLM_ROBERTA, T5, ALBERT):
        own = [text for text in _user_defined(model) if text not in known]
        added += [AddedToken(text, special=False, normalized=False) for text in own]
    backend.add_tokens(added)


def _extra_ids(config: Mapping[str, Any]) -> list[str]:
    """T5's sentinels in the order of their ids, which is the last first."""
    value = config.get("extra_ids", 100)
    if type(value) is not int or not 0 <= value <= _MAX_EXTRA_IDS:
        raise corrupt("tokenizer_config.json", f"extra_ids is {str(value)[:40]!r}")
    return [f"<extra_id_{number}>" for number in range(value - 1, -1, -1)]
