"""Waits until what is wanted is served, and shows how far it is."""

from __future__ import annotations

import asyncio
import contextlib

from treadle.cli.console import message_console
from treadle.cli.report import Report
from treadle.client import Deployment, DeploymentTarget, RegistryClient
from treadle.errors import DeadlineExceeded, FailedPrecondition, NotFound


async def wait_until_settled(client: RegistryClient, wanted: Deployment, timeout_s: float) -> None:
    """Returns once workers serve what is wanted.

    Raises FailedPrecondition (ROLLOUT_FAILED) when every worker that tried a target failed, and
    (ROLLOUT_REPLACED) when somebody wants something else, NotFound when the deployment is deleted, and
    DeadlineExceeded; the rollout goes on in the registry.
    """
    report = Report(message_console())
    last, there = wanted, False
    with report.live():
        try:
            async with asyncio.timeout(timeout_s):
                async with contextlib.aclosing(client.watch_models()) as changes:
                    async for change in changes:
                        there = there and not change.reset
                        if change.deleted_deployment == wanted.alias or (change.complete and not there):
                            raise NotFound(f"the deployment of {wanted.alias!r} was deleted meanwhile")
                        if change.deployment is None or change.deployment.alias != wanted.alias:
                            continue
                        last, there = change.deployment, True
                        report.working(wanted.alias, "done" if last.settled else _progress(last), 0, 0)
                        _check(last, wanted)
                        if last.settled:
                            return
        except TimeoutError:
            raise DeadlineExceeded(
                f"not every worker is ready within {timeout_s:g} s ({_progress(last)}); the rollout goes on: "
                "`treadle models deployments` shows how far it is"
            ) from None


def _check(now: Deployment, wanted: Deployment) -> None:
    if now.targets != wanted.targets:
        raise FailedPrecondition(
            f"another model was deployed under {now.alias!r} meanwhile", reason="ROLLOUT_REPLACED"
        )
    for target in now.targets:
        loading, ready, failed, error = _workers(now, target)
        if failed and not ready and not loading:
            raise FailedPrecondition(
                f"{target.artifact_digest[:19]} could not be loaded: {error or 'the worker says no more'}; "
                f"what was served before goes on (treadle models rollback {now.alias})",
                reason="ROLLOUT_FAILED",
            )


def _progress(deployment: Deployment) -> str:
    lines = []
    for target in deployment.targets:
        loading, ready, failed, _ = _workers(deployment, target)
        counts = ((loading, "loading"), (ready, "ready"), (failed, "failed"))
        workers = ", ".join(f"{count} {state}" for count, state in counts if count) or "waiting for a worker"
        lines.append(f"{target.artifact_digest[:19]}: {workers}")
    return "; ".join(lines)


def _workers(deployment: Deployment, target: DeploymentTarget) -> tuple[int, int, int, str]:
    """Of a target: workers that load it, have it ready, and failed, and why one of those did."""
    own = [status for status in deployment.status if status.artifact_digest == target.artifact_digest]
    asked = target.configuration
    own = [
        status
        for status in own
        if asked.dtype in ("", status.configuration.dtype)
        and asked.quantization in ("", status.configuration.quantization)
        and asked.cache_dtype in ("", status.configuration.cache_dtype or status.configuration.dtype)
    ]
    return (
        sum(status.loading_workers for status in own),
        sum(status.ready_workers for status in own),
        sum(status.failed_workers for status in own),
        next((status.error for status in own if status.error), ""),
    )
