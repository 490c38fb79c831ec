"""Leases given, renewed, ended: by a worker's the registry knows what is ready."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace

from treadle.errors import AlreadyExists, FailedPrecondition, NotFound, ResourceExhausted, invalid_field
from treadle_registry.names import check_alias, check_digest
from treadle_registry.rollout.lease import Lease, Serving, ServingState
from treadle_registry.rollout.rollouts import Rollouts
from treadle_registry.rollout.step import Step
from treadle_registry.rollout.wanted import check_configuration

SHORTEST_S, LONGEST_S, DEFAULT_S = 1.0, 3600.0, 60.0
MAX_LEASES = 10_000
_MAX_HOLDER = 200
_MAX_REQUEST_ID = 128
_RETRY_AFTER_S = 5.0


@dataclass(frozen=True, slots=True)
class LeaseRequest:
    """What is asked for; `time_to_live_s` None is a minute, `serving` None is no worker's lease."""

    digest: str
    holder: str
    request_id: str = ""
    time_to_live_s: float | None = None
    serving: Serving | None = None


class Leasing:
    """Gives leases; in the registry's thread alone."""

    def __init__(self, rollouts: Rollouts, compute_digest: Callable[[str], str]) -> None:
        """`compute_digest` gives an artifact's; it may raise NotFound and DataLoss."""
        self._rollouts, self._compute_digest = rollouts, compute_digest
        self._artifacts = rollouts.catalog.artifacts

    def acquire(self, request: LeaseRequest) -> Lease:
        """A lease on an artifact; the same request_id gives the same one while it lives.

        Raises InvalidArgument, NotFound (MODEL_NOT_FOUND), AlreadyExists (REQUEST_ID_REUSED),
        FailedPrecondition (NOT_WANTED) and ResourceExhausted (REPLICAS_TAKEN, TOO_MANY_LEASES).
        """
        _check(request)
        rollouts = self._rollouts
        with rollouts.step() as step:
            known = rollouts.book.of_request(request.request_id)
            if known is not None and known.lease_id not in step.dropped:
                return _same(known, request)
            self._artifacts.need(request.digest)
            if len(rollouts.book) - len(step.dropped) >= MAX_LEASES:
                raise ResourceExhausted(
                    f"{MAX_LEASES} leases are held already",
                    reason="TOO_MANY_LEASES",
                    retry_after_s=_RETRY_AFTER_S,
                )
            lease = self._made(request)
            _admit(step, lease)
            step.leases[lease.lease_id] = lease
            step.settle(lease.alias)
        return lease

    def _made(self, request: LeaseRequest) -> Lease:
        lease_id = f"lease-{secrets.token_hex(16)}"
        time_to_live_s = _time_to_live(request.time_to_live_s, DEFAULT_S)
        return Lease(
            lease_id=lease_id,
            request_id=request.request_id or lease_id,
            digest=request.digest,
            compute_digest=self._compute_digest(request.digest),
            holder=request.holder,
            time_to_live_s=time_to_live_s,
            serving=request.serving,
            deadline=self._rollouts.clock() + time_to_live_s,
            number=self._rollouts.number(),
        )

    def renew(self, lease_id: str, time_to_live_s: float | None, serving: Serving | None) -> Lease:
        """Another whole time to live; None leaves what was said before.

        Raises NotFound (LEASE_NOT_FOUND) for one that has ended, InvalidArgument for another alias or
        configuration, and where draining ends what `acquire` raises.
        """
        with self._rollouts.step() as step:
            lease = self._live(step, lease_id)
            lasting_s = _time_to_live(time_to_live_s, lease.time_to_live_s)
            _check_same_work(lease, serving)
            renewed = replace(
                lease,
                time_to_live_s=lasting_s,
                serving=serving or lease.serving,
                deadline=self._rollouts.clock() + lasting_s,
            )
            if renewed == replace(lease, deadline=renewed.deadline):
                step.renewed[lease_id] = renewed
                return renewed
            if lease.state is ServingState.DRAINING:
                _admit(step, renewed)
            step.leases[lease_id] = renewed
            step.settle(renewed.alias)
        return renewed

    def release(self, lease_id: str) -> None:
        """Ends a lease; raises NotFound (LEASE_NOT_FOUND)."""
        with self._rollouts.step() as step:
            lease = self._live(step, lease_id)
            step.dropped[lease_id] = lease

    def lapse(self) -> None:
        """Ends what has not been renewed in time."""
        with self._rollouts.step():
            pass

    def page(self, after: int, limit: int, digest: str) -> list[Lease]:
        """Live leases by number, above `after`; of one artifact, or with an empty digest of all."""
        if digest:
            check_digest(digest, "artifact_digest")
        self.lapse()
        return self._rollouts.book.page(after, limit, digest)

    def _live(self, step: Step, lease_id: str) -> Lease:
        lease = self._rollouts.book.get(lease_id)
        if lease is None or lease_id in step.dropped:
            raise NotFound(
                f"there is no lease {lease_id[:64]!r} (any more); acquire another", reason="LEASE_NOT_FOUND"
            )
        return lease


