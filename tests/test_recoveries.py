"""Claims about what is on record of a fit's failures, and when there were too many."""

import pytest

from dtrain.config import FailureConfig
from dtrain.errors import WorkerDied
from dtrain.recoveries import Recoveries


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_recovery_ends_with_a_new_step_and_not_with_one_that_was_finished_before() -> None:
    clock, told = Clock(), []
    recoveries = Recoveries(FailureConfig(), lambda: told.append(len(recoveries.done)), clock)
    recoveries.begin(WorkerDied("rank 1 died", 1, "here"), 7, 2)
    recoveries.settle(5)
    recoveries.settle(7)  # the rest of what was finished when it died
    assert recoveries.done == [] and told == []
    clock.now += 3
    recoveries.settle(8)
    recoveries.settle(9)
    (recovery,) = recoveries.done
    assert (recovery.rank, recovery.host, recovery.seconds, recovery.steps_redone) == (1, "here", 3.0, 0)
    assert told == [1]


def test_failures_count_in_a_row_until_a_step_is_new() -> None:
    error = WorkerDied("rank 1 died", 1, "here")
    recoveries = Recoveries(FailureConfig(max_failures=2))
    for steps in (7, 7, 8, 8):  # the third has trained a step more
        recoveries.begin(error, steps, 2)
        recoveries.redo(4)
    assert [recovery.steps_redone for recovery in recoveries.done] == [4, 4, 4]
    with pytest.raises(WorkerDied, match="rank 1 died; that was failure 3 in a row, after 8 steps") as caught:
        recoveries.begin(error, 8, 2)
    assert (caught.value.rank, caught.value.host) == (1, "here")
    with pytest.raises(WorkerDied, match="failure 3 in a row"):
        recoveries.begin(caught.value, 8, 2)  # said once more, counted once
