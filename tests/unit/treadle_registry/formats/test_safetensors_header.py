"""Headers as the format's own reader takes them, and those that it must not take: each with its reason."""

from __future__ import annotations

import json
import os
import random
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from small_folder import write_model

from treadle.errors import InvalidArgument, TreadleError
from treadle_registry.formats.safetensors_file import read_header
from treadle_registry.formats.safetensors_header import MAX_HEADER, header_entries
from treadle_registry.operations.importing import check_source
from treadle_registry.sources.source import LocalSource


def write_file(path: Path, header: bytes | dict[str, Any], data: int) -> Path:
    """A file of this header and so many bytes of data, which lie nowhere."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + data)
    return path


def entry(begin: int, end: int, *shape: int, dtype: str = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape) or [end - begin], "data_offsets": [begin, end]}


def test_a_header_of_a_hundred_megabytes_is_read_and_no_longer_one(tmp_path: Path):
    text = json.dumps({"a": entry(0, 4)}).encode()
    largest = write_file(tmp_path / "largest.safetensors", text + b" " * (MAX_HEADER - len(text)), 4)
    assert MAX_HEADER == 100_000_000
    assert read_header(largest)["a"].size == 4
    with safe_open(largest, framework="numpy") as file:
        assert list(file.keys()) == ["a"]
    longer = tmp_path / "longer.safetensors"
    with longer.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER + 100)
    tracemalloc.start()
    with pytest.raises(InvalidArgument) as caught:
        read_header(longer)
    assert tracemalloc.get_traced_memory()[1] < 1 << 20
    tracemalloc.stop()
    assert (caught.value.reason, caught.value.code) == ("CORRUPT_WEIGHTS", "INVALID_ARGUMENT")
    assert "at most 100000000 are read; download it again" in caught.value.message
    with pytest.raises(SafetensorError):
        safe_open(longer, framework="numpy")


def test_memory_goes_with_the_tensors_and_not_with_the_text(tmp_path: Path):
    count = 20_000
    many = {f"model.layers.{number}.weight": entry(number, number + 1) for number in range(count)}
    path = write_file(tmp_path / "many.safetensors", many, count)
    nested = b'{"__metadata__":{"a":' + b"[" * 9 + b"]" * 9 + b"},"
    bomb = write_file(tmp_path / "bomb.safetensors", b'{"a":{"x":[' + b"[]," * 3_000_000 + b"[]]}}", 0)
    tracemalloc.start()
    assert len(read_header(path)) == count
    per_tensor = tracemalloc.get_traced_memory()[1] / count
    tracemalloc.reset_peak()
    for hostile in (bomb, write_file(tmp_path / "nested.safetensors", nested, 0)):
        with pytest.raises(InvalidArgument):
            read_header(hostile)
    of_bomb = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert per_tensor < 1500
    assert of_bomb < 4 * bomb.stat().st_size + (1 << 20)
    print(f"{per_tensor:.0f} bytes a tensor; nine megabytes of brackets took {of_bomb >> 20} MiB")


REFUSED: dict[str, tuple[bytes | dict[str, Any], int, str]] = {
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' begins at"),
    "one within another": ({"a": entry(0, 8), "b": entry(2, 4)}, 8, "'b' begins at"),
    "twice the same bytes": ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "begins at"),
    "a gap": ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "'b' begins at"),
    "a gap at the start": ({"a": entry(4, 8)}, 8, "'a' begins at"),
    "bytes behind the last": ({"a": entry(0, 8)}, 9, "end at byte"),
    "cut": ({"a": entry(0, 8)}, 7, "may be truncated"),
    "twice": (b'{"a":%s,"a":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2), 4, "'a' is there twice"),
    "twice, escaped": (
        b'{"a":%s,"\\u0061":%s}' % ((json.dumps(entry(0, 4)).encode(),) * 2),
        4,
        "'a' is there twice",
    ),
    "no offsets": ({"a": {"dtype": "U8", "shape": [1]}}, 1, "two offsets"),
    "backwards": ({"a": {"dtype": "U8", "shape": [1], "data_offsets": [1, 0]}}, 1, "'a'"),
    "half a byte": ({"a": {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]}}, 1, "in F4 has 1 bytes"),
    "half a character": (b'{"\\ud800":%s}' % json.dumps(entry(0, 1)).encode(), 1, "cannot be read"),
    "metadata of numbers": ({"__metadata__": {"a": 1}, "b": entry(0, 1)}, 1, "no string"),
    "something behind it": (b"{} {}", 0, "something follows"),
    "a comma too many": (b'{"a":%s,}' % json.dumps(entry(0, 1)).encode(), 1, "no string"),
    "an entry of 3,000 characters": ({"a": entry(0, 1) | {"x": "y" * 3000}}, 1, "two offsets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(tmp_path: Path, case: str):
    header, data, named = REFUSED[case]
    with pytest.raises(InvalidArgument) as caught:
        read_header(write_file(tmp_path / "model.safetensors", header, data))
    assert caught.value.reason == "CORRUPT_WEIGHTS"
    assert named in caught.value.message
    assert caught.value.message.startswith("model.safetensors is not a whole safetensors file: ")
    assert caught.value.message.endswith("; download it again")


def test_as_the_formats_own_reader(tmp_path: Path, rng: random.Random):
    names = ["a", "b.weight", 'with "quotes"', "ünïcode", "back\\slash", "line\nbreak", "{", "}", "🙂"]
    for case in range(100):
        chosen = rng.sample(names, rng.randint(0, len(names)))
        tensors = {
            name: np.zeros(
                [rng.randint(0, 3) for _ in range(rng.randint(0, 3))],
                rng.choice((np.float32, np.int8, np.uint16, np.bool_)),
            )
            for name in chosen
        }
        path = tmp_path / f"{case}.safetensors"
        save_file(tensors, path, {"format": "np", "} [": '"'} if rng.random() < 0.5 else None)
        found = read_header(path)
        with safe_open(path, framework="numpy") as file:
            assert found.keys() == set(file.keys())
            assert {name: list(tensor.shape) for name, tensor in found.items()} == {
                name: file.get_slice(name).get_shape()
                for name in file.keys()  # noqa: SIM118
            }


def test_as_json(rng: random.Random):
    """What the cursor reads is what JSON means, whatever was changed in it."""
    value = {"a": entry(0, 1), "b.c": entry(1, 3), "é": entry(3, 4)}
    refused = 0
    for _ in range(2000):
        text = json.dumps(value | {"__metadata__": {"k": "v"}}, indent=rng.choice((None, 1)))
        text = text.replace(" ", rng.choice((" ", "", "\t ")))
        expected = {name: found for name, found in json.loads(text).items() if name != "__metadata__"}
        assert dict(header_entries(text)) == expected
        place = rng.randrange(len(text))
        changed = text[:place] + rng.choice('{}[],:"x\\ ') + text[place + rng.randint(0, 1) :]
        try:
            found = dict(header_entries(changed))
        except ValueError:
            refused += 1
            continue
        assert found == {name: item for name, item in json.loads(changed).items() if name != "__metadata__"}
    assert refused > 500
    print(f"{refused} of 2000 changed headers refused")


def test_twice_in_two_shards_and_a_shard_that_is_missing(tmp_path: Path):
    folder = write_model(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"model.norm.weight": "model-1.safetensors", "model.embed_tokens.weight": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    for reason, named in (("MISSING_FILE", "model-2.safetensors"), ("CORRUPT_WEIGHTS", "another file")):
        with pytest.raises(TreadleError) as caught:
            check_source(LocalSource("folder", str(folder)))
        assert (caught.value.reason, caught.value.code) == (reason, "INVALID_ARGUMENT")
        assert named in caught.value.message
        assert ";" in caught.value.message, "there is a way out"
        if reason == "MISSING_FILE":
            os.link(folder / "model-1.safetensors", folder / "model-2.safetensors")
