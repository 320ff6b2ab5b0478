"""Owns how a fit goes on in another group: where workers have died, and where others join.

The group breaks at any call that is `survivable`. Those who live say how far they are, the furthest of them hands over,
and then new processes take the places of the dead, or the others go on without them. Where that breaks in turn it is
begun again, with what was handed over. How ranks do their part is in rank_fit.py.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

from dtrain.checkpointer import Checkpointer
from dtrain.config import FailureConfig
from dtrain.fit_state import Lost, Standing
from dtrain.interrupts import Interrupts
from dtrain.recoveries import Recoveries
from dtrain.types import FitPlan, SegmentResult
from dtrain.worker_group import GroupBroken, WorkerGroup

if TYPE_CHECKING:
    from dtrain.controller import Display, FitRecord

MOST_REFUSALS = 3
"""Of newcomers: each doubles the number of segments until the ranks are asked again, up to this."""


class Fitting(Protocol):
    """What the controller of the fit does meanwhile.

    Attributes:
        segments: so many are finished and taken in.
    """

    segments: int

    def watch(self, is_last: bool = False) -> None:
        """Called a few times a second while workers are waited for."""

    def listen(self, ranks: Sequence[int] | None = None) -> None:
        """Give all ranks, or some, time from now on to get on."""

    def take_in(self, answers: Sequence[SegmentResult], record: "FitRecord") -> SegmentResult:
        """What the ranks returned of a segment."""

    def count_workers(self, record: "FitRecord") -> int:
        """Put on record how many there are by now."""


class Regrouping:
    """The groups of one fit, one after the other.

    Args:
        fit: its controller.
        group: its workers.
        task: what is trained, and the callbacks, pickled: what `Worker.begin_fit` is given.
        record: what it has come to.
        checkpointer: makes its checkpoints.
        display: told what happens.
        interrupts: where the fit is about to be stopped, nobody is replaced.
        recoveries: what it has survived.
        failure: what it survives, and how.
    """

    def __init__(
        self,
        fit: Fitting,
        group: WorkerGroup,
        task: tuple[FitPlan, bytes],
        record: "FitRecord",
        checkpointer: Checkpointer,
        display: "Display",
        interrupts: Interrupts,
        recoveries: Recoveries,
        failure: FailureConfig,
    ) -> None:
        self._fit = fit
        self._group = group
        self._task = task
        self._record = record
        self._checkpointer = checkpointer
        self._display = display
        self._interrupts = interrupts
        self._recoveries = recoveries
        self._failure = failure
        self._last: list[SegmentResult] = []  # of them, what each rank returned
        self._told = 0  # so many segments were finished then
        self._is_to_grow = False
        self._refusals = 0  # ranks could tell newcomers nothing so often, without a break
        self._asked_again_after = -1  # so many segments
        self._is_resizing = False  # ranks may yet be as in the group before
        self._handover: Any = None  # what the furthest rank told, until a recovery has come to its end

    def keep(self, answers: Sequence[SegmentResult]) -> None:
        """What the ranks have returned of a segment; of those that die, that is all that is known."""
        if len(answers) == len(self._group.workers):
            self._last, self._told = list(answers), self._fit.segments

    def has_newcomers(self) -> bool:
        """Whether workers wait to be taken in."""
        if self._fit.segments > self._asked_again_after:
            self._is_to_grow = self._is_to_grow or self._group.can_grow()
            self._refusals = self._refusals if self._is_to_grow else 0
        return self._is_to_grow

    def grow(self) -> None:
        """Take in workers that are ready, between two segments: rank 0 tells them where it is.

        One that cannot follow is given up, and nobody else has noticed anything.

        Raises:
            GroupBroken: one that trains had died, or one dies meanwhile.
        """
        group, self._is_to_grow = self._group, False
        standing, *_ = group.wait(group.submit("standing"), self._fit.watch, survivable=True)
        if not standing.goes_on:  # to ask interrupts what is sent ahead, so it is done ever more seldom
            self._asked_again_after = self._fit.segments + 2**self._refusals - 1
            self._refusals = min(self._refusals + 1, MOST_REFUSALS)
            return
        self._refusals = 0
        self._checkpointer.finish()  # its manifest tells how many ranks there are
        try:
            (self._handover,) = group.submit("hand_over", ranks=[0])
            named = {"handover": self._handover, "lost": Lost()}
            new = group.grow("begin_fit", *self._task, watch=self._fit.watch, **named)
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
            self._display.note(f"{len(new)} more: going on with {self._fit.count_workers(self._record)} workers")

    def _join(self) -> None:
        """Make one group of the ranks that train and the new ones."""
        group = self._group
        if self._last:  # one of each, whoever dies in the meantime
            new = replace(self._last[0], own={}, callbacks=())
            self._last += [new] * (len(group.workers) - len(self._last))
        self._is_resizing = True
        group.wait(group.submit("where"), self._fit.watch, survivable=True)
        group.renumber()
        self._fit.listen()
        own = group.wait(group.submit("resize", self._handover, Lost()), self._fit.watch, survivable=True)
        group.form_anew(self._fit.watch)
        self._is_resizing = False
        group.wait(group.submit("go_on"), self._fit.watch, survivable=True)
        if self._last:
            first = self._last[0]
            self._last = [replace(first, own=o, callbacks=() if n else first.callbacks) for n, o in enumerate(own)]
            self._told = self._fit.segments
        self._fit.listen()

    def _goes_on_without(self, num_left: int) -> bool:
        """Whether those that are left go on by themselves: also where the fit is about to be stopped."""
        if not num_left or self._interrupts.requested:
            return num_left > 0
        spec = self._group.spec
        if spec.extra_workers:
            return num_left >= spec.num_workers
        return self._failure.on_loss == "shrink"

    def go_on(self, broken: GroupBroken) -> None:
        """Form the group anew, with new processes for the dead or without, from where the furthest of the others is.

        Raises:
            WorkerDied: that is not to be; the group is closed.
            GroupBroken: it broke again. Those that were being replaced are to be replaced once more.
        """
        group, dead = self._group, list(broken.dead)
        self._checkpointer.lose(dead)
        try:
            dead, behind = self._settle(broken)
            if dead and self._goes_on_without(len(group.workers) - len(dead)):
                gone, dead = dead, []  # from here on ranks have other numbers
                self._shrink(gone)
                self._fit.count_workers(self._record)
            else:
                if dead:
                    self._replace(dead, broken)
                self._catch_up(dead, behind)
            group.form_anew(self._fit.watch)
        except GroupBroken as again:
            raise GroupBroken(sorted({*dead, *again.dead}), again.error) from None
        except BaseException:
            if not group.closed:
                group.fail(broken.dead)
            raise
        self._fit.listen()
        answers = group.wait(group.submit("go_on"), self._fit.watch, survivable=True)
        self._handover = None
        if answers[0] is not None:
            self._fit.take_in(answers, self._record)

    def _replace(self, dead: Sequence[int], broken: GroupBroken) -> None:
        """Start new processes for the dead, and tell them where the furthest of the others is."""

        def watch(is_last: bool) -> None:
            self._fit.watch(is_last)
            if self._interrupts.requested:  # who is left goes on alone, to the checkpoint that is wanted
                raise GroupBroken(dead, broken.error)

        self._group.replace(dead, self._display.status, watch)
        lost = self._lost(is_first=0 in dead)
        named = {"handover": self._handover, "lost": lost}
        calls = self._group.submit("begin_fit", *self._task, ranks=dead, **named)
        self._group.wait(calls, watch, ranks=dead, survivable=True)

    def _catch_up(self, dead: Sequence[int], behind: Sequence[int]) -> None:
        """Bring those who live to where the furthest is, and into a group of this size, should it be another."""
        group = self._group
        if self._is_resizing:
            left = [rank for rank in range(len(group.workers)) if rank not in dead]
            calls = group.submit("resize", self._handover, Lost(), ranks=left)
            group.wait(calls, self._fit.watch, ranks=left, survivable=True)
            self._is_resizing = False
        else:
            calls = group.submit("catch_up", self._handover, ranks=behind)
            group.wait(calls, self._fit.watch, ranks=behind, survivable=True)

    def _settle(self, broken: GroupBroken) -> tuple[list[int], list[int]]:
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
            self._recoveries.begin(broken.error, self._record.steps, len(group.workers))
            self._display.note(f"{broken.error.message}: going on with new workers ({self._recoveries})")
            return list(broken.dead), []
        self._fit.listen(left)
        calls = group.submit("standing", ranks=left)
        found: list[Standing] = group.wait(calls, self._fit.watch, ranks=left, survivable=True)
        if not all(standing.goes_on for standing in found):
            raise broken.error
        standings = dict(zip(left, found, strict=True))
        furthest = max(left, key=lambda rank: (standings[rank].place, -rank))
        ahead = standings[furthest]
        if ahead.segments > self._fit.segments and ahead.result is not None:
            self._fit.take_in([ahead.result], self._record)  # the last to finish it did not live to say so
        behind = [rank for rank in left if standings[rank].place < ahead.place]
        lost = [rank for rank in behind if not standings[rank].can_catch_up_with(ahead)]
        dead = sorted([*broken.dead, *lost])
        num_left = len(group.workers) - len(dead)
        num_left = num_left if self._goes_on_without(num_left) else len(group.workers)
        self._recoveries.begin(broken.error, self._record.steps + ahead.steps, num_left)
        how = "in place" if num_left == len(group.workers) else f"with {num_left} of {len(group.workers)} workers"
        self._display.note(f"{broken.error.message}: going on {how} ({self._recoveries})")
        (self._handover,) = group.submit("hand_over", ranks=[furthest])
        return dead, [rank for rank in behind if rank not in lost]

    def _lost(self, is_first: bool) -> Lost:
        """What the dead have told of what each rank alone has."""
        last, position = self._last, self._record.position
        own = tuple(result.own for result in last) if all(result.own for result in last) else ()
        is_older = bool(last) and (last[0].position.epoch < position.epoch or last[0].position.step == 0)
        return Lost(own, is_older, list(last[0].callbacks) if last and is_first else [], self._told)

    def _shrink(self, dead: Sequence[int]) -> None:
        """Let those that live go on as a smaller group."""
        group = self._group
        told = self._lost(is_first=0 in dead)
        own = tuple(told.own[rank] for rank in dead) if told.own and not told.is_older else ()
        lost = Lost(own, callbacks=told.callbacks, segments=told.segments)
        self._checkpointer.finish()  # its calls go by the numbers that ranks have by now
        left = [result for rank, result in enumerate(self._last) if rank not in dead]
        if left:  # what callbacks on rank 0 alone have told is the new one's, as the dead ones' sums are
            left[0] = replace(left[0], callbacks=self._last[0].callbacks)
        self._last = left
        group.shrink(dead)
        self._is_resizing = False
        self._fit.listen()
        owned = group.wait(group.submit("resize", self._handover, lost), self._fit.watch, survivable=True)
        if left:
            left[0] = replace(left[0], own=owned[0])
