"""Claims about the lease of a run: one driver at a time, a dead one is no obstacle, a fenced one learns of it."""

import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from dtrain import lease as module
from dtrain.errors import CheckpointError, ConfigError, TakenOver
from dtrain.lease import Lease
from dtrain.storage import Folder

DRIVER = """
import os, subprocess, sys
from dtrain.errors import CheckpointError, ConfigError
from dtrain.lease import Lease

children = []

def acquire(url):
    global held
    held = Lease.acquire(url)

def release():
    held.release()

def start_children():
    if os.fork() == 0:  # as multiprocessing does
        sys.stdin.read()
        os._exit(0)
    children.append(subprocess.Popen([sys.executable, "-c", "import sys; sys.stdin.read()"]))

def take_turns(url, times):
    for _ in range(int(times)):
        try:
            with Lease.acquire(url):
                os.mkdir(url + "/only one")
                os.rmdir(url + "/only one")
        except ConfigError:
            pass

def fork_and_release(url):
    with Lease.acquire(url, sleep=lambda seconds: None) as lease:
        child = os.fork()
        if child == 0:
            lease.release()
            try:
                lease.check()
            except CheckpointError:
                os._exit(0)
            os._exit(1)
        lease.check()
        status = os.waitpid(child, 0)[1]
        lease.check()
        try:
            Lease.acquire(url)
        except ConfigError:
            return status

def loaded():
    return sorted({"tensorflow", "keras", "ray", "mlflow", "numpy"} & set(sys.modules))

for line in sys.stdin:
    verb, *arguments = line.split()
    try:
        print("done", globals()[verb](*arguments), flush=True)
    except Exception as error:
        print(type(error).__name__, error, flush=True)
"""


class Driver:
    """A process that takes leases."""

    def __init__(self) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", DRIVER], stdin=pipe, stdout=pipe, text=True)

    def tell(self, *words: str) -> None:
        assert self.process.stdin is not None
        print(*words, file=self.process.stdin, flush=True)

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, *words: str) -> str:
        self.tell(*words)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def drivers() -> Iterator[list[Driver]]:
    pool = [Driver() for _ in range(4)]
    yield pool
    for driver in pool:
        with driver.process:
            driver.kill()


@pytest.fixture
def mortal() -> Iterator[Driver]:
    driver = Driver()
    with driver.process:
        yield driver
        driver.kill()


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def take(clock: Clock) -> Iterator[Callable[..., Lease]]:
    """Takes leases whose time is the clock's."""
    taken = []

    def take(url: str, sleep: Callable[[float], object] = clock.sleep) -> Lease:
        taken.append(Lease.acquire(url, clock, sleep))
        return taken[-1]

    yield take
    for lease in taken:
        lease.release()


@pytest.fixture
def run(storage: str, tmp_path: Path) -> str:
    (tmp_path / "store" / "run 1").mkdir(parents=True)
    return f"{storage}/run 1"


@pytest.fixture
def remote() -> str:
    return f"memory://{uuid.uuid4().hex}/run"


def facts(url: str) -> dict[str, Any]:
    said = json.loads(Folder(url).read(module.LEASE))
    assert isinstance(said, dict)
    return said


# Everywhere -----------------------------------------------------------------------------------------------------------


def test_a_second_driver_is_told_who_holds_the_run(run: str, take: Callable[..., Lease]) -> None:
    first = take(run)
    said = facts(run)
    with pytest.raises(ConfigError) as refused:
        take(run)
    for fact in (f"run_name={Path(run).name!r}", f"process {os.getpid()}", said["host"], said["user"], said["since"]):
        assert fact in str(refused.value)
    first.check()


def test_a_released_lease_is_free_and_leaves_nothing(run: str, take: Callable[..., Lease]) -> None:
    with take(run) as first:
        first.check()
    assert Folder(run).entries() == {}
    second = take(run)
    first.release()  # the second time does nothing to the second's
    second.check()
    with pytest.raises(CheckpointError, match="is not held by this process"):
        first.check()


