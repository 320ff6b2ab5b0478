"""Owns contenders, driven from the suite's own process: each can be checked, and does a block of work when told to.

`block()` returns seconds a step (a row, for evaluate and predict), whatever is behind it.
"""

import contextlib
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np

import dtrain
from benchmarks.suite import peers
from benchmarks.suite.clock import EpochClock, Fingerprint
from benchmarks.suite.processes import Group
from benchmarks.suite.work import THREADS, WORKS, model_fn
from dtrain.collective import horovod_environment
from dtrain.rendezvous import RendezvousServer, assign

TOLERANCE = 1e-5
"""By how much a float32 weight may differ from that of one plain Keras process."""


class WrongResult(Exception):
    """A contender did not compute what one plain Keras process does."""


class Contender(Protocol):
    """Something that does the work of a row."""

    def check(self) -> list[list[Any]]:
        """The final weights of each rank that can tell them, after CHECK_STEPS mini-batches of the work."""

    def block(self) -> float: ...

    def close(self) -> None: ...


class Ours:
    """dtrain. A block is a fit of two epochs, the second of which is timed, by a callback on rank 0.

    K steps run in one call, so a block gives one number, the mean of its steps: it holds the end of the epoch, and
    whatever the driver does meanwhile.

    Args:
        workers: how many.
        steps: of a block; None: the work's.
        is_exact: it ends with the weights of one plain Keras process; else only ranks are compared.
        options: of `dtrain.Trainer`.
    """

    def __init__(
        self, name: str, workers: int = 2, steps: int | None = None, is_exact: bool = True, **options: Any
    ) -> None:
        self.work, self.workers, self.is_exact = WORKS[name], workers, is_exact
        self.steps = steps or self.work.steps
        self.data = self.work.data(self.steps)
        self.trainer = dtrain.Trainer(
            partial(model_fn, self.work),
            num_workers=workers,
            threads_per_worker=THREADS,
            **{"tracking": False, "checkpoint": False, **options},
        )

    def check(self) -> list[list[Any]]:
        x, y = self.work.data(peers.CHECK_STEPS)
        with tempfile.TemporaryDirectory() as folder:
            self.trainer.fit(
                x, y, batch_size=self.work.batch_size, shuffle=False, verbose=0, callbacks=[Fingerprint(folder)]
            )
            prints = [path.name.split("-") for path in Path(folder).iterdir()]
        if len(prints) != self.workers or len({digest for _, digest in prints}) != 1:
            raise WrongResult(f"{len(prints)} ranks of dtrain ended with different weights")
        return [self.trainer.get_weights()] if self.is_exact else []

    def peak_memory(self) -> float:
        """GiB of the worker that has held most, in a fit."""
        self.block()
        return max(peers.peak_memory(worker.pid) for worker in self.trainer.workers)

    def block(self) -> float:
        clock = EpochClock()
        self.trainer.fit(*self.data, batch_size=self.work.batch_size, epochs=2, verbose=0, callbacks=[clock])
        return clock.seconds[-1] / self.steps

    def close(self) -> None:
        self.trainer.shutdown()


