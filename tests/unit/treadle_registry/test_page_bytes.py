"""Pages that are cut where their messages become too large to be received."""

from __future__ import annotations

import random

from google.protobuf import wrappers_pb2

from treadle_registry.pages import read_token
from treadle_registry.servicing.page_bytes import MOST_BYTES, page_in_bytes


def of_size(size: int) -> wrappers_pb2.BytesValue:
    return wrappers_pb2.BytesValue(value=bytes(size))


def test_every_item_comes_once_in_messages_of_bounded_size(rng: random.Random):
    largest = [MOST_BYTES // 3, MOST_BYTES // 40, 2 * MOST_BYTES]
    sizes = [rng.randrange(rng.choice(largest)) for _ in range(300)]
    rows = list(enumerate(sizes))
    got: list[int] = []
    pages = alone = 0
    while True:
        after = len(got)
        page = rows[after : after + 100]
        token = "more" if after + 100 < len(rows) else ""
        items, following = page_in_bytes(
            page, token, "sizes", lambda row: row[0], lambda row: of_size(row[1])
        )
        pages += 1
        assert items
        assert len(items) == 1 or sum(item.ByteSize() for item in items) <= MOST_BYTES
        alone += len(items) == 1
        got += [len(item.value) for item in items]
        if not following:
            break
        if following != "more":
            assert read_token(following, "sizes", 0) == len(got) - 1
    assert got == sizes
    print(f"300 items in {pages} pages, {alone} of one item")
    assert pages > 20
    assert alone > 0


def test_a_page_that_fits_is_as_it_was():
    items, token = page_in_bytes([1, 2, 3], "t", "sizes", lambda row: row, of_size)
    assert ([len(item.value) for item in items], token) == ([1, 2, 3], "t")
    assert page_in_bytes([], "t", "sizes", lambda row: row, of_size) == ([], "t")
