"""Owns a fit from the driver's side: sends segments, feeds tracking and progress, commits checkpoints.

The only committer and the only one who talks to the tracker. It touches no terminal and no signal itself; what it
needs comes in through the constructor.
"""

import contextlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dtrain.checkpoint import Checkpoint, CheckpointStore, Manifest
from dtrain.config import CheckpointConfig
from dtrain.data.sampler import Sampler
from dtrain.policy import checkpoint_is_due, is_better, next_segment_steps
from dtrain.tracking import Tracker
from dtrain.types import Batching, BatchPlan, EpochEnd, FitPlan, Logs, Position, Segment, SegmentResult
from dtrain.worker_group import LAST_PROGRESS_SECONDS, PROGRESS_SECONDS, WorkerGroup


class Display(Protocol):
    """What shows progress: `dtrain.progress.ProgressBar`, or nothing."""

    def begin_epoch(self, epoch: int) -> None: ...

    def update(self, step: int, logs: Logs, samples_per_second: float | None = None) -> None: ...

    def end_epoch(self, epoch: int, logs: Logs, seconds: float | None = None) -> None: ...

    def expect(self, steps_per_epoch: int | None) -> None: ...

    def status(self, message: str) -> None: ...

    def print(self, text: str) -> None: ...


@dataclass(frozen=True)
class Saving:
    """How checkpoints of a fit are made."""

    store: CheckpointStore
    config: CheckpointConfig
    manifest: Manifest
    """What all of them have in common; step, position, files and metrics are filled in."""


@dataclass
class FitRecord:
    """What a fit has come to so far."""

    steps: int = 0
    rows: int = 0
    steps_per_epoch: int | None = None  # found out by reading, where nobody knew it before
    position: Position = field(default_factory=lambda: Position(0, 0))
    history: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    callback_states: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Checkpoint | None = None
    best: tuple[float, Checkpoint] | None = None