class SlowInput(Ours):
    """dtrain, with a data source that takes so many seconds to read a row."""

    def __init__(self, name: str, seconds: float) -> None:
        super().__init__(name)
        self.source = Slow(*self.data, seconds)
        self.data = (self.source,)

    def read(self) -> float:
        """Seconds to read a worker's rows of a mini-batch."""
        rows = np.arange(self.work.batch_size // self.workers)
        started = time.perf_counter()
        for _ in range(self.steps):
            self.source.read(rows)
        return (time.perf_counter() - started) / self.steps


class Slow(dtrain.data.DataSource):
    """Arrays, of which each row takes some seconds to be read."""

    def __init__(self, x: Any, y: Any, seconds: float) -> None:
        self.x, self.y, self.seconds = x, y, seconds

    def __len__(self) -> int:
        return len(self.y)

    def read(self, indices: Any) -> Any:
        time.sleep(self.seconds * len(indices))
        return self.x[indices], self.y[indices]


class Independent:
    """N plain Keras processes that know nothing of each other, each with its share of every mini-batch.

    What no communication at all would give; so there is nothing to check.
    """

    def __init__(self, name: str, ranks: int = 2) -> None:
        self.group = Group(peers.PlainKeras, ranks, name)

    def check(self) -> list[list[Any]]:
        return []

    def block(self) -> float:
        return max(self.group.call("block"))

    def peak_memory(self) -> float:
        """GiB of the process that has held most, in a fit."""
        return max(self.group.call("peak_memory"))

    def close(self) -> None:
        self.group.close()


class Horovod:
    """The hand-written loop with Horovod as it is released, which neither wakes when work arrives nor sends early.

    A block's number is the median of its steps, timed one by one on rank 0.

    Args:
        settings: of Horovod, as environment variables.
    """

    def __init__(self, name: str, reduction: str = "grouped", ranks: int = 2, **settings: str) -> None:
        self.environment = {"DTRAIN_STOCK_CYCLES": "1", "DTRAIN_STOCK_SCHEDULING": "1", **settings}
        self.members = assign(["node"] * ranks, 0)
        self.server = RendezvousServer()
        self.group = Group(peers.HandWritten, ranks, name, reduction, environment=self.environment)

    def check(self) -> list[list[Any]]:
        with self._joined():
            return self.group.call("check", peers.CHECK_STEPS)

    def block(self) -> float:
        with self._joined():
            return statistics.median(self.group.call("block")[0])

    def close(self) -> None:
        self.group.close()
        self.server.close()

    @contextlib.contextmanager
    def _joined(self) -> Iterator[None]:
        address = self.server.new_scope().address
        self.group.call_each("join", [(horovod_environment(one, address, "lo", 60.0),) for one in self.members])
        yield
        self.group.call("leave")


class MirroredStrategy:
    """MultiWorkerMirroredStrategy; timed as dtrain is, by a callback at the ends of an epoch."""

    def __init__(self, name: str, ranks: int = 2) -> None:
        self.group = Group(peers.Mirrored, ranks, name, _free_ports(ranks), environment={"TF_USE_LEGACY_KERAS": "0"})

    def check(self) -> list[list[Any]]:
        return self.group.call("check", peers.CHECK_STEPS)

    def block(self) -> float:
        return max(self.group.call("block"))

    def close(self) -> None:
        self.group.close()


def reference_weights(name: str, deterministic: bool = False) -> list[Any]:
    """Those that one plain Keras process ends with on the same mini-batches.

    Args:
        deterministic: its operations are, as dtrain's are; the gradient of a convolution then rounds otherwise.
    """
    group = Group(peers.PlainKeras, 1, name, 0, deterministic)
    try:
        weights: list[Any] = group.call("check")[0]
        return weights
    finally:
        group.close()


def check_weights(who: str, ranks: Sequence[Sequence[Any]], reference: Sequence[Any]) -> float:
    """The largest difference from the reference.

    Raises:
        WrongResult: it is too large, or ranks differ among themselves.
    """
    largest = 0.0
    for weights in ranks:
        if not all(np.array_equal(mine, first) for mine, first in zip(weights, ranks[0], strict=True)):
            raise WrongResult(f"ranks of {who} ended with different weights")
        differences = (np.abs(mine - its).max() for mine, its in zip(weights, reference, strict=True))
        largest = max(largest, float(max(differences)))
    if not largest <= TOLERANCE:
        raise WrongResult(f"{who} ended {largest:.1e} from one plain Keras process; {TOLERANCE:.0e} is allowed")
    return largest


@contextlib.contextmanager
def mlflow_server(folder: str) -> Iterator[str]:
    """Where one listens that keeps its runs in a folder."""
    (port,) = _free_ports(1)
    store = ["--backend-store-uri", f"sqlite:///{folder}.db", "--artifacts-destination", folder]
    command = [sys.executable, "-m", "mlflow", "server", *store, "--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        until = time.monotonic() + 120
        while socket.socket().connect_ex(("127.0.0.1", port)):
            if time.monotonic() > until or server.poll() is not None:
                raise RuntimeError("mlflow server does not start")
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
