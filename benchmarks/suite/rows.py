"""Owns the rows: which work, who does it, which ratios are taken, and what they must reach."""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

import dtrain
from benchmarks.suite import contenders, measure, passes
from benchmarks.suite.contenders import Horovod, Independent, MirroredStrategy, Ours, SlowInput, mlflow_server
from benchmarks.suite.first_step import Script, WorkerStart
from benchmarks.suite.learning import OPTIONS, learners, optional
from benchmarks.suite.link import accumulating, exposed, overlapping, to_ring_bound
from benchmarks.suite.many import growth, many_ranks
from benchmarks.suite.measure import Rounds, Spread
from benchmarks.suite.processes import Group
from benchmarks.suite.work import WORKS

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
        ours: the contender whose seconds stand as dtrain's.
    """

    title: str
    of: Callable[[Rounds], Spread]
    peer: str
    bar: float
    at_most: bool
    ours: str = OURS

    def is_met(self, value: float) -> bool:
        return value <= self.bar if self.at_most else value >= self.bar


@dataclass(frozen=True)
class Row:
    """A piece of work.

    Attributes:
        name: for BENCH=.
        number: its place in the list of bars; 0: it is none of those.
        title: what the work is.
        unit: what the contenders' seconds are for; "epochs" and "GiB": they are no seconds, but those.
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


def _ratio_of(title: str, ours: str, peer: str, bar: float) -> Ratio:
    """The time of another one of dtrain's over a peer's."""
    return Ratio(title, lambda rounds: measure.ratio(rounds, ours, peer), peer, bar, at_most=True, ours=ours)


def _epochs(title: str, ours: str, peer: str = "N=1") -> Ratio:
    return Ratio(title, lambda rounds: measure.ratio_of_all(rounds, ours, peer), peer, 1.1, at_most=True, ours=ours)


def _alone(title: str, ours: str, bar: float) -> Ratio:
    """No ratio, but what a contender took."""
    return Ratio(title, lambda rounds: measure.seconds(rounds, ours), ours, bar, at_most=True, ours=ours)


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


@contextlib.contextmanager
def memory(name: str) -> Iterator[Mapping[str, Any]]:
    """What a worker holds, and one plain Keras process with as many rows of each mini-batch."""
    with contextlib.ExitStack() as stack:
        contenders_of: dict[str, Any] = {OURS: Ours(name), "plain": Independent(name)}
        for contender in contenders_of.values():
            stack.callback(contender.close)
        yield {who: contender.peak_memory for who, contender in contenders_of.items()}


@contextlib.contextmanager
def slow_input() -> Iterator[Mapping[str, Any]]:
    """The same work with data that come as fast as the steps are made, without, and those data alone."""
    with steps("cnn", {"steps": lambda: Ours("cnn")}) as blocks:
        rows = WORKS["cnn"].batch_size // 2
        ours = SlowInput("cnn", blocks["steps"]() / rows)
        try:
            yield {OURS: ours.block, **blocks, "input": ours.read}
        finally:
            ours.close()