def _check(request: LeaseRequest) -> None:
    check_digest(request.digest, "artifact_digest")
    if not request.holder or len(request.holder) > _MAX_HOLDER or not request.holder.isprintable():
        raise invalid_field("holder", f"must say who holds it, in 1 to {_MAX_HOLDER} printable characters")
    if len(request.request_id) > _MAX_REQUEST_ID:
        raise invalid_field("request_id", f"must have at most {_MAX_REQUEST_ID} characters")
    _time_to_live(request.time_to_live_s, DEFAULT_S)
    serving = request.serving
    if serving is not None:
        if serving.alias:
            check_alias(serving.alias, "serving.alias")
        check_configuration(serving.configuration, "serving.configuration")
        if not serving.configuration.dtype:
            raise invalid_field(
                "serving.configuration.dtype", "must be said: a worker knows what it computes in"
            )


def _time_to_live(asked_s: float | None, default_s: float) -> float:
    if asked_s is None:
        return default_s
    if not SHORTEST_S <= asked_s <= LONGEST_S:
        raise invalid_field(
            "time_to_live", f"must be {SHORTEST_S:g} to {LONGEST_S:g} seconds; got {asked_s:g}"
        )
    return asked_s


def _same(known: Lease, request: LeaseRequest) -> Lease:
    """The lease that the request was given before; raises AlreadyExists where it asked for another."""
    asked, given = request.serving, known.serving
    differs = (asked is None) != (given is None) or (
        asked is not None
        and given is not None
        and (asked.alias, asked.configuration) != (given.alias, given.configuration)
    )
    if differs or (known.digest, known.holder) != (request.digest, request.holder):
        raise AlreadyExists(
            f"the request_id {request.request_id!r} was given another lease; choose a new one",
            reason="REQUEST_ID_REUSED",
        )
    return known


def _check_same_work(lease: Lease, serving: Serving | None) -> None:
    if serving is None:
        return
    if lease.serving is None:
        raise invalid_field("serving", "this lease is no worker's; acquire one with `serving` for that")
    for field in ("alias", "configuration"):
        if getattr(serving, field) != getattr(lease.serving, field):
            raise invalid_field(
                f"serving.{field}", "must be as the lease was acquired with; acquire another for another"
            )


def _admit(step: Step, lease: Lease) -> None:
    """Raises unless the deployment under the lease's alias, where there is one, has a place for it.

    Who only finishes what runs needs none.
    """
    deployment = step.deployment(lease.alias) if lease.alias else None
    if deployment is None or lease.state is None or not lease.state.takes_a_place:
        return
    target = deployment.target_of(lease)
    if target is None:
        raise FailedPrecondition(
            f"the deployment of {lease.alias!r} neither wants nor serves {lease.digest} so computed; "
            "GetDeployment says what it wants",
            reason="NOT_WANTED",
        )
    others = [
        other
        for other in step.leases_under(lease.alias)
        if other.lease_id != lease.lease_id
        and other.state is not None
        and other.state.takes_a_place
        and target.fits(other)
    ]
    if len(others) >= deployment.replicas:
        raise ResourceExhausted(
            f"{len(others)} workers have {lease.digest} for {lease.alias!r} already, and "
            f"{deployment.replicas} are wanted",
            reason="REPLICAS_TAKEN",
            retry_after_s=_RETRY_AFTER_S,
        )
