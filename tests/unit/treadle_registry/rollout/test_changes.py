"""What watchers are told: everything once, changes from then on, and no more than the last of each name."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

import pytest

from treadle.errors import ResourceExhausted, Unavailable
from treadle_registry.catalog.aliases import Alias, moved
from treadle_registry.rollout.changes import Change, ChangeLog, Notice

QUIET_S = 3600.0


def alias(name: str, digest: str = "d") -> Change:
    return Change("alias", name, moved(name, digest))


def gone(name: str) -> Change:
    return Change("alias", name, None)


def log_of(**settings: int) -> ChangeLog:
    return ChangeLog(alive_every_s=QUIET_S, **settings)


class Follower:
    """Keeps a copy of what it is told, as a client does."""

    def __init__(self, log: ChangeLog) -> None:
        self._log = log
        self._notices: AsyncGenerator[Notice, None] | None = None
        self.version = ""
        self.known: dict[str, Alias] = {}
        self._incoming: dict[str, Alias] | None = None
        self.resets = self.told = 0

    async def hear(self) -> None:
        """The next notice, which is there."""
        if self._notices is None:
            self._notices = self._log.watch(self.version)
        notice = await asyncio.wait_for(anext(self._notices), 5)
        self.told += 1
        if notice.content == "reset":
            self.resets, self._incoming = self.resets + 1, {}
        elif notice.content == "complete":
            assert self._incoming is not None
            self.known, self._incoming = self._incoming, None
        elif isinstance(notice.content, Change):
            known = self.known if self._incoming is None else self._incoming
            if isinstance(notice.content.value, Alias):
                known[notice.content.name] = notice.content.value
            else:
                known.pop(notice.content.name, None)
        assert bool(notice.version) == (self._incoming is None)
        if notice.version:
            self.version = notice.version

    async def leave(self) -> None:
        """As a connection that breaks; a state that was half told is forgotten."""
        if self._notices is not None:
            await self._notices.aclose()
        self._notices = None
        if self._incoming is not None:
            self._incoming, self.version = None, ""

    async def catch_up(self, version: str) -> None:
        """Hears until it has what is there."""
        while self.version != version:
            await self.hear()


def version_of(log: ChangeLog) -> str:
    return log._version(log._number)


async def test_the_whole_state_comes_first_and_then_changes(rng: random.Random):
    log = log_of()
    log.add([alias("a"), alias("b"), gone("a"), alias("c")])
    follower = Follower(log)
    await follower.catch_up(version_of(log))
    assert (sorted(follower.known), follower.resets) == (["b", "c"], 1)
    log.add([gone("b"), alias("d")])
    await follower.catch_up(version_of(log))
    assert (sorted(follower.known), follower.resets) == (["c", "d"], 1)
    await follower.leave()
    log.add([alias("e")])
    await follower.catch_up(version_of(log))
    assert (sorted(follower.known), follower.resets) == (["c", "d", "e"], 1)
    await follower.leave()


@pytest.mark.parametrize(
    "version", ["x", "0.1", ".", "00000000.1", "1" * 5000, "{boot}.99", "{boot}.-1", "{boot}."]
)
async def test_a_version_that_was_not_given_out_here_begins_anew(version: str):
    log = log_of()
    log.add([alias("a")])
    notices = log.watch(version.format(boot=version_of(log).split(".")[0]))
    assert (await anext(notices)).content == "reset"
    await notices.aclose()


async def test_who_reads_slowly_is_told_the_last_change_of_each_name():
    log = log_of()
    log.add([alias("a")])
    follower = Follower(log)
    await follower.catch_up(version_of(log))
    told = follower.told
    for number in range(5000):
        log.add([alias(f"m{number % 10}", f"d{number}")])
    await follower.catch_up(version_of(log))
    assert follower.told - told == 10
    assert {known.digest for known in follower.known.values()} == {"d", *(f"d{n}" for n in range(4990, 5000))}
    print(f"5000 changes, {follower.told - told} told")
    await follower.leave()


async def test_who_has_missed_more_deletions_than_are_remembered_begins_anew():
    log = log_of(kept_deletions=3)
    log.add([alias(f"m{number}") for number in range(10)])
    follower, quick = Follower(log), Follower(log)
    await follower.catch_up(version_of(log))
    await quick.catch_up(version_of(log))
    for number in range(9):
        log.add([gone(f"m{number}")])
        await quick.catch_up(version_of(log))
    await follower.catch_up(version_of(log))
    assert (list(follower.known), follower.resets) == (["m9"], 2)
    assert (list(quick.known), quick.resets) == (["m9"], 1)
    assert len(log._last) == 1 + 3
    await follower.leave()
    await quick.leave()


async def test_many_followers_that_come_and_go_all_know_the_same(rng: random.Random):
    log = log_of(kept_deletions=5)
    followers = [Follower(log) for _ in range(20)]
    truth: dict[str, str] = {}
    broken = 0
    for _ in range(3000):
        name = f"m{rng.randrange(15)}"
        if rng.random() < 0.3:
            truth.pop(name, None)
            log.add([gone(name)])
        else:
            truth[name] = f"d{rng.randrange(1000)}"
            log.add([alias(name, truth[name])])
        follower = rng.choice(followers)
        if rng.random() < 0.2:
            await follower.leave()
            broken += 1
        for _ in range(rng.randrange(6)):
            if follower.version == version_of(log):
                break
            await follower.hear()
    for follower in followers:
        await follower.catch_up(version_of(log))
        assert {name: known.digest for name, known in follower.known.items()} == truth
        await follower.leave()
    assert log.watchers == 0
    resets, told = sum(one.resets for one in followers), sum(one.told for one in followers)
    print(f"{told} notices, {broken} broken watches, {resets} resets")
    assert broken > 100
    assert resets > len(followers)


async def test_news_wakes_who_waits_and_silence_is_broken_now_and_then():
    log = ChangeLog(alive_every_s=0.02)
    log.add([alias("a")])
    notices = log.watch("")
    heard = [await anext(notices) for _ in range(5)]
    assert [notice.content for notice in heard[3:]] == ["alive", "alive"]
    assert {notice.version for notice in heard[2:]} == {version_of(log)}
    waiting = asyncio.create_task(anext(notices))
    log.add([alias("b")])
    found = await waiting
    while found.content == "alive":
        found = await anext(notices)
    assert isinstance(found.content, Change)
    assert found.content.name == "b"
    await notices.aclose()


async def test_the_end_ends_every_watch_and_there_are_not_too_many():
    log = log_of(max_watchers=3)
    watches = [log.watch("") for _ in range(3)]
    for notices in watches:
        assert [(await anext(notices)).content for _ in range(2)] == ["reset", "complete"]
    with pytest.raises(ResourceExhausted) as refused:
        await anext(log.watch(""))
    assert refused.value.reason == "TOO_MANY_WATCHERS"
    ends = [asyncio.create_task(anext(notices)) for notices in watches]
    await asyncio.sleep(0)
    log.close()
    ended = 0
    for end in ends:
        with pytest.raises(Unavailable) as caught:
            await end
        assert caught.value.reason == "SHUTTING_DOWN"
        assert caught.value.retry_after_s
        ended += 1
    assert (ended, log.watchers) == (3, 0)
