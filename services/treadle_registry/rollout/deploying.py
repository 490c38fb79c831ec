"""What aliases and deployments are to be: set, promoted, rolled back, deleted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from treadle.errors import Aborted, FailedPrecondition, NotFound, ResourceExhausted
from treadle_registry.catalog.aliases import Alias, check_etag
from treadle_registry.names import check_alias, check_digest, is_digest
from treadle_registry.rollout.deployment import Deployment, Target, ready_leases
from treadle_registry.rollout.lease import Configuration, Lease, serving_leases
from treadle_registry.rollout.rollouts import Rollouts
from treadle_registry.rollout.status import DeploymentView
from treadle_registry.rollout.step import Step
from treadle_registry.rollout.wanted import MAX_REPLICAS, check_wanted

MAX_DEPLOYMENTS = 1000
_LOOKED_BACK = 1000
"""Different artifacts of an alias's history that a roll back looks at."""


@dataclass(frozen=True, slots=True)
class Promotion:
    """An alias as it is now (None: it waits for a worker), and the deployment that rolls it out, if any."""

    alias: Alias | None
    deployment: DeploymentView | None


class Deploying:
    """Changes what is wanted; in the registry's thread alone."""

    def __init__(self, rollouts: Rollouts) -> None:
        self._rollouts = rollouts
        self._artifacts, self._aliases = rollouts.catalog.artifacts, rollouts.catalog.aliases

    def set_alias(self, name: str, digest: str, etag: str = "") -> Alias:
        """Creates or moves an alias; one that is there already stays as it is.

        Where workers serve the alias it moves only to what one of them is ready for, and with it what the
        deployment wants. Raises NotFound for an unknown artifact, Aborted when `etag` is given and is not
        the alias's, and FailedPrecondition (NO_WORKER_READY).
        """
        check_alias(name, "name")
        check_digest(digest, "artifact_digest")
        with self._rollouts.step() as step:
            self._artifacts.need(digest)
            current = step.alias(name)
            check_etag(current, name, etag)
            if current is not None and current.digest == digest:
                return current
            deployment, leases = step.deployment(name), step.leases_under(name)
            ready = [lease for lease in ready_leases(leases) if lease.digest == digest]
            if not ready and (deployment is not None or serving_leases(leases)):
                raise FailedPrecondition(
                    f"workers serve {name!r}, and none is ready for {digest}; PromoteAlias moves the alias "
                    f"as soon as one is (treadle models promote {name} {digest[:19]})",
                    reason="NO_WORKER_READY",
                )
            if deployment is None:
                return step.move(name, digest)
            step.want(replace(deployment, targets=(_ready_target(deployment, ready),)))
            return self._need_alias(step, name)

    def delete_alias(self, name: str, etag: str = "") -> None:
        """Forgets an alias, but not its history.

        Raises NotFound, Aborted and FailedPrecondition (ALIAS_DEPLOYED).
        """
        check_alias(name, "name")
        with self._rollouts.step() as step:
            check_etag(self._aliases.get(name), name, etag)
            if step.deployment(name) is not None:
                raise FailedPrecondition(
                    f"the alias {name!r} is deployed; delete its deployment first (treadle models undeploy "
                    f"{name})",
                    reason="ALIAS_DEPLOYED",
                )
            step.move(name, "")

    def set_deployment(self, wanted: Deployment) -> DeploymentView:
        """Says what is wanted under an alias; with an etag only if it is the deployment's still.

        Raises InvalidArgument, NotFound for an unknown artifact, Aborted (ETAG_MISMATCH) and
        ResourceExhausted (TOO_MANY_DEPLOYMENTS).
        """
        check_wanted(wanted)
        with self._rollouts.step() as step:
            current = step.deployment(wanted.alias)
            _check_deployment_etag(current, wanted)
            for target in wanted.targets:
                self._artifacts.need(target.digest)
            if current is None or not _same_wanted(current, wanted):
                self._want(step, replace(wanted, serving=self._served(step, wanted.alias)))
        return self._need_view(wanted.alias)

    def get_deployment(self, alias: str) -> DeploymentView:
        """A deployment and how far the workers are; raises NotFound (DEPLOYMENT_NOT_FOUND)."""
        check_alias(alias, "alias")
        with self._rollouts.step():
            pass
        return self._need_view(alias)

    def deployments(self, after: str, limit: int) -> list[DeploymentView]:
        """Deployments by alias, above `after`."""
        with self._rollouts.step():
            pass
        return self._rollouts.views(after, limit)

    def delete_deployment(self, alias: str, etag: str = "") -> None:
        """Forgets what is wanted; the alias stays. Raises NotFound and Aborted."""
        check_alias(alias, "alias")
        with self._rollouts.step() as step:
            current = step.deployment(alias)
            if current is None:
                raise _no_deployment(alias)
            _check_deployment_etag(current, replace(current, etag=etag))
            step.deployments[alias] = None

    def promote(self, name: str, model: str, etag: str = "") -> Promotion:
        """Makes an artifact what the alias means: once a worker is ready if workers serve it, else at once.

        `model` is an alias or digest. Raises NotFound and Aborted (ETAG_MISMATCH).
        """
        check_alias(name, "name")
        with self._rollouts.step() as step:
            digest = model if is_digest(model) else self._aliases.get(check_alias(model, "model")).digest
            self._artifacts.need(digest)
            check_etag(step.alias(name), name, etag)
            self._promote(step, name, digest)
        return self._promotion(name)

    def roll_back(self, name: str, etag: str = "", steps: int = 1) -> Promotion:
        """Promotes what the alias meant before, `steps` different artifacts back from what is wanted now.

        Raises NotFound, Aborted (ETAG_MISMATCH) and FailedPrecondition (NOTHING_BEFORE, ARTIFACT_GONE).
        """
        check_alias(name, "name")
        with self._rollouts.step() as step:
            deployment, current = step.deployment(name), step.alias(name)
            if current is None and deployment is None:
                raise NotFound(f"no alias {name!r}; list them with ListAliases", reason="MODEL_NOT_FOUND")
            check_etag(current, name, etag)
            now = deployment.targets[0].digest if deployment else self._need_alias(step, name).digest
            before = [digest for digest in self._meanings(name, current) if digest != now]
            if len(before) < steps:
                raise FailedPrecondition(
                    f"the history of {name!r} has {len(before)} artifacts besides what it means now; "
                    f"{steps} back there is none. PromoteAlias takes any artifact of the store",
                    reason="NOTHING_BEFORE",
                )
            digest = before[steps - 1]
            if not self._artifacts.has(digest):
                raise FailedPrecondition(
                    f"{name!r} meant {digest} before, which was deleted or evicted since; import it again, "
                    "or go back further",
                    reason="ARTIFACT_GONE",
                )
            self._promote(step, name, digest)
        return self._promotion(name)

    def _meanings(self, name: str, current: Alias | None) -> list[str]:
        """Different artifacts that the alias has meant, the last one first."""
        found = self._aliases.meanings(name, _LOOKED_BACK)
        first = [current.digest] if current else []
        return [*first, *(digest for digest in found if digest not in first)]

    def _promote(self, step: Step, name: str, digest: str) -> None:
        deployment, leases = step.deployment(name), serving_leases(step.leases_under(name))
        current = step.alias(name)
        if deployment is not None:
            target = Target(digest, deployment.targets[0].configuration)
            if deployment.targets != (target,):
                step.want(replace(deployment, targets=(target,)))
        elif current is not None and current.digest == digest:
            return
        elif leases:
            target = Target(digest, _commonest(leases))
            wanted = Deployment(
                name, (target,), min(len(leases), MAX_REPLICAS), serving=self._served(step, name)
            )
            self._want(step, wanted)
        else:
            step.move(name, digest)

    def _want(self, step: Step, wanted: Deployment) -> None:
        if (
            step.deployment(wanted.alias) is None
            and len(self._rollouts.views("", MAX_DEPLOYMENTS)) >= MAX_DEPLOYMENTS
        ):
            raise ResourceExhausted(
                f"there are {MAX_DEPLOYMENTS} deployments already; delete one", reason="TOO_MANY_DEPLOYMENTS"
            )
        step.want(wanted)

    def _served(self, step: Step, alias: str) -> tuple[Target, ...]:
        """What requests go to now: as the deployment has it, else what the alias means and workers have."""
        deployment, current = step.deployment(alias), step.alias(alias)
        if deployment is not None:
            return deployment.serving
        if current is None:
            return ()
        ready = [lease for lease in ready_leases(step.leases_under(alias)) if lease.digest == current.digest]
        configurations = dict.fromkeys(lease.serving.configuration for lease in ready if lease.serving)
        return tuple(Target(current.digest, configuration) for configuration in configurations)

    def _promotion(self, name: str) -> Promotion:
        return Promotion(self._rollouts.alias(name), self._rollouts.view(name))

    def _need_view(self, alias: str) -> DeploymentView:
        found = self._rollouts.view(alias)
        if found is None:
            raise _no_deployment(alias)
        return found

    def _need_alias(self, step: Step, name: str) -> Alias:
        alias = step.alias(name)
        assert alias is not None, "a worker is ready for what the alias is to mean"
        return alias


