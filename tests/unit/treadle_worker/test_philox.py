"""Philox against the known answers that Random123 publishes (kat_vectors), and its uniforms."""

import numpy as np
import pytest

from treadle_worker.philox import philox4x32, uniforms

KNOWN = [
    ("00000000 " * 4, "00000000 " * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff " * 4, "ffffffff " * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> np.ndarray:
    return np.array([int(word, 16) for word in text.split()], np.uint64)[:, None]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    assert np.array_equal(philox4x32(words(counter), words(key)), words(answer))


def test_known_answers_in_one_batch():
    counter, key, answer = (np.concatenate([words(row[i]) for row in KNOWN], axis=1) for i in range(3))
    assert np.array_equal(philox4x32(counter, key), answer)


def test_uniforms_depend_on_each_bit_of_seed_and_position():
    seeds = np.array([0, 1, 1 << 32, 1 << 63, 0, 0, 0], np.uint64)
    positions = np.array([0, 0, 0, 0, 1, 1 << 31, 1 << 40], np.uint64)
    u = uniforms(seeds, positions)
    assert len(set(u.tolist())) == len(u)
    assert all(uniforms(seeds[i : i + 1], positions[i : i + 1])[0] == u[i] for i in range(len(u)))


def test_uniforms_are_uniform():
    u = uniforms(np.full(100_000, 7, np.uint64), np.arange(100_000, dtype=np.uint64))
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.histogram(u, bins=100, range=(0, 1))[0]
    chi_square = ((counts - 1000) ** 2 / 1000).sum()
    print(f"chi-square {chi_square:.1f} at 99 degrees of freedom")
    assert chi_square < 149  # p = 0.001; the draws are fixed
