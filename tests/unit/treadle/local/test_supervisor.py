"""Services that start, die, come back and stop; and that nothing is left of them."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from treadle.errors import Unavailable
from treadle.local import ServiceSpec, ServiceState, Supervisor
from treadle.process import child_command

STUB_SUITE = Path(__file__).with_name("stub_suite.py")


class Seen:
    """An observer that remembers."""

    def __init__(self) -> None:
        self.states: list[tuple[str, ServiceState]] = []
        self.restarting = asyncio.Event()

    def service(self, name, state, detail=""):
        self.states.append((name, state))
        if state is ServiceState.RESTARTING:
            self.restarting.set()

    def importing(self, model, progress):
        raise AssertionError

    def note(self, text):
        raise AssertionError


def service(tmp_path: Path, code: str, name: str = "stub", **fields) -> ServiceSpec:
    """A Python program that is ready once it has made the file <name>."""

    async def probe() -> bool:
        return (tmp_path / name).exists()

    return ServiceSpec(name, (sys.executable, "-c", code, str(tmp_path / name)), probe, **fields)


WAIT = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(600)"


def pid_of(supervisor: Supervisor, name: str = "stub") -> int:
    process = supervisor._services[name]._process
    assert process is not None
    return process.pid


async def test_a_service_that_dies_is_started_again(tmp_path):
    seen = Seen()
    async with asyncio.timeout(60), Supervisor(tmp_path, seen) as supervisor:
        supervisor.start(service(tmp_path, WAIT))
        await supervisor.ready()
        pids = [pid_of(supervisor)]
        for _ in range(2):
            seen.restarting.clear()
            os.kill(pids[-1], signal.SIGKILL)
            await seen.restarting.wait()
            await supervisor.ready("stub")
            pids.append(pid_of(supervisor))
        assert len(set(pids)) == 3
    assert not any(psutil.pid_exists(pid) for pid in pids)
    kinds = [state for _, state in seen.states]
    restarts = kinds.count(ServiceState.RESTARTING)
    print(f"{restarts} restarts")
    assert restarts == 2
    assert kinds.count(ServiceState.READY) == 3
    assert kinds[-1] is ServiceState.STOPPED


async def test_a_service_that_cannot_start_is_an_error_with_its_log(tmp_path):
    seen = Seen()
    async with asyncio.timeout(60), Supervisor(tmp_path, seen) as supervisor:
        supervisor.start(
            service(tmp_path, WAIT, "good"), service(tmp_path, "raise SystemExit('no such model')", "broken")
        )
        with pytest.raises(Unavailable) as caught:
            await supervisor.ready()
    assert caught.value.reason == "SERVICE_FAILED"
    assert "exit code 1" in caught.value.message
    assert "no such model" in caught.value.message
    assert str(tmp_path / "broken.log") in caught.value.message
    assert ("broken", ServiceState.FAILED) in seen.states
    assert ("good", ServiceState.STOPPED) in seen.states


async def test_a_service_that_is_never_ready_is_given_up(tmp_path):
    async with asyncio.timeout(60), Supervisor(tmp_path, Seen()) as supervisor:
        supervisor.start(service(tmp_path, "import time; time.sleep(600)", start_timeout_s=0.5))
        with pytest.raises(Unavailable, match=r"not ready within 0\.5 s"):
            await supervisor.ready()


async def test_one_that_dies_too_often_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr("treadle.local.service._PAUSES_S", (0.01, 0.01))
    code = "import pathlib, sys, time; pathlib.Path(sys.argv[1]).touch(); time.sleep(0.4)"
    seen = Seen()
    async with asyncio.timeout(60), Supervisor(tmp_path, seen) as supervisor:
        supervisor.start(service(tmp_path, code))
        await supervisor.ready()
        with pytest.raises(Unavailable, match="exit code 0"):
            await supervisor.wait()
    states = [state for _, state in seen.states]
    assert states.count(ServiceState.RESTARTING) == 2
    assert states.count(ServiceState.FAILED) == 1


async def test_one_that_does_not_leave_is_killed(tmp_path):
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); " + WAIT
    async with asyncio.timeout(60), Supervisor(tmp_path, Seen()) as supervisor:
        supervisor.start(service(tmp_path, code, grace_s=0.3))
        await supervisor.ready()
        pid = pid_of(supervisor)
    assert not psutil.pid_exists(pid)


async def test_a_log_stays_within_bounds(tmp_path, monkeypatch):
    monkeypatch.setattr("treadle.local.service._MAX_LOG_BYTES", 20_000)
    monkeypatch.setattr("treadle.local.service._KEPT_LOG_BYTES", 2_000)
    code = (
        "import pathlib, sys, time\npathlib.Path(sys.argv[1]).touch()\n"
        "for number in range(100000):\n    print('line', number, flush=True)\n    time.sleep(0.0002)"
    )
    async with asyncio.timeout(60), Supervisor(tmp_path, Seen()) as supervisor:
        supervisor.start(service(tmp_path, code))
        await supervisor.ready()
        log = tmp_path / "stub.log"
        sizes = [0]
        while not any(later < earlier for earlier, later in itertools.pairwise(sizes)):
            sizes.append(log.stat().st_size)
            await asyncio.sleep(0.02)
    first = log.read_bytes().split(b"\n", 1)[0]
    assert first.startswith(b"line ")
    cut_off = sum(len(f"line {number}\n") for number in range(int(first.split()[1])))
    assert cut_off > 20_000 - 2_000  # only a log over its bound is cut, and to no more than what is kept


@pytest.fixture
def stub_suite(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A supervisor in a process of its own, with four services ready."""
    command = child_command([sys.executable, str(STUB_SUITE), str(tmp_path)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def everything_below(pid: int, tmp_path: Path) -> list[psutil.Process]:
    below = psutil.Process(pid).children(recursive=True)
    grandchildren = {int((tmp_path / f"stage{stage}").read_text()) for stage in range(4)}
    assert grandchildren <= {process.pid for process in below}
    assert len(below) == 8
    return below


def await_their_end(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=20)
    assert not alive
    print(f"{len(processes)} processes, none left")


def test_nothing_is_left_when_the_supervisor_is_killed(stub_suite, tmp_path):
    below = everything_below(stub_suite.pid, tmp_path)
    stub_suite.kill()
    stub_suite.wait(20)
    await_their_end(below)
    assert not (tmp_path / "order").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_all_in_order(stub_suite, tmp_path, number):
    below = everything_below(stub_suite.pid, tmp_path)
    stub_suite.send_signal(number)
    assert stub_suite.wait(30) == 128 + number
    await_their_end(below)
    assert (tmp_path / "order").read_text().split() == ["stage3", "stage2", "stage1", "stage0"]


def test_a_second_signal_does_not_wait(tmp_path):
    stubborn = STUB_SUITE.read_text().replace("sys.exit(0)", "time.sleep(600)")
    script = tmp_path / "stubborn.py"
    script.write_text(stubborn)
    command = child_command([sys.executable, str(script), str(tmp_path)])
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        below = everything_below(process.pid, tmp_path)
        process.send_signal(signal.SIGINT)
        deadline = time.monotonic() + 10
        while not (tmp_path / "order").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        await_their_end(below)
    assert (tmp_path / "order").read_text().split() == ["stage3"]
