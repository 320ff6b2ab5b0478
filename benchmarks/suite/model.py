"""What a step costs on so many ranks: measured on 2 and 3, checked on 4, and projected to thousands.

A sum of S bytes over N ranks takes

    cycle + 2 (N - 1) hop + 2 (N - 1) / N * S * turns * byte

on a ring: messages go round twice. Where ranks share a machine's cores they take turns, of which there are N / cores,
or 1, to copy bytes. A step takes as many turns of computing, until the slowest rank is done, and what exchanging adds:
of the form of a sum, but with figures of its own, since the cores are busy then. What disturbs a measurement only
makes it longer, so of several rounds the shortest counts.
"""

import argparse
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from statistics import fmean, median
from typing import Any

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scipy.optimize import nnls

from benchmarks.suite.link import Fit
from benchmarks.suite.peers import use_threads
from benchmarks.suite.processes import Group
from benchmarks.suite.work import WORKS
from dtrain import wire
from dtrain.collective import HorovodCollective, LocalCollective
from dtrain.policy import SEGMENT_SECONDS
from dtrain.rendezvous import RendezvousServer, assign

WORK = "cnn"
ROWS = WORKS[WORK].batch_size // 2
"""Of a mini-batch on each rank."""
SIZES = 8, 1 << 18, 1 << 20, 1 << 22
"""Bytes of the sums that are measured."""
SUMS, STEPS, ROUNDS = 40, 60, 5
CALIBRATED, CHECKED = (2, 3), 4
PROJECTED = 16, 64, 256, 1024, 4096

CALLS_PER_SECOND = 8000
"""So many calls of actors a driver makes; each rank is called twice a segment."""
FAILURES_PER_HOUR = 1 / 8000
"""Of one machine: a thousand fail once in eight hours."""
RECOVERY_SECONDS = 4.2
"""As `make soak` measured it."""


