"""Owns decisions that need no one to be asked: pure functions of what was measured and what was asked for."""

import math
import statistics
import sys
from collections.abc import Mapping, Sequence

from dtrain.config import CheckpointConfig

SEGMENT_SECONDS = 2.0
"""Workers are spoken to about so often: what is measured of a segment is shown, recorded and decided upon."""
SLOW_SHARE = 0.2
"""A rank is slow where the others wait for it for so much of the time."""
FIRST_STEPS = 1
"""The first segment traces the step: the user sees it end as soon as can be."""


def next_segment_steps(
    seconds_per_step: float | None, previous: int, remaining: int | None, first_step: int = 0, window: int = 1
) -> int:
    """How many steps the next segment has.

    Args:
        seconds_per_step: of the segment before; None: nothing was measured yet.
        previous: how many steps that one had.
        remaining: steps left in the epoch, 1 or more; None: unknown.
        first_step: where in the epoch it begins.
        window: a segment ends before a step of the epoch whose number is a multiple of this, or with the epoch.
    """
    if remaining is None:
        remaining = sys.maxsize
    steps = min(_wanted_steps(seconds_per_step, previous), remaining)
    steps += -(first_step + steps) % window
    return remaining if steps * 1.25 >= remaining else steps


def _wanted_steps(seconds_per_step: float | None, previous: int) -> int:
    if seconds_per_step is None:
        return FIRST_STEPS
    wanted = max(1, int(SEGMENT_SECONDS / max(seconds_per_step, 1e-6)))
    # The first steps are slower than the rest; growing at most eightfold forgets a wrong measure soon enough.
    return min(wanted, previous * 8)


def who_is_slow(seconds: float, spent: Sequence[Mapping[str, float]]) -> tuple[int, str, float] | None:
    """The rank that keeps the others of a segment waiting.

    Args:
        seconds: that the segment took, on all ranks.
        spent: for each rank, seconds by what it spent them on, without those in which it waited for others.

    Returns:
        The rank, what it spends more time on than the others, and the share of the time that they wait for it; None:
        nobody is slow.
    """
    if len(spent) < 2 or seconds <= 0:
        return None
    rank = max(range(len(spent)), key=lambda rank: sum(spent[rank].values()))
    others = [each for other, each in enumerate(spent) if other != rank]
    excess = {what: own - statistics.median(each[what] for each in others) for what, own in spent[rank].items()}
    share = sum(excess.values()) / seconds
    return (rank, max(excess, key=excess.__getitem__), share) if share >= SLOW_SHARE else None


def failures_in_a_row(before: int, furthest: int, steps: int) -> int:
    """How many failures there were without a newly finished step between them, this one included.

    Args:
        before: the number after the last failure.
        furthest: steps that had been finished by then.
        steps: steps that are finished now.
    """
    return 1 if steps > furthest else before + 1


def steps_until_checkpoint(config: CheckpointConfig | None, step: int) -> int | None:
    """Mini-batches from `step` of the run to the next checkpoint that goes by steps, 1 or more; None: there is none."""
    if config is None or config.every_steps is None:
        return None
    return config.every_steps - step % config.every_steps


def checkpoint_is_due(config: CheckpointConfig, epoch: int, step: int) -> bool:
    """Whether to make a checkpoint when `epoch`, counted from 0, has ended, `step` mini-batches into the run."""
    by_epochs = config.every_epochs is not None and (epoch + 1) % config.every_epochs == 0
    return by_epochs or (config.every_steps is not None and step % config.every_steps == 0)


def is_better(config: CheckpointConfig, metrics: Mapping[str, float], best: float | None) -> bool:
    """Whether `metrics` have a better value of the monitored metric than `best`. NaN never is better."""
    value = metrics.get(config.monitor or "")
    if value is None or math.isnan(value):
        return False
    mode = config.mode
    if mode == "auto":
        rising = ("acc", "auc", "precision", "recall", "f1", "iou", "r2")
        mode = "max" if any(part in (config.monitor or "").lower() for part in rising) else "min"
    return best is None or (value > best if mode == "max" else value < best)
