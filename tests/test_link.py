"""Claims about a network that fails: two machines, which are network namespaces here, joined by a bridge.

The link to the second one is cut as a switch would cut it: packets are lost, and nobody is told.
"""

import contextlib
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

import psutil
import pytest
from followed import Followed

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


class Driver(Followed):
    """A program that trains, on the first of them."""

    def __init__(self, machines: Machines, folder: Path) -> None:
        machines.environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
        here = (f"{machines.ADDRESSES[0]}:6379", str(folder))
        train = f"train(*{here!r}, 2, [2, 1], on_loss='shrink', hang_timeout={HANG_TIMEOUT})"
        program = machines.run(0, sys.executable, "-c", f"from followed import train; {train}")
        super().__init__(folder, DEADLINE, program.poll)


@pytest.mark.timeout(400)
def test_a_short_cut_is_ridden_out_and_a_long_one_counts_as_a_death(machines: Machines, tmp_path: Path) -> None:
    driver = Driver(machines, tmp_path)
    driver.wait_for_steps(20)
    assert len({node for node, _ in driver.workers()}) == 2
    machines.cut()
    time.sleep(3.5)  # TCP tries again after 6.2 s at the latest
    stood = driver.steps()
    machines.mend()
    driver.wait_for_steps(stood + 50)
    assert driver.sizes() == [2]
    machines.cut()
    cut_at = time.monotonic()
    driver.wait_for_sizes(2, 1)
    seconds = time.monotonic() - cut_at
    found = driver.end()
    assert found["off"] < 1e-10
    (cause,) = found["causes"]
    assert "has not answered" in cause
    print(f"three steps further {seconds:.1f} s after the cut, of which {HANG_TIMEOUT:g} s are hang_timeout")
