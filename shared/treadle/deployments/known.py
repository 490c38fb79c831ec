"""Aliases and deployments as the registry's watch has told them so far."""

from __future__ import annotations

from treadle.deployments.deployment import Deployment


class KnownModels:
    """Changed by the watch alone; whoever reads it sees a state that the registry was in."""

    def __init__(self) -> None:
        self.aliases: dict[str, str] = {}
        """Names to the digests of the artifacts that they mean."""
        self.deployments: dict[str, Deployment] = {}
        """By alias."""

    def set_alias(self, name: str, artifact_digest: str) -> None:
        """The alias is new, or means something else now."""
        self.aliases[name] = artifact_digest

    def delete_alias(self, name: str) -> None:
        """The alias is gone."""
        self.aliases.pop(name, None)

    def set_deployment(self, deployment: Deployment) -> None:
        """The deployment is new, or has changed."""
        self.deployments[deployment.alias] = deployment

    def delete_deployment(self, alias: str) -> None:
        """The deployment is gone; the alias may stay."""
        self.deployments.pop(alias, None)
