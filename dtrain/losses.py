"""Owns the exact value of losses whose divisor is not the number of rows.

A loss that is a mean over rows becomes exact by row shares alone. One with a mask, with reduction "sum" or
"mean_with_sample_weight" divides by something else; while a step is traced, the one function that every
`keras.losses.Loss` goes through is replaced, and the divisor is summed over ranks first.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import tensorflow as tf
from keras import ops

from dtrain.keras_internals import loss_module
from dtrain.optimizer import Reduction

_MEANS = ("sum_over_batch_size", "mean", "mean_with_sample_weight")


@contextlib.contextmanager
def exact_losses(step: Reduction) -> Iterator[None]:
    """Inside, every Keras loss times this rank's share, summed over ranks, is the whole mini-batch's loss."""
    plain = loss_module.reduce_weighted_values
    calls = 0

    def reduce_weighted_values(
        values: Any,
        sample_weight: Any = None,
        mask: Any = None,
        reduction: str = "sum_over_batch_size",
        dtype: Any = None,
    ) -> Any:
        nonlocal calls
        values = ops.convert_to_tensor(values, dtype=dtype)
        is_mean = reduction in _MEANS
        by_weight = reduction == "mean_with_sample_weight" and sample_weight is not None
        row_shares_suffice = is_mean and mask is None and not by_weight
        if values.shape.rank == 0 or reduction in (None, "none") or row_shares_suffice:
            return plain(values, sample_weight, mask, reduction, dtype)
        total = plain(values, sample_weight, mask, "sum", dtype)
        divisor = tf.ones_like(total)
        if is_mean:
            weight = sample_weight if by_weight or sample_weight is None else ops.ones_like(sample_weight)
            local = tf.stop_gradient(plain(ops.ones_like(values), weight, mask, "sum", dtype))
            (divisor,) = step.collective.all_reduce([local], f"loss{calls}")
            calls += 1
        return tf.math.divide_no_nan(total, divisor * tf.cast(step.share, total.dtype))

    with patch.object(loss_module, "reduce_weighted_values", reduce_weighted_values):
        yield
