"""Leases: how long they last, who gets one, what a restart leaves of them."""

from __future__ import annotations

import math

import pytest
from rollout_parts import BFLOAT16, INT8, RolloutParts, digest_of

from treadle.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    TreadleError,
)
from treadle_registry.rollout import leasing
from treadle_registry.rollout.lease import Serving, ServingState
from treadle_registry.rollout.leasing import LeaseRequest

A, B, C = map(digest_of, range(3))
LOADING, READY, DRAINING, FAILED = ServingState


def reason_of(call, *args, **kwargs) -> str:
    with pytest.raises(TreadleError) as caught:
        call(*args, **kwargs)
    return caught.value.reason


def test_a_lease_lasts_as_long_as_it_was_asked_for_and_renewing_begins_anew(parts: RolloutParts):
    lease = parts.leasing.acquire(LeaseRequest(A, "job", time_to_live_s=10))
    parts.now += 9
    assert parts.leasing.renew(lease.lease_id, None, None).deadline == parts.now + 10
    parts.now += 9
    assert [held.lease_id for held in parts.leasing.page(0, 10, "")] == [lease.lease_id]
    assert parts.leasing.renew(lease.lease_id, 2, None).time_to_live_s == 2
    parts.now += 2
    assert reason_of(parts.leasing.renew, lease.lease_id, None, None) == "LEASE_NOT_FOUND"
    assert reason_of(parts.leasing.release, lease.lease_id) == "LEASE_NOT_FOUND"
    assert parts.leasing.page(0, 10, A) == []
    assert parts.leasing.acquire(LeaseRequest(A, "job")).time_to_live_s == 60


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"digest": "x"}, "artifact_digest"),
        ({"holder": ""}, "holder"),
        ({"holder": "x" * 201}, "holder"),
        ({"holder": "a\nb"}, "holder"),
        ({"request_id": "x" * 129}, "request_id"),
        ({"time_to_live_s": 0.5}, "time_to_live"),
        ({"time_to_live_s": 3601}, "time_to_live"),
        ({"time_to_live_s": -1.0}, "time_to_live"),
        ({"time_to_live_s": math.nan}, "time_to_live"),
        ({"serving": Serving(BFLOAT16, READY, "a b")}, "serving.alias"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_by_its_field(parts: RolloutParts, change, field):
    with pytest.raises(InvalidArgument) as caught:
        parts.leasing.acquire(LeaseRequest(**{"digest": A, "holder": "w"} | change))
    assert caught.value.fields[0].field == field


def test_one_request_id_is_one_lease_while_it_lives(parts: RolloutParts):
    asked = LeaseRequest(A, "w", "same", serving=Serving(BFLOAT16, LOADING, "prod"))
    first = parts.leasing.acquire(asked)
    parts.becomes(first, READY)
    assert parts.leasing.acquire(asked).lease_id == first.lease_id
    for other in (LeaseRequest(B, "w", "same"), LeaseRequest(A, "v", "same"), LeaseRequest(A, "w", "same")):
        with pytest.raises(AlreadyExists):
            parts.leasing.acquire(other)
    parts.restart()
    assert parts.leasing.acquire(asked).lease_id == first.lease_id
    parts.now += 60
    assert parts.leasing.acquire(asked).lease_id != first.lease_id
    assert reason_of(parts.leasing.acquire, LeaseRequest(digest_of(99), "w")) == "MODEL_NOT_FOUND"


def test_no_more_workers_than_wanted_get_a_lease(parts: RolloutParts):
    parts.deploy("prod", A, B, replicas=2)
    leases = [parts.lease(A, "prod", state) for state in (LOADING, FAILED)]
    with pytest.raises(ResourceExhausted) as caught:
        parts.lease(A, "prod", LOADING)
    assert caught.value.reason == "REPLICAS_TAKEN"
    assert caught.value.retry_after_s
    parts.lease(B, "prod")
    parts.lease(A, "elsewhere")
    parts.lease(A, "")
    assert reason_of(parts.lease, C, "prod") == "NOT_WANTED"
    # Who drains takes no place; but it has none either when it would stay after all.
    parts.becomes(leases[0], DRAINING)
    parts.lease(A, "prod", LOADING)
    assert reason_of(parts.becomes, leases[0], READY) == "REPLICAS_TAKEN"
    parts.leasing.release(leases[1].lease_id)
    parts.becomes(leases[0], READY)
    # What is not wanted any more is renewed, as long as it runs, and not given again.
    parts.deploy("prod", C)
    parts.lease(C, "prod")
    parts.becomes(leases[0], READY)
    assert reason_of(parts.lease, A, "prod") == "NOT_WANTED"
    # Whose lease lapsed while it finishes what runs can still hold it.
    draining = parts.lease(A, "prod", DRAINING)
    assert reason_of(parts.becomes, draining, READY) == "NOT_WANTED"


def test_a_lapsed_lease_gives_its_place_back_at_once(parts: RolloutParts):
    parts.deploy("prod", A)
    parts.lease(A, "prod", LOADING, time_to_live_s=5)
    assert reason_of(parts.lease, A, "prod") == "REPLICAS_TAKEN"
    parts.now += 5
    parts.lease(A, "prod")
    assert parts.means("prod") == A


def test_a_renewal_changes_only_what_the_worker_does(parts: RolloutParts):
    lease = parts.lease(A, "prod", LOADING)
    for serving in (Serving(BFLOAT16, READY, "other"), Serving(INT8, READY, "prod")):
        with pytest.raises(InvalidArgument):
            parts.leasing.renew(lease.lease_id, None, serving)
    plain = parts.leasing.acquire(LeaseRequest(A, "job"))
    with pytest.raises(InvalidArgument):
        parts.leasing.renew(plain.lease_id, None, Serving(BFLOAT16, READY, "prod"))


def test_after_a_restart_every_lease_lives_for_its_own_time(parts: RolloutParts):
    short = parts.leasing.acquire(LeaseRequest(A, "short", time_to_live_s=10))
    long = parts.lease(B, "prod", time_to_live_s=100)
    numbers = [short.number, long.number]
    parts.now += 9
    parts.restart()
    parts.now += 9
    held = parts.leasing.page(0, 10, "")
    assert [lease.lease_id for lease in held] == [short.lease_id, long.lease_id]
    assert [lease.number for lease in held] == numbers
    assert held[1].serving == long.serving
    parts.now += 1
    assert [lease.holder for lease in parts.leasing.page(0, 10, "")] == ["worker"]
    later = parts.leasing.acquire(LeaseRequest(A, "later"))
    assert later.number > long.number
    parts.now += 100
    parts.leasing.lapse()
    parts.restart()
    assert parts.leasing.page(0, 10, "") == []
    assert parts.leasing.acquire(LeaseRequest(A, "last")).number > later.number


def test_a_renewal_without_news_is_not_written(parts: RolloutParts):
    leases = [parts.lease(A, "", holder=f"w{number}") for number in range(20)]
    written = parts.catalog.database.db.total_changes
    for lease in leases * 5:
        parts.becomes(lease, READY)
    assert parts.catalog.database.db.total_changes == written
    print(f"{5 * len(leases)} renewals, {parts.catalog.database.db.total_changes - written} rows written")


def test_their_number_is_bounded(parts: RolloutParts, monkeypatch):
    monkeypatch.setattr(leasing, "MAX_LEASES", 5)
    for number in range(5):
        parts.leasing.acquire(LeaseRequest(A, f"w{number}", time_to_live_s=10))
    assert reason_of(parts.leasing.acquire, LeaseRequest(A, "w")) == "TOO_MANY_LEASES"
    parts.now += 10
    parts.leasing.acquire(LeaseRequest(A, "w"))


def test_what_is_held_says_why(parts: RolloutParts):
    parts.deploying.set_alias("prod", A)
    parts.deploy("next", B)
    parts.leasing.acquire(LeaseRequest(A, "job-7"))
    held = parts.rollouts.held()
    assert held == {A: ["aliased as prod", "leased by job-7"], B: ["deployed under next"]}
    with pytest.raises(NotFound):
        parts.leasing.release("nobody")
    with pytest.raises(FailedPrecondition):
        parts.lease(C, "next")
