"""Owns the rows: which work, who does it, which ratios are taken, and what they must reach."""

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.suite import contenders, measure, passes
from benchmarks.suite.contenders import Horovod, Independent, MirroredStrategy, Ours
from benchmarks.suite.first_step import Script, WorkerStart
from benchmarks.suite.measure import Rounds, Spread
from benchmarks.suite.processes import Group

OURS, ONE_WORKER = "dtrain", "one worker"


@dataclass(frozen=True)
class Ratio:
    """What is compared, and the bar.

    Attributes:
        title: what is divided by what.
        of: takes the ratio of a row's rounds.
        peer: the contender whose seconds stand beside dtrain's.
        bar: what the median has to reach.
        at_most: the bar is an upper one.
    """

    title: str
    of: Callable[[Rounds], Spread]
    peer: str
    bar: float
    at_most: bool

    def is_met(self, value: float) -> bool:
        return value <= self.bar if self.at_most else value >= self.bar


@dataclass(frozen=True)
class Row:
    """A piece of work.

    Attributes:
        name: for BENCH=.
        number: its place in the list of bars.
        title: what the work is.
        unit: what the contenders' seconds are for.
        start: makes the contenders, by name, the first of which is dtrain; checks them; closes them at the end.
        ratios: what is taken.
        share: of the rounds that are asked for, how many this row does; its blocks are long.
    """

    name: str
    number: int
    title: str
    unit: str
    start: Callable[[], Any]
    ratios: tuple[Ratio, ...]
    share: float = 1.0


def time_ratio(title: str, peer: str, bar: float) -> Ratio:
    """dtrain's time over the peer's: at most the bar."""
    return Ratio(title, lambda rounds: measure.ratio(rounds, OURS, peer), peer, bar, at_most=True)


def throughput_ratio(title: str, peer: str, bar: float) -> Ratio:
    """dtrain's throughput over the peer's: at least the bar."""
    return Ratio(title, lambda rounds: measure.ratio(rounds, peer, OURS), peer, bar, at_most=False)


@contextlib.contextmanager
def steps(name: str, kinds: Mapping[str, Callable[[], contenders.Contender]]) -> Iterator[Mapping[str, Any]]:
    """Contenders of training steps, each of which has ended with the weights of one plain Keras process."""
    references = {False: contenders.reference_weights(name)}
    with contextlib.ExitStack() as stack:
        started: dict[str, contenders.Contender] = {}
        for who, make in kinds.items():
            started[who] = make()
            stack.callback(started[who].close)
            alone = who == ONE_WORKER  # on whole mini-batches, where TensorFlow's determinism shows most
            if alone not in references:
                references[alone] = contenders.reference_weights(name, deterministic=alone)
            largest = contenders.check_weights(who, started[who].check(), references[alone])
            print(f"  {who}: ready; weights within {largest:.1e}", file=sys.stderr, flush=True)
        references.clear()
        yield {who: contender.block for who, contender in started.items()}


@contextlib.contextmanager
def evaluations(name: str, verb: str) -> Iterator[Mapping[str, Any]]:
    with contextlib.ExitStack() as stack:
        trainer = passes.trainer_of(name)
        stack.callback(trainer.shutdown)
        ours = passes.OurPass(trainer, name, verb)
        difference = passes.check_results(OURS, np.asarray(ours.check()[0]), name, verb)
        print(f"  {OURS}: ready; results within {difference:.1e}", file=sys.stderr, flush=True)
        group = Group(passes.peers.PlainKeras, 2, name, passes.STEPS)
        stack.callback(group.close)
        yield {OURS: ours.block, "KI": passes.KerasPass(group, name, verb).block}


@contextlib.contextmanager
def first_steps() -> Iterator[Mapping[str, Any]]:
    import ray

    address = ray.get_runtime_context().gcs_address
    scripts = {OURS: Script("dtrain", address), "plain": Script("plain"), "worker start": WorkerStart()}
    yield {who: script.block for who, script in scripts.items()}


ROWS = (
    Row(
        "mlp",
        1,
        "MLP 100-64-10, 64 rows over 2 workers, a step",
        "step",
        lambda: steps(
            "mlp",
            {
                OURS: lambda: Ours("mlp"),
                "RH": lambda: Horovod("mlp"),
                "RH tuned": lambda: Horovod("mlp", "flat", HOROVOD_CYCLE_TIME="0.2"),
                "MW": lambda: MirroredStrategy("mlp"),
            },
        ),
        (
            time_ratio("dtrain / RH", "RH", 0.6),
            time_ratio("dtrain / RH tuned", "RH tuned", 0.9),
            time_ratio("dtrain / MW", "MW", 0.25),
        ),
    ),
    Row(
        "cnn",
        2,
        "CNN 28 by 28, 225k parameters, 128 rows over 2 workers",
        "step",
        lambda: steps(
            "cnn",
            {
                OURS: lambda: Ours("cnn"),
                "KI": lambda: Independent("cnn"),
                ONE_WORKER: lambda: Ours("cnn", workers=1),
            },
        ),
        (
            throughput_ratio("throughput / KI", "KI", 0.95),
            throughput_ratio("two workers / one", ONE_WORKER, 1.85),
        ),
    ),
    Row(
        "deep",
        4,
        "200 small variables, 64 rows over 2 workers",
        "step",
        lambda: steps("deep", {OURS: lambda: Ours("deep"), "RH per tensor": lambda: Horovod("deep", "single")}),
        (time_ratio("dtrain / RH per tensor", "RH per tensor", 0.7),),
    ),
    Row(
        "embedding",
        5,
        "embedding 1M by 64, 5,000 rows touched a step, 2 workers",
        "step",
        lambda: steps(
            "embedding",
            {OURS: lambda: Ours("embedding"), "dense": lambda: Ours("embedding", steps=3, sparse_as_dense=True)},
        ),
        (throughput_ratio("dense / sparse, time", "dense", 10.0),),
        share=0.6,
    ),
    Row(
        "first-step",
        9,
        "first step of a script, 2 workers on a warm Ray",
        "script",
        first_steps,
        (
            Ratio(
                "dtrain / (plain + C + 1 s)",
                lambda rounds: measure.ratio_to_sum(rounds, OURS, ["plain", "worker start"], 1.0),
                "plain",
                1.0,
                at_most=True,
            ),
        ),
        share=0.4,
    ),
    Row(
        "evaluate",
        13,
        "CNN, evaluate 20,480 rows, 2 workers",
        "row",
        lambda: evaluations("cnn", "evaluate"),
        (throughput_ratio("throughput / KI", "KI", 0.95),),
    ),
    Row(
        "predict",
        13,
        "CNN, predict 20,480 rows, 2 workers",
        "row",
        lambda: evaluations("cnn", "predict"),
        (throughput_ratio("throughput / KI", "KI", 0.95),),
    ),
)
