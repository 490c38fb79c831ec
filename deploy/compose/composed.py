"""A composed suite as the demo sees it: compose's commands and the engine's answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_METRIC = """
import sys, urllib.request
text = urllib.request.urlopen("http://127.0.0.1:9055/metrics", timeout=10).read().decode()
samples = [line.rsplit(" ", 1) for line in text.splitlines() if line.partition("{")[0] == sys.argv[1]]
print(sum(float(value) for _, value in samples))
"""


def say(line: str) -> None:
    """A line of the transcript; a heading has a blank line before it."""
    print(f"\n{line}" if line.startswith("## ") else line, flush=True)


def require(condition: bool, otherwise: str) -> None:
    """Ends the demo with `otherwise` unless the condition holds."""
    if not condition:
        sys.exit(f"FAILED: {otherwise}")


class Composed:
    """The suite of one compose project."""

    def __init__(
        self, folder: Path, *, project: str, overrides: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        """`overrides` are compose files, from `folder`; `environment` goes before the process's own."""
        self.project = project
        self._folder = folder
        self._environment = dict(os.environ) | dict(environment)
        files = [part for file in ("docker-compose.yml", *overrides) for part in ("-f", file)]
        self._compose = [*_compose_command(), "-p", project, *files]

    def compose(self, *arguments: str) -> str:
        """Runs compose; what it prints is shown only where it fails."""
        return self._run([*self._compose, *arguments])

    def docker(self, *arguments: str) -> str:
        """Runs docker."""
        return self._run(["docker", *arguments])

    def _run(self, command: list[str]) -> str:
        result = subprocess.run(
            command, cwd=self._folder, env=self._environment, capture_output=True, text=True, check=False
        )
        require(
            result.returncode == 0, f"{' '.join(command)}\n{result.stdout[-3000:]}\n{result.stderr[-3000:]}"
        )
        return result.stdout

    def down(self) -> None:
        """Removes containers, networks and volumes."""
        subprocess.run(
            ["docker", "rm", "-f", self.load_name], capture_output=True, env=self._environment, check=False
        )
        self.compose("down", "-v", "--remove-orphans", "-t", "5")

    @property
    def load_name(self) -> str:
        """The container's that asks for answers."""
        return f"{self.project}-load"

    def leftovers(self) -> list[str]:
        """Containers, networks and volumes of the project."""
        label = f"label=com.docker.compose.project={self.project}"
        kinds = (("ps", "-aq"), ("network", "ls", "-q"), ("volume", "ls", "-q"))
        return [found for kind in kinds for found in self.docker(*kind, "--filter", label).split()]

    def containers(self, service: str, *, running: bool = True) -> list[str]:
        """Ids of a service's containers."""
        labels = (f"com.docker.compose.project={self.project}", f"com.docker.compose.service={service}")
        filters = [part for label in labels for part in ("--filter", f"label={label}")]
        return self.docker("ps", "-q", *([] if running else ["-a"]), *filters).split()

    def inspect(self, thing: str) -> Any:
        """What the engine knows of a container or an image."""
        return json.loads(self.docker("inspect", thing))[0]

    def name(self, container: str) -> str:
        """The container's name."""
        return str(self.inspect(container)["Name"]).removeprefix("/")

    def exit_code(self, container: str) -> int:
        """Of a container that has ended."""
        return int(self.inspect(container)["State"]["ExitCode"])

    def variable(self, container: str, name: str) -> str:
        """What a container's environment says; KeyError where it says nothing."""
        # A variable that compose hands through, and that is not set, stands there without a "=".
        entries = [entry.partition("=") for entry in self.inspect(container)["Config"]["Env"]]
        return {key: value for key, given, value in entries if given}[name]

    def log(self, container: str) -> str:
        """Its standard output."""
        return self.docker("logs", container)

    def image(self, service: str) -> str:
        """The image's name."""
        return f"treadle/{service}:{self._environment.get('TAG') or 'latest'}"

    def image_bytes(self, image: str) -> int:
        """Its size, its base included."""
        return int(self.inspect(image)["Size"])

    def image_user(self, image: str) -> str:
        """Who it runs as."""
        return str(self.inspect(image)["Config"]["User"])

    def published(self) -> dict[str, list[str]]:
        """Addresses of this machine that lead to a container, by the container's name."""
        label = f"label=com.docker.compose.project={self.project}"
        found = {}
        for container in self.docker("ps", "-q", "--filter", label).split():
            facts = self.inspect(container)
            bound = [each for ports in facts["NetworkSettings"]["Ports"].values() for each in ports or ()]
            found[facts["Name"].removeprefix("/")] = [
                f"{each['HostIp']}:{each['HostPort']}" for each in bound
            ]
        return found

    def statuses(self) -> list[tuple[str, str]]:
        """Each running container's name and its status in words."""
        label = f"label=com.docker.compose.project={self.project}"
        lines = self.docker("ps", "--filter", label, "--format", "{{.Names}}\t{{.Status}}").splitlines()
        return sorted((line.split("\t")[0], line.split("\t")[1]) for line in lines)

    def wait_healthy(self, services: Sequence[str], *, timeout_s: float) -> None:
        """Until every container of the services is healthy."""
        deadline = time.monotonic() + timeout_s
        while True:
            states = {
                service: [
                    self.inspect(each)["State"]["Health"]["Status"] for each in self.containers(service)
                ]
                for service in services
            }
            if all(found and set(found) == {"healthy"} for found in states.values()):
                return
            require(time.monotonic() < deadline, f"not healthy within {timeout_s:.0f} s: {states}")
            time.sleep(1)

    def python(self, container: str, code: str) -> Any:
        """Runs Python inside; what it prints is JSON."""
        return json.loads(self.docker("exec", container, "python", "-c", code))

    def metric(self, worker: str, name: str) -> float:
        """A worker's metric, over all of its labels."""
        return float(self.docker("exec", worker, "python", "-c", _METRIC, name))

    def kill(self, container: str) -> None:
        """SIGKILL; the engine does not start it again by itself."""
        self.docker("kill", "-s", "KILL", container)

    def open_python(self, script: Path, *arguments: str) -> subprocess.Popen[str]:
        """Starts a script in a container of its own, on the suite's network; its lines can be read."""
        command = ["docker", "run", "--rm", "-i", "--init", "--read-only", "--cap-drop", "ALL"]
        command += ["--name", self.load_name, "--network", f"{self.project}_private"]
        command += ["--entrypoint", "python", self.image("cli"), "-", *arguments]
        with script.open() as code:
            return subprocess.Popen(
                command, stdin=code, stdout=subprocess.PIPE, env=self._environment, text=True
            )


def _compose_command() -> list[str]:
    """Version 2, a plugin of docker, or else version 1."""
    plugin = subprocess.run(["docker", "compose", "version"], capture_output=True, check=False)
    if plugin.returncode == 0:
        return ["docker", "compose"]
    require(shutil.which("docker-compose") is not None, "there is neither docker compose nor docker-compose")
    return ["docker-compose"]
