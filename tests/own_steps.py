"""Owns a model whose steps are its own, for tests of what happens to them."""

from typing import Any

import keras
import numpy as np
import tensorflow as tf


class OwnSteps(keras.Model):  # type: ignore[misc]
    """Two optimizers in one step, and a number that is no metric's."""

    def __init__(self, dtype: str) -> None:
        super().__init__(dtype=dtype)
        self.first = keras.layers.Dense(8, "tanh", dtype=dtype)
        self.second = keras.layers.Dense(3, "softmax", dtype=dtype)
        self.other = keras.optimizers.SGD(0.05, momentum=0.9)

    def call(self, x: Any) -> Any:
        return self.second(self.first(x))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x, training=True)))
        ours, theirs = self.first.trainable_variables, self.second.trainable_variables
        gradients = tape.gradient(loss, [*ours, *theirs])
        self.optimizer.apply(gradients[: len(ours)], ours)
        self.other.apply(gradients[len(ours) :], theirs)
        return {"own": loss}

    def test_step(self, data: Any) -> Any:
        x, y = data
        return {"loss": keras.ops.mean(keras.losses.sparse_categorical_crossentropy(y, self(x)))}


def make_eager() -> Any:
    """Its steps are not traced, and it has metrics that they do not update."""
    return _make("float32", "adam", run_eagerly=True, metrics=["accuracy"])


def make_exact() -> Any:
    """In float64, where any split of a mini-batch gives the same but for rounding."""
    return _make("float64", keras.optimizers.SGD(0.05))


def make_of_width(width: int) -> Any:
    """In the precision of the moment; it takes rows of so many numbers."""
    return _make(keras.config.floatx(), "adam", width)


def _make(dtype: str, optimizer: Any, width: int = 5, **options: Any) -> Any:
    keras.utils.set_random_seed(4)
    model = OwnSteps(dtype)
    model(np.zeros((1, width)))
    model.compile(optimizer, **options)
    model.other.build(model.second.trainable_variables)
    return model