@contextlib.contextmanager
def tracked() -> Iterator[Mapping[str, Any]]:
    """A fit with five metrics on record, and without a record."""
    with tempfile.TemporaryDirectory() as folder, mlflow_server(f"{folder}/server") as server:

        def to(uri: str) -> Callable[[], Ours]:
            config = dtrain.MLflowConfig(tracking_uri=uri, log_model=False)
            return lambda: Ours("metrics", tracking=config, storage_path=folder)

        kinds = {OURS: to(f"sqlite:///{folder}/mlflow.db"), "server": to(server), "no record": lambda: Ours("metrics")}
        with steps("metrics", kinds) as blocks:
            yield blocks


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
        "large",
        3,
        "25M parameters, 64 rows over 2 workers",
        "step",
        lambda: steps(
            "large", {OURS: lambda: Ours("large"), "RH": lambda: Horovod("large"), "KI": lambda: Independent("large")}
        ),
        (
            Ratio(
                "what sums add to a step, dtrain / RH",
                lambda rounds: exposed(rounds, (OURS, "KI"), ("RH", "KI")),
                "RH",
                0.75,
                at_most=True,
            ),
        ),
        share=0.6,
    ),
    Row(
        "link",
        3,
        "25M parameters over a cable",
        "step",
        lambda: overlapping(OURS),
        (
            Ratio(
                "one sum / buckets, where sums take as long as the backward pass",
                lambda rounds: measure.ratio(rounds, "one sum", OURS),
                "one sum",
                1.3,
                at_most=False,
            ),
            Ratio("all-reduce of 100 MB at 1 Gbit/s / ring bound", to_ring_bound, "all-reduce", 1.1, at_most=True),
        ),
        share=0.3,
    ),
    Row(
        "accumulation",
        14,
        "25M parameters at 1 Gbit/s, every fourth step updates",
        "step",
        lambda: accumulating(OURS),
        (
            Ratio(
                "what sums add to a step, accumulating / not",
                lambda rounds: exposed(rounds, (OURS, f"{OURS}, no sum"), ("every step", "every step, no sum")),
                "every step",
                0.3,
                at_most=True,
            ),
        ),
        share=0.3,
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
        "input",
        6,
        "CNN on 2 workers, data that come as fast as the steps are made",
        "step",
        slow_input,
        (
            Ratio(
                "throughput / the slower of steps and input",
                lambda rounds: measure.ratio_to_slower(rounds, ["steps", "input"], OURS),
                "steps",
                0.95,
                at_most=False,
            ),
        ),
    ),
    Row(
        "tracking",
        8,
        "CNN with five metrics on 2 workers, journal and MLflow at their usual rate",
        "step",
        tracked,
        (
            time_ratio("SQLite / no record", "no record", 1.01),
            _ratio_of("server / no record", "server", "no record", 1.01),
        ),
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
        "epochs",
        11,
        "97 % on digits with the linear scaling rule, 16 rows a worker",
        "epochs",
        lambda: learners(OURS),
        (_epochs("4 workers / 1", OURS), _epochs("2 workers / 1", "N=2")),
        share=0.3,
    ),
    Row(
        "options",
        11,
        "97 % on digits with what is not exact, 32 rows over 2 workers",
        "epochs",
        optional,
        tuple(_epochs(f"{name} / exact", name, "exact") for name in OPTIONS if name != "exact"),
        share=0.3,
    ),
    Row(
        "ranks",
        12,
        "2, 4, 8 and 16 ranks with nothing to do",
        "sum of 8 bytes, start, second",
        lambda: many_ranks(OURS),
        (
            Ratio(
                "sum of 8 bytes over 16 and 2 ranks: exponent of growth",
                lambda rounds: growth(rounds, OURS),
                "2 ranks",
                1.0,
                at_most=True,
            ),
            _alone("start of 16, seconds", "start of 16", 1.5),
            _alone("start of 2, seconds", "start of 2", 0.2),
            _alone("idle, share of a core", "idle", 0.005),
        ),
        share=0.4,
    ),
    Row(
        "deterministic",
        0,
        "CNN on 2 workers, the same bits in every run",
        "step",
        lambda: steps(  # without, a convolution's gradient rounds otherwise in each run
            "cnn", {OURS: lambda: Ours("cnn"), "not": lambda: Ours("cnn", is_exact=False, deterministic=False)}
        ),
        (time_ratio("deterministic / not", "not", 1.1),),
        share=0.4,
    ),
    Row(
        "batch-norm",
        0,
        "CNN with BatchNormalization on 2 workers, statistics of whole mini-batches",
        "step",
        lambda: steps(
            "normalized",
            {
                # Exact in float64, as tests show; here rounding grows through three normalizations.
                OURS: lambda: Ours("normalized", is_exact=False, sync_batch_norm=True),
                "own rows": lambda: Ours("normalized", is_exact=False),
            },
        ),
        (time_ratio("sync_batch_norm=True / False", "own rows", 1.5),),
        share=0.4,
    ),
    Row(
        "memory",
        0,
        "25M parameters, the most that a worker holds",
        "GiB",
        lambda: memory("large"),
        (time_ratio("a worker / a plain Keras process", "plain", 1.5),),
        share=0.15,
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
