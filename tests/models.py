"""Small models and data that tests share. Factories import Keras inside, as users' should where the driver has none."""

from pathlib import Path
from typing import Any

import numpy as np


def blobs(rows: int = 96, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Points in five dimensions, and which of three classes they are in."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


def make_classifier() -> Any:
    import keras

    keras.utils.set_random_seed(1)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(16, activation="relu", kernel_regularizer="l2"),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def make_two_headed() -> Any:
    """Takes {"a": (5,), "b": (3,)} and gives {"class": (3,), "value": (1,)}."""
    import keras

    keras.utils.set_random_seed(2)
    inputs = {"a": keras.Input((5,), name="a"), "b": keras.Input((3,), name="b")}
    hidden = keras.layers.Dense(8, activation="tanh")(keras.layers.Concatenate()([inputs["a"], inputs["b"]]))
    outputs = {
        "class": keras.layers.Dense(3, activation="softmax", name="class")(hidden),
        "value": keras.layers.Dense(1, name="value")(hidden),
    }
    model = keras.Model(inputs, outputs)
    model.compile(
        "adam",
        loss={"class": "sparse_categorical_crossentropy", "value": "mse"},
        loss_weights={"class": 1.0, "value": 0.5},
        metrics={"class": ["accuracy"], "value": ["mae"]},
    )
    return model


def make_witnessed(config: dict[str, str]) -> Any:
    """A model whose layer leaves a file named by its process whenever it computes."""
    import keras
    import tensorflow as tf

    class Witness(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            import os

            folder = config["folder"]

            def leave(value: Any) -> Any:
                (Path(folder) / str(os.getpid())).touch()
                return value

            y = tf.py_function(leave, [x], x.dtype)
            y.set_shape(x.shape)
            return y

    model = keras.Sequential([keras.Input((5,)), Witness(), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


def make_exact_accumulating() -> Any:
    """The same, with an update after every fourth mini-batch."""
    import keras

    model = make_exact_model()
    optimizer = keras.optimizers.Adam(0.01, epsilon=1e-3, gradient_accumulation_steps=4)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(dtype="float64"), metrics=["accuracy"])
    return model


def make_exact_model() -> Any:
    """One whose rows do not meet, in float64: any split of a mini-batch gives the same but for rounding."""
    import keras

    keras.utils.set_random_seed(4)
    layers = [keras.layers.Dense(8, "tanh", dtype="float64"), keras.layers.Dense(3, "softmax", dtype="float64")]
    model = keras.Sequential([keras.Input((5,)), *layers])
    loss = keras.losses.SparseCategoricalCrossentropy(dtype="float64")
    model.compile(keras.optimizers.Adam(0.01, epsilon=1e-3), loss, metrics=["accuracy"])
    return model
