"""What every request says of whose it is, which model is to answer, and how long it may take."""

from __future__ import annotations

import re
from typing import Protocol

from treadle.errors import FieldViolation, Unimplemented
from treadle_gateway.config import GatewayConfig
from treadle_gateway.generation import Priority
from treadle_gateway.violations import Violations, shown

MAX_NAME = 256

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_TENANT = re.compile(r"[A-Za-z0-9._-]{1,64}")


class Addressed(Protocol):
    """A generation, or a task's context."""

    @property
    def request_id(self) -> str:
        """The client's; empty: one is chosen."""

    @property
    def tenant(self) -> str:
        """Whose it is."""

    @property
    def model(self) -> str:
        """An alias or a digest."""

    @property
    def profile(self) -> str:
        """Empty: any."""

    @property
    def adapter(self) -> str:
        """Empty: none."""

    @property
    def priority(self) -> int:
        """A Priority, or what is none."""

    @property
    def timeout_s(self) -> float | None:
        """None: not set."""


def check_addressed(found: Violations, asked: Addressed, limits: GatewayConfig, *, prefix: str) -> None:
    """Checks them all; `prefix` is the path of the message that has them ("generation.")."""
    check_names(found, asked.request_id, asked.tenant, prefix=prefix)
    for field, value in (("model", asked.model), ("profile", asked.profile), ("adapter", asked.adapter)):
        found.require(
            len(value) <= MAX_NAME and value.isprintable(),
            f"{prefix}{field}",
            f"must be at most {MAX_NAME} printable characters; got {shown(value)}",
        )
    found.require(
        bool(asked.model),
        f"{prefix}model",
        'must name a model: an alias, or an artifact digest ("sha256:…"). ListModels lists what is served',
    )
    found.require(
        asked.priority in list(Priority),
        f"{prefix}priority",
        f"{asked.priority} is no Priority; use LOW (1), NORMAL (2), HIGH (3) or leave it unset",
    )
    timeout_s = asked.timeout_s
    found.require(
        timeout_s is None or 0 < timeout_s <= limits.max_timeout_s,
        f"{prefix}timeout",
        f"must be over 0 and at most {limits.max_timeout_s:g} s; got {timeout_s} s. "
        "Leave it unset for the gateway's default",
    )


def check_names(
    found: Violations, request_id: str, tenant: str, *, prefix: str = "", required: bool = False
) -> None:
    """Checks a request's id and tenant, which become parts of keys."""
    found.require(
        bool(_REQUEST_ID.fullmatch(request_id)) or (not request_id and not required),
        f"{prefix}request_id",
        f"must be 1 to 128 of [A-Za-z0-9._:-]; got {shown(request_id)}"
        + ("" if required else ". Leave it empty to have one chosen"),
    )
    found.require(
        not tenant or bool(_TENANT.fullmatch(tenant)),
        f"{prefix}tenant",
        f"must be 1 to 64 of [A-Za-z0-9._-]; got {shown(tenant)}. Leave it empty for the default tenant",
    )


def refuse_adapter(asked: Addressed, *, prefix: str) -> None:
    """Raises Unimplemented where an adapter is asked for."""
    if asked.adapter:
        refuse(f"{prefix}adapter", "adapters are not served yet; leave it empty")


def refuse(field: str, description: str) -> None:
    """Raises Unimplemented, naming the field."""
    raise Unimplemented(f"{field}: {description}", fields=[FieldViolation(field, description)])
