"""Owns what users test their own models with."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain.data.source import ArraySource
from dtrain.driver_tensorflow import import_tensorflow
from dtrain.errors import DataError
from dtrain.faults import Fault, FaultPlan, Phase, PlannedError
from dtrain.trainer import Trainer
from dtrain.types import Tree

if TYPE_CHECKING:
    from collections.abc import Callable

    import keras

__all__ = [
    "Fault",
    "FaultPlan",
    "PlannedError",
    "Shardability",
    "check_shardable",
    "delay",
    "kill",
    "nan",
    "raise_in",
    "stop",
]

TOLERANCE = 1e-4
"""Float32 rounds; what is no mean over rows is further off."""


@dataclass(frozen=True)
class Shardability:
    """How far one step on several workers is from the same step in one process.

    Attributes:
        logs: relative differences of the loss and of each metric, by name.
        weights: the largest difference of a weight after the step, relative to the largest change of a weight.
        exceptions: sentences on layers that are known not to compute the same (random numbers, BatchNormalization).
    """

    logs: Mapping[str, float]
    weights: float
    exceptions: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether both are the same but for rounding."""
        return max(self.weights, *self.logs.values()) <= TOLERANCE


def check_shardable(
    model_fn: "Callable[..., keras.Model]",
    batch: Tree,
    *,
    num_workers: int = 2,
    config: Mapping[str, Any] | None = None,
) -> Shardability:
    """Tell whether a model's own losses are means over rows, and its metrics add up, in a step on some workers.

    What dtrain cannot see from outside shows here: a loss function, an `add_loss` or a `compute_loss` that sums over
    rows, or mixes them. Mark such a loss with `dtrain.whole_batch`. It takes as long as starting some workers.

    Args:
        model_fn: as for `dtrain.Trainer`.
        batch: (x, y) or (x, y, sample_weight): one mini-batch; of an even split the last row is left out, since parts
            of the same size would hide a mean of means.
        num_workers: how many workers to compare with one.
        config: as for `dtrain.Trainer`.

    Raises:
        DataError: the batch has fewer than `num_workers + 1` rows.

    Example:
        >>> assert dtrain.testing.check_shardable(make_model, (x[:32], y[:32])).exact
    """
    source = ArraySource(*(batch if isinstance(batch, tuple) else (batch,)))
    rows = len(source) - (len(source) % num_workers == 0)
    if rows < num_workers + 1:
        raise DataError(f"batch has {len(source)} rows: {num_workers} workers need at least {num_workers + 1}")
    import_tensorflow()
    from dtrain.model import describe, make_model

    x, y, sample_weight = (*source.read(np.arange(rows, dtype=np.int64)), None, None)[:3]
    with Trainer(
        model_fn, num_workers=num_workers, config=config, tracking=False, checkpoint=False, deterministic=True
    ) as trainer:
        trainer.test_on_batch(x, y, sample_weight)  # builds the model
        before = trainer.get_weights()
        many = trainer.train_on_batch(x, y, sample_weight, return_dict=True)
        after = trainer.get_weights()
    model = make_model(model_fn, config)
    model.test_on_batch(x, y, sample_weight)
    model.set_weights(before)
    one = model.train_on_batch(x, y, sample_weight, return_dict=True)
    logs = {
        name: _largest([many[name]], [value]) / max(float(np.max(np.abs(value))), 1e-7) for name, value in one.items()
    }
    change = max(_largest(model.get_weights(), before), 1e-7)
    return Shardability(logs, _largest(model.get_weights(), after) / change, describe(model).exceptions)


def _largest(one: list[Any], other: list[Any]) -> float:
    return max((float(np.max(np.abs(a - b), initial=0.0)) for a, b in zip(one, other, strict=True)), default=0.0)


def kill(rank: int, step: int, *, phase: Phase = "step", life: int = 0) -> Fault:
    """SIGKILL of a worker, inside `with FaultPlan(...)`.

    Args:
        rank: whose.
        step: in which step of the fit, counted from 0; of other phases see `Fault.number`.
        phase: where.
        life: how many processes had this rank before.

    Example:
        >>> with dtrain.testing.FaultPlan(dtrain.testing.kill(rank=1, step=7)):
        ...     with dtrain.Trainer(make_model, num_workers=2) as trainer:
        ...         history = trainer.fit(x, y)
        >>> history.recoveries[0].rank
        1
    """
    return Fault("kill", rank, phase, step, life=life)


def stop(rank: int, step: int, *, phase: Phase = "step", life: int = 0) -> Fault:
    """SIGSTOP of a worker, which stays there and says nothing; the rest as in `kill`."""
    return Fault("stop", rank, phase, step, life=life)


def raise_in(phase: Phase, rank: int, step: int, *, life: int = 0) -> Fault:
    """A worker raises `PlannedError`; the rest as in `kill`."""
    return Fault("raise", rank, phase, step, life=life)


def delay(rank: int, step: int, seconds: float, *, phase: Phase = "data", life: int = 0) -> Fault:
    """A worker sleeps; the rest as in `kill`."""
    return Fault("delay", rank, phase, step, seconds, life)


def nan(rank: int, step: int, *, life: int = 0) -> Fault:
    """A worker's gradients of one step are NaN."""
    return Fault("nan", rank, "step", step, life=life)
