"""Owns the exact value of losses that are no mean over rows.

A loss that is a mean over rows becomes exact by row shares alone. Of the others there are two kinds:

- one with a mask, with reduction "sum" or "mean_with_sample_weight", divides by something else than the number of rows:
  while a step is traced, the one function that every `keras.losses.Loss` goes through is replaced, and the divisor is
  summed over ranks first;
- one that mixes rows (Dice, Tversky, Circle, and what users mark with `whole_batch`) is computed on every rank from the
  rows of all, which are gathered first.
"""

import contextlib
from collections.abc import Iterator
from typing import Any, TypeVar
from unittest.mock import patch

import keras
import tensorflow as tf
from keras import ops

from dtrain.keras_internals import get_keras_mask, loss_module, set_keras_mask
from dtrain.optimizer import Reduction

T = TypeVar("T")

_MIX_ROWS = (keras.losses.Dice, keras.losses.Tversky, keras.losses.Circle)
_FUNCTIONS_MIX_ROWS = tuple(keras.losses.get(name) for name in ("dice", "tversky", "circle"))

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@contextlib.contextmanager
def exact_losses(step: Reduction) -> Iterator[None]:
    """Inside, every Keras loss times this rank's share, summed over ranks, is the whole mini-batch's loss."""
    exact = _ExactLosses(step)

    def call(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return exact.call(self, y_true, y_pred, sample_weight)

    def update_state(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        return exact.update_state(self, y_true, y_pred, sample_weight)

    with (
        patch.object(loss_module, "reduce_weighted_values", exact.reduce_weighted_values),
        patch.object(keras.losses.Loss, "__call__", call),
        patch.object(keras.metrics.MeanMetricWrapper, "update_state", update_state),
    ):
        yield


class _ExactLosses:
    """What stands in the place of Keras's functions while a step is traced, and calls them.

    Args:
        step: how it is reduced.
    """

    def __init__(self, step: Reduction) -> None:
        self._step = step
        self._plain_reduce = loss_module.reduce_weighted_values
        self._plain_call = keras.losses.Loss.__call__
        self._plain_update = keras.metrics.MeanMetricWrapper.update_state
        self._calls = 0
        self._is_whole = False  # what is computed has the rows of all ranks

    def call(self, loss: Any, *rows: Any) -> Any:
        if not mixes_rows(loss):
            return self._plain_call(loss, *rows)
        gathered = self._gathered(rows)
        with patch.object(self, "_is_whole", True):
            return self._plain_call(loss, *gathered)  # times each rank's share, it is counted once

    def update_state(self, metric: Any, *rows: Any) -> Any:
        return self._plain_update(metric, *(self._gathered(rows) if mixes_rows(metric) else rows))

    def reduce_weighted_values(
        self,
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        values = ops.convert_to_tensor(values, dtype=dtype)
        weights = sample_weight, mask, reduction, dtype
        is_mean = reduction in _MEANS
        by_weight = reduction == "mean_with_sample_weight" and (sample_weight is not None or mask is not None)
        row_shares_suffice = is_mean and mask is None and not by_weight
        if self._is_whole or reduction in (None, "none"):
            return self._plain_reduce(values, *weights)
        if values.shape.rank == 0:
            return self._reduce_number(values, *weights)
        if row_shares_suffice:
            return self._plain_reduce(values, *weights)
        total = self._plain_reduce(values, sample_weight, mask, "sum", dtype)
        divisor = tf.ones_like(total)
        if by_weight:
            divisor = self._summed(ops.sum(_weights(values, sample_weight, mask)))
        elif is_mean:
            ones = None if sample_weight is None else ops.ones_like(sample_weight)
            divisor = self._summed(self._plain_reduce(ops.ones_like(values), ones, mask, "sum", dtype))
        return tf.math.divide_no_nan(total, divisor * tf.cast(self._step.share, total.dtype))

    def _reduce_number(self, value: Any, sample_weight: Any, mask: Any, reduction: str, dtype: Any) -> Any:
        """One number for all rows, which Keras multiplies with the sum, or the mean, of their weights."""
        if sample_weight is None or reduction == "mean_with_sample_weight":
            return self._plain_reduce(value, sample_weight, mask, reduction, dtype)
        weight = self._plain_reduce(ops.ones_like(value), sample_weight, mask, reduction, dtype)
        share = tf.cast(self._step.share, weight.dtype) if reduction in _MEANS else tf.ones_like(weight)
        return value * self._summed(weight * share)

    def _summed(self, value: Any) -> Any:
        """Over ranks; no gradient flows back."""
        self._calls += 1
        return self._step.collective.all_reduce([tf.stop_gradient(value)], f"loss{self._calls}")[0]

    def _gathered(self, rows: Any) -> Any:
        self._calls += 1
        return _gather(rows, self._step, f"rows{self._calls}")


def whole_batch(loss: T) -> T:
    """Mark a loss (an object, its class, or a function) that is no mean over rows: it mixes rows.

    On several workers it is then computed from the targets and predictions of the whole mini-batch, which are gathered
    on every worker. Keras's own Dice, Tversky and Circle need no mark.

    Example:
        >>> @dtrain.whole_batch
        ... def ratio(y_true, y_pred):
        ...     return keras.ops.sum(abs(y_true - y_pred)) / keras.ops.sum(abs(y_true))
    """
    loss.dtrain_whole_batch = True  # type: ignore[attr-defined]
    return loss


def mixes_rows(loss: Any) -> bool:
    """Whether a Keras loss (or a metric made of one) must see the whole mini-batch at once."""
    function = getattr(loss, "fn", None) or getattr(loss, "_fn", None) or loss
    marked = any(getattr(item, "dtrain_whole_batch", False) for item in (loss, function))
    return marked or isinstance(loss, _MIX_ROWS) or function in _FUNCTIONS_MIX_ROWS


def _weights(values: Any, sample_weight: Any, mask: Any) -> Any:
    """What Keras divides by the sum of: of the shape that they were given in, not of that of the values."""
    weights = loss_module.apply_mask(sample_weight, mask, values.dtype, "sum")
    return loss_module.squeeze_or_expand_to_same_rank(values, ops.cast(weights, values.dtype))[1]


def _gather(tree: Any, step: Reduction, name: str) -> Any:
    """The rows of all ranks, masks included."""
    count = 0

    def gather(leaf: Any) -> Any:
        nonlocal count
        count += 1
        place = f"{name}.{count}"
        every = step.across(lambda rows: step.collective.all_gather(rows, place), ops.convert_to_tensor(leaf))
        mask = get_keras_mask(leaf)
        if mask is not None:
            bits = step.collective.all_gather(tf.cast(mask, tf.uint8), f"{place}.mask")
            set_keras_mask(every, tf.cast(bits, tf.bool))
        return every

    return tuple(None if part is None else keras.tree.map_structure(gather, part) for part in tree)
