"""Owns how rows of a table are looked up in a step that is traced: one by one.

Keras's `take` makes a tensor of the whole variable first; the update of the rows that were touched then has to copy all
of it, since the tensor shares its memory. Read by themselves the rows are the same, and their gradients are.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import tensorflow as tf

from dtrain.keras_internals import Variable, backend_numpy


@contextlib.contextmanager
def by_rows() -> Iterator[None]:
    """Inside, Embedding layers, and `keras.ops.take(variable, indices, axis=0)`, read the rows that they need."""
    plain = backend_numpy.take

    def take(x: Any, indices: Any, axis: Any = None) -> Any:
        table = x._value if isinstance(x, Variable) and axis == 0 else None
        if not isinstance(table, tf.Variable) or isinstance(indices, (tf.SparseTensor, tf.RaggedTensor)):
            return plain(x, indices, axis=axis)
        indices = tf.convert_to_tensor(indices)
        from_end = indices + tf.cast(tf.shape(table)[0], indices.dtype)  # negative ones count from there, as in Keras
        return x._maybe_autocast(tf.gather(table, tf.where(indices < 0, from_end, indices)))

    with patch.object(backend_numpy, "take", take):
        yield
