"""Bearer keys: their text, what is kept of them, and how a shown key is checked.

A key is `trd_<id>_<secret>`; the secret has 256 random bits. Only its SHA-256 is kept: for a secret with
that much entropy a slow password hash would add nothing but time. The id finds the record, so that one
comparison, in constant time, decides.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from treadle.errors import Unauthenticated
from treadle.security.principal import Principal, Role

_KEY = re.compile(r"trd_([a-z0-9-]{1,32})_([0-9a-f]{64})")
KEY_ID = re.compile(r"[a-z0-9-]{1,32}")
_SCHEME = re.compile(r"bearer +(\S+) *", re.IGNORECASE)
_WAY_OUT = 'send the metadata "authorization: Bearer trd_…"; `treadle keys create` makes a key'
_NO_HASH = "0" * 64


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What is kept of a key."""

    key_id: str
    sha256: str
    """Of the secret's text, in hexadecimal."""
    roles: frozenset[Role]
    tenants: frozenset[str] | None = None
    """None: all."""
    created_at: datetime | None = None
    expires_at: datetime | None = None


def new_key(
    key_id: str,
    roles: Iterable[Role],
    *,
    tenants: Iterable[str] | None = None,
    expires_at: datetime | None = None,
) -> tuple[str, KeyRecord]:
    """A new key's text, which is nowhere else, and its record."""
    secret = secrets.token_hex(32)
    record = KeyRecord(
        key_id=key_id,
        sha256=_hash(secret),
        roles=frozenset(roles),
        tenants=None if tenants is None else frozenset(tenants),
        created_at=datetime.now(UTC),
        expires_at=expires_at,
    )
    return f"trd_{key_id}_{secret}", record


def authenticate(
    records: Mapping[str, KeyRecord], authorization: str | None, now: datetime | None = None
) -> Principal:
    """Whose key the `authorization` header shows.

    Raises Unauthenticated: KEY_MISSING, KEY_INVALID or KEY_EXPIRED. No error repeats the key.
    """
    if not authorization:
        raise Unauthenticated(f"this service asks for a key: {_WAY_OUT}", reason="KEY_MISSING")
    scheme = _SCHEME.fullmatch(authorization)
    shown = _KEY.fullmatch(scheme[1]) if scheme else None
    record = records.get(shown[1]) if shown else None
    secret = shown[2] if shown else ""
    same = hmac.compare_digest(_hash(secret), record.sha256 if record else _NO_HASH)
    if record is None or not same:
        raise Unauthenticated(f"the key is not known here: {_WAY_OUT}", reason="KEY_INVALID")
    if record.expires_at is not None and record.expires_at <= (now or datetime.now(UTC)):
        raise Unauthenticated(
            f"key {record.key_id!r} expired at {record.expires_at.isoformat()}; ask for a new one",
            reason="KEY_EXPIRED",
        )
    return Principal(record.key_id, record.roles, record.tenants)


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
