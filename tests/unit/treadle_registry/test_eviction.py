"""What goes when room is needed: the least recently used, nothing that is held, nothing for nothing."""

from __future__ import annotations

import random

from rollout_parts import digest_of

from treadle_registry.eviction import EvictionPlan, plan_eviction
from treadle_registry.store.blob_use import Share

A, B, C, D = map(digest_of, range(4))


def reasons(plan: EvictionPlan) -> dict[str, tuple[int, str]]:
    return {fate.digest: (fate.size, fate.reason if fate.kept else "goes") for fate in plan.fates}


def test_the_least_recently_used_goes_first_and_no_more_than_needed():
    shares = {digest: Share({f"blob of {digest}": 100}) for digest in (A, B, C, D)}
    uses = {A: 4.0, B: 3.0, C: 2.0, D: 1.0}
    plan = plan_eviction(shares, uses, {D: ["aliased as prod", "leased by w"]}, 250)
    assert [fate.digest for fate in plan.fates] == [D, C, B, A]
    assert plan.going == [C, B]
    assert (plan.bytes_before, plan.bytes_after) == (400, 200)
    assert reasons(plan) == {
        D: (100, "aliased as prod; leased by w"),
        C: (100, "goes"),
        B: (100, "goes"),
        A: (100, "there is room for it"),
    }
    assert plan_eviction(shares, uses, {}, 400).going == []


def test_a_file_that_is_kept_frees_nothing():
    shares = {
        A: Share({"weights": 100, "config": 1}),
        B: Share({"weights": 100, "other": 2}),
        C: Share({"c": 50}),
    }
    plan = plan_eviction(shares, {A: 1.0, B: 2.0, C: 3.0}, {B: ["aliased as prod"]}, 0)
    assert plan.going == [A, C]
    assert reasons(plan)[A] == (1, "goes")
    assert (plan.bytes_before, plan.bytes_after) == (153, 102)
    # Two that share everything go together, and the bytes are counted once.
    twins = {A: Share({"weights": 100}), B: Share({"weights": 100}), C: Share({"c": 50})}
    plan = plan_eviction(twins, {A: 1.0, B: 2.0, C: 3.0}, {}, 60)
    assert plan.going == [A, B]
    assert reasons(plan) == {
        A: (0, "goes"),
        B: (100, "goes"),
        C: (50, "there is room for it"),
    }
    # One of them held: deleting the other would be for nothing.
    plan = plan_eviction(twins, {A: 1.0, B: 2.0, C: 3.0}, {B: ["leased by w"]}, 60)
    assert plan.going == [C]
    assert reasons(plan)[A] == (0, "frees nothing: others have the same files")


def test_random_stores(rng: random.Random):
    gone = kept = spared = reached = 0
    for _ in range(400):
        blobs = {f"b{number}": rng.randrange(1, 100) for number in range(rng.randrange(1, 12))}
        digests = [digest_of(number) for number in range(rng.randrange(1, 9))]
        shares = {
            digest: Share(
                {blob: blobs[blob] for blob in rng.sample(sorted(blobs), rng.randint(1, len(blobs)))}
            )
            for digest in digests
        }
        uses = {digest: float(rng.randrange(4)) for digest in digests}
        held = {digest: ["held"] for digest in digests if rng.random() < 0.3}
        total = size_of(shares, digests)
        target = rng.randrange(total + 1)
        plan = plan_eviction(shares, uses, held, target)
        rest = [digest for digest in digests if digest not in plan.going]
        assert plan.bytes_before == total
        assert plan.bytes_after == size_of(shares, rest)
        assert not held.keys() & set(plan.going)
        assert sum(fate.size for fate in plan.fates if not fate.kept) == total - plan.bytes_after
        assert [fate.digest for fate in plan.fates] == sorted(digests, key=lambda one: (uses[one], one))
        if plan.bytes_after > target:
            assert size_of(shares, list(held)) == plan.bytes_after
        else:
            reached += 1
        for digest in plan.going:
            # Nobody goes in vain.
            assert size_of(shares, [*rest, digest]) > plan.bytes_after
        if plan.going:
            # Without the last of them it would not have been enough.
            assert size_of(shares, [*rest, plan.going[-1]]) > target
            newest = max((uses[digest], digest) for digest in plan.going)
            for digest in rest:
                if (uses[digest], digest) < newest and digest not in held:
                    assert size_of(shares, [one for one in rest if one != digest]) == plan.bytes_after
                    spared += 1
        gone, kept = gone + len(plan.going), kept + len(rest)
    print(f"{gone} went, {kept} stayed, {spared} of those for they free nothing; {reached} of 400 reached")
    assert min(gone, kept, spared, reached) > 0


def size_of(shares: dict[str, Share], digests: list[str]) -> int:
    """Bytes of the different files of some artifacts."""
    return sum({blob: size for digest in digests for blob, size in shares[digest].files.items()}.values())