class Controller:
    """Runs fits on a group of workers."""

    def __init__(
        self, group: WorkerGroup, tracker: Tracker, display: Display, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._group = group
        self._tracker = tracker
        self._display = display
        self._clock = clock
        self._rate: float | None = None
        self._shown = ("train", 0)
        self._newest: SegmentResult | None = None

    def fit(
        self, plan: FitPlan, steps: BatchPlan | int | None, callbacks: bytes, saving: Saving | None, record: FitRecord
    ) -> None:
        """Train until the plan's epochs are done or a callback stops it; `record` is filled as it goes.

        Args:
            plan: what to train. The workers have opened the data.
            steps: what the steps of epochs are counted with, or how many an epoch has at most; None: nobody knows.
            callbacks: the user's callbacks, pickled.
            saving: how to make checkpoints; None: none.
            record: starts empty.
        """
        sampler = Sampler(steps, plan.initial_epoch) if isinstance(steps, BatchPlan) else None
        record.position = Position(plan.initial_epoch, 0)
        self._group.call("begin_fit", plan, callbacks, watch=self._watch)
        ended: SegmentResult | None = None
        for epoch in range(plan.initial_epoch, plan.epochs):
            num_steps = steps if isinstance(steps, int) else sampler.steps_in_epoch(epoch) if sampler else None
            ended = self._run_epoch(epoch, num_steps, record)
            is_last = ended.stop or epoch + 1 == plan.epochs
            if is_last:
                break
            if saving is not None and ended.epoch_end and checkpoint_is_due(saving.config, epoch, is_last):
                self._save(saving, ended.epoch_end, record)
        finished = self._group.call("end_fit", watch=self._watch)
        self._watch(True)
        record.history, record.callback_states = finished[0]
        # The last one is of the finished model: the end of a fit restores the best weights, or takes their averages.
        if saving is not None and ended is not None and ended.epoch_end:
            self._save(saving, ended.epoch_end, record)

    def run_pass(self, task: str, plan: BatchPlan | Batching, callbacks: bytes) -> list[Any]:
        """Run `evaluate` or `predict` on all workers, which have opened the data; what each returned."""
        self._shown = (task, 0)
        self._display.begin_epoch(0)
        results = self._group.call(task, plan, callbacks, watch=self._watch)
        self._watch(True)
        self._display.end_epoch(0, results[0] if task == "evaluate" else {})
        return results

    def _run_epoch(self, epoch: int, num_steps: int | None, record: FitRecord) -> SegmentResult:
        """Send the epoch's segments, one ahead of the one that runs, and take in what comes back.

        The epoch has ended when a result says so: the data may have fewer steps than `num_steps`.
        """
        self._shown = ("train", epoch)
        self._display.begin_epoch(epoch)
        started = self._clock()
        sent: list[tuple[Segment, list[Any]]] = []
        step = 0
        while True:
            # Nothing is sent ahead before anything is measured, or into the next epoch: a callback may stop there.
            while (num_steps is None or step < num_steps) and len(sent) < (2 if self._newest else 1):
                segment = self._next_segment(Position(epoch, step), None if num_steps is None else num_steps - step)
                sent.append((segment, self._group.submit("run", segment)))
                step += segment.num_steps
            segment, calls = sent.pop(0)
            result: SegmentResult = self._group.wait(calls, self._watch)[0]
            self._take_in(segment, result, record)
            if result.epoch_end or result.stop:
                break
        for _, calls in sent:  # sent before a callback or the data ended the epoch: the workers pass over it
            self._group.wait(calls, self._watch)
        seconds = self._clock() - started
        if result.epoch_end:
            self._end_epoch(result.epoch_end, seconds, record)
            if num_steps is None and not result.stop:
                record.steps_per_epoch = segment.position.step + result.num_steps
                self._display.expect(record.steps_per_epoch)
        return result

    def _next_segment(self, position: Position, remaining: int | None) -> Segment:
        newest = self._newest
        pace = newest.seconds / newest.num_steps if newest else None
        return Segment(position, next_segment_steps(pace, newest.num_steps if newest else 0, remaining))

    def _take_in(self, segment: Segment, result: SegmentResult, record: FitRecord) -> None:
        rate = None
        if result.num_steps:
            self._newest = result
            rate = self._rate = result.rows / result.seconds if result.seconds else None
        record.steps += result.num_steps
        self._tracker.log_steps(record.steps - _length(result.step_logs), result.step_logs, result.seconds)
        record.rows += result.rows
        record.position = result.position
        if rate is not None:
            pace = {"samples_per_second": rate, "step_time": result.seconds / result.num_steps}
            if result.learning_rate is not None:
                pace["learning_rate"] = result.learning_rate
            self._tracker.log(record.steps - 1, pace)
        self._display.update(segment.position.step + result.num_steps, result.logs, rate)

    def _end_epoch(self, end: EpochEnd, seconds: float, record: FitRecord) -> None:
        record.epochs.append(end.epoch)
        record.seconds.append(seconds)
        self._tracker.log(record.steps - 1, {**end.logs, "epoch_seconds": seconds})
        self._display.end_epoch(end.epoch, end.logs, seconds)

    def _save(self, saving: Saving, end: EpochEnd, record: FitRecord) -> None:
        """Rank 0 writes the files, and the manifest that makes a checkpoint of them is written here."""
        staging = saving.store.stage(record.steps)
        try:
            files = self._group.call("write_checkpoint", staging, watch=self._watch)[0]
            manifest = replace(
                saving.manifest, step=record.steps, position=record.position, files=files, metrics=end.logs
            )
            record.checkpoint = saving.store.commit(staging, manifest)
        except BaseException:
            with contextlib.suppress(Exception):
                saving.store.discard(staging)
            raise
        if is_better(saving.config, end.logs, record.best[0] if record.best else None):
            record.best = end.logs[saving.config.monitor or ""], record.checkpoint
        saving.store.prune(saving.config.keep, record.best[1] if record.best else None)

    def _watch(self, is_last: bool = False) -> None:
        """Show how far rank 0 is and what it printed; the last time all of it, after an answer that was late."""
        for _ in range(2 if is_last else 1):
            progress = self._group.progress(timeout=LAST_PROGRESS_SECONDS if is_last else PROGRESS_SECONDS)
            if progress is None:
                continue
            # Steps of a validation, or of the epoch before, are none of this bar's.
            if progress.step and (progress.phase, progress.epoch) == self._shown:
                self._display.update(progress.step, progress.logs, self._rate)
            for line in progress.printed:
                self._display.print(line)


def _length(series: Mapping[str, Any]) -> int:
    return max((len(values) for values in series.values()), default=0)
