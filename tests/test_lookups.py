"""Claims about rows that are looked up in a table."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import lookups


def gathers(function: Any, *arguments: Any) -> set[str]:
    """The kinds of operations that gather in what is traced."""
    graph = tf.function(function).get_concrete_function(*arguments).graph
    return {operation.type for operation in graph.get_operations() if "Gather" in operation.type}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
def test_rows_are_read_by_themselves_and_are_those_of_keras(policy: str) -> None:
    layer = keras.layers.Embedding(7, 3, dtype=policy)
    rows = np.array([[0, 6, -1], [2, 2, -7]])
    expected = layer(rows)
    with lookups.by_rows():
        found = layer(rows)
        assert gathers(layer, tf.constant(rows)) == {"ResourceGather"}
    assert found.dtype == expected.dtype and np.array_equal(found, expected)
    assert "ResourceGather" not in gathers(layer, tf.constant(rows))


def test_the_gradient_is_that_of_keras() -> None:
    layer = keras.layers.Embedding(7, 3)
    rows = np.array([[0, 6, -1], [2, 2, 0]])
    layer.build()

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            loss = keras.ops.sum(keras.ops.square(layer(rows)))
        return tape.gradient(loss, layer.trainable_weights[0].value)

    expected = gradient()
    with lookups.by_rows():
        found = gradient()
    assert isinstance(found, tf.IndexedSlices)
    assert np.array_equal(found.indices, expected.indices) and np.array_equal(found.values, expected.values)


def test_what_is_no_table_or_taken_along_another_axis_is_left_to_keras() -> None:
    table = keras.Variable(np.arange(6.0).reshape(2, 3))
    with lookups.by_rows():
        for axis in (None, 1, -1):
            assert np.array_equal(keras.ops.take(table, [1], axis=axis), np.take(table.numpy(), [1], axis=axis))
        assert np.array_equal(keras.ops.take(np.arange(4), [-1], axis=0), [3])
