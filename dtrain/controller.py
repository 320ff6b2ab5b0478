"""Owns a fit from the driver's side: sends segments, feeds tracking and progress, commits checkpoints.

The only committer and the only one who talks to the tracker. It touches no terminal and no signal itself; what it
needs comes in through the constructor.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from dtrain import cluster
from dtrain.checkpoint import Checkpoint
from dtrain.checkpointer import Checkpointer, Saving
from dtrain.config import FailureConfig
from dtrain.data.sampler import Sampler
from dtrain.errors import NotFinite
from dtrain.findings import Findings
from dtrain.fit_state import Lost, SavedFit, Standing
from dtrain.heartbeat import Heartbeat
from dtrain.interrupts import Interrupts
from dtrain.policy import next_segment_steps
from dtrain.recoveries import Recoveries
from dtrain.tracking import Tracker
from dtrain.types import Batching, BatchPlan, EpochEnd, FitPlan, Logs, Position, Segment, SegmentResult
from dtrain.worker_group import LAST_PROGRESS_SECONDS, PROGRESS_SECONDS, GroupBroken, WorkerGroup


class Display(Protocol):
    """What shows progress: `dtrain.progress.ProgressBar`, or nothing.

    Attributes:
        workers: how many there are, which stands beside the bar.
    """

    workers: int

    def begin_epoch(self, epoch: int) -> None: ...

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
        self._clock = clock
        self._rate: float | None = None
        self._shown = ("train", 0)
        self._newest: SegmentResult | None = None
        self._segments = 0  # finished and taken in
        self._last: list[SegmentResult] = []  # of them, what each rank returned
        self._epoch_started = 0.0
        self._is_to_grow, self._may_grow = False, True
        self._findings = Findings(lambda: group.workers, lambda line: display.note(line))
        self._checkpointer: Checkpointer | None = None
        self._heartbeat: Heartbeat | None = None
        self._is_resizing = False  # ranks may yet be as in the group before
        self._handover: Any = None  # what the furthest rank told, until a recovery has come to its end

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
        rates = self._group.call("begin_fit", plan, callbacks, cluster.put(saved), watch=self._watch)
        if saved is not None:
            self._tell_other_rate(rates[0])
        del saved  # the workers have it, and it may be large
        checkpointer = self._checkpointer = Checkpointer(self._group, saving, self._watch)
        try:
            # What makes no checkpoints has nothing to end in order.
            with checkpointer, self._interrupts.graceful() if saving is not None else nullcontext():
                first = record.steps
                if plan.epochs > record.position.epoch:
                    checkpointer.write_first(first)
                self._run_epochs(plan, callbacks, steps, record, checkpointer)
                has_news = record.steps > first or (plan.epochs > plan.initial_epoch and not is_finished)
                self._end(plan, callbacks, record, checkpointer, has_news)
        except GroupBroken as broken:  # where nothing more is trained
            self._group.fail(broken.dead)
            raise broken.error from None
        finally:
            record.checkpoint = checkpointer.newest or record.checkpoint
            self._checkpointer = None
        self._interrupts.check()

    def _end(
        self, plan: FitPlan, callbacks: bytes, record: FitRecord, checkpointer: Checkpointer, has_news: bool
    ) -> None:
        """What is left to do once nothing more is trained; where the group breaks on the way, in another one."""
        broken: GroupBroken | None = None
        has_best = not has_news
        while True:
            try:
                if broken is not None:
                    failure, broken = broken, None
                    self._go_on(failure, plan, callbacks, record)
                if self._interrupts.requested:
                    self._display.status("interrupted: writing a checkpoint")
                    self._save(checkpointer, record)
                    return
                if not has_best:
                    checkpointer.take_best(record.steps, record.logs, **_stopped(record))
                    has_best = True
                self._finish(checkpointer, record, has_news)
                return
            except GroupBroken as error:
                broken = error

    def _finish(self, checkpointer: Checkpointer, record: FitRecord, has_news: bool) -> None:
        """End the fit on the workers, which restores the best weights, or takes their averages: that is saved, too."""
        finished = self._group.wait(self._group.submit("end_fit"), self._watch, survivable=True)
        self._watch(True)
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
        results = self._group.call(task, plan, callbacks, watch=self._watch)
        self._watch(True)
        self._display.end_epoch(0, results[0] if task == "evaluate" else {})
        return results

    def _run_epochs(
        self,
        plan: FitPlan,
        callbacks: bytes,
        steps: BatchPlan | int | None,
        record: FitRecord,
        checkpointer: Checkpointer,
    ) -> None:
        """Train from where `record` stands to the end, or until a callback or an interrupt stops it.

        Where the group breaks it is formed anew, and goes on.
        """
        sampler = Sampler(steps, plan.initial_epoch) if isinstance(steps, BatchPlan) else None
        broken: GroupBroken | None = None
        is_due = False  # a checkpoint, besides those that are sent for within an epoch
        self._heartbeat = Heartbeat(self._group.beats, self._failure.hang_timeout or math.inf, self._clock)
        self._epoch_started = self._clock()
        while broken is not None or not self._is_over(plan, record):
            epoch = record.position.epoch
            num_steps = steps if isinstance(steps, int) else sampler.steps_in_epoch(epoch) if sampler else None
            try:
                if broken is not None:
                    failure, broken = broken, None
                    self._go_on(failure, plan, callbacks, record)
                elif self._has_newcomers():
                    self._grow(plan, callbacks, record)
                else:
                    self._run_epoch(num_steps, record, checkpointer)
                if not record.stopped and record.position.epoch < plan.epochs:
                    has_ended = record.position.epoch > epoch
                    is_due |= checkpointer.is_late(record.steps)
                    is_due |= has_ended and checkpointer.is_due(epoch, record.steps)
                if is_due:
                    checkpointer.take(record.steps, record.logs)
                    is_due = False
            except GroupBroken as error:
                broken = error
        self._heartbeat = None

    def _is_over(self, plan: FitPlan, record: FitRecord) -> bool:
        return record.position.epoch >= plan.epochs or record.stopped or self._interrupts.requested

    def _run_epoch(self, num_steps: int | None, record: FitRecord, checkpointer: Checkpointer) -> None:
        """Send the epoch's segments, one ahead of the one that runs, and take in what comes back.

        The epoch has ended when a result says so: the data may have fewer steps than `num_steps`. An interrupt ends it
        when what was sent is done, as do workers that are to join.
        """
        epoch, step = record.position.epoch, record.position.step
        before = record.steps - step  # steps of the run before this epoch
        self._shown = ("train", epoch)
        self._display.begin_epoch(epoch)
        if step == 0:
            self._epoch_started = self._clock()
        sent: deque[tuple[Segment | int, list[Any]]] = deque()  # a number: the snapshot of that step
        result: SegmentResult | None = None
        self._listen()
        try:
            while result is None or not (result.epoch_end or result.stop):
                # Nothing is sent ahead before anything is measured, or into the next epoch: a callback may stop there.
                while (num_steps is None or step < num_steps) and _segments(sent) < (2 if self._newest else 1):
                    if result is not None and (self._interrupts.requested or self._has_newcomers()):
                        break
                    due = checkpointer.steps_until_due(before + step)
                    left = None if num_steps is None else num_steps - step
                    segment = self._next_segment(Position(epoch, step), left, due)
                    if segment.num_steps == due and len(sent) > _segments(sent):
                        break  # two copies of the state at most: the snapshot before is to be written first
                    sent.append((segment, self._group.submit("run", segment)))
                    step += segment.num_steps
                    if segment.num_steps == due and step != num_steps:
                        sent.append((before + step, self._group.submit("snapshot", before + step)))
                if not sent:
                    return
                item, calls = sent.popleft()
                answers = self._group.wait(calls, self._watch, survivable=True)
                if isinstance(item, Segment):
                    result = self._take_in(answers, record)
                else:
                    checkpointer.write(item, record.steps, answers[0], record.logs)
        except GroupBroken:
            for _, calls in sent:
                self._group.drain(calls)
            raise
        for _, calls in sent:  # sent before a callback or the data ended the epoch: the workers pass over it
            self._group.wait(calls, self._watch, survivable=True)
        if result.epoch_end and num_steps is None and not result.stop:
            record.steps_per_epoch = record.steps - before
            self._display.expect(record.steps_per_epoch)

    def _has_newcomers(self) -> bool:
        """Whether workers wait to be taken in."""
        self._is_to_grow = self._is_to_grow or (self._may_grow and self._group.can_grow())
        return self._is_to_grow

    def _grow(self, plan: FitPlan, callbacks: bytes, record: FitRecord) -> None:
        """Take in workers that are ready, between two segments: rank 0 tells them where it is.

        One that cannot follow is given up, and nobody else has noticed anything.

        Raises:
            GroupBroken: one that trains had died, or one dies meanwhile.
        """
        group, self._is_to_grow = self._group, False
        standing, *_ = group.wait(group.submit("standing"), self._watch, survivable=True)
        self._may_grow = standing.goes_on
        if not self._may_grow:
            return
        if self._checkpointer is not None:
            self._checkpointer.finish()  # its manifest tells how many ranks there are
        try:
            (self._handover,) = group.submit("hand_over", ranks=[0])
            named = {"handover": self._handover, "lost": Lost()}
            new = group.grow("begin_fit", plan, callbacks, watch=self._watch, **named)
            if new:
                self._join()
            self._handover = None
        except GroupBroken:  # as at any other time
            raise
        except BaseException:
            if not group.closed:  # some may be in no group
                group.fail()
            raise
        if new:
            self._display.note(f"{len(new)} more: going on with {self._count_workers(record)} workers")

    def _join(self) -> None:
        """Make one group of the ranks that train and the new ones."""
        group = self._group
        if self._last:  # one of each, whoever dies in the meantime
            new = replace(self._last[0], own={}, callbacks=())
            self._last += [new] * (len(group.workers) - len(self._last))
        self._is_resizing = True
        group.wait(group.submit("where"), self._watch, survivable=True)
        group.renumber()
        self._listen()
        own = group.wait(group.submit("resize", self._handover, Lost()), self._watch, survivable=True)
        group.form_anew(self._watch)
        self._is_resizing = False
        group.wait(group.submit("go_on"), self._watch, survivable=True)
        if self._last:
            first = self._last[0]
            self._last = [replace(first, own=o, callbacks=() if n else first.callbacks) for n, o in enumerate(own)]
        self._listen()

    def _count_workers(self, record: FitRecord) -> int:
        """Put on record how many there are by now."""
        number = self._display.workers = len(self._group.workers)
        self._findings.renumber()
        self._tracker.log(max(0, record.steps - 1), {"num_workers": number})  # no step further than the steps on record
        return number

    def _goes_on_without(self, num_left: int) -> bool:
        """Whether those that are left go on by themselves: also where the fit is about to be stopped."""
        if not num_left or self._interrupts.requested:
            return num_left > 0
        spec = self._group.spec
        if spec.extra_workers:
            return num_left >= spec.num_workers
        return self._failure.on_loss == "shrink"

    def _go_on(self, broken: GroupBroken, plan: FitPlan, callbacks: bytes, record: FitRecord) -> None:
        """Form the group anew, with new processes for the dead or without, from where the furthest of the others is.

        Raises:
            WorkerDied: that is not to be; the group is closed.
            GroupBroken: it broke again. Those that were being replaced are to be replaced once more.
        """
        group, dead = self._group, list(broken.dead)
        if self._checkpointer is not None:
            self._checkpointer.lose(dead)
        try:
            dead, behind = self._settle(broken, record)
            if dead and self._goes_on_without(len(group.workers) - len(dead)):
                gone, dead = dead, []  # from here on ranks have other numbers
                self._shrink(gone, record.position)
                self._count_workers(record)
            else:
                if dead:
                    self._replace(dead, broken, plan, callbacks, record.position)
                self._catch_up(dead, behind)
            group.form_anew(self._watch)
        except GroupBroken as again:
            raise GroupBroken(sorted({*dead, *again.dead}), again.error) from None
        except BaseException:
            if not group.closed:
                group.fail(broken.dead)
            raise
        self._listen()
        answers = group.wait(group.submit("go_on"), self._watch, survivable=True)
        self._handover = None
        if answers[0] is not None:
            self._take_in(answers, record)

    def _replace(
        self, dead: Sequence[int], broken: GroupBroken, plan: FitPlan, callbacks: bytes, position: Position
    ) -> None:
        """Start new processes for the dead, and tell them where the furthest of the others is."""

        def watch(is_last: bool) -> None:
            self._watch(is_last)
            if self._interrupts.requested:  # who is left goes on alone, to the checkpoint that is wanted
                raise GroupBroken(dead, broken.error)

        self._group.replace(dead, self._display.status, watch)
        lost = self._lost(position, is_first=0 in dead)
        named = {"handover": self._handover, "lost": lost}
        calls = self._group.submit("begin_fit", plan, callbacks, ranks=dead, **named)
        self._group.wait(calls, watch, ranks=dead, survivable=True)

    def _catch_up(self, dead: Sequence[int], behind: Sequence[int]) -> None:
        """Bring those who live to where the furthest is, and into a group of this size, should it be another."""
        group = self._group
        if self._is_resizing:
            left = [rank for rank in range(len(group.workers)) if rank not in dead]
            group.wait(group.submit("resize", self._handover, Lost(), ranks=left), ranks=left, survivable=True)
            self._is_resizing = False
        else:
            calls = group.submit("catch_up", self._handover, ranks=behind)
            group.wait(calls, self._watch, ranks=behind, survivable=True)

    def _settle(self, broken: GroupBroken, record: FitRecord) -> tuple[list[int], list[int]]:
        """Ask those who live how far they are, and the furthest of them to hand over.

        Where nobody is left, what was handed over before, in a recovery that came to nothing, still holds.

        Returns:
            The ranks to be replaced, and the ranks that are a step behind the furthest.
        """
        group = self._group
        left = [rank for rank in range(len(group.workers)) if rank not in broken.dead]
        if not left:
            if self._handover is None:
                raise broken.error
            self._recoveries.begin(broken.error, record.steps, len(group.workers))
            self._display.note(f"{broken.error.message}: going on with new workers ({self._recoveries})")
            return list(broken.dead), []
        self._listen(left)
        calls = group.submit("standing", ranks=left)
        found: list[Standing] = group.wait(calls, self._watch, ranks=left, survivable=True)
        if not all(standing.goes_on for standing in found):
            raise broken.error
        standings = dict(zip(left, found, strict=True))
        furthest = max(left, key=lambda rank: (standings[rank].place, -rank))
        ahead = standings[furthest]
        if ahead.segments > self._segments and ahead.result is not None:
            self._take_in([ahead.result], record)  # the last to finish it did not live to say so
        behind = [rank for rank in left if standings[rank].place < ahead.place]
        lost = [rank for rank in behind if not standings[rank].can_catch_up_with(ahead)]
        dead = sorted([*broken.dead, *lost])
        num_left = len(group.workers) - len(dead)
        num_left = num_left if self._goes_on_without(num_left) else len(group.workers)
        self._recoveries.begin(broken.error, record.steps + ahead.steps, num_left)
        how = "in place" if num_left == len(group.workers) else f"with {num_left} of {len(group.workers)} workers"
        self._display.note(f"{broken.error.message}: going on {how} ({self._recoveries})")
        (self._handover,) = group.submit("hand_over", ranks=[furthest])
        return dead, [rank for rank in behind if rank not in lost]

    def _listen(self, ranks: Sequence[int] | None = None) -> None:
        """Give all ranks, or some, time from now on to get on."""
        if self._heartbeat is not None:
            self._heartbeat.begin(range(len(self._group.workers)) if ranks is None else ranks)

    def _lost(self, position: Position, is_first: bool) -> Lost:
        """What the dead have told of what each rank alone has."""
        last = self._last
        own = tuple(result.own for result in last) if all(result.own for result in last) else ()
        is_older = bool(last) and (last[0].position.epoch < position.epoch or last[0].position.step == 0)
        return Lost(own, is_older, list(last[0].callbacks) if last and is_first else [])

    def _shrink(self, dead: Sequence[int], position: Position) -> None:
        """Let those that live go on as a smaller group."""
        group = self._group
        told = self._lost(position, is_first=0 in dead)
        own = tuple(told.own[rank] for rank in dead) if told.own and not told.is_older else ()
        lost = Lost(own, callbacks=told.callbacks)
        if self._checkpointer is not None:
            self._checkpointer.finish()  # its calls go by the numbers that ranks have by now
        left = [result for rank, result in enumerate(self._last) if rank not in dead]
        if left:  # what callbacks on rank 0 alone have told is the new one's, as the dead ones' sums are
            left[0] = replace(left[0], callbacks=self._last[0].callbacks)
        self._last = left
        group.shrink(dead)
        self._is_resizing = False
        self._listen()
        owned = group.wait(group.submit("resize", self._handover, lost), self._watch, survivable=True)
        if left:
            left[0] = replace(left[0], own=owned[0])

    def _save(self, checkpointer: Checkpointer, record: FitRecord, **extra: Any) -> None:
        """Make a checkpoint, and wait for it."""
        checkpointer.save(record.steps, record.logs, **_stopped(record), **extra)

    def _next_segment(self, position: Position, remaining: int | None, due: int | None) -> Segment:
        """`due`: steps to the next checkpoint, which no segment reaches over."""
        newest = self._newest
        pace = newest.seconds / newest.num_steps if newest else None
        num_steps = next_segment_steps(pace, newest.num_steps if newest else 0, remaining)
        return Segment(position, num_steps if due is None else min(num_steps, due))

    def _take_in(self, answers: Sequence[SegmentResult], record: FitRecord) -> SegmentResult:
        """What the ranks returned of a segment."""
        result, rate = answers[0], None
        step = record.position.step + result.num_steps
        if result.num_steps:
            self._recoveries.settle(record.steps + result.num_steps)
            self._newest = result
            rate = self._rate = result.rows / result.seconds if result.seconds else None
            if self._heartbeat is not None and self._segments:  # the first one builds the graph
                self._heartbeat.took(result.seconds / result.num_steps)
        if result.num_steps or result.epoch_end is not None:
            self._segments += 1
            if len(answers) == len(self._group.workers):
                self._last = list(answers)
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
        if self._segments > 1:  # the first ones build graphs
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
        self._listen()
        for rank, why in found.items():
            self._group.end(rank, f"it hung: {why} (hang_timeout={self._failure.hang_timeout:g})")

    def _watch(self, is_last: bool = False) -> None:
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


def _segments(sent: Iterable[tuple[Any, Any]]) -> int:
    return sum(isinstance(item, Segment) for item, _ in sent)


def _length(series: Mapping[str, Any]) -> int:
    return max((len(values) for values in series.values()), default=0)
