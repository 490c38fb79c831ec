"""Every key that the suite has in Redis: type, owner, bound and life.

Values are versioned protobuf messages of `treadle.api.worker.v1` (queue.proto). A `{hash tag}` keeps the
keys of one request, or of one profile, in one slot of a cluster.

| key | type | written by | bound | life |
|---|---|---|---|---|
| `treadle:lane:{<profile>}:<priority>:<tenant>` | stream of LaneEntry, group `workers` | gateway adds; the worker that ends a request deletes its entry | the gateway's lane limit | as long as the profile has requests |
| `treadle:lanes:{<profile>}` | set of the profile's lane keys | gateway | one a tenant and priority | as the lanes |
| `treadle:request:{<tenant>:<request_id>}:log` | stream of StreamEntry, ids `<epoch>-<n>` | gateway makes it; the owner of the epoch appends | an entry for one or several steps, plus fences | ACTIVE_MS, renewed while it runs; then the request's retention |
| `treadle:request:{…}:epoch` | counter | whoever takes the request: workers, and gateways that cancel | – | with the log |
| `treadle:request:{…}:reservation` | hash `payload`, `lane`, `entry`; the last two once it is queued | gateway | – | with the log |
| `treadle:request:{…}:enqueuing` | string: the gateway that puts the request into its lane now | gateway | – | ENQUEUING_MS, deleted when it is queued |
| `treadle:request:{…}:owner` | string: the consumer | the worker that took it | – | with the log |
| `treadle:request:{…}:watchers` | set of gateway ids | gateways that wait for it | one a gateway | with the log |
| `treadle:request:{…}:attached` | string | the gateway that has the client | – | that gateway's `attached_s` (ATTACHED_MS), renewed three times in it |
| `treadle:gateway:<gateway_id>:dirty` | list of News | workers push, the gateway pops | DIRTY_LIMIT items, trimmed | DIRTY_MS after the last push |
| `treadle:workers` | set of consumers | workers | one a worker; whoever finds a beat gone removes it | – |
| `treadle:worker:<consumer>:beat` | Heartbeat | the worker | – | its lease (LEASE_MS), renewed three times in it |
| `treadle:worker:<consumer>:control` | stream of ControlEntry | gateways | CONTROL_LIMIT, trimmed | as the beat |
"""

from __future__ import annotations

from dataclasses import dataclass

GROUP = "workers"
"""The consumer group of every lane."""

SCHEMA_VERSION = 2
"""The newest of an entry that is read here: 1, and with tasks 2. A reader refuses a greater one."""

PRIORITIES = ("high", "normal", "low")
"""In the order in which workers claim."""

ACTIVE_MS = 3_600_000
RETENTION_MS = 60_000
"""How long a finished CANCEL request's log is kept, so that a retry finds its answer."""
DETACH_RETENTION_MS = 300_000
ENQUEUING_MS = 5_000
"""After so long a reservation that is not queued is stale, and a retry puts the request back."""
ATTACHED_MS = 15_000
"""How long a client is taken to be there after its gateway said so last, where nothing else is set."""
LEASE_MS = 15_000
"""How long a worker is taken to live after its last beat, where nothing else is set. Workers may differ."""
RENEWALS = 3
"""How often what lapses is renewed in its life."""
HANDED_BACK_IDLE_MS = 86_400_000
"""The idle time that handed back entries are given: longer than any lease."""
DIRTY_MS = 60_000
DIRTY_LIMIT = 16_384
CONTROL_LIMIT = 4_096

WORKERS = "treadle:workers"

NOBODY = "released"
"""The consumer that holds what workers hand back; it never beats, so anybody may claim from it."""


def lane(profile: str, priority: str, tenant: str) -> str:
    """The lane of a profile, priority ("high", "normal", "low") and tenant."""
    return f"treadle:lane:{{{profile}}}:{priority}:{tenant}"


def lanes(profile: str) -> str:
    """The set that names a profile's lanes."""
    return f"treadle:lanes:{{{profile}}}"


def lane_priority(lane_key: str | bytes) -> str:
    """The priority in a lane's key."""
    key = lane_key.decode() if isinstance(lane_key, bytes) else lane_key
    return key.split("}:", 1)[1].split(":", 1)[0]


def dirty(gateway_id: str) -> str:
    """The list in which a gateway finds which requests have news."""
    return f"treadle:gateway:{gateway_id}:dirty"


def beat(consumer: str) -> str:
    """A worker's heartbeat."""
    return f"treadle:worker:{consumer}:beat"


def control(consumer: str) -> str:
    """A worker's control stream."""
    return f"treadle:worker:{consumer}:control"


@dataclass(frozen=True, slots=True)
class RequestKeys:
    """The keys of one request. Tenants and ids hold no braces: the gateway checks them."""

    tenant: str
    request_id: str

    @property
    def tag(self) -> str:
        """ "<tenant>:<request_id>"; tenants hold no colon."""
        return f"{self.tenant}:{self.request_id}"

    def _key(self, part: str) -> str:
        return f"treadle:request:{{{self.tag}}}:{part}"

    @property
    def log(self) -> str:
        """The token stream."""
        return self._key("log")

    @property
    def epoch(self) -> str:
        """The counter of owners."""
        return self._key("epoch")

    @property
    def reservation(self) -> str:
        """Who has the id, with which payload."""
        return self._key("reservation")

    @property
    def enqueuing(self) -> str:
        """There while a gateway puts the request into its lane."""
        return self._key("enqueuing")

    @property
    def owner(self) -> str:
        """The consumer that runs it."""
        return self._key("owner")

    @property
    def watchers(self) -> str:
        """The gateways that wait for it."""
        return self._key("watchers")

    @property
    def living_with_log(self) -> tuple[str, ...]:
        """The keys that live as long as the log, the log among them."""
        return self.log, self.epoch, self.reservation, self.owner, self.watchers

    @property
    def attached(self) -> str:
        """There while a gateway has the request's client."""
        return self._key("attached")
