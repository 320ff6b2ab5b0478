"""Owns what many ranks on one machine take that have next to nothing to do: forming a group, 8 bytes, idleness.

The ranks are plain processes over dtrain's rendezvous and its Horovod, without a model: as its workers are underneath.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import pairwise
from statistics import linear_regression, median
from typing import Any

import tensorflow as tf

from benchmarks.suite.measure import Rounds, Spread, spread
from benchmarks.suite.peers import use_threads
from benchmarks.suite.processes import Group
from dtrain.collective import horovod_environment
from dtrain.rendezvous import RendezvousServer, assign

SIZES = 2, 4, 8, 16
SUMS = 100
"""So many all-reduces are timed in a block."""
IDLE_SECONDS = 2.0


class Rank:
    """One of them."""

    def __init__(self, rank: int, ranks: int) -> None:
        use_threads()

    def join(self, environment: dict[str, str] | None) -> float:
        """Form a group, if there is a place in it; seconds that Horovod takes."""
        import horovod.tensorflow as hvd

        if environment is None:
            return 0.0
        os.environ.update(environment)
        started = time.perf_counter()
        hvd.init()
        return time.perf_counter() - started

    def leave(self) -> None:
        import horovod.tensorflow as hvd

        hvd.shutdown()

    def sum(self) -> float:
        """Seconds that it takes to sum 8 bytes, the median."""
        import horovod.tensorflow as hvd

        if not hvd.is_initialized():
            return 0.0
        stamps = [time.perf_counter()]
        for _ in range(SUMS):
            hvd.allreduce(tf.constant([1.0, 2.0]), op=hvd.Sum, name="eight")
            stamps.append(time.perf_counter())
        return median(after - before for before, after in pairwise(stamps))

    def idle(self) -> float:
        """Seconds of a processor in a second with nothing to do."""
        used = time.process_time()
        time.sleep(IDLE_SECONDS)
        return (time.process_time() - used) / IDLE_SECONDS


class Ranks:
    """As many processes as the largest group has, some of which form one."""

    def __init__(self) -> None:
        self.server = RendezvousServer()
        self.group = Group(Rank, max(SIZES))

    def close(self) -> None:
        self.group.close()
        self.server.close()

    def start(self, size: int) -> float:
        """Seconds to form a group of so many, of the slowest."""
        with self._joined(size) as seconds:
            return max(seconds)

    def sum(self, size: int) -> float:
        with self._joined(size):
            return float(max(self.group.call("sum")))

    def idle(self, size: int) -> float:
        with self._joined(size):
            return float(max(self.group.call("idle")))

    @contextmanager
    def _joined(self, size: int) -> Iterator[list[float]]:
        address = self.server.new_scope().address
        members = assign(["node"] * size, 0)
        places: list[Any] = [horovod_environment(member, address, "lo", 60.0) for member in members]
        places += [None] * (max(SIZES) - size)
        yield self.group.call_each("join", [(place,) for place in places])
        self.group.call("leave")


@contextmanager
def many_ranks(ours: str) -> Iterator[Mapping[str, Any]]:
    """What is measured, by name; `ours` is the sum over the most ranks."""
    ranks = Ranks()
    try:
        sums = {name_of(size, ours): lambda size=size: ranks.sum(size) for size in reversed(SIZES)}
        starts = {f"start of {size}": lambda size=size: ranks.start(size) for size in (SIZES[0], SIZES[-1])}
        yield {**sums, **starts, "idle": lambda: ranks.idle(SIZES[0])}
    finally:
        ranks.close()


def name_of(size: int, ours: str) -> str:
    """The contender that sums over so many."""
    return ours if size == SIZES[-1] else f"{size} ranks"


def growth(rounds: Rounds, ours: str) -> Spread:
    """The exponent k where the time of a sum grows with the number of ranks as N**k, by least squares."""
    logs = [math.log(size) for size in SIZES]

    def slope(number: int) -> float:
        times = [math.log(min(rounds[name_of(size, ours)][number])) for size in SIZES]
        return linear_regression(logs, times).slope

    return spread([slope(number) for number in range(len(rounds[ours]))])
