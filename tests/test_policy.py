"""Claims about dtrain.policy: tables of pure decisions."""

import math

import pytest

from dtrain.config import CheckpointConfig
from dtrain.policy import checkpoint_is_due, is_better, next_segment_steps


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
    ("every", "epoch", "is_last", "due"),
    [(1, 0, False, True), (2, 0, False, False), (2, 1, False, True), (None, 5, False, False), (None, 5, True, True)],
)
def test_checkpoints_are_made_every_n_epochs_and_at_the_end(
    every: int | None, epoch: int, is_last: bool, due: bool
) -> None:
    assert checkpoint_is_due(CheckpointConfig(every_epochs=every), epoch, is_last) is due


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
