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
    plain = loss_module.reduce_weighted_values
    plain_call, plain_update = keras.losses.Loss.__call__, keras.metrics.MeanMetricWrapper.update_state
    calls = 0
    on_whole_batch = False

    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        if on_whole_batch:
            return plain(values, sample_weight, mask, reduction, dtype)
        values = ops.convert_to_tensor(values, dtype=dtype)
        is_mean = reduction in _MEANS
        by_weight = reduction == "mean_with_sample_weight" and (sample_weight is not None or mask is not None)
        if values.shape.rank == 0 and sample_weight is not None and reduction not in (None, "none") and not by_weight:
            # One number for all rows, times the sum or the mean of the whole mini-batch's weights.
            weight = plain(ops.ones_like(values), sample_weight, mask, reduction, dtype)
            return values * summed(weight * tf.cast(step.share, weight.dtype) if is_mean else weight)
        row_shares_suffice = is_mean and mask is None and not by_weight
        if values.shape.rank == 0 or reduction in (None, "none") or row_shares_suffice:
            return plain(values, sample_weight, mask, reduction, dtype)
        total = plain(values, sample_weight, mask, "sum", dtype)
        divisor = tf.ones_like(total)
        if by_weight:
            divisor = summed(loss_module.reduce_values(_weights(values, sample_weight, mask), None, "sum"))
        elif is_mean:
            weight = None if sample_weight is None else ops.ones_like(sample_weight)
            divisor = summed(plain(ops.ones_like(values), weight, mask, "sum", dtype))
        return tf.math.divide_no_nan(total, divisor * tf.cast(step.share, total.dtype))

    def summed(value: Any) -> Any:
        """Over ranks; no gradient flows back."""
        nonlocal calls
        calls += 1
        return step.collective.all_reduce([tf.stop_gradient(value)], f"loss{calls}")[0]

    def call(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        nonlocal calls, on_whole_batch
        if not mixes_rows(self):
            return plain_call(self, y_true, y_pred, sample_weight)
        gathered = _gather((y_true, y_pred, sample_weight), step, f"rows{calls}")
        calls += 1
        on_whole_batch = True
        try:
            return plain_call(self, *gathered)  # times each rank's share, it is counted once
        finally:
            on_whole_batch = False

    def update_state(self: Any, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        nonlocal calls
        rows = (y_true, y_pred, sample_weight)
        if mixes_rows(self):
            rows = _gather(rows, step, f"rows{calls}")
            calls += 1
        return plain_update(self, *rows)

    with (
        patch.object(loss_module, "reduce_weighted_values", reduce_weighted_values),
        patch.object(keras.losses.Loss, "__call__", call),
        patch.object(keras.metrics.MeanMetricWrapper, "update_state", update_state),
    ):
        yield


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
    function = getattr(loss, "fn", None) or getattr(loss, "_fn", None)
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
