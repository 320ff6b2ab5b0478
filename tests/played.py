"""Owns workers that are only played, in this process: for claims about the driver alone, which then need no Ray."""

from collections.abc import Callable
from typing import Any

import pytest

import dtrain
from dtrain import cluster, fit_state
from dtrain.callback_checkpoint import CallbackState
from dtrain.checkpoint import Staging
from dtrain.errors import CheckpointError
from dtrain.fit_state import Snapshot
from dtrain.interrupts import Interrupts
from dtrain.types import EpochEnd, FitPlan, ModelDescription, Opened, Position, Segment, SegmentResult, WorkerInfo

STEPS_PER_EPOCH = 2
RATE = 0.5
"""The learning rate of the factory."""
MODEL = ModelDescription("played", "", 0, 0, "sgd", "mse", ("loss",), RATE, "", "", ())


class Workers:
    """A group of one worker, which has done at once what it is told, and writes real checkpoints.

    Attributes:
        meanwhile: called with a method's name when the driver waits for it.
        learning_rate: what a fit begins with.
        metrics: those of every epoch.
    """

    description = MODEL
    workers = (WorkerInfo(0, 0, "here", "node"),)
    closed = False

    def __init__(self, interrupts: Interrupts | None = None, meanwhile: Callable[[str], None] = lambda _: None) -> None:
        self.meanwhile = meanwhile
        self.learning_rate: float | None = RATE
        self.metrics = {"loss": 1.0}
        self.position = Position(0, 0)
        self._interrupts = interrupts or Interrupts()

    def call(self, method: str, *args: Any, watch: Callable[[bool], None] = lambda _: None) -> list[Any]:
        return self.wait(self.submit(method, *args), watch)

    def submit(self, method: str, *args: Any, beside: str | None = None) -> list[Any]:
        return [(method, getattr(self, method)(*args))]

    def have_answered(self, calls: list[Any]) -> bool:
        return True

    def can_grow(self) -> bool:
        return False

    def beats(self) -> list[Any]:
        return []

    def wait(
        self, calls: list[Any], watch: Callable[[bool], None] = lambda _: None, survivable: bool = False
    ) -> list[Any]:
        with self._interrupts.watched():
            watch(False)
            for method, _ in calls:
                self.meanwhile(method)
        return [answer for _, answer in calls]

    def progress(self, timeout: float) -> None: ...

    def begin_fit(self, plan: FitPlan, callbacks: bytes, saved: Any) -> float | None:
        return self.learning_rate

    def run(self, segment: Segment) -> SegmentResult:
        epoch, step = segment.position.epoch, segment.position.step + segment.num_steps
        end = EpochEnd(epoch, self.metrics, self.learning_rate) if step == STEPS_PER_EPOCH else None
        self.position = Position(epoch, step) if end is None else Position(epoch + 1, 0)
        return SegmentResult(self.position, segment.num_steps, 1, 1.0, self.metrics, epoch_end=end)

    def end_fit(self) -> tuple[dict[str, list[float]], list[Any]]:
        return {}, []

    def snapshot(self, key: int) -> Position:
        return self.position

    def write_snapshot(self, key: int, staging: Staging) -> Any:
        try:
            return fit_state.write(snapshot_at(self.position), staging, 0)
        except CheckpointError as error:
            return error


def snapshot_at(position: Position) -> Snapshot:
    """A rank's part of a checkpoint that a fit goes on from, without any weights."""
    return Snapshot(position, {}, {}, [CallbackState("History", {"attributes": {"history": {}, "epoch": []}}, {})])


def by(workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let these train whatever a Trainer fits."""
    opened = Opened("arrays", (), None, steps_per_epoch=STEPS_PER_EPOCH, model=MODEL)
    monkeypatch.setattr(cluster, "put", lambda value: value)
    monkeypatch.setattr(dtrain.Trainer, "check_room", lambda *_: None)
    monkeypatch.setattr(dtrain.Trainer, "start", lambda *_: (workers, opened))
