"""What a deployment serves and an alias means, as workers come, get ready and die."""

from __future__ import annotations

import pytest
from rollout_parts import BFLOAT16, INT8, RolloutParts, digest_of

from treadle.errors import Aborted, FailedPrecondition, InvalidArgument, NotFound, ResourceExhausted
from treadle_registry.rollout.deployment import Deployment, Target
from treadle_registry.rollout.lease import Configuration, ServingState

A, B, C = map(digest_of, range(3))
LOADING, READY, DRAINING, FAILED = ServingState


def test_a_new_alias_comes_with_the_first_worker_that_is_ready(parts: RolloutParts):
    parts.deploy("prod", A)
    assert (parts.means("prod"), parts.serving("prod")) == ("", [])
    lease = parts.lease(A, "prod", LOADING)
    assert (parts.means("prod"), parts.serving("prod")) == ("", [])
    parts.becomes(lease, READY)
    assert (parts.means("prod"), parts.serving("prod")) == (A, [A])
    assert parts.deploying.get_deployment("prod").deployment.settled


def test_what_was_served_goes_on_until_the_new_one_is_ready_and_a_death_takes_nothing_back(
    parts: RolloutParts,
):
    parts.deploy("prod", A)
    old = parts.lease(A, "prod")
    parts.deploy("prod", B)
    assert (parts.means("prod"), parts.serving("prod")) == (A, [A])
    new = parts.lease(B, "prod", LOADING)
    parts.becomes(new, FAILED)
    assert (parts.means("prod"), parts.serving("prod")) == (A, [A])
    parts.becomes(new, READY)
    assert (parts.means("prod"), parts.serving("prod")) == (B, [B])
    parts.leasing.release(new.lease_id)
    assert (parts.means("prod"), parts.serving("prod")) == (B, [B])
    parts.becomes(old, DRAINING)
    view = parts.deploying.get_deployment("prod")
    counts = {line.digest: (line.ready, line.draining) for line in view.status}
    assert counts == {A: (0, 1), B: (0, 0)}


def test_a_canary_joins_what_is_served_and_the_alias_stays(parts: RolloutParts):
    parts.deploy("prod", A)
    parts.lease(A, "prod")
    targets = (Target(A, weight=90), Target(B, weight=10))
    parts.deploying.set_deployment(Deployment("prod", targets))
    assert parts.serving("prod") == [A]
    parts.lease(B, "prod")
    view = parts.deploying.get_deployment("prod").deployment
    assert view.serving == targets
    assert parts.means("prod") == A


def test_of_two_new_targets_the_one_that_is_ready_joins_what_was_served(parts: RolloutParts):
    parts.deploy("prod", A)
    parts.lease(A, "prod")
    parts.deploy("prod", B, C)
    parts.lease(C, "prod")
    assert (parts.means("prod"), parts.serving("prod")) == (A, [A, C])
    parts.lease(B, "prod")
    assert (parts.means("prod"), parts.serving("prod")) == (B, [B, C])


def test_a_target_without_weight_is_waited_for_by_nobody_and_served_with_the_others(parts: RolloutParts):
    targets = (Target(A, weight=1), Target(B, weight=0))
    parts.deploying.set_deployment(Deployment("prod", targets))
    parts.lease(B, "prod")
    assert parts.serving("prod") == []
    lease = parts.lease(A, "prod")
    assert parts.deploying.get_deployment("prod").deployment.settled
    # It was not necessarily ready: with a weight it is waited for.
    targets = (Target(A, weight=1), Target(C, weight=0))
    parts.deploying.set_deployment(Deployment("prod", targets))
    assert parts.deploying.get_deployment("prod").deployment.settled
    parts.deploying.set_deployment(Deployment("prod", (Target(A, weight=1), Target(C, weight=1))))
    assert not parts.deploying.get_deployment("prod").deployment.settled
    assert lease.digest in parts.serving("prod")
    parts.lease(C, "prod")
    assert parts.deploying.get_deployment("prod").deployment.settled


