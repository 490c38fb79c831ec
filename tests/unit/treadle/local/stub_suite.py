"""Run by test_supervisor.py as a process: a supervisor over stub services that have children of their own.

Arguments: the folder for logs and marks. Prints "ready" when every stub is ready.
"""

from __future__ import annotations

import sys
from pathlib import Path

from treadle.cli.console import message_console
from treadle.cli.interrupt import run_until_interrupted
from treadle.cli.report import Report
from treadle.local import ServiceSpec, Supervisor

# A service that starts a child as the suite's services do, says that it is ready, and leaves at SIGTERM.
SERVICE = """
import pathlib, signal, subprocess, sys, time
from treadle.process import child_command
mark, order = pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])
child = subprocess.Popen(child_command(["sleep", "600"]))
def leave(*_):
    with order.open("a") as file:
        file.write(mark.name + " ")
    child.kill()
    sys.exit(0)
signal.signal(signal.SIGTERM, leave)
mark.write_text(str(child.pid))
while True:
    time.sleep(0.05)
"""


def stub(folder: Path, name: str, stage: int) -> ServiceSpec:
    mark = folder / name

    async def probe() -> bool:
        return mark.exists()

    command = (sys.executable, "-c", SERVICE, str(mark), str(folder / "order"))
    return ServiceSpec(name, command, probe, stage=stage, start_timeout_s=30)


async def main(folder: Path) -> None:
    async with Supervisor(folder, Report(message_console())) as supervisor:
        supervisor.start(*(stub(folder, f"stage{stage}", stage) for stage in range(4)))
        await supervisor.ready()
        print("ready", flush=True)
        await supervisor.wait()


if __name__ == "__main__":
    run_until_interrupted(main(Path(sys.argv[1])))
