"""Owns what a fit has survived: how many failures it may still go on from, and what is on record of each."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime

from dtrain.config import FailureConfig
from dtrain.errors import WorkerDied
from dtrain.history import Recovery
from dtrain.policy import failures_in_a_row


class Recoveries:
    """The failures of one fit.

    Args:
        config: how many it survives.
        on_recovered: called when one is on record: a step is finished again.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        config: FailureConfig,
        on_recovered: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.done: list[Recovery] = []
        self._config = config
        self._on_recovered = on_recovered
        self._clock = clock
        self._in_a_row, self._furthest = 0, 0
        self._failed_at = 0
        self._is_over = False
        self._current: tuple[Recovery, float] | None = None  # and when it was noticed

    def begin(self, error: WorkerDied, steps: int, num_workers: int) -> None:
        """Note a failure after so many finished steps, those included that are not taken in yet.

        So many workers are to go on.

        Raises:
            WorkerDied: it is one too many.
        """
        if self._is_over:
            raise error
        self.settle()
        self._in_a_row = failures_in_a_row(self._in_a_row, self._furthest, steps)
        self._furthest, self._failed_at = max(self._furthest, steps), steps
        if self._in_a_row > self._config.max_failures:
            self._is_over = True
            raise self.last_word(error)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        self._current = Recovery(now, error.rank, error.host, error.message, 0.0, 0, num_workers), self._clock()

    def last_word(self, error: WorkerDied) -> WorkerDied:
        """The error that ends the fit: where it was not the first, with how many there were and where."""
        if self._in_a_row < 2:
            return error
        told = f"{error.message}; that was failure {self._in_a_row} in a row, after {self._furthest} steps"
        return WorkerDied(told, error.rank, error.host, error.remote_traceback)

    def redo(self, steps: int) -> None:
        """So many finished steps are trained again."""
        self._failed_at -= steps
        if self._current is not None:
            recovery, noticed = self._current
            self._current = replace(recovery, steps_redone=steps), noticed

    def settle(self, steps: int | None = None) -> None:
        """So many steps are finished, or (None) the fit ends: the last recovery is over with the first that is new."""
        if self._current is None or (steps is not None and steps <= self._failed_at):
            return
        (recovery, noticed), self._current = self._current, None
        self.done.append(replace(recovery, seconds=self._clock() - noticed))
        self._on_recovered()

    def __str__(self) -> str:
        return f"{self._in_a_row} of {self._config.max_failures}"
