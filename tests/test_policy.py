"""Claims about dtrain.policy: tables of pure decisions."""

import math
from typing import Any

import pytest

from dtrain.config import CheckpointConfig
from dtrain.policy import (
    checkpoint_is_due,
    failures_in_a_row,
    is_better,
    next_segment_steps,
    steps_until_checkpoint,
    who_is_slow,
)


@pytest.mark.parametrize(
    ("before", "furthest", "steps", "number"),
    [
        (0, 0, 0, 1),  # before any step
        (1, 0, 0, 2),
        (2, 10, 10, 3),  # again at the same step
        (2, 10, 7, 3),  # on the way to it, from a checkpoint
        (2, 10, 11, 1),  # a step further
    ],
)
def test_failures_count_until_a_step_is_new(before: int, furthest: int, steps: int, number: int) -> None:
    assert failures_in_a_row(before, furthest, steps) == number


@pytest.mark.parametrize(
    ("pace", "previous", "remaining", "steps"),
    [
        (None, 0, 100, 1),  # nothing measured: the first segment is one step
        (10.0, 1, 100, 1),  # a slow first step, which traced, does not grow by itself
        (0.001, 1, 10_000, 8),  # at most eightfold
        (0.001, 512, 100_000, 2000),  # two seconds of steps
        (0.001, 4096, 100_000, 2000),
        (0.001, 2000, 2400, 2400),  # a remainder of a quarter goes along
        (0.001, 2000, 3000, 2000),
        (0.0, 1000, 50, 50),
        (5.0, 1, 1, 1),
    ],
)
def test_segments_grow_to_about_two_seconds(pace: float | None, previous: int, remaining: int, steps: int) -> None:
    assert next_segment_steps(pace, previous, remaining) == steps


@pytest.mark.parametrize(
    ("pace", "previous", "remaining", "first_step", "steps"),
    [
        (None, 0, 100, 0, 8),
        (None, 0, 5, 0, 5),  # the epoch ends
        (None, 0, 97, 3, 5),  # gone on with within a window
        (0.1, 8, 1000, 8, 24),
        (0.01, 500, 1000, 16, 200),
        (0.01, 500, None, 16, 200),
    ],
)
def test_segments_hold_whole_windows(
    pace: float | None, previous: int, remaining: int | None, first_step: int, steps: int
) -> None:
    assert next_segment_steps(pace, previous, remaining, first_step, window=8) == steps


@pytest.mark.parametrize(
    ("every_epochs", "every_steps", "epoch", "step", "due"),
    [
        (1, None, 0, 10, True),
        (2, None, 0, 10, False),
        (2, None, 1, 20, True),
        (None, None, 5, 60, False),  # at the end of the fit alone
        (None, 20, 0, 10, False),
        (None, 20, 1, 20, True),  # that step, which ends an epoch
    ],
)
def test_checkpoints_are_made_every_n_epochs_or_steps(
    every_epochs: int | None, every_steps: int | None, epoch: int, step: int, due: bool
) -> None:
    config = CheckpointConfig(every_epochs=every_epochs, every_steps=every_steps)
    assert checkpoint_is_due(config, epoch, step) is due


@pytest.mark.parametrize(("every", "step", "left"), [(None, 7, None), (5, 0, 5), (5, 3, 2), (5, 5, 5), (1, 8, 1)])
def test_the_next_checkpoint_by_steps_is_counted_over_the_whole_run(
    every: int | None, step: int, left: int | None
) -> None:
    assert steps_until_checkpoint(CheckpointConfig(every_steps=every), step) == left


@pytest.mark.parametrize(
    ("monitor", "mode", "value", "best", "better"),
    [
        (None, "auto", 1.0, None, False),
        ("val_loss", "auto", 1.0, None, True),
        ("val_loss", "auto", 0.5, 1.0, True),
        ("val_loss", "auto", 1.0, 1.0, False),
        ("val_accuracy", "auto", 0.9, 0.8, True),
        ("val_accuracy", "min", 0.9, 0.8, False),
        ("val_loss", "auto", math.nan, None, False),
        ("missing", "auto", 1.0, None, False),
    ],
)
def test_the_best_is_by_the_monitored_metric(
    monitor: str | None, mode: str, value: float, best: float | None, better: bool
) -> None:
    config = CheckpointConfig(monitor=monitor, mode=mode)  # type: ignore[arg-type]
    assert is_better(config, {"val_loss": value, "val_accuracy": value}, best) is better


def spent(reading: float = 0.0, callbacks: float = 0.0, computing: float = 1.0) -> dict[str, float]:
    return {"reading data": reading, "callbacks": callbacks, "computing": computing}


@pytest.mark.parametrize(
    ("ranks", "found"),
    [
        ([spent(), spent(reading=0.3)], None),  # too little
        ([spent(), spent(reading=0.9)], (1, "reading data", 0.45)),
        ([spent(reading=0.2, callbacks=0.7), spent(reading=0.1), spent()], (0, "callbacks", 0.425)),
        ([spent(reading=1.0), spent(reading=1.1), spent(reading=1.0)], None),  # all alike
        ([spent(computing=1.1), spent(computing=1.9), spent()], (1, "computing", 0.425)),
        ([spent(reading=1.0), spent(computing=1.9)], None),  # they make up for each other
        ([spent(reading=1.0)], None),
    ],
)
def test_who_keeps_the_others_waiting_is_slow(ranks: list[dict[str, float]], found: Any) -> None:
    who = who_is_slow(2.0, ranks)
    assert who == (found if found is None else (*found[:2], pytest.approx(found[2])))
