"""Owns a fit from the driver's side: sends segments, feeds tracking and progress, commits checkpoints.

The only committer and the only one who talks to the tracker. It touches no terminal and no signal itself; what it
needs comes in through the constructor.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

from dtrain import cluster
from dtrain.checkpoint import Checkpoint
from dtrain.checkpointer import Checkpointer, Saving
from dtrain.config import FailureConfig
from dtrain.data.sampler import Sampler
from dtrain.errors import NotFinite
from dtrain.findings import Findings
from dtrain.fit_state import SavedFit
from dtrain.heartbeat import Heartbeat
from dtrain.interrupts import Interrupts
from dtrain.policy import next_segment_steps
from dtrain.recoveries import Recoveries
from dtrain.regrouping import Regrouping
from dtrain.tracking import Tracker
from dtrain.types import Batching, BatchPlan, EpochEnd, FitPlan, Logs, Position, Segment, SegmentResult
from dtrain.worker_group import LAST_PROGRESS_SECONDS, PROGRESS_SECONDS, GroupBroken, WorkerGroup


class Display(Protocol):
    """What shows progress: `dtrain.progress.ProgressBar`, or nothing.

    Attributes:
        workers: how many there are, which stands beside the bar.
    """

    workers: int

    def begin_epoch(self, epoch: int, step: int = 0) -> None: ...

    def update(self, step: int, logs: Logs, samples_per_second: float | None = None) -> None: ...

    def end_epoch(self, epoch: int, logs: Logs, seconds: float | None = None) -> None: ...

    def expect(self, steps_per_epoch: int | None) -> None: ...

    def status(self, message: str) -> None: ...

    def note(self, text: str) -> None: ...

    def print(self, text: str) -> None: ...


@dataclass
class FitRecord:
    """What a fit has come to so far."""

    steps: int = 0
    steps_per_epoch: int | None = None  # found out by reading, where nobody knew it before
    position: Position = field(default_factory=lambda: Position(0, 0))
    logs: Logs = field(default_factory=dict)
    stopped: bool = False  # by a callback
    history: dict[str, list[float]] = field(default_factory=dict)
    epochs: list[int] = field(default_factory=list)
    callback_states: list[dict[str, Any]] = field(default_factory=list)
    checkpoint: Checkpoint | None = None


class Controller:
    """Runs a fit, or an evaluate or predict, on a group of workers.

    Args:
        group: its workers.
        tracker: told what they come to.
        display: shows it.
        interrupts: what ends it early.
        recoveries: what a fit has survived.
        failure: what it survives, and how; None: it ends at the first failure.
        sync_every: so many steps of an epoch are one call (see `StepOptions`), between which no segment ends, unless a
            checkpoint is due there.
        check_ours: raises TakenOver where the run is known to be another driver's; asked a few times a second.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        group: WorkerGroup,
        tracker: Tracker,
        display: Display,
        interrupts: Interrupts | None = None,
        recoveries: Recoveries | None = None,
        failure: FailureConfig | None = None,
        sync_every: int = 1,
        check_ours: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._interrupts = interrupts or Interrupts()
        self._failure = failure or FailureConfig(max_failures=0, hang_timeout=None)
        self._recoveries = recoveries or Recoveries(self._failure)
        self._group = group
        self._tracker = tracker
        self._display = display
        self._check_ours = check_ours
        self._window = sync_every
        self._clock = clock
        self._rate: float | None = None
        self._shown = ("train", 0)
        self._newest: SegmentResult | None = None
        self.segments = 0
        """So many are finished and taken in."""
        self._epoch_started = 0.0
        self._findings = Findings(lambda: group.workers, lambda line: display.note(line))
        self._checkpointer: Checkpointer | None = None
        self._heartbeat: Heartbeat | None = None
        self._regrouping: Regrouping | None = None

    def fit(
        self,
        plan: FitPlan,
        steps: BatchPlan | int | None,
        callbacks: bytes,
        saving: Saving | None,
        record: FitRecord,
        saved: SavedFit | None = None,
    ) -> None:
        """Train until the plan's epochs are done or a callback stops it; `record` is filled as it goes.

        Args:
            plan: what to train. The workers have opened the data.
            steps: what the steps of epochs are counted with, or how many an epoch has at most; None: nobody knows.
            callbacks: the user's callbacks, pickled.
            saving: how to make checkpoints; None: none.
            record: starts empty, or with the checkpoint that `saved` is from.
            saved: the fit to go on with.

        Raises:
            KeyboardInterrupt: it was interrupted, and stopped between two segments, with a checkpoint.
        """
        self._display.workers = len(self._group.workers)
        if saved is None:
            record.position = Position(plan.initial_epoch, 0)
        else:
            record.position, record.steps = saved.position, saved.step
            record.logs, record.stopped = saved.metrics, saved.stopped
        is_finished = saved is not None and saved.finished
        rates = self._group.call("begin_fit", plan, callbacks, cluster.put(saved), watch=self.watch)
        if saved is not None:
            self._tell_other_rate(rates[0])
        del saved  # the workers have it, and it may be large
        checkpointer = self._checkpointer = Checkpointer(self._group, saving, self.watch)
        known = self._display, self._interrupts, self._recoveries, self._failure
        regrouping = Regrouping(self, self._group, (plan, callbacks), record, checkpointer, *known)
        self._regrouping = regrouping
        try:
            # What makes no checkpoints has nothing to end in order.
            with checkpointer, self._interrupts.graceful() if saving is not None else nullcontext():
                first = record.steps
                self._run_epochs(plan, steps, record, checkpointer, regrouping)
                has_news = record.steps > first or (plan.epochs > plan.initial_epoch and not is_finished)
                self._end(record, checkpointer, regrouping, has_news)
        finally:
            record.checkpoint = checkpointer.newest or record.checkpoint
            self._checkpointer = self._heartbeat = None
        self._interrupts.check()

    def _end(self, record: FitRecord, checkpointer: Checkpointer, regrouping: Regrouping, has_news: bool) -> None:
        """What is left to do once nothing more is trained; where the group breaks on the way, in another one."""
        broken: GroupBroken | None = None
        has_best, has_ended = not has_news, False
        self.listen()
        while True:
            try:
                if broken is not None:
                    failure, broken = broken, None
                    regrouping.go_on(failure)
                if self._interrupts.requested and not has_ended:
                    self._display.status("interrupted: writing a checkpoint")
                    self._save(checkpointer, record)
                    return
                if not has_best:
                    checkpointer.take_best(record.steps, record.logs, **_stopped(record))
                    checkpointer.finish(is_last=True)
                    has_best = True
                has_ended = True
                self._finish(checkpointer, record, has_news)
                return
            except GroupBroken as error:
                broken = error

    def _finish(self, checkpointer: Checkpointer, record: FitRecord, has_news: bool) -> None:
        """End the fit on the workers, which restores the best weights, or takes their averages: that is saved, too."""
        finished = self._group.wait(self._group.submit("end_fit"), self.watch, survivable=True)
        self.watch(True)
        record.history, record.callback_states = finished[0]
        if has_news:
            self._save(checkpointer, record, finished=True)

    def _tell_other_rate(self, rate: float | None) -> None:
        """That of a checkpoint holds, and who has changed it in the factory should know."""
        own = self._group.description.learning_rate if self._group.description is not None else None
        if rate is not None and own is not None and rate != own:
            self._display.print(f"the learning rate is {rate:g}, as in the checkpoint; model_fn's is {own:g}")

    def run_pass(self, task: str, plan: BatchPlan | Batching, callbacks: bytes) -> list[Any]:
        """Run `evaluate` or `predict` on all workers, which have opened the data; what each returned."""
        self._shown = (task, 0)
        self._display.begin_epoch(0)
        results = self._group.call(task, plan, callbacks, watch=self.watch)
        self.watch(True)
        self._display.end_epoch(0, results[0] if task == "evaluate" else {})
        return results

    def _run_epochs(
        self,
        plan: FitPlan,
        steps: BatchPlan | int | None,
        record: FitRecord,
        checkpointer: Checkpointer,
        regrouping: Regrouping,
    ) -> None:
        """Train from where `record` stands to the end, or until a callback or an interrupt stops it.

        Where the group breaks it is formed anew, and goes on.
        """
        sampler = Sampler(steps, plan.initial_epoch) if isinstance(steps, BatchPlan) else None
        broken: GroupBroken | None = None
        is_due = checkpointer.begin(record.steps)  # a checkpoint, besides those that are sent for within an epoch
        self._heartbeat = Heartbeat(self._group.beats, self._failure.hang_timeout or math.inf, self._clock)
        self._epoch_started = self._clock()
        while broken is not None or not self._is_over(plan, record):
            epoch = record.position.epoch
            num_steps = steps if isinstance(steps, int) else sampler.steps_in_epoch(epoch) if sampler else None
            try:
                if broken is not None:
                    failure, broken = broken, None
                    regrouping.go_on(failure)
                elif is_due:
                    checkpointer.take(record.steps, record.logs)
                    is_due = False
                elif regrouping.has_newcomers():
                    regrouping.grow()
                else:
                    self._run_epoch(num_steps, record, checkpointer, regrouping)
                if not record.stopped and record.position.epoch < plan.epochs:
                    has_ended = record.position.epoch > epoch
                    is_due |= checkpointer.is_late(record.steps)
                    is_due |= has_ended and checkpointer.is_due(epoch, record.steps)
            except GroupBroken as error:
                broken = error

    def _is_over(self, plan: FitPlan, record: FitRecord) -> bool:
        return record.position.epoch >= plan.epochs or record.stopped or self._interrupts.requested

    def _run_epoch(
        self, num_steps: int | None, record: FitRecord, checkpointer: Checkpointer, regrouping: Regrouping
    ) -> None:
        """Send the epoch's segments, one ahead of the one that runs, and take in what comes back.

        The epoch has ended when a result says so: the data may have fewer steps than `num_steps`. An interrupt ends it
        when what was sent is done, as do workers that are to join.
        """
        epoch, step = record.position.epoch, record.position.step
        before = record.steps - step  # steps of the run before this epoch
        self._shown = ("train", epoch)
        self._display.begin_epoch(epoch, step)
        if step == 0:
            self._epoch_started = self._clock()
        sent: deque[tuple[Segment | int, list[Any]]] = deque()  # a number: the snapshot of that step
        result: SegmentResult | None = None
        self.listen()
        try:
            while result is None or not (result.epoch_end or result.stop):
                # Nothing is sent ahead before anything is measured, or into the next epoch: a callback may stop there.
                while (num_steps is None or step < num_steps) and _num_segments(sent) < (2 if self._newest else 1):
                    if result is not None and (self._interrupts.requested or regrouping.has_newcomers()):
                        break
                    due = checkpointer.steps_until_due(before + step)
                    left = None if num_steps is None else num_steps - step
                    segment = self._next_segment(Position(epoch, step), left, due)
                    if segment.num_steps == due and len(sent) > _num_segments(sent):
                        break  # two copies of the state at most: the snapshot before is to be written first
                    sent.append((segment, self._group.submit("run", segment)))
                    step += segment.num_steps
                    if segment.num_steps == due and step != num_steps:
                        sent.append((before + step, self._group.submit("snapshot", before + step)))
                if not sent:
                    return
                item, calls = sent.popleft()
                answers = self._group.wait(calls, self.watch, survivable=True)
                if isinstance(item, Segment):
                    result = self.take_in(answers, record)
                else:
                    checkpointer.write(item, record.steps, answers[0], record.logs)
        except GroupBroken:
            for _, calls in sent:
                self._group.drain(calls)
            raise
        for _, calls in sent:  # sent before a callback or the data ended the epoch: the workers pass over it
            self._group.wait(calls, self.watch, survivable=True)
        if result.epoch_end and num_steps is None and not result.stop:
            record.steps_per_epoch = record.steps - before
            self._display.expect(record.steps_per_epoch)

    def count_workers(self, record: FitRecord) -> int:
        """Put on record how many there are by now."""
        number = self._display.workers = len(self._group.workers)
        self._findings.renumber()
        self._tracker.log(max(0, record.steps - 1), {"num_workers": number})  # no step further than the steps on record
        return number

    def listen(self, ranks: Sequence[int] | None = None) -> None:
        """Give all ranks, or some, time from now on to get on."""
        if self._heartbeat is not None:
            self._heartbeat.begin(range(len(self._group.workers)) if ranks is None else ranks)

    def _save(self, checkpointer: Checkpointer, record: FitRecord, **extra: Any) -> None:
        """Make a checkpoint, and wait for it."""
        checkpointer.save(record.steps, record.logs, **_stopped(record), **extra)

    def _next_segment(self, position: Position, remaining: int | None, due: int | None) -> Segment:
        """`due`: steps to the next checkpoint, which no segment reaches over."""
        newest = self._newest
        pace = newest.seconds / newest.num_steps if newest else None
        previous = newest.num_steps if newest else 0
        num_steps = next_segment_steps(pace, previous, remaining, position.step, self._window)
        return Segment(position, num_steps if due is None else min(num_steps, due))

    def take_in(self, answers: Sequence[SegmentResult], record: FitRecord) -> SegmentResult:
        """What the ranks returned of a segment."""
        result, rate = answers[0], None
        step = record.position.step + result.num_steps
        if result.num_steps:
            self._recoveries.settle(record.steps + result.num_steps)
            self._newest = result
            rate = self._rate = result.rows / result.seconds if result.seconds else None
            if self._heartbeat is not None and self.segments:  # the first one builds the graph
                self._heartbeat.took(result.seconds / result.num_steps * self._window)
        if result.num_steps or result.epoch_end is not None:
            self.segments += 1
            if self._regrouping is not None:
                self._regrouping.keep(answers)
        record.steps += result.num_steps
        self._tracker.log_steps(record.steps - _length(result.step_logs), result.step_logs, result.seconds)
        self._look_into(answers, record.steps - result.num_steps, record.position.step)
        record.position, record.stopped = result.position, result.stop
        record.logs = result.epoch_end.logs if result.epoch_end is not None else result.logs
        if rate is not None:
            pace = {"samples_per_second": rate, "step_time": result.seconds / result.num_steps}
            if result.learning_rate is not None:
                pace["learning_rate"] = result.learning_rate
            self._tracker.log(record.steps - 1, pace)
        self._display.update(step, result.logs, rate)
        if result.epoch_end is not None:
            self._end_epoch(result.epoch_end, self._clock() - self._epoch_started, record)
        return result

    def _look_into(self, answers: Sequence[SegmentResult], first: int, start: int) -> None:
        """See that what the ranks returned is as it should be, and tell what is not.

        Args:
            answers: of a segment.
            first: the step of the run that it begins with.
            start: the same step of the epoch.

        Raises:
            NotFinite: it ends the fit; the group is closed.
        """
        findings = self._findings
        if self.segments > 1:  # the first ones build graphs
            findings.look_for_who_is_slow(answers)
        try:
            skipped = findings.look_for_skipped(answers, first, start)
        except NotFinite:
            self._group.fail()
            raise
        if skipped:
            self._tracker.log(max(skipped), {"skipped_steps": findings.num_skipped})
        # What a step of the model's own returned may still be NaN where the step was left out.
        last = first + answers[0].num_steps - 1
        if self._failure.on_nan == "ignore" or answers[0].stop or last in skipped:
            return
        try:
            findings.look_for_not_finite(answers, first)
        except NotFinite:
            if self._checkpointer is not None:
                self._checkpointer.finish()
            self._group.close()
            raise

    def _end_epoch(self, end: EpochEnd, seconds: float, record: FitRecord) -> None:
        record.epochs.append(end.epoch)
        self._tracker.log(record.steps - 1, {**end.logs, "epoch_seconds": seconds})
        self._display.end_epoch(end.epoch, end.logs, seconds)

    def _end_who_hangs(self) -> None:
        """Tell who keeps the others waiting for too long, and end it; the rest is as with any that died."""
        found = self._heartbeat.look() if self._heartbeat is not None else {}
        if not found or self._group.closed:
            return
        for rank, why in found.items():
            worker = self._group.workers[rank]
            self._display.note(f"rank {rank} on {worker.host} hangs: {why}; it counts as dead")
        for other, stack in self._group.stacks().items():
            self._display.print(f"rank {other} is here:\n{stack}")
        self.listen()
        for rank, why in found.items():
            self._group.end(rank, f"it hung: {why} (hang_timeout={self._failure.hang_timeout:g})")

    def watch(self, is_last: bool = False) -> None:
        """Show how far rank 0 is and what it printed; the last time all of it, after an answer that was late."""
        if not is_last:  # before a failure is told, which comes first
            self._check_ours()
        if self._checkpointer is not None:
            self._checkpointer.commit()
        self._end_who_hangs()
        if self._interrupts.requested:
            self._display.status("stopping when the steps that were sent are done; another Ctrl-C stops at once")
        for _ in range(2 if is_last else 1):
            progress = self._group.progress(timeout=LAST_PROGRESS_SECONDS if is_last else PROGRESS_SECONDS)
            if progress is None:
                continue
            # Steps of a validation, or of the epoch before, are none of this bar's.
            if progress.step and (progress.phase, progress.epoch) == self._shown:
                self._display.update(progress.step, progress.logs, self._rate)
            for line in progress.printed:
                self._display.print(line)


def _stopped(record: FitRecord) -> dict[str, bool]:
    """What a checkpoint says of a fit that a callback has stopped."""
    return {"stopped": True} if record.stopped else {}


def _num_segments(sent: Iterable[tuple[Any, Any]]) -> int:
    return sum(isinstance(item, Segment) for item, _ in sent)


def _length(series: Mapping[str, Any]) -> int:
    return max((len(values) for values in series.values()), default=0)