class Rank:
    """A plain process that can be a rank of groups of several sizes."""

    def __init__(self, rank: int, ranks: int) -> None:
        use_threads()
        self.rank = rank
        self.collective: Any = None

    def join(self, size: int, address: str) -> float:
        """Be in a group of so many, or in none; seconds to form it."""
        if self.rank >= size:
            return 0.0
        member = assign(["node"] * size, 0)[self.rank]
        self.collective = HorovodCollective(member)
        began = time.perf_counter()
        self.collective.join(member, address, "lo")
        return time.perf_counter() - began

    def leave(self) -> None:
        if self.collective is not None:
            self.collective.close()
        self.collective = None

    def sum(self, size: int) -> float:
        """Median seconds of a sum of so many bytes."""
        if self.collective is None:
            return 0.0
        numbers = tf.ones([size // 4])
        stamps = [time.perf_counter()]
        for _ in range(SUMS):
            self.collective.all_reduce([numbers], "numbers")
            stamps.append(time.perf_counter())
        return median(after - before for before, after in pairwise(stamps))

    def compute(self, size: int) -> list[float]:
        """Seconds of each of some steps without sums, where so many ranks compute at once."""
        if self.rank >= size:
            return []
        fit = Fit(LocalCollective(), WORK, 2 * ROWS, wire.BUCKET_BYTES, 4)
        return [fit.block() for _ in range(STEPS // 4)][2:]

    def step(self) -> float:
        """Median seconds of a step with sums."""
        if self.collective is None:
            return 0.0
        fit = Fit(self.collective, WORK, ROWS * self.collective.world_size, wire.BUCKET_BYTES, 4)
        return median([fit.block() for _ in range(STEPS // 4)][2:])

    def idle(self) -> float:
        """Share of a core that a rank takes that has nothing to do."""
        used = time.process_time()
        time.sleep(2.0)
        return (time.process_time() - used) / 2.0

    def gradient_bytes(self) -> int:
        fit = Fit(LocalCollective(), WORK, 2 * ROWS, wire.BUCKET_BYTES, 1)
        return 4 * int(fit.replica.model.count_params())


class Ranks:
    """As many of them as are checked."""

    def __init__(self) -> None:
        self.server = RendezvousServer()
        self.group = Group(Rank, CHECKED)

    def close(self) -> None:
        self.group.close()
        self.server.close()

    def most(self, method: str, *arguments: Any) -> float:
        return float(max(self.group.call(method, *arguments)))

    @contextmanager
    def of(self, size: int) -> Iterator[None]:
        """Inside, so many form a group."""
        self.group.call("join", size, self.server.new_scope().address)
        yield
        self.group.call("leave")


class Sums:
    """What a sum takes, fitted to seconds by number of ranks and bytes."""

    def __init__(self, measured: dict[tuple[int, int], float], cores: int) -> None:
        self.cores = cores
        weights = np.array([1 / seconds for seconds in measured.values()])  # relative errors count
        terms = np.array([self._terms(ranks, size) for ranks, size in measured])
        self.cycle, self.hop, self.byte = map(float, nnls(terms * weights[:, None], np.ones(len(weights)))[0])

    def seconds(self, ranks: int, size: int) -> float:
        return float(np.dot(self._terms(ranks, size), [self.cycle, self.hop, self.byte]))

    def _terms(self, ranks: int, size: int) -> list[float]:
        turns = max(1.0, ranks / self.cores)
        return [1.0, 2.0 * (ranks - 1), 2.0 * (ranks - 1) / ranks * size * turns]


def slowest(seconds: Sequence[float], ranks: int) -> float:
    """The mean of the largest of so many draws."""
    draws = np.random.default_rng(0).choice(np.asarray(seconds), (2000, ranks))
    return float(draws.max(axis=1).mean())


def projection(compute: float, spread: float, sums: Sums, size: int, gigabits: float) -> Table:
    """One rank a machine, which has its cores for itself."""
    table = Table("ranks", "step", "of it, sums", "efficiency", "control ring", "driver", "goodput", box=None)
    for ranks in PROJECTED:
        control = sums.cycle + 2 * (ranks - 1) * sums.hop
        total = control + 2 * (ranks - 1) / ranks * size * 8 / (gigabits * 1e9)
        step = compute + spread * math.sqrt(2 * math.log(ranks)) + total
        driver = 2 * ranks / SEGMENT_SECONDS / CALLS_PER_SECOND
        goodput = 1 - ranks * FAILURES_PER_HOUR * RECOVERY_SECONDS / 3600
        cells = [f"{1e3 * step:.1f} ms", f"{1e3 * total:.1f} ms", f"{compute / step:.0%}", f"{1e3 * control:.1f} ms"]
        table.add_row(f"{ranks:,}", *cells, f"{driver:.1%}", f"{goodput:.2%}")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite.model", description=__doc__.split("\n")[0])
    parser.add_argument("--gigabits", type=float, default=10.0, help="of a machine's network, for the projection (10)")
    parser.add_argument("--hop", type=float, help="microseconds from a machine to the next; default: as measured here")
    options = parser.parse_args()
    cores, console, ranks = os.cpu_count() or 1, Console(width=120), Ranks()
    measured: dict[tuple[int, int], float] = {}
    steps: dict[int, float] = {}
    draws: list[float] = []
    try:
        size = int(ranks.most("gradient_bytes"))
        with ranks.of(2):
            idle = ranks.most("idle")
        for _ in track(range(ROUNDS), "measuring", console=console, transient=True):
            draws += [seconds for own in ranks.group.call("compute", min(2, cores)) for seconds in own]
            for number in (*CALIBRATED, CHECKED):
                with ranks.of(number):
                    for each in SIZES:
                        measured[number, each] = min(ranks.most("sum", each), measured.get((number, each), math.inf))
                    steps[number] = min(ranks.most("step"), steps.get(number, math.inf))
    finally:
        ranks.close()
    sums = Sums({key: seconds for key, seconds in measured.items() if key[0] in CALIBRATED}, cores)
    spread = float(np.std(draws))
    computing = {number: max(1.0, number / cores) * slowest(draws, number) for number in (*CALIBRATED, CHECKED)}
    added = {(number, 0): max(1e-6, steps[number] - computing[number]) for number in CALIBRATED}
    expected = sums.seconds(CHECKED, SIZES[0]), computing[CHECKED] + Sums(added, cores).seconds(CHECKED, 0)
    console.print(f"{cores} cores; a sum: cycle {1e6 * sums.cycle:.0f} µs, hop {1e6 * sums.hop:.0f} µs,"
                  f" {1e-9 / max(sums.byte, 1e-15):.2f} GB/s; computing {1e3 * fmean(draws):.2f} ms, spread"
                  f" {1e3 * spread:.2f} ms; idle {idle:.2%} of a core")  # fmt: skip
    seen = measured[CHECKED, SIZES[0]], steps[CHECKED]
    for what, predicted, found in zip(("sum of 8 bytes", "step"), expected, seen, strict=True):
        console.print(
            f"{what}, {CHECKED} ranks: {1e3 * predicted:.2f} ms predicted, {1e3 * found:.2f} ms measured:"
            f" {predicted / found - 1:+.0%}"
        )
    if options.hop is not None:
        sums.hop = options.hop * 1e-6
    console.print(f"One rank a machine, {options.gigabits:g} Gbit/s, {1e6 * sums.hop:.0f} µs a hop:")
    console.print(projection(fmean(draws), spread, sums, size, options.gigabits))
    breaks = math.ceil(1 + (0.1 * 0.1 - sums.cycle) / (2 * sums.hop)) if sums.hop else 0
    console.print(
        f"The control ring takes a tenth of a step of 100 ms from {breaks:,} ranks on; the driver all of its time from"
        f" {int(CALLS_PER_SECOND * SEGMENT_SECONDS / 2):,}."
    )


if __name__ == "__main__":
    main()
