"""Owns the workers that are to join a group: they get ready while it trains, and join when it pauses."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from dtrain.interrupts import Interrupts
from dtrain.outcomes import have_answered, outcome_of
from dtrain.rooms import Room
from dtrain.spares import Spare, Spares
from dtrain.types import Failure, WorkerInfo

log = logging.getLogger("dtrain")

JOIN_SECONDS = 120.0
"""How long the group waits for one that is to join, once that has built its model and opened its data."""
POLL_SECONDS = 0.1

Told = Mapping[str, tuple[Any, ...]]
"""Calls that the ranks of a group have had, (method, *arguments), by what they are about."""


@dataclass(frozen=True)
class Newcomer:
    """A worker that is to join.

    Attributes:
        spare: its process.
        where: it runs.
        told: what the ranks had been told when it was.
        calls: that tell it all that.
    """

    spare: Spare
    where: WorkerInfo
    told: Told
    calls: Sequence[Any]


class Newcomers:
    """Those of a group.

    Args:
        spares: processes that have started, or are about to.
        interrupts: ends a wait.
    """

    def __init__(self, spares: Spares, interrupts: Interrupts) -> None:
        self._spares = spares
        self._interrupts = interrupts
        self._waiting: list[Newcomer] = []

    def get_ready(self, told: Told, place: Callable[[Any, WorkerInfo], Any]) -> bool:
        """Let those whose processes have started build the model and open the data, which needs no group.

        Args:
            told: what the ranks were told.
            place: sends a process the call that tells it its place.

        Returns:
            Whether one is ready by now. Does not wait.
        """
        while self._spares.have_one_ready() and (taken := self._spares.take(patience=0)) is not None:
            spare, where = taken
            calls = [place(spare.actor, where), *_tell(spare, told.values())]
            self._waiting.append(Newcomer(spare, where, dict(told), calls))
        ready = [newcomer for newcomer in self._waiting if have_answered(newcomer.calls)]
        failed = [newcomer for newcomer in ready if not self._can_follow(newcomer, newcomer.calls)]
        self._waiting = [newcomer for newcomer in self._waiting if newcomer not in failed]
        return len(ready) > len(failed)

    def join(
        self,
        told: Told,
        last: tuple[str, tuple[Any, ...], Mapping[str, Any]],
        watch: Callable[[bool], None],
    ) -> list[Newcomer]:
        """Those of the ready ones that a last call, (method, arguments, named ones), ends well for.

        The others are given up, and their rooms left out for a while.
        """
        ready = [newcomer for newcomer in self._waiting if have_answered(newcomer.calls)]
        self._waiting = [newcomer for newcomer in self._waiting if newcomer not in ready]
        method, args, kwargs = last
        calls: list[list[Any]] = []
        for newcomer in ready:
            since = [each for about, each in told.items() if newcomer.told.get(about) is not each]
            calls.append([*newcomer.calls, *_tell(newcomer.spare, since)])
            calls[-1].append(getattr(newcomer.spare.actor, method).remote(*args, **kwargs))
        self._wait([call for each in calls for call in each], watch)
        return [newcomer for newcomer, each in zip(ready, calls, strict=True) if self._can_follow(newcomer, each)]

    @property
    def rooms(self) -> list[Room]:
        """Where they are."""
        return [newcomer.spare.room for newcomer in self._waiting]

    def close(self) -> None:
        """End their processes."""
        waiting, self._waiting = self._waiting, []
        for newcomer in waiting:
            ray.kill(newcomer.spare.actor, no_restart=True)

    def _wait(self, calls: Sequence[Any], watch: Callable[[bool], None]) -> None:
        deadline = time.monotonic() + JOIN_SECONDS
        while not have_answered(calls) and time.monotonic() < deadline and not self._interrupts.requested:
            ray.wait(list(calls), num_returns=len(calls), timeout=POLL_SECONDS)
            watch(False)

    def _can_follow(self, newcomer: Newcomer, calls: Sequence[Any]) -> bool:
        problem = f"it was not ready within {JOIN_SECONDS:g} s"
        if have_answered(calls):
            failures = [outcome for outcome in map(outcome_of, calls) if isinstance(outcome, Failure)]
            if not failures:
                return True
            problem = failures[0].error
        log.warning("a worker on %s that was to join could not: %s", newcomer.where.host, problem)
        self._spares.leave_out([newcomer.spare.room])
        ray.kill(newcomer.spare.actor, no_restart=True)
        return False


def _tell(spare: Spare, told: Any) -> list[Any]:
    return [getattr(spare.actor, method).remote(*args) for method, *args in told]
