"""What a client may ask of a hub."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from treadle.errors import InvalidArgument
from treadle_registry.sources.hub_source import HubSource
from treadle_registry.sources.source import source_from_json, source_to_json

GOOD = [
    HubSource("gpt2"),
    HubSource("Qwen/Qwen2.5-0.5B-Instruct"),
    HubSource("a/b", "refs/pr/4"),
    HubSource("a/b", "v1.0", "fp16"),
    HubSource("a/b", "0" * 40, gguf_file="model.Q4_K_M.gguf", local_files_only=True),
]
BAD = {
    "hub.repository": [
        *(
            "",
            "/",
            "a/",
            "/a",
            "a//b",
            "a/b/c",
            "..",
            "../b",
            "a/..",
            "a/../b",
            "a..b",
            "a--b",
            "a/b.git",
            "a b",
        ),
        *(
            "http://evil/a",
            "https://hub/a/b",
            "a/b?x",
            "a/b#c",
            "a/b@main",
            "a%2fb",
            "a\\b",
            "a/b\n",
            "a\0",
            "ä/b",
        ),
        *("~/a", ".hidden/a", "-a/b", "x" * 97, "127.0.0.1:80/a", "a/b-", "file:///etc/passwd"),
    ],
    "hub.revision": [
        "..",
        "a/../b",
        "/a",
        "a/",
        "a//b",
        "a b",
        "a\0b",
        "http://x",
        "a?b",
        "x" * 256,
        "-a",
        "a.lock",
    ],
    "hub.variant": ["..", "a/b", "a.b", "a b", "a\0", "x" * 65, "-a"],
    "hub.gguf_file": [
        "a",
        "../a.gguf",
        "a/b.gguf",
        "/a.gguf",
        "a b.gguf",
        ".a.gguf",
        "a\0.gguf",
        "x" * 200 + ".gguf",
    ],
}


def test_what_a_hub_has_is_taken():
    for source in GOOD:
        source.check()
        assert source_from_json(source_to_json(source)) == source
    print(f"{len(GOOD)} sources")


@pytest.mark.parametrize("field", BAD)
def test_addresses_and_ways_out_are_refused_by_their_field(field: str):
    refused = 0
    for text in BAD[field]:
        whole = asdict(HubSource("a/b")) | {field.removeprefix("hub."): text}
        with pytest.raises(InvalidArgument) as raised:
            HubSource(**whole).check()
        assert [violation.field for violation in raised.value.fields] == [field], text
        refused += 1
    assert refused == len(BAD[field]) > 6
    print(f"{refused} refused as {field}")


def test_a_variant_has_no_place_beside_a_gguf_file():
    with pytest.raises(InvalidArgument, match="leave it out beside gguf_file"):
        HubSource("a/b", variant="fp16", gguf_file="m.gguf").check()


def test_it_is_said_as_the_command_line_takes_it():
    assert str(HubSource("a/b")) == "hub:a/b"
    assert str(HubSource("a/b", "v1", "fp16")) == "hub:a/b@v1 (fp16)"
    assert HubSource("a/b", "v1", gguf_file="m.gguf").at("c0") == "hub:a/b@c0/m.gguf"
