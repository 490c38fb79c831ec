"""Where a name leads now: to one artifact, or by weight to one of a deployment's."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

from treadle.deployments import Deployment, KnownModels, Target


def routes(known: KnownModels | None, name: str, request_id: str) -> list[Target]:
    """What may answer a request for `name`, best first; none where the registry must be asked.

    Of a deployment that is what it serves, in an order that is drawn by weight from the request's id, so that
    the same id always finds the same one; each is there for when nobody has those before it ready. Last comes
    what is wanted and not served yet: where workers have let the old go and the news has not arrived here.
    """
    if known is None:
        return []
    deployment = known.deployments.get(name)
    if deployment is not None:
        return _of_deployment(deployment, request_id)
    digest = known.aliases.get(name)
    return [] if digest is None else [Target(digest)]


def _of_deployment(deployment: Deployment, request_id: str) -> list[Target]:
    serving = drawn(deployment.serving, request_id)
    there = {target.what for target in deployment.serving}
    return serving + [one for one in drawn(deployment.targets, request_id) if one.what not in there]


def drawn(targets: Sequence[Target], request_id: str) -> list[Target]:
    """The targets that get requests, in the order of the draw: each comes first with its share of the weight.

    Rendezvous hashing with weights: when a weight changes, no more ids change sides than must.
    """
    weights = {target: target.weight or (1 if len(targets) == 1 else 0) for target in targets}
    shown = [target for target in targets if weights[target]]
    return sorted(shown, key=lambda target: -math.log(_chance(target, request_id)) / weights[target])


def _chance(target: Target, request_id: str) -> float:
    """Over 0 to 1, evenly by id and target, whatever its weight."""
    configuration = target.configuration
    parts = (
        request_id,
        target.artifact_digest,
        configuration.dtype,
        configuration.quantization,
        configuration.cache_dtype,
    )
    number = int.from_bytes(hashlib.sha256("\0".join(parts).encode()).digest()[:8])
    return (number + 1) / (1 << 64)
