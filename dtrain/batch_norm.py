"""Owns the statistics of a whole mini-batch for BatchNormalization layers that ask for them (`synchronized=True`).

Keras knows how to do that under tf.distribute alone. Here, while a step is traced, its moments are replaced by ones
over all ranks. Layers that do not ask keep the statistics of each rank's own rows.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any
from unittest.mock import patch

import keras
import tensorflow as tf

from dtrain.keras_internals import backend_nn, layers_of
from dtrain.optimizer import Reduction

BatchNormalization = keras.layers.BatchNormalization


def synchronize(model: keras.Model) -> None:
    """Make every BatchNormalization of a model ask for the statistics of the whole mini-batch."""
    for layer in layers_of(model):
        if isinstance(layer, BatchNormalization):
            layer.synchronized = True


@contextlib.contextmanager
def synchronized_moments(reduction: Reduction) -> Iterator[None]:
    """Inside, synchronized layers, and `keras.ops.moments(..., synchronized=True)`, use the whole mini-batch."""
    plain_moments = BatchNormalization._moments
    calls = 0

    def over_ranks(x: Any, axes: Any, weight: Any, epsilon: float) -> tuple[Any, Any]:
        nonlocal calls
        calls += 1
        return _moments(x, axes, weight, epsilon, reduction, f"moments{calls}")

    def compute_moments_sync(x: Any, axes: Any, keepdims: bool) -> tuple[Any, Any]:
        mean, variance = over_ranks(x, axes, tf.ones_like(x), 0.0)
        return (mean, variance) if keepdims else (tf.squeeze(mean, axes), tf.squeeze(variance, axes))

    def moments(self: Any, inputs: Any, mask: Any) -> tuple[Any, Any]:
        if mask is None or not self.synchronized:
            mean, variance = plain_moments(self, inputs, mask)
            return mean, variance
        weight = tf.cast(tf.broadcast_to(tf.expand_dims(mask, -1), tf.shape(inputs)), inputs.dtype)
        mean, variance = over_ranks(inputs, self._reduction_axes, weight, keras.config.epsilon())
        return tf.squeeze(mean), tf.squeeze(variance)

    with (
        patch.object(backend_nn, "_compute_moments_sync", compute_moments_sync),
        patch.object(BatchNormalization, "_moments", moments),
    ):
        yield


def _moments(
    x: tf.Tensor, axes: Sequence[int], weight: tf.Tensor, epsilon: float, reduction: Reduction, name: str
) -> tuple[tf.Tensor, tf.Tensor]:
    """Mean and variance over all ranks; the reduced axes keep length 1. Differentiable. Collective.

    Each rank sends the number, the mean and the squared deviations of its own values, in a row beside zeros, and all
    put them together after Chan, Golub and LeVeque (1979). A sum of squares would lose the variance of values that are
    far from 0. `epsilon` is added to the number of values, as Keras does where there is a mask.
    """
    x = tf.where(weight > 0, x, tf.zeros_like(x))  # what is masked may be NaN
    count = tf.reduce_sum(weight, axes, keepdims=True)
    total = tf.reduce_sum(x * weight, axes, keepdims=True)
    mean = tf.math.divide_no_nan(total, count)
    deviations = tf.reduce_sum(tf.square(x - mean) * weight, axes, keepdims=True)
    own = tf.cast(tf.stack([count, total, deviations]), tf.float64)  # few numbers; their sums need not round again
    collective = reduction.collective
    before, after = collective.rank, collective.world_size - 1 - collective.rank
    padded = tf.pad(own[None], [[before, after]] + [[0, 0]] * own.shape.rank)
    rows = reduction.across(lambda tensor: collective.all_reduce([tensor], name)[0], padded)
    counts, totals, deviations = tf.unstack(rows, axis=1)
    number = tf.reduce_sum(counts, 0) + epsilon
    mean = tf.math.divide_no_nan(tf.reduce_sum(totals, 0), number)
    between = counts * tf.square(tf.math.divide_no_nan(totals, counts) - mean)
    variance = tf.math.divide_no_nan(tf.reduce_sum(deviations + between, 0), number)
    return tf.cast(mean, x.dtype), tf.cast(variance, x.dtype)
