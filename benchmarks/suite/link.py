"""Owns work whose gradients travel over a slow cable: between two network namespaces, at a given rate.

The ranks are plain processes with dtrain's replicas, its rendezvous and its Horovod, without Ray: nothing in the loop
over steps would talk to it.
"""

import ctypes
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import tensorflow as tf

from benchmarks.suite.contenders import check_weights, reference_weights
from benchmarks.suite.measure import Rounds, Spread, spread
from benchmarks.suite.peers import CHECK_STEPS, use_threads
from benchmarks.suite.processes import Group
from benchmarks.suite.work import WORKS, model_fn
from dtrain import wire
from dtrain.collective import HorovodCollective, LocalCollective
from dtrain.data.source import ArraySource
from dtrain.rendezvous import RendezvousServer, assign
from dtrain.replica import Replica
from dtrain.types import BatchPlan, FitPlan, Position, Segment

GIGABIT = 1e9
REDUCED_BYTES = 100_000_000
SUMS = 3
"""So many all-reduces are timed in a block."""
MANY_ROWS = 2048
"""Of a mini-batch that takes about as long to compute as its gradients take at a gigabit a second."""
CLONE_NEWNET = 0x40000000


class Cable:
    """Two namespaces, joined. Making them needs root and iproute2."""

    ADDRESSES = "10.78.0.1", "10.78.0.2"

    def __init__(self) -> None:
        self.namespaces = [f"dtb{os.getpid()}-{number}" for number in range(2)]
        try:
            for name in self.namespaces:
                _run("ip", "netns", "add", name)
            first, second = self.namespaces
            _run("ip", "-n", first, "link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", second)
            for name, address in zip(self.namespaces, self.ADDRESSES, strict=True):
                _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth0")
                _run("ip", "-n", name, "link", "set", "eth0", "up")
                _run("ip", "-n", name, "link", "set", "lo", "up")
        except BaseException:
            self.close()
            raise

    def limit(self, bits_per_second: float) -> None:
        """From now on so much passes in each direction."""
        shape = f"rate {bits_per_second:.0f}bit burst 256kb latency 400ms".split()
        for name in self.namespaces:
            _run("tc", "-n", name, "qdisc", "replace", "dev", "eth0", "root", "tbf", *shape)

    def close(self) -> None:
        for name in self.namespaces:
            with suppress(OSError, subprocess.CalledProcessError):
                _run("ip", "netns", "delete", name)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True)


