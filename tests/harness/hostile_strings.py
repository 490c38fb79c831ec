"""Texts that tokenizers get wrong: random ones, and what people and attackers send."""

from __future__ import annotations

import random
import unicodedata
from collections.abc import Sequence

EMOJI = ["👍", "👍🏽", "👩‍🚀", "👨‍👩‍👧‍👦", "🏳️‍🌈", "❤️", "🇩🇪", "🇩", "1️⃣", "\U0001f9d1\u200d", "\u200d\u200d"]
RIGHT_TO_LEFT = [
    "שלום",
    "مرحبا بالعالم",
    "\u202eabc\u202c",
    "א\u05b0",
    "\u0627\u0644\u0644\u0651\u0670\u0647",
    "\u061c",
]
SCRIPTS = [
    "日本語テキスト",
    "한국어",
    "中文字符",
    "ｆｕｌｌ",
    "ﬁ",
    "Ⅷ",
    "½",
    "ไทย",
    "हिन्दी",
    "ಕನ್ನಡ",
    "𝔘𝔫𝔦",
    "ß",
    "İ",
    "ı",
    "Ǆ",
    "ﷺ",
    "㍿",
    "ｶﾞ",
]
MARKS = [
    "e\u0301",
    "é",
    "a\u0308\u0301\u0323",
    "\u0301",
    "n\u0303o",
    "\u0345",
    "Z\u0351\u036b\u0343",
    "\u20e3",
    "각",
    "\u1112\u1161\u11ab",
]
SPACES = [
    " ",
    "  ",
    "\t",
    "\n",
    "\r\n",
    "\r",
    "\n\n\n",
    "\x0b",
    "\x0c",
    "\x85",
    "\xa0",
    "\u1680",
    "\u2003",
    "\u2028",
    "\u2029",
    "\u202f",
    "\u205f",
    "\u3000",
    "\u200b",
    "\ufeff",
    "\u2060",
    "\u180e",
    "▁",
    "▁▁",
    "Ġ",
    "Ċ",
]
CONTROLS = [
    "\x00",
    "\x01",
    "\x1b[31m",
    "\x7f",
    "\x80",
    "\x9f",
    "\ufffd",
    "\ufffe",
    "\uffff",
    "\U0010ffff",
    "\ue000",
    "\U000e0041",
    "\u00ad",
    "\ufe0f",
]
SPECIALS = [
    "<s>",
    "</s>",
    "<unk>",
    "<pad>",
    "<mask>",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    "[UNK]",
    "[PAD]",
    "<|endoftext|>",
    "<|im_start|>",
    "[INST]",
    "[/INST]",
    "<0x0A>",
    "<0xE4>",
    "<extra_id_0>",
    "< s >",
    "<s",
    "##ing",
    "</w>",
    "``",
    "''",
]
NUMBERS = ["0", "42", "1,234.5", "007", "12345678901234567890", "1,", "3.14e-10", "٣", "１２"]
PUNCTUATION = [
    "'s",
    "n't",
    "'LL",
    "...",
    "?!",
    "—",
    "“”",
    "(a[b]{c})",
    "a.b.c",
    "http://x.y/z?q=1&r=%20",
    "C++",
    "#!/",
    "\\n",
    "$€",
    "@me",
    "~~~~",
    "====",
    "''''",
]
KINDS = (EMOJI, RIGHT_TO_LEFT, SCRIPTS, MARKS, SPACES, CONTROLS, SPECIALS, NUMBERS, PUNCTUATION)  # fmt: skip


def hostile_strings(rng: random.Random, count: int, words: Sequence[str]) -> list[str]:
    """`count` texts of up to some hundred characters, `words` among them; the first few are edges."""
    texts = ["", *(item for kind in KINDS for item in kind)]
    texts += [f" {item} " for item in texts] + [item + item for item in texts]
    while len(texts) < count:
        texts.append(_one(rng, words))
    return texts[:count]


def _one(rng: random.Random, words: Sequence[str]) -> str:
    kind = rng.random()
    if kind < 0.1:
        return _points(rng, rng.randint(1, 30))
    if kind < 0.15:
        # A run, long for once.
        return rng.choice(rng.choice([*KINDS, words])) * rng.randint(2, 400 if rng.random() < 0.05 else 40)
    parts = []
    for _ in range(rng.randint(1, 24)):
        drawn = rng.random()
        if drawn < 0.5:
            word = rng.choice(words)
            parts.append(rng.choice([word, word, word.upper(), word.capitalize(), word[::-1]]))
        elif drawn < 0.56:
            parts.append(_points(rng, rng.randint(1, 3)))
        else:
            parts.append(rng.choice(rng.choice(KINDS)))
        if rng.random() < 0.6:
            parts.append(rng.choice(SPACES) if rng.random() < 0.15 else " ")
    text = "".join(parts)
    form = rng.random()
    return unicodedata.normalize("NFD" if form < 0.05 else "NFKC", text) if form < 0.1 else text


def _points(rng: random.Random, count: int) -> str:
    """Characters from anywhere but the halves of pairs."""
    tops = (0x80, 0x800, 0x3000, 0x10000, 0x110000)
    points = (rng.randrange(rng.choice(tops)) for _ in range(count))
    return "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)
