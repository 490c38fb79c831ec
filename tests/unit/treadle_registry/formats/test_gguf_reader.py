"""Files that are not what they claim, each refused by name and without an allocation."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from treadle.errors import InvalidArgument, TreadleError
from treadle_registry.formats.gguf_reader import GgufFile

HUGE = (1 << 64) - 1


def text(value: bytes, claimed: int | None = None) -> bytes:
    return struct.pack("<Q", len(value) if claimed is None else claimed) + value


def header(tensors: int = 0, pairs: int = 0, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, pairs)


def pair(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, dimensions: list[int], kind: int = 0, offset: int = 0) -> bytes:
    count = len(dimensions)
    return text(name) + struct.pack(f"<I{count}QIQ", count, *dimensions, kind, offset)


PADDING = bytes(256)
CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "fewer than 24 bytes"),
    "not gguf": (header(magic=b"PK\x03\x04") + PADDING, "does not begin with GGUF"),
    "version 1": (header(version=1) + PADDING, "version is 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + PADDING, "little-endian"),
    "tensors without end": (header(tensors=HUGE) + PADDING, f"{HUGE} tensors"),
    "pairs without end": (header(pairs=1 << 40) + PADDING, "metadata pairs"),
    "key longer than the file": (header(pairs=1) + text(b"", HUGE) + PADDING, "a metadata key"),
    "key not UTF-8": (header(pairs=1) + pair(b"\xff\xfe", 4, bytes(4)) + PADDING, "not UTF-8"),
    "key twice": (header(pairs=2) + pair(b"a", 0, b"1") * 2 + PADDING, "'a' twice"),
    "unknown type": (header(pairs=1) + pair(b"a", 99, b"") + PADDING, "unknown type 99"),
    "string longer than the file": (header(pairs=1) + pair(b"a", 8, text(b"x", 1 << 62)) + PADDING, "claims"),
    "array without end": (
        header(pairs=1) + pair(b"a", 9, struct.pack("<IQ", 4, HUGE)) + PADDING,
        "the array 'a' claims",
    ),
    "strings without end": (
        header(pairs=1) + pair(b"a", 9, struct.pack("<IQ", 8, 1 << 60)) + PADDING,
        "the array 'a' claims",
    ),
    "array of arrays": (
        header(pairs=1) + pair(b"a", 9, struct.pack("<IQ", 9, 1)) + PADDING,
        "elements of type 9",
    ),
    "ends within the header": (header(pairs=1) + b"\x01", "more than its size"),
    "alignment": (
        header(pairs=1) + pair(b"general.alignment", 4, struct.pack("<I", 0)) + PADDING,
        "general.alignment",
    ),
    "alignment no power of two": (
        header(pairs=1) + pair(b"general.alignment", 4, struct.pack("<I", 24)) + PADDING,
        "general.alignment",
    ),
    "no dimensions": (header(tensors=1) + tensor(b"t", []) + PADDING, "0 dimensions"),
    "many dimensions": (header(tensors=1) + tensor(b"t", [1] * 9) + PADDING, "9 dimensions"),
    "product past 64 bits": (header(tensors=1) + tensor(b"t", [1 << 33, 1 << 33]) + PADDING, "claims"),
    "dimension of zero": (header(tensors=1) + tensor(b"t", [4, 0]) + PADDING, "shape"),
    "broken block": (header(tensors=1) + tensor(b"t", [33], kind=2) + PADDING, "shape"),
    "offset past the end": (header(tensors=1) + tensor(b"t", [4], offset=1 << 40) + PADDING, "ends at byte"),
    "offset not aligned": (header(tensors=1) + tensor(b"t", [4], offset=7) + PADDING, "not aligned"),
    "overlap": (
        header(tensors=2) + tensor(b"t", [16]) + tensor(b"u", [4], offset=32) + PADDING,
        "overlap",
    ),
    "tensor twice": (
        header(tensors=2) + tensor(b"t", [4]) + tensor(b"t", [4], offset=32) + PADDING,
        "twice",
    ),
    "long name": (header(tensors=1) + tensor(b"t" * 300, [4]) + PADDING, "a tensor's name"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_corrupt(tmp_path: Path, case: str):
    data, expected = CORRUPT[case]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    with pytest.raises(InvalidArgument) as caught:
        GgufFile(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert caught.value.reason == "CORRUPT_GGUF"
    assert caught.value.message.startswith("broken.gguf ")
    assert expected in caught.value.message
    assert peak < 1 << 20


def test_unknown_format_is_named(tmp_path: Path):
    path = tmp_path / "odd.gguf"
    path.write_bytes(header(tensors=1) + tensor(b"strange", [256], kind=19) + PADDING)
    with pytest.raises(InvalidArgument) as caught:
        GgufFile(path)
    assert caught.value.reason == "UNSUPPORTED_QUANTIZATION"
    assert "'strange' is in IQ1_S (ggml's format 19)" in caught.value.message


def test_every_truncation_is_refused(
    tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: Callable[..., Path]
):
    whole = write_gguf(tmp_path / "whole.gguf", tiny_model(layers=1), vocabulary).read_bytes()
    path = tmp_path / "cut.gguf"
    lengths = [*range(0, 400, 7), *range(400, len(whole) - 32, len(whole) // 150)]
    for length in lengths:
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidArgument) as caught:
            GgufFile(path)
        assert caught.value.reason == "CORRUPT_GGUF"
    assert len(lengths) > 150
    print(f"{len(lengths)} truncations of {len(whole)} bytes refused")


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_end_in_an_error_or_a_file(
    data: st.DataObject, tmp_path: Path, vocabulary: Any, tiny_model: Any, write_gguf: Callable[..., Path]
):
    path = tmp_path / "base.gguf"
    if not path.exists():
        write_gguf(path, tiny_model(layers=1), vocabulary)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, 3000) | st.integers(0, 30000)) % len(content)
        content[place] = data.draw(st.integers(0, 255))
    broken = tmp_path / "flipped.gguf"
    broken.write_bytes(content)
    reason = ""
    try:
        with GgufFile(broken) as file:
            assert all(entry.offset + entry.size <= len(content) for entry in file.tensors.values())
    except TreadleError as error:
        reason = error.reason
    assert reason in ("", "CORRUPT_GGUF", "UNSUPPORTED_QUANTIZATION")
