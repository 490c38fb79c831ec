"""One row's tokens in falling order of their weight, as far as a draw needs them, without sorting the row.

The order is: the higher logit first, and the lower token id among equals. The tokens are counted and weighed
by buckets of logits; where a question falls into a bucket, that bucket alone is sorted. So the cost is a few
passes over the row, whatever its shape, and a sort of the few hundred tokens of a bucket (of all tokens at
worst, for a row made for it).
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.intp]

NUM_BUCKETS = 1024
_LARGEST = float(np.finfo(np.float32).max)
_SMALLEST = 1e-30
"""What lies nearer together is one bucket."""
REACH = 64.0
"""Buckets divide what lies so many temperatures below the best logit; the last one has the rest, too, whose
weight (e^-64 of the best token's each) is lost beside the others' in float64."""


class Place(NamedTuple):
    """A place in the order."""

    bucket: int
    offset: int
    """In the sorted bucket."""


class _Bucket(NamedTuple):
    indices: IntArray
    logits: Float32Array
    cumulative: Float64Array
    """The weight of the order up to and with each token."""


class Scratch:
    """Room for one row's numbers, used again for the next: fresh memory costs more than the arithmetic."""

    def __init__(self, vocab_size: int) -> None:
        self.depth = np.empty(vocab_size, np.float32)
        self.weight = np.empty(vocab_size, np.float64)
        self.bucket_of = np.empty(vocab_size, np.intp)


class FallingOrder:
    """The order of a row of logits [V] with at least one above -inf.

    A token weighs exp((logit - best logit) / temperature). One order at a time may use a scratch.
    """

    def __init__(
        self, logits_V: Float32Array, temperature: float, scratch: Scratch, *, num_best: int = 0
    ) -> None:
        """With `num_best` only so many tokens are wanted: these and those near the last one are weighed."""
        best, reach = logits_V.max(), np.float32(min(REACH * temperature, _LARGEST))
        with np.errstate(over="ignore"):
            depth = np.subtract(best, logits_V, out=scratch.depth)
        lowest = depth.max()
        # Every operation here keeps the order, if not the distances: equal logits share a bucket.
        divided = min(reach, lowest)
        np.minimum(depth, divided, out=depth)
        np.multiply(depth, np.float32((NUM_BUCKETS - 0.5) / divided if divided > _SMALLEST else 0), out=depth)
        np.copyto(scratch.bucket_of, depth, casting="unsafe")
        self._has_rest = bool(lowest > reach)
        self._logits, self._bucket_of, weight = logits_V, scratch.bucket_of, scratch.weight
        self._token_ids: IntArray | None = None
        self._count_up_to: IntArray | None = None
        self._sorted: dict[int, _Bucket] = {}
        if num_best and (bucket := self.at_count(num_best).bucket) < NUM_BUCKETS - 1:
            self._token_ids = np.flatnonzero(self._bucket_of <= bucket)
            self._logits, self._bucket_of = logits_V[self._token_ids], self._bucket_of[self._token_ids]
            weight = weight[: len(self._token_ids)]
        self._weight = np.subtract(self._logits, np.float64(best), out=weight)
        np.divide(weight, temperature, out=weight)
        np.exp(weight, out=weight)
        mass = np.bincount(self._bucket_of, weights=weight, minlength=NUM_BUCKETS)
        self._mass_up_to = np.cumsum(mass)

    @property
    def total(self) -> float:
        """The weight of all tokens (with `num_best`: of those that are weighed)."""
        return float(self._mass_up_to[-1])

    def num_weighing(self, least: float) -> int:
        """How many tokens weigh so much or more; the best one weighs 1."""
        return int(np.count_nonzero(self._weight >= least))

    def at_mass(self, mass: float, *, inclusive: bool) -> Place | None:
        """The first place up to and with which the order weighs more than `mass` (inclusive: so much).

        None where there is none.
        """
        side: Literal["left", "right"] = "left" if inclusive else "right"
        bucket = int(np.searchsorted(self._mass_up_to, mass, side))
        if bucket == NUM_BUCKETS:
            return None
        cumulative = self._sort(bucket).cumulative
        # The bucket's weight was added up in another order: the place may be one too far.
        return Place(bucket, min(int(np.searchsorted(cumulative, mass, side)), len(cumulative) - 1))

    def at_count(self, count: int) -> Place:
        """The place of the `count`-th token."""
        if self._count_up_to is None:
            self._count_up_to = np.cumsum(np.bincount(self._bucket_of, minlength=NUM_BUCKETS))
        bucket = int(np.searchsorted(self._count_up_to, count))
        before = int(self._count_up_to[bucket - 1]) if bucket else 0
        return Place(bucket, count - before - 1)

    def last_equal(self, place: Place) -> Place:
        """The last place whose logit is that of the place."""
        logits = self._sort(place.bucket).logits
        same = np.searchsorted(-logits, -logits[place.offset], "right")
        return Place(place.bucket, int(same) - 1)

    def is_rest(self, place: Place) -> bool:
        """Whether the place lies where no weight is left: a limit there is none."""
        return self._has_rest and place.bucket == NUM_BUCKETS - 1

    def mass_up_to(self, place: Place) -> float:
        """The weight of the order up to and with the place."""
        return float(self._sort(place.bucket).cumulative[place.offset])

    def token(self, place: Place) -> int:
        """The token there."""
        index = int(self._sort(place.bucket).indices[place.offset])
        return index if self._token_ids is None else int(self._token_ids[index])

    def _sort(self, bucket: int) -> _Bucket:
        if (done := self._sorted.get(bucket)) is None:
            indices = np.flatnonzero(self._bucket_of == bucket)
            indices = indices[np.argsort(-self._logits[indices], kind="stable")]
            before = self._mass_up_to[bucket - 1] if bucket else 0.0
            cumulative = before + np.cumsum(self._weight[indices])
            done = self._sorted[bucket] = _Bucket(indices, self._logits[indices], cumulative)
        return done
