"""Owns the processes that wait, TensorFlow imported, to take a dead rank's place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from dtrain.types import Failure, WorkerInfo

READY_SECONDS = 60.0
"""A spare that was started a moment ago may take so long: no longer than a new process would."""


@dataclass(frozen=True)
class Spare:
    """A process that waits.

    Attributes:
        actor: the Worker.
        bundle: its place in the group's placement group.
        ready: the call that gets it ready.
    """

    actor: Any
    bundle: int
    ready: Any


class Spares:
    """The spares of a group.

    Args:
        spawn: starts a Worker, given a number of its own and its bundle; does not wait for it.
    """

    def __init__(self, spawn: Callable[[int, int], Any]) -> None:
        self._spawn = spawn
        self._num_started = 0
        self._waiting: list[Spare] = []

    def start(self, bundles: Sequence[int], settings: Any) -> None:
        """Start one in each of these bundles; in the background, so that nothing waits for it.

        Args:
            bundles: of the placement group; free, or about to be.
            settings: what `Worker.setup` is given.
        """
        for bundle in bundles:
            actor = self._spawn(self._num_started, bundle)
            self._num_started += 1
            self._waiting.append(Spare(actor, bundle, actor.setup.remote(settings)))

    def take(self) -> tuple[Spare, WorkerInfo] | None:
        """One that lives, those first that are ready, and where it runs; None: there is none."""
        is_ready = (
            set(ray.wait([spare.ready for spare in self._waiting], num_returns=len(self), timeout=0)[0]) if self else ()
        )
        self._waiting.sort(key=lambda spare: spare.ready not in is_ready)
        while self._waiting:
            spare = self._waiting.pop(0)
            try:
                made, where = ray.get([spare.ready, spare.actor.where.remote()], timeout=READY_SECONDS)
            except (RayError, GetTimeoutError):
                made = Failure("it died, too", traceback="")
            if not isinstance(made, Failure):
                return spare, where
            ray.kill(spare.actor, no_restart=True)
        return None

    @property
    def bundles(self) -> list[int]:
        """Those that have one."""
        return [spare.bundle for spare in self._waiting]

    def __len__(self) -> int:
        return len(self._waiting)

    def close(self) -> None:
        """End all that wait."""
        waiting, self._waiting = self._waiting, []
        for spare in waiting:
            ray.kill(spare.actor, no_restart=True)
