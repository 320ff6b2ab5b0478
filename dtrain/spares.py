"""Owns the processes that wait, TensorFlow imported, to take a dead rank's place or to make the group larger."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from dtrain.interrupts import Interrupts
from dtrain.rooms import Room
from dtrain.types import Failure, WorkerInfo

READY_SECONDS = 60.0
"""A spare that was started a moment ago may take so long: no longer than a new process would."""
ANSWER_SECONDS = 10.0
"""How long one that is ready may take to say where it is."""
POLL_SECONDS = 0.1
AGAIN_SECONDS = 30.0
"""A room whose process could not start is tried again after so long, after each failure more after twice as long."""
MOST_DOUBLINGS = 7


@dataclass(frozen=True)
class Spare:
    """A process that waits.

    Attributes:
        actor: the Worker.
        room: where it is, or will be once the cluster has that room.
        ready: the call that gets it ready.
    """

    actor: Any
    room: Room
    ready: Any


class Spares:
    """The spares of a group.

    Args:
        spawn: starts a Worker, given a number of its own and its room; waits neither for the process nor for the room.
        interrupts: ends a wait.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        spawn: Callable[[int, Room], Any],
        interrupts: Interrupts,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._spawn = spawn
        self._interrupts = interrupts
        self._clock = clock
        self._num_started = 0
        self._waiting: list[Spare] = []
        self._failed: dict[Room, tuple[float, int]] = {}  # when it did last, and how often

    def start(self, rooms: Sequence[Room], settings: Any) -> None:
        """Let there be one in each of these rooms; in the background, so that nothing waits for it.

        Args:
            rooms: free, or about to be.
            settings: what `Worker.setup` is given.
        """
        for room in rooms:
            since, times = self._failed.get(room, (-math.inf, 1))
            if self._clock() - since < AGAIN_SECONDS * 2 ** min(times - 1, MOST_DOUBLINGS):
                continue
            actor = self._spawn(self._num_started, room)
            self._num_started += 1
            self._waiting.append(Spare(actor, room, actor.setup.remote(settings)))

    def have_one_ready(self) -> bool:
        """Whether `take` would return one at once. Those that could not start are given up."""
        for spare in list(self._waiting):
            if _has_answered(spare) and _where(spare) is None:
                self._give_up(spare)
        return any(map(_has_answered, self._waiting))

    def take(self, patience: float = READY_SECONDS) -> tuple[Spare, WorkerInfo] | None:
        """One that lives, those first that are ready, and where it runs; None: there is none within so many seconds."""
        deadline = self._clock() + patience
        while self._waiting:
            spare = next(filter(_has_answered, self._waiting), None)
            if spare is None:
                if self._clock() >= deadline:
                    return None
                self._interrupts.check()
                ray.wait([spare.ready for spare in self._waiting], timeout=POLL_SECONDS)
                continue
            where = _where(spare)
            if where is not None:
                self._waiting.remove(spare)
                return spare, where
            self._give_up(spare)
        return None

    def leave_out(self, rooms: Sequence[Room]) -> None:
        """Those who came from there could not be used: no new ones for a while."""
        for room in rooms:
            self._failed[room] = self._clock(), self._failed.get(room, (0.0, 0))[1] + 1

    @property
    def rooms(self) -> list[Room]:
        """Those that have one."""
        return [spare.room for spare in self._waiting]

    def close(self) -> None:
        """End all that wait."""
        waiting, self._waiting = self._waiting, []
        for spare in waiting:
            ray.kill(spare.actor, no_restart=True)

    def _give_up(self, spare: Spare) -> None:
        self._waiting.remove(spare)
        self.leave_out([spare.room])
        ray.kill(spare.actor, no_restart=True)


def _has_answered(spare: Spare) -> bool:
    """Whether it is ready, or never will be."""
    return bool(ray.wait([spare.ready], timeout=0)[0])


def _where(spare: Spare) -> WorkerInfo | None:
    """Where it runs; None: it is dead by now, or could not be set up."""
    try:
        made, where = ray.get([spare.ready, spare.actor.where.remote()], timeout=ANSWER_SECONDS)
    except RayError:
        return None
    return None if isinstance(made, Failure) else where