def test_leases_of_two_runs_are_independent(run: str, take: Callable[..., Lease]) -> None:
    runs = [Folder(run) / name for name in ("a", "b")]
    for folder in runs:
        folder.make()
    for lease in [take(folder.url) for folder in runs]:
        lease.check()


@pytest.mark.parametrize("data", [b"", b"\xff\0", b"[]", b"{}", b"[" * 4000, b'{"token": 1}', b"x" * 10_000])
def test_a_file_that_no_holder_wrote_holds_nothing(run: str, take: Callable[..., Lease], data: bytes) -> None:
    Folder(run).write(module.LEASE, data)
    take(run).check()


def test_a_holder_that_would_write_to_the_terminal_is_not_believed(remote: str, take: Callable[..., Lease]) -> None:
    first = take(remote)
    for change in ({"host": "\x1b[2J"}, {"pid": "1"}, {"renewed": float("inf")}, {"more": 1}):
        Folder(remote).write(module.LEASE, json.dumps({**facts(remote), **change}).encode())
        with pytest.raises(CheckpointError, match="was taken over by somebody who removed its lease"):
            first.check()
        (first := take(remote)).check()


def test_a_holder_whose_lease_was_taken_over_is_fenced(run: str, take: Callable[..., Lease]) -> None:
    old = take(run)
    Folder(run).remove_file(module.LEASE)
    with pytest.raises(CheckpointError, match="taken over by somebody who removed its lease"):
        old.check()
    new = take(run)
    with pytest.raises(CheckpointError, match=r"was taken over by process \d+.*writes no more checkpoints"):
        old.check()
    old.release()
    new.check()


@pytest.mark.parametrize("kind", ["local", "memory"])
def test_a_forked_child_holds_nothing_and_gives_nothing_back(kind: str, tmp_path: Path, drivers: list[Driver]) -> None:
    url = str(tmp_path) if kind == "local" else "memory://run"
    assert drivers[0].do("fork_and_release", url) == "done 0"


# Local disks ----------------------------------------------------------------------------------------------------------


def test_exactly_one_wins_each_of_100_races(tmp_path: Path, drivers: list[Driver]) -> None:
    for race in range(100):
        folder = tmp_path / str(race)
        folder.mkdir()
        for driver in drivers:
            driver.tell("acquire", str(folder))
        answers = [driver.answer() for driver in drivers]
        (winner,) = [driver for driver, answer in zip(drivers, answers, strict=True) if answer == "done None"]
        refused = [answer for answer in answers if answer != "done None"]
        assert all(f"is being trained by process {winner.process.pid} of user" in answer for answer in refused)
        assert winner.do("release") == "done None"


def test_leases_that_come_and_go_are_never_two(tmp_path: Path, drivers: list[Driver]) -> None:
    for driver in drivers:
        driver.tell("take_turns", str(tmp_path), "300")
    assert [driver.answer() for driver in drivers] == ["done None"] * 4


def test_a_killed_drivers_lease_is_taken_over_at_once_while_its_children_live(
    tmp_path: Path, mortal: Driver, take: Callable[..., Lease]
) -> None:
    assert mortal.do("acquire", str(tmp_path)) == "done None"
    assert mortal.do("start_children") == "done None"
    with pytest.raises(ConfigError, match=f"is being trained by process {mortal.process.pid} of user"):
        take(str(tmp_path))
    mortal.kill()
    take(str(tmp_path)).check()


def test_the_lease_is_for_its_owner_alone(tmp_path: Path, take: Callable[..., Lease]) -> None:
    take(str(tmp_path))
    assert (tmp_path / module.LEASE).stat().st_mode & 0o777 == 0o600


def test_what_cannot_be_locked_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="run_name='missing' in .* cannot be locked .* No such file"):
        Lease.acquire(str(tmp_path / "missing"))
    for name, make in {"folder": Path.mkdir, "link": lambda path: path.symlink_to("/etc/passwd")}.items():
        (tmp_path / name).mkdir()
        make(tmp_path / name / module.LEASE)
        with pytest.raises(ConfigError, match=f"run_name='{name}' in .* cannot be locked"):
            Lease.acquire(str(tmp_path / name))

    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    with pytest.raises(ConfigError, match="Operation not supported; mend that, or give another storage_path"):
        Lease.acquire(str(tmp_path))


