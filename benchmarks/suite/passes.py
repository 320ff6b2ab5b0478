"""Owns the contenders of `evaluate` and `predict`: the wall clock of the whole verb, data to results.

dtrain has to send the rows to its workers each time; plain Keras processes have theirs already.
"""

import time
from functools import partial
from typing import Any

import numpy as np

import dtrain
from benchmarks.suite import peers
from benchmarks.suite.contenders import TOLERANCE, WrongResult
from benchmarks.suite.processes import Group
from benchmarks.suite.work import THREADS, WORKS, model_fn

STEPS = 160
"""Mini-batches of a pass."""


class OurPass:
    """`evaluate` or `predict` of a Trainer that both share, of as many rows as the work's mini-batches hold."""

    def __init__(self, trainer: dtrain.Trainer, name: str, verb: str) -> None:
        self.trainer, self.work, self.verb = trainer, WORKS[name], verb
        self.x, self.y = self.work.data(STEPS)

    def check(self) -> list[Any]:
        return [np.asarray(self._run())]

    def block(self) -> float:
        started = time.perf_counter()
        self._run()
        return (time.perf_counter() - started) / len(self.y)

    def close(self) -> None:
        self.trainer.shutdown()

    def _run(self) -> Any:
        if self.verb == "predict":
            return self.trainer.predict(self.x, batch_size=self.work.batch_size, verbose=0)
        return self.trainer.evaluate(self.x, self.y, batch_size=self.work.batch_size, verbose=0)


class KerasPass:
    """The same by N plain Keras processes, each with its share of the rows."""

    def __init__(self, group: Group, name: str, verb: str) -> None:
        self.group, self.verb = group, verb
        self.rows = WORKS[name].batch_size * STEPS

    def check(self) -> list[Any]:
        """Of rows in another order than dtrain's, so that only the mean over all can be compared."""
        return []

    def block(self) -> float:
        started = time.perf_counter()
        self.group.call("evaluate" if self.verb == "evaluate" else "predict_and_forget")
        return (time.perf_counter() - started) / self.rows

    def close(self) -> None:
        self.group.close()


def trainer_of(name: str) -> dtrain.Trainer:
    return dtrain.Trainer(
        partial(model_fn, WORKS[name]),
        num_workers=2,
        threads_per_worker=THREADS,
        tracking=False,
        checkpoint=False,
    )


def check_results(who: str, found: Any, name: str, verb: str) -> float:
    """Compares with one plain Keras process on all rows, which has the same weights.

    Raises:
        WrongResult: they differ.
    """
    group = Group(peers.PlainKeras, 1, name, STEPS)
    try:
        expected = np.asarray(group.call(verb)[0])
    finally:
        group.close()
    difference = float(np.abs(found - expected).max())
    if found.shape != expected.shape or not difference <= TOLERANCE:
        raise WrongResult(f"{who} {verb}s {difference:.1e} away from one plain Keras process")
    return difference