def test_one_artifact_in_two_configurations(parts: RolloutParts):
    targets = (Target(A, Configuration(quantization="int8")), Target(B))
    parts.deploying.set_deployment(Deployment("prod", targets))
    with pytest.raises(FailedPrecondition) as caught:
        parts.lease(A, "prod", LOADING, configuration=BFLOAT16)
    assert caught.value.reason == "NOT_WANTED"
    parts.lease(A, "prod", configuration=INT8)
    assert parts.means("prod") == A
    overlapping = (Target(A), Target(A, INT8))
    with pytest.raises(InvalidArgument) as refused:
        parts.deploying.set_deployment(Deployment("other", overlapping))
    assert refused.value.fields[0].field == "deployment.targets"


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        (Deployment("a b", (Target(A),)), "deployment.alias"),
        (Deployment("a", ()), "deployment.targets"),
        (Deployment("a", (Target(A), Target(B), Target(C))), "deployment.targets"),
        (Deployment("a", (Target(A, weight=0), Target(B, weight=0))), "deployment.targets"),
        (Deployment("a", (Target("x"),)), "deployment.targets[0].artifact_digest"),
        (Deployment("a", (Target(A, weight=10**9),)), "deployment.targets[0].weight"),
        (
            Deployment("a", (Target(A, Configuration("int3")),)),
            "deployment.targets[0].configuration.dtype",
        ),
        (Deployment("a", (Target(A),), replicas=10**6), "deployment.replicas"),
        (Deployment("a", (Target(A),), warm_up_prompts=("x",) * 99), "deployment.warm_up_prompts"),
        (Deployment("a", (Target(A),), warm_up_prompts=("",)), "deployment.warm_up_prompts[0]"),
    ],
)
def test_what_cannot_be_wanted_is_refused_by_its_field(parts: RolloutParts, wanted, field):
    with pytest.raises(InvalidArgument) as caught:
        parts.deploying.set_deployment(wanted)
    assert caught.value.fields[0].field == field


def test_a_deployment_is_compared_and_swapped(parts: RolloutParts):
    parts.deploy("prod", A)
    first = parts.deploying.get_deployment("prod").deployment
    parts.deploy("prod", A)
    assert parts.deploying.get_deployment("prod").deployment == first
    parts.deploy("prod", B, etag=first.etag)
    for etag in (first.etag, "x"):
        with pytest.raises(Aborted) as caught:
            parts.deploy("prod", C, etag=etag)
        assert caught.value.reason == "ETAG_MISMATCH"
        with pytest.raises(Aborted):
            parts.deploying.delete_deployment("prod", etag)
    with pytest.raises(Aborted):
        parts.deploy("new", C, etag="x")
    with pytest.raises(NotFound):
        parts.deploy("prod", digest_of(99))
    # What is served changes no etag: who wants something else need not read it again for that.
    before = parts.deploying.get_deployment("prod").deployment.etag
    parts.lease(B, "prod")
    assert parts.deploying.get_deployment("prod").deployment.etag == before
    parts.deploying.delete_deployment("prod", before)
    assert parts.means("prod") == B
    with pytest.raises(NotFound) as gone:
        parts.deploying.get_deployment("prod")
    assert gone.value.reason == "DEPLOYMENT_NOT_FOUND"


def test_an_alias_that_workers_serve_moves_only_to_what_one_is_ready_for(parts: RolloutParts):
    parts.deploying.set_alias("free", A)
    assert parts.deploying.set_alias("free", B).digest == B
    parts.deploy("prod", A)
    parts.lease(A, "prod")
    refused = 0
    for make_ready in (False, True):
        lease = parts.lease(A, "by-settings", LOADING)
        if make_ready:
            parts.becomes(lease, READY)
        for name in ("prod", "by-settings"):
            with pytest.raises(FailedPrecondition) as caught:
                parts.deploying.set_alias(name, B)
            assert caught.value.reason == "NO_WORKER_READY"
            assert "PromoteAlias" in caught.value.message
            refused += 1
    assert parts.deploying.set_alias("by-settings", A).digest == A
    # Among the ready ones it moves at once, and what is wanted with it.
    targets = (Target(A, weight=9), Target(B, weight=1))
    parts.deploying.set_deployment(Deployment("prod", targets))
    parts.lease(B, "prod")
    assert parts.deploying.set_alias("prod", B).digest == B
    assert parts.serving("prod") == [B]
    assert refused == 4


def test_promotion_of_what_nobody_serves_is_at_once(parts: RolloutParts):
    assert parts.deploying.promote("new", A).alias.digest == A
    done = parts.deploying.promote("new", B)
    assert (done.alias.digest, done.deployment) == (B, None)
    with pytest.raises(Aborted):
        parts.deploying.promote("new", C, "stale")
    assert parts.deploying.promote("other", "new").alias.digest == B
    with pytest.raises(NotFound):
        parts.deploying.promote("new", digest_of(99))