class Rank:
    """One of the two, with a replica for each contender."""

    def __init__(self, rank: int, ranks: int, namespaces: list[str]) -> None:
        with Path("/run/netns", namespaces[rank]).open() as namespace:
            if ctypes.CDLL(None, use_errno=True).setns(namespace.fileno(), CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "no namespace can be entered")
        use_threads()
        self.member = assign(["first", "second"], 0)[rank]
        self.collective = HorovodCollective(self.member)
        self.fits: dict[str, Fit] = {}

    def serve(self) -> str:
        """Where the ranks might meet: those of either do."""
        self.server = RendezvousServer(Cable.ADDRESSES[self.member.rank])
        return self.server.new_scope().address

    def join(self, address: str) -> None:
        self.collective.join(self.member, address, "eth0")

    def add(self, who: str, name: str, batch_size: int, bucket_bytes: int, alone: bool) -> None:
        self.fits[who] = Fit(LocalCollective() if alone else self.collective, name, batch_size, bucket_bytes)

    def check(self, name: str) -> list[Any]:
        """The weights after the steps that every contender is checked with."""
        return Fit(self.collective, name, WORKS[name].batch_size, wire.BUCKET_BYTES, CHECK_STEPS).check()

    def block(self, who: str) -> float:
        return self.fits[who].block()

    def all_reduce(self) -> float:
        """Seconds to sum so many bytes."""
        numbers = tf.ones([REDUCED_BYTES // 4])
        seconds = []
        for _ in range(SUMS):
            began = time.perf_counter()
            self.collective.all_reduce([numbers], "numbers")
            seconds.append(time.perf_counter() - began)
        return min(seconds)


class Fit:
    """A replica in a fit that goes on, an epoch a block."""

    def __init__(self, collective: Any, name: str, batch_size: int, bucket_bytes: int, steps: int = 0) -> None:
        work = replace(WORKS[name], batch_size=batch_size)
        self.steps, self.bucket_bytes, self.epoch = steps or work.steps, bucket_bytes, 0
        x, y = work.data(self.steps)
        if isinstance(collective, LocalCollective):  # as many rows as in the group
            x, y, batch_size = x[: len(x) // 2], y[: len(y) // 2], batch_size // 2
        self.replica = Replica(model_fn(work), collective)
        self.replica.begin_fit(FitPlan(BatchPlan(len(x), batch_size), 1000), ArraySource(x, y))

    def check(self) -> list[Any]:
        self.block()
        weights: list[Any] = self.replica.model.get_weights()
        return weights

    def block(self) -> float:
        """Seconds a step."""
        with patch.object(wire, "BUCKET_BYTES", self.bucket_bytes):
            result = self.replica.run(Segment(Position(self.epoch, 0), self.steps))
        self.epoch += 1
        return result.seconds / result.num_steps


class Linked:
    """The two ranks, joined by a cable."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            self.cable = Cable()
            stack.callback(self.cable.close)
            self.group = Group(Rank, 2, self.cable.namespaces)
            stack.callback(self.group.close)
            address = self.group.call("serve")[0]
            self.group.call("join", address)
            self.close = stack.pop_all().close

    def check(self, name: str) -> None:
        """Raises where what it trains is not what one process trains."""
        largest = check_weights(name, self.group.call("check", name), reference_weights(name))
        print(f"  {name}: ready; weights within {largest:.1e}", file=sys.stderr, flush=True)

    def add(
        self, who: str, name: str, batch_size: int, bucket_bytes: int = wire.BUCKET_BYTES, alone: bool = False
    ) -> None:
        self.group.call("add", who, name, batch_size, bucket_bytes, alone)

    def block(self, who: str, rate: float) -> float:
        """Seconds a step over a cable of so many bits a second."""
        self.cable.limit(rate)
        return float(max(self.group.call("block", who)))

    def all_reduce(self, rate: float) -> float:
        self.cable.limit(rate)
        return float(max(self.group.call("all_reduce")))


@contextmanager
def overlapping(ours: str) -> Iterator[Mapping[str, Any]]:
    """Steps with sums in buckets, with one sum, and without any, at the rate where sums take as long as gradients."""
    linked = Linked()
    try:
        linked.check("large")
        linked.add(ours, "large", MANY_ROWS)
        linked.add("one sum", "large", MANY_ROWS, bucket_bytes=1 << 62)
        linked.add("no sum", "large", MANY_ROWS, alone=True)
        alone = min(linked.block("no sum", GIGABIT) for _ in range(2))
        rate = 8 * REDUCED_BYTES / (alone * 2 / 3)  # of a step, a third is the forward pass
        print(f"  a step without sums: {alone:.2f} s; {rate / 1e9:.2f} Gbit/s", file=sys.stderr, flush=True)
        blocks = {who: lambda who=who: linked.block(who, rate) for who in (ours, "one sum", "no sum")}
        yield {**blocks, "all-reduce": lambda: linked.all_reduce(GIGABIT)}
    finally:
        linked.close()


@contextmanager
def accumulating(ours: str) -> Iterator[Mapping[str, Any]]:
    """Steps of which every fourth updates, and steps that all do; and both without sums."""
    linked = Linked()
    try:
        linked.check("accumulating")
        for who, name in ((ours, "accumulating"), ("every step", "large")):
            linked.add(who, name, WORKS[name].batch_size)
            linked.add(f"{who}, no sum", name, WORKS[name].batch_size, alone=True)
        names = (who for each in (ours, "every step") for who in (each, f"{each}, no sum"))
        yield {who: lambda who=who: linked.block(who, GIGABIT) for who in names}
    finally:
        linked.close()


def to_ring_bound(rounds: Rounds) -> Spread:
    """The time of an all-reduce to what its bytes take on the cable: with 2 ranks each sends them once."""
    bound = 8 * REDUCED_BYTES / GIGABIT
    return spread([min(pair) / bound for pair in rounds["all-reduce"]])


def exposed(rounds: Rounds, above: tuple[str, str], below: tuple[str, str]) -> Spread:
    """What sums add to a step, to what they add to another: of each, the contender with sums and the one without."""

    def added(pair: tuple[str, str], number: int) -> float:
        with_sums, without = (min(rounds[name][number]) for name in pair)
        return with_sums - without

    return spread([added(above, number) / added(below, number) for number in range(len(rounds[above[0]]))])