def _no_deployment(alias: str) -> NotFound:
    return NotFound(f"nothing is deployed under {alias!r}; SetDeployment does", reason="DEPLOYMENT_NOT_FOUND")


def _check_deployment_etag(current: Deployment | None, wanted: Deployment) -> None:
    if wanted.etag and (current is None or current.etag != wanted.etag):
        now = f"is {current.etag}" if current else "is gone with it"
        raise Aborted(
            f"the deployment of {wanted.alias!r} was changed meanwhile: its etag {now}; read it again and "
            "decide anew",
            reason="ETAG_MISMATCH",
        )


def _same_wanted(one: Deployment, another: Deployment) -> bool:
    return (one.targets, one.replicas, one.warm_up_prompts) == (
        another.targets,
        another.replicas,
        another.warm_up_prompts,
    )


def _ready_target(deployment: Deployment, ready: list[Lease]) -> Target:
    """The target of a ready worker, computed as the deployment has it if one of them does that."""
    as_before = Target(ready[0].digest, deployment.targets[0].configuration)
    if any(as_before.fits(lease) for lease in ready):
        return as_before
    assert ready[0].serving is not None
    return Target(ready[0].digest, ready[0].serving.configuration)


def _commonest(leases: list[Lease]) -> Configuration:
    """How most of the workers compute."""
    count = Counter(lease.serving.configuration for lease in leases if lease.serving)
    return count.most_common(1)[0][0]
