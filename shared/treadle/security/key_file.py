"""The file of hashed keys: read, read again when it changed, written aside and renamed."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from types import MappingProxyType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from treadle.errors import AlreadyExists, FailedPrecondition, NotFound
from treadle.security.keys import KEY_ID, KeyRecord, authenticate
from treadle.security.principal import Principal, Role

logger = logging.getLogger(__name__)

_Tenant = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]{1,64}$")]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")

    id: Annotated[str, StringConstraints(pattern=f"^{KEY_ID.pattern}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    roles: frozenset[Role] = Field(min_length=1)
    tenants: frozenset[_Tenant] | None = None
    created_at: datetime | None = None
    expires_at: datetime | None = None


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: list[_Entry]


class KeyFile:
    """Keys by id, as the file had them when it was last read."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._records: Mapping[str, KeyRecord] = MappingProxyType({})
        self._seen: tuple[int, int, int] | None = None

    @classmethod
    def read(cls, path: Path) -> KeyFile:
        """Reads the file; raises FailedPrecondition (KEYS_UNREADABLE) when it cannot be used."""
        keys = cls(path)
        keys._read()
        return keys

    @property
    def records(self) -> Mapping[str, KeyRecord]:
        """The keys by id."""
        return self._records

    def authenticate(self, authorization: str | None) -> Principal:
        """See `treadle.security.keys.authenticate`."""
        return authenticate(self._records, authorization)

    def reload_if_changed(self) -> bool:
        """Reads a file that changed; one that cannot be used leaves the keys as they are."""
        try:
            if _identity(self.path) == self._seen:
                return False
            self._read()
        except (OSError, FailedPrecondition) as error:
            logger.error("the keys are kept as they were: %s", error, extra={"path": str(self.path)})
            return False
        logger.info("keys read again", extra={"path": str(self.path), "keys": len(self._records)})
        return True

    def _read(self) -> None:
        try:
            self._seen = _identity(self.path)
            content = _Content.model_validate_json(self.path.read_bytes())
        except OSError as error:
            raise FailedPrecondition(
                f"the keys in {self.path} cannot be read: {error.strerror}", reason="KEYS_UNREADABLE"
            ) from error
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise FailedPrecondition(
                f"{self.path} is no file of keys: {where}: {first['msg']}; `treadle keys create` writes one",
                reason="KEYS_UNREADABLE",
            ) from error
        records = {entry.id: _record(entry) for entry in content.keys}
        if len(records) != len(content.keys):
            raise FailedPrecondition(f"{self.path} has two keys of one id", reason="KEYS_UNREADABLE")
        self._records = MappingProxyType(records)


def add_key(path: Path, record: KeyRecord) -> None:
    """Adds a key to the file, which is made when it is not there; raises AlreadyExists."""
    records = dict(KeyFile.read(path).records) if path.exists() else {}
    if record.key_id in records:
        raise AlreadyExists(
            f"{path} has a key {record.key_id!r}; take another id, or revoke it", reason="KEY_EXISTS"
        )
    _write(path, records | {record.key_id: record})


def revoke_key(path: Path, key_id: str) -> None:
    """Takes a key out of the file; raises NotFound."""
    records = dict(KeyFile.read(path).records)
    if records.pop(key_id, None) is None:
        raise NotFound(f"{path} has no key {key_id!r}", reason="KEY_NOT_FOUND")
    _write(path, records)


def _write(path: Path, records: Mapping[str, KeyRecord]) -> None:
    content = {"keys": [_entry(record) for record in records.values()]}
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "w") as file:
        json.dump(content, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.rename(path)


def _entry(record: KeyRecord) -> dict[str, object]:
    entry: dict[str, object] = {
        "id": record.key_id,
        "sha256": record.sha256,
        "roles": sorted(record.roles),
        "tenants": None if record.tenants is None else sorted(record.tenants),
        "created_at": record.created_at and record.created_at.isoformat(timespec="seconds"),
        "expires_at": record.expires_at and record.expires_at.isoformat(timespec="seconds"),
    }
    return {name: value for name, value in entry.items() if value is not None}


def _record(entry: _Entry) -> KeyRecord:
    if entry.expires_at is not None and entry.expires_at.tzinfo is None:
        raise FailedPrecondition(
            f"key {entry.id!r}: expires_at has no time zone; end it with Z", reason="KEYS_UNREADABLE"
        )
    return KeyRecord(entry.id, entry.sha256, entry.roles, entry.tenants, entry.created_at, entry.expires_at)


def _identity(path: Path) -> tuple[int, int, int]:
    facts = path.stat()
    return facts.st_ino, facts.st_mtime_ns, facts.st_size
