"""Keys: made, kept as hashes, recognised, refused."""

from __future__ import annotations

import json
import secrets
import stat
from datetime import UTC, datetime, timedelta

import pytest

from treadle.errors import AlreadyExists, FailedPrecondition, NotFound, PermissionDenied, Unauthenticated
from treadle.security import ANYBODY, Principal, Role
from treadle.security.key_file import KeyFile, add_key, revoke_key
from treadle.security.keys import authenticate, new_key

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def test_a_key_is_recognised_with_its_roles_and_tenants():
    text, record = new_key("web", [Role.INFER], tenants=["a", "b"])
    principal = authenticate({"web": record}, f"Bearer {text}")
    assert principal == Principal("web", frozenset({Role.INFER}), frozenset({"a", "b"}))
    assert authenticate({"web": record}, f"bearer  {text} ") == principal
    assert text.rpartition("_")[2] not in repr(record)


def wrong_headers() -> list[tuple[str | None, str]]:
    text, _ = new_key("web", [Role.INFER])
    secret = text.rpartition("_")[2]
    return [
        (None, "KEY_MISSING"),
        ("", "KEY_MISSING"),
        (text, "KEY_INVALID"),
        (f"Basic {text}", "KEY_INVALID"),
        ("Bearer", "KEY_INVALID"),
        ("Bearer trd_web_", "KEY_INVALID"),
        (f"Bearer trd_web_{secrets.token_hex(32)}", "KEY_INVALID"),
        (f"Bearer trd_web_{secret.upper()}", "KEY_INVALID"),
        (f"Bearer trd_other_{secret}", "KEY_INVALID"),
        (f"Bearer {text}{'0' * 100_000}", "KEY_INVALID"),
        ("Bearer trd_web_" + "0" * 64, "KEY_INVALID"),
    ]


@pytest.mark.parametrize(("header", "reason"), wrong_headers())
def test_a_wrong_key_is_refused_and_never_repeated(header, reason):
    _, record = new_key("web", [Role.INFER])
    with pytest.raises(Unauthenticated) as refused:
        authenticate({"web": record}, header)
    assert refused.value.reason == reason
    shown = (header or "").rpartition("_")[2]
    assert len(shown) < 32 or shown not in refused.value.message


def test_a_key_ends():
    text, record = new_key("web", [Role.INFER], expires_at=NOW)
    records = {"web": record}
    assert authenticate(records, f"Bearer {text}", NOW - timedelta(seconds=1)).key_id == "web"
    with pytest.raises(Unauthenticated) as refused:
        authenticate(records, f"Bearer {text}", NOW)
    assert refused.value.reason == "KEY_EXPIRED"


def test_roles():
    infer = Principal("k", frozenset({Role.INFER}))
    infer.require(frozenset({Role.INFER, Role.TRAIN}), "this")
    with pytest.raises(PermissionDenied, match="admin or train") as refused:
        infer.require(frozenset({Role.TRAIN}), "this")
    assert refused.value.reason == "ROLE_MISSING"
    Principal("root", frozenset({Role.ADMIN})).require(frozenset(), "this")
    with pytest.raises(PermissionDenied):
        infer.require(frozenset(), "this")


def test_tenants():
    one = Principal("k", frozenset({Role.INFER}), frozenset({"shop"}))
    assert one.tenant_for("", default="default") == "shop"
    assert one.tenant_for("shop", default="default") == "shop"
    two = Principal("k", frozenset({Role.INFER}), frozenset({"shop", "lab"}))
    assert two.tenant_for("lab", default="default") == "lab"
    refused = 0
    for principal, asked in [(one, "lab"), (one, "default"), (two, "x"), (two, "")]:
        with pytest.raises(PermissionDenied) as error:
            principal.tenant_for(asked, default="default", field="generation.tenant")
        assert error.value.reason == "TENANT_FOREIGN"
        assert error.value.fields[0].field == "generation.tenant"
        refused += 1
    assert refused == 4
    assert ANYBODY.tenant_for("", default="default") == "default"
    assert ANYBODY.tenant_for("any", default="default") == "any"


def test_the_file_has_hashes_only_and_its_owner_alone_reads_it(tmp_path):
    path = tmp_path / "keys.json"
    text, record = new_key("web", [Role.INFER], tenants=["a"], expires_at=NOW)
    add_key(path, record)
    other, record2 = new_key("root", [Role.ADMIN])
    add_key(path, record2)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    content = path.read_text()
    assert all(key.rpartition("_")[2] not in content for key in (text, other))
    keys = KeyFile.read(path)
    assert keys.records["web"] == record or keys.records["web"].expires_at == NOW
    assert keys.authenticate(f"Bearer {other}").roles == {Role.ADMIN}
    with pytest.raises(AlreadyExists):
        add_key(path, record)
    revoke_key(path, "root")
    assert keys.reload_if_changed()
    with pytest.raises(Unauthenticated):
        keys.authenticate(f"Bearer {other}")
    with pytest.raises(NotFound):
        revoke_key(path, "root")
    assert [entry.name for entry in tmp_path.iterdir()] == ["keys.json"]


def test_a_file_that_becomes_unusable_leaves_the_keys(tmp_path, caplog):
    path = tmp_path / "keys.json"
    text, record = new_key("web", [Role.INFER])
    add_key(path, record)
    keys = KeyFile.read(path)
    assert not keys.reload_if_changed()
    for broken in ('{"keys": [', '{"keys": [{"id": "web"}]}', "[]"):
        path.write_text(broken)
        assert not keys.reload_if_changed()
    path.unlink()
    assert not keys.reload_if_changed()
    assert keys.authenticate(f"Bearer {text}").key_id == "web"
    assert len(caplog.records) == 4


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ("", "file of keys"),
        ("[]", "file of keys"),
        ('{"keys": [{"id": "A", "sha256": "%s", "roles": ["infer"]}]}' % ("0" * 64), "keys.0.id"),
        ('{"keys": [{"id": "a", "sha256": "%s", "roles": ["infer"]}]}' % ("0" * 63), "keys.0.sha256"),
        ('{"keys": [{"id": "a", "sha256": "%s", "roles": []}]}' % ("0" * 64), "keys.0.roles"),
        ('{"keys": [{"id": "a", "sha256": "%s", "roles": ["king"]}]}' % ("0" * 64), "keys.0.roles"),
        ('{"keys": [{"id": "a", "sha256": "%s", "roles": ["infer"], "x": 1}]}' % ("0" * 64), "keys.0.x"),
        (
            '{"keys": [{"id": "a", "sha256": "%s", "roles": ["infer"], "expires_at": "2026-01-01T00:00:00"}]}'
            % ("0" * 64),
            "time zone",
        ),
        (json.dumps({"keys": [{"id": "a", "sha256": "0" * 64, "roles": ["infer"]}] * 2}), "two keys"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, word):
    path = tmp_path / "keys.json"
    path.write_text(content)
    with pytest.raises(FailedPrecondition, match=word) as refused:
        KeyFile.read(path)
    assert refused.value.reason == "KEYS_UNREADABLE"
