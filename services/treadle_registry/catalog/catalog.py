"""All tables of one database."""

from __future__ import annotations

from pathlib import Path

from treadle_registry.catalog.aliases import AliasTable
from treadle_registry.catalog.artifacts import ArtifactTable
from treadle_registry.catalog.database import Database
from treadle_registry.catalog.deployments import DeploymentTable
from treadle_registry.catalog.leases import LeaseTable
from treadle_registry.catalog.operations import OperationTable


class Catalog:
    """Opened by whoever is the registry of a store; see `database`."""

    def __init__(self, folder: Path) -> None:
        """Raises FailedPrecondition when another registry has the database, or it is of a newer release."""
        self.database = Database(folder)
        self.artifacts = ArtifactTable(self.database)
        self.aliases = AliasTable(self.database)
        self.operations = OperationTable(self.database)
        self.deployments = DeploymentTable(self.database)
        self.leases = LeaseTable(self.database)

    def close(self) -> None:
        """Closes the database and lets another registry have it."""
        self.database.close()
