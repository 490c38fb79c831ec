"""What this worker is to serve, from what the registry wants and its settings name: plain functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from treadle.deployments import Deployment, KnownModels, ServingConfiguration

_DIGEST_PREFIX = "sha256:"


@dataclass(frozen=True, slots=True)
class Claim:
    """An artifact to serve, how, and for whom."""

    name: str
    """Alias or digest, as people call it."""
    artifact_digest: str
    configuration: ServingConfiguration = field(default_factory=ServingConfiguration)
    """As it is wanted: an empty field is the worker's settings' to fill."""
    required: bool = True
    """Named in the settings: served whoever else does. Otherwise only with a lease for a replica."""
    warm_up_prompts: tuple[str, ...] = field(default=(), compare=False)

    @property
    def alias(self) -> str:
        """Whose deployment it is; empty for a digest."""
        return "" if is_digest(self.name) else self.name


def is_digest(name: str) -> bool:
    """Whether a model's name is an artifact's digest, which never means anything else."""
    return name.startswith(_DIGEST_PREFIX)


def wanted(
    known: KnownModels | None, named: Sequence[str], resolved: Mapping[str, str], *, others: bool
) -> list[Claim]:
    """Everything that this worker may serve: what is named first, then what else is deployed.

    `known` is what the registry's watch says (None: nothing yet), `named` are the aliases and digests of the
    settings, `resolved` what aliases meant when the registry was asked for them, `others` whether deployments
    of other aliases are taken up. Of a deployment both is wanted, what is served and what is to be.
    """
    claims = [claim for name in named for claim in _of_name(known, name, resolved)]
    if known is not None and others:
        for alias in sorted(known.deployments.keys() - set(named)):
            claims += _of_deployment(known.deployments[alias], required=False)
    return list(dict.fromkeys(claims))


def _of_name(known: KnownModels | None, name: str, resolved: Mapping[str, str]) -> list[Claim]:
    if is_digest(name):
        return [Claim(name, name)]
    if known is None:
        return [Claim(name, resolved[name])] if name in resolved else []
    if name in known.deployments:
        return _of_deployment(known.deployments[name], required=True)
    return [Claim(name, known.aliases[name])] if name in known.aliases else []


def _of_deployment(deployment: Deployment, *, required: bool) -> list[Claim]:
    return [
        Claim(
            deployment.alias,
            target.artifact_digest,
            target.configuration,
            required,
            deployment.warm_up_prompts,
        )
        for target in deployment.concerned
    ]


def to_take_up(claims: Iterable[Claim], held: Collection[Claim], *, limit: int) -> list[Claim]:
    """Claims to ask leases for, of those that are not required: none once `limit` different models are held.

    `held` are those that are not required and held now, being given up included: each has its memory still.
    The last room is for another model of an alias that is held already, or no roll-out could begin; where
    there is room for one only, it is for any.
    """
    models = {(claim.artifact_digest, claim.configuration) for claim in held}
    aliases = {claim.name for claim in held}
    room = limit - len(models)

    def fits(claim: Claim) -> bool:
        needed = 1 if claim.name in aliases or limit == 1 else 2
        return (claim.artifact_digest, claim.configuration) in models or room >= needed

    return [claim for claim in claims if not claim.required and claim not in held and fits(claim)]