def test_a_run_whose_folder_was_replaced_is_another_run(tmp_path: Path, take: Callable[..., Lease]) -> None:
    (tmp_path / "run").mkdir()
    old = take(str(tmp_path / "run"))
    (tmp_path / "run").rename(tmp_path / "moved away")
    (tmp_path / "run").mkdir()
    new = take(str(tmp_path / "run"))
    with pytest.raises(CheckpointError, match="was taken over"):
        old.check()
    new.check()


def test_taking_a_lease_loads_no_large_library(drivers: list[Driver]) -> None:
    assert drivers[0].do("loaded") == "done []"


# Object stores --------------------------------------------------------------------------------------------------------


def test_a_lease_that_is_not_renewed_expires_and_its_holder_is_fenced(
    remote: str, clock: Clock, take: Callable[..., Lease]
) -> None:
    old = take(remote)
    clock.now += 50
    with pytest.raises(
        ConfigError, match=r"heard of 52 s ago; end it, or if it is dead try again in 8 s or remove memory:"
    ):
        take(remote)
    old.check()  # renews it
    clock.now += 50
    with pytest.raises(ConfigError, match="is being trained by"):
        take(remote)
    clock.now += 11
    new = take(remote)
    with pytest.raises(CheckpointError, match="was taken over by process"):
        old.check()
    old.release()
    new.check()


def test_exactly_one_wins_each_of_100_races_step_by_step(remote: str) -> None:
    def race(url: str) -> Lease | ConfigError:
        try:
            return Lease.acquire(url, together, together)
        except ConfigError as error:
            return error

    def together(_: float = 0.0) -> float:
        """All have found it free before the first one writes, and all have written before the first one looks."""
        step.wait(30)
        return 0.0

    step = threading.Barrier(4)
    with ThreadPoolExecutor(4) as pool:
        for number in range(100):
            ended = list(pool.map(race, [f"{remote}-{number}"] * 4))
            (winner,) = [lease for lease in ended if isinstance(lease, Lease)]
            assert str(ended).count(f"is being trained by process {os.getpid()}, this very process,") == 3
            winner.release()


def test_a_lease_is_renewed_while_its_holder_lives(
    remote: str, clock: Clock, take: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.001)
    held = take(remote)
    clock.now += 1000
    deadline = time.monotonic() + 30
    while facts(remote)["renewed"] != clock.now:
        assert time.monotonic() < deadline
    held.release()
    assert Folder(remote).entries() == {}


def test_a_holder_finds_out_by_itself_that_another_has_its_lease(
    remote: str, take: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RENEW_SECONDS", 0.001)
    held = take(remote)
    held.check_known()
    mine = facts(remote)
    with monkeypatch.context() as patch:
        patch.setattr(held, "_write", lambda: None)  # or it might write over the other's in this very moment
        Folder(remote).replace(module.LEASE, json.dumps({**mine, "token": "another's"}).encode())
        deadline = time.monotonic() + 30
        with pytest.raises(TakenOver):
            while time.monotonic() < deadline:
                held.check_known()


def test_a_store_that_does_not_answer_fails_the_check_and_not_the_lease(
    remote: str, take: Callable[..., Lease], monkeypatch: pytest.MonkeyPatch
) -> None:
    held = take(remote)

    def away(*arguments: Any) -> bytes:
        raise OSError("no route to host")

    for verb, message in {"read": "cannot be read: no route", "replace": "cannot be renewed: no route"}.items():
        with monkeypatch.context() as patch:
            patch.setattr(Folder, verb, away)
            with pytest.raises(CheckpointError, match=message):
                held.check()
            with pytest.raises(ConfigError, match="no route to host"):
                Lease.acquire(f"{remote}-2")
    held.check()
