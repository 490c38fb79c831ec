"""Who calls: the roles and tenants that a key was given."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from treadle.errors import FieldViolation, PermissionDenied


class Role(StrEnum):
    """What a key may do."""

    INFER = "infer"
    """Generate, tokenise, look models up."""
    TRAIN = "train"
    """Training jobs, and looking models up."""
    SERVE = "serve"
    """A worker's: hold models with leases and say what is ready, look models up."""
    MONITOR = "monitor"
    """Read metrics and the workers' status."""
    ADMIN = "admin"
    """Everything, also what changes the store and the workers."""


@dataclass(frozen=True, slots=True)
class Principal:
    """A caller that was recognised."""

    key_id: str
    roles: frozenset[Role]
    tenants: frozenset[str] | None = None
    """The tenants that it may act for; None: all."""

    def require(self, allowed: frozenset[Role], what: str) -> None:
        """Raises PermissionDenied (ROLE_MISSING) unless a role is among `allowed`; ADMIN always is."""
        if Role.ADMIN in self.roles or self.roles & allowed:
            return
        needed, there = " or ".join(sorted(allowed | {Role.ADMIN})), ", ".join(sorted(self.roles))
        raise PermissionDenied(
            f"{what} needs a key with the role {needed}; key {self.key_id!r} has {there}",
            reason="ROLE_MISSING",
        )

    def tenant_for(self, asked: str, *, default: str, field: str = "tenant") -> str:
        """The tenant that a request belongs to: the one it names, else the key's only one, else `default`.

        Raises PermissionDenied (TENANT_FOREIGN) for a tenant that the key was not given.
        """
        if self.tenants is None:
            return asked or default
        if not asked and len(self.tenants) == 1:
            return next(iter(self.tenants))
        tenant = asked or default
        if tenant not in self.tenants:
            message = f"key {self.key_id!r} may not act for tenant {tenant[:64]!r}; name one of its own"
            raise PermissionDenied(message, reason="TENANT_FOREIGN", fields=[FieldViolation(field, message)])
        return tenant


ANYBODY = Principal("", frozenset(Role))
"""Every caller of a server without keys."""

_current: contextvars.ContextVar[Principal] = contextvars.ContextVar("principal", default=ANYBODY)


def current_principal() -> Principal:
    """The caller of the RPC that this task serves."""
    return _current.get()


@contextlib.contextmanager
def bind_principal(principal: Principal) -> Iterator[None]:
    """Makes `principal` the caller until the block ends."""
    token = _current.set(principal)
    try:
        yield
    finally:
        # A generator that was left in the middle is closed by another task: there is nothing to undo there.
        with contextlib.suppress(ValueError):
            _current.reset(token)