def test_promotion_keeps_what_a_deployment_says_besides(parts: RolloutParts):
    wanted = Deployment("prod", (Target(A, INT8),), 3, ("hello",))
    parts.deploying.set_deployment(wanted)
    parts.lease(A, "prod", configuration=INT8)
    promotion = parts.deploying.promote("prod", B)
    assert promotion.alias.digest == A
    now = promotion.deployment.deployment
    assert (now.targets, now.replicas, now.warm_up_prompts) == ((Target(B, INT8),), 3, ("hello",))
    again = parts.deploying.promote("prod", B).deployment.deployment
    assert again == now


def test_promotion_makes_a_deployment_of_workers_that_serve_by_their_settings(parts: RolloutParts):
    parts.deploying.set_alias("prod", A)
    leases = [parts.lease(A, "prod", holder=f"w{number}") for number in range(3)]
    parts.becomes(leases[2], DRAINING)
    assert parts.deploying.promote("prod", A).deployment is None
    promotion = parts.deploying.promote("prod", B)
    assert promotion.alias.digest == A
    made = promotion.deployment.deployment
    assert (made.targets, made.replicas) == ((Target(B, BFLOAT16),), 2)
    assert made.serving == (Target(A, BFLOAT16),)
    parts.lease(B, "prod")
    assert (parts.means("prod"), parts.serving("prod")) == (B, [B])


def test_roll_back_goes_over_different_artifacts_and_calls_off_what_is_under_way(parts: RolloutParts):
    with pytest.raises(NotFound):
        parts.deploying.roll_back("prod")
    for digest in (A, B, A, C):
        parts.deploying.set_alias("prod", digest)
    assert parts.deploying.roll_back("prod").alias.digest == A
    assert parts.deploying.roll_back("prod").alias.digest == C
    assert parts.deploying.roll_back("prod", steps=2).alias.digest == B
    with pytest.raises(FailedPrecondition) as caught:
        parts.deploying.roll_back("prod", steps=3)
    assert caught.value.reason == "NOTHING_BEFORE"
    parts.lease(B, "prod")
    parts.deploying.promote("prod", C)
    assert parts.means("prod") == B
    back = parts.deploying.roll_back("prod")
    assert back.alias.digest == B
    assert back.deployment.deployment.settled
    parts.catalog.artifacts.remove([C])
    with pytest.raises(FailedPrecondition) as gone:
        parts.deploying.roll_back("prod")
    assert gone.value.reason == "ARTIFACT_GONE"


def test_a_deployed_alias_is_not_deleted(parts: RolloutParts):
    parts.deploy("prod", A)
    parts.lease(A, "prod")
    with pytest.raises(FailedPrecondition) as caught:
        parts.deploying.delete_alias("prod")
    assert caught.value.reason == "ALIAS_DEPLOYED"
    parts.deploying.delete_deployment("prod")
    parts.deploying.delete_alias("prod")
    assert parts.means("prod") == ""
    with pytest.raises(NotFound):
        parts.deploying.roll_back("prod")


def test_everything_is_there_after_a_restart(parts: RolloutParts):
    parts.deploy("prod", A, replicas=2)
    parts.lease(A, "prod")
    parts.lease(B, "by-settings", LOADING)
    parts.deploy("prod", B)
    before = parts.deploying.get_deployment("prod")
    parts.restart()
    assert parts.deploying.get_deployment("prod") == before
    assert (parts.means("prod"), parts.serving("prod")) == (A, [A])
    told = {(change.kind, change.name): change.value for change in parts.changes}
    assert told[("deployment", "prod")] == before
    assert told[("alias", "prod")].digest == A


def test_what_goes_wrong_while_writing_changes_nothing(parts: RolloutParts, monkeypatch):
    parts.deploy("prod", A)
    lease = parts.lease(A, "prod", LOADING)
    before, told = parts.deploying.get_deployment("prod"), len(parts.changes)

    def fail(alias: object) -> None:
        raise ResourceExhausted("full", reason="DISK_FULL")

    with monkeypatch.context() as broken:
        broken.setattr(parts.catalog.aliases, "write", fail)
        with pytest.raises(ResourceExhausted):
            parts.becomes(lease, READY)
    assert (parts.means("prod"), len(parts.changes)) == ("", told)
    assert parts.deploying.get_deployment("prod") == before
    parts.restart()
    assert parts.deploying.get_deployment("prod") == before
    parts.becomes(lease, READY)
    assert parts.means("prod") == A
