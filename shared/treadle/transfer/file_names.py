"""What the files of a model may be called within its folder: one rule for who sends and who takes."""

from __future__ import annotations

import re

_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,126}")
_INNER = re.compile(
    r"additional_chat_templates/[A-Za-z0-9][A-Za-z0-9._-]{0,126}\.jinja"
    r"|[0-9]{1,2}_[A-Za-z][A-Za-z0-9]{0,63}/config\.json"
)
"""Transformers' chat templates but the default, and the settings of sentence-transformers' modules."""


def is_file_name(name: str) -> bool:
    """Whether it is a plain file name that a store takes."""
    return _FILE.fullmatch(name) is not None


def is_inner_name(name: str) -> bool:
    """Whether it is one of the files in a model's own folders that belong to it: "1_Pooling/config.json"."""
    return _INNER.fullmatch(name) is not None


def is_inner_folder(name: str) -> bool:
    """Whether such files lie in a folder of this name."""
    return is_inner_name(f"{name}/config.json") or is_inner_name(f"{name}/any.jinja")


def is_model_file(name: str) -> bool:
    """Whether it may be the name of a file of a model."""
    return is_file_name(name) or is_inner_name(name)
