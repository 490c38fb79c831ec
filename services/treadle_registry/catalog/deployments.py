"""Deployments as they are kept, a row each."""

from __future__ import annotations

from treadle_registry.catalog.database import Database
from treadle_registry.rollout.deployment import Deployment


class DeploymentTable:
    """Deployments by their alias. Writes belong to the caller's transaction."""

    def __init__(self, db: Database) -> None:
        self._db = db

    def all(self) -> list[Deployment]:
        """Every deployment, by alias."""
        rows = self._db.execute("SELECT alias, etag, update_time, state FROM deployments ORDER BY alias")
        return [Deployment.from_json(*row) for row in rows]

    def write(self, deployment: Deployment) -> None:
        """Keeps a deployment in place of the one before."""
        self._db.execute(
            "INSERT OR REPLACE INTO deployments (alias, etag, update_time, state) VALUES (?, ?, ?, ?)",
            (deployment.alias, deployment.etag, deployment.update_time, deployment.to_json()),
        )

    def delete(self, alias: str) -> None:
        """Forgets one."""
        self._db.execute("DELETE FROM deployments WHERE alias = ?", (alias,))
