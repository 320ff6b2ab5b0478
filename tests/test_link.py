"""Claims about a network that fails: two machines, which are network namespaces here, joined by a bridge.

The link to the second one is cut as a switch would cut it: packets are lost, and nobody is told.
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import models
import numpy as np
import psutil
import pytest
import sizes
from models import blobs, make_exact_model
from sizes import Sizes, sizes_in

import dtrain

for module in (models, sizes):  # the workers do not have the tests' folder on their path
    cloudpickle.register_pickle_by_value(module)

HANG_TIMEOUT = 12.0
DEADLINE = 180.0
RAY = str(Path(sys.executable).parent / "ray")


class Machines:
    """Two machines of a Ray cluster, with room for one worker each."""

    ADDRESSES = ("10.77.0.1", "10.77.0.2")

    def __init__(self, folder: Path) -> None:
        self._name = f"dt{os.getpid()}"
        self._programs: list[subprocess.Popen[bytes]] = []
        self._log = (folder / "ray.log").open("wb")
        clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
        self.environment = {**clean, **token, "RAY_worker_niceness": "0", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0"}
        self._temporary = tempfile.mkdtemp(prefix="dt-")  # Ray's own would tell others of a cluster that is gone
        try:
            self._make_network()
        except (OSError, subprocess.CalledProcessError) as error:
            self.close()
            pytest.skip(f"no network of namespaces can be made here: {error}")
        head, other = self.ADDRESSES
        common = ["--num-cpus=1", "--object-store-memory=100000000", "--disable-usage-stats", "--block"]
        self.run(0, RAY, "start", "--head", f"--node-ip-address={head}", "--include-dashboard=false",
                 f"--temp-dir={self._temporary}", *common)  # fmt: skip
        self._wait_for_port(head)
        self.run(1, RAY, "start", f"--address={head}:6379", f"--node-ip-address={other}", *common)

    def _wait_for_port(self, address: str) -> None:
        look = f"import socket; socket.create_connection(({address!r}, 6379), 1).close()"
        deadline = time.monotonic() + DEADLINE
        while self.run(0, sys.executable, "-c", look).wait() != 0:
            assert time.monotonic() < deadline, "the first machine's Ray does not start"
            time.sleep(0.2)

    def run(self, machine: int, *command: str) -> "subprocess.Popen[bytes]":
        """Start a program on one of them."""
        inside = ["ip", "netns", "exec", f"{self._name}-{machine}", *command]
        program = subprocess.Popen(inside, env=self.environment, stdout=self._log, stderr=self._log)
        self._programs.append(program)
        return program

    def cut(self) -> None:
        """The link to the second one."""
        self._bridge("link", "set", "port1", "nomaster")

    def mend(self) -> None:
        self._bridge("link", "set", "port1", "master", "bridge")

    def close(self) -> None:
        for program in reversed(self._programs):
            with_children = (
                [program, *psutil.Process(program.pid).children(recursive=True)] if program.poll() is None else []
            )
            for process in with_children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.send_signal(signal.SIGKILL)
            program.wait()
        for end in ("0", "1", "b"):
            with contextlib.suppress(OSError):
                subprocess.run(["ip", "netns", "delete", f"{self._name}-{end}"], check=False, capture_output=True)
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._log.close()

    def _make_network(self) -> None:
        for end in ("0", "1", "b"):
            _ip("netns", "add", f"{self._name}-{end}")
        self._bridge("link", "add", "bridge", "type", "bridge")
        self._bridge("link", "set", "bridge", "up")
        for number, address in enumerate(self.ADDRESSES):
            machine = f"{self._name}-{number}"
            self._bridge("link", "add", f"port{number}", "type", "veth", "peer", "name", "eth0", "netns", machine)
            self._bridge("link", "set", f"port{number}", "master", "bridge", "up")
            _ip("-n", machine, "address", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", machine, "link", "set", "eth0", "up")
            _ip("-n", machine, "link", "set", "lo", "up")

    def _bridge(self, *arguments: str) -> None:
        _ip("-n", f"{self._name}-b", *arguments)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    """Skips where none can be made: that needs root, iproute2, and a kernel with bridges."""
    made = Machines(tmp_path)
    yield made
    made.close()


def train(address: str, folder: str) -> None:
    """A driver on the first machine."""
    import ray

    ray.init(address=address, namespace="dtrain", log_to_driver=False, logging_level="ERROR")
    deadline = time.monotonic() + DEADLINE
    while ray.cluster_resources().get("CPU", 0) < 2:
        assert time.monotonic() < deadline, "the second machine's Ray does not start"
        time.sleep(0.2)
    here = Path(folder)
    x, y = blobs(80)
    data: dict[str, Any] = {"x": x, "y": y, "batch_size": 8, "verbose": 0}
    options: dict[str, Any] = {"threads_per_worker": 1, "checkpoint": False, "tracking": False}
    failure = dtrain.FailureConfig(on_loss="shrink", hang_timeout=HANG_TIMEOUT)
    with dtrain.Trainer(make_exact_model, num_workers=2, failure=failure, **options) as trainer:
        trainer.evaluate(x[:8], y[:8], verbose=0)
        hosts = [worker.node_id for worker in trainer.workers]
        history = trainer.fit(**data, epochs=9999, callbacks=[Sizes(here / "sizes.txt", [2, 1], here / "enough")])
        weights = trainer.get_weights()
    with dtrain.Trainer(make_exact_model, **options) as trainer:
        trainer.fit(**data, epochs=len(history.epoch))
        control = trainer.get_weights()
    found = {
        "hosts": len(set(hosts)),
        "off": max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(weights, control, strict=True)),
        "recoveries": [recovery.cause for recovery in history.recoveries],
    }
    (here / "found.json").write_text(json.dumps(found))


@pytest.mark.timeout(400)
def test_a_short_cut_is_ridden_out_and_a_long_one_counts_as_a_death(machines: Machines, tmp_path: Path) -> None:
    file = tmp_path / "sizes.txt"

    def steps() -> int:
        return len(file.read_text().split()) if file.exists() else 0

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + DEADLINE
        while steps() < number:
            assert driver.poll() is None, (tmp_path / "ray.log").read_text()[-2000:]
            assert time.monotonic() < deadline, f"{steps()} of {number} steps"
            time.sleep(0.1)

    program = f"import test_link; test_link.train({machines.ADDRESSES[0] + ':6379'!r}, {str(tmp_path)!r})"
    machines.environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    driver = machines.run(0, sys.executable, "-c", program)
    wait_for(20)
    machines.cut()
    time.sleep(3.5)  # TCP tries again after 6.2 s at the latest
    stood = steps()
    machines.mend()
    wait_for(stood + 50)
    assert sizes_in(file) == [2]
    machines.cut()
    cut_at = time.monotonic()
    while sizes_in(file) != [2, 1]:
        wait_for(steps() + 1)
    seconds = time.monotonic() - cut_at
    (tmp_path / "enough").touch()
    assert driver.wait(DEADLINE) == 0, (tmp_path / "ray.log").read_text()[-2000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["hosts"] == 2 and found["off"] < 1e-10
    (cause,) = found["recoveries"]
    assert "has not answered" in cause
    print(f"three steps further {seconds:.1f} s after the cut, of which {HANG_TIMEOUT:g} s are hang_timeout")
