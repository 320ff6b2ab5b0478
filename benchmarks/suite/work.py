"""Owns the work that rows do: models with their data, made anew and alike wherever they are asked for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

THREADS = 1
"""Of TensorFlow, inside operations and across them, in every process of every contender."""
INPUT_SEED, MODEL_SEED = 0, 1


@dataclass(frozen=True)
class Work:
    """A model and its data.

    Attributes:
        make_model: makes and compiles it; given the module `keras`, Keras's or, for tf.distribute, tf_keras.
        shape: of a row.
        batch_size: rows of a mini-batch of the whole job.
        steps: mini-batches of a block.
        classes: the labels are so many.
        vocabulary: rows are integers below this; None: numbers.
    """

    make_model: Callable[[Any], Any]
    shape: tuple[int, ...]
    batch_size: int
    steps: int
    classes: int = 10
    vocabulary: int | None = None

    def data(self, steps: int) -> tuple[Any, Any]:
        """Rows and labels of so many mini-batches."""
        generator = np.random.default_rng(INPUT_SEED)
        size = (steps * self.batch_size, *self.shape)
        if self.vocabulary is None:
            x = generator.standard_normal(size, np.float32)
        else:
            x = generator.integers(self.vocabulary, size=size).astype(np.int32)
        return x, generator.integers(self.classes, size=len(x))


def share(data: tuple[Any, Any], batch_size: int, rank: int, ranks: int) -> tuple[Any, Any]:
    """A rank's rows of each mini-batch, in order."""
    own = batch_size // ranks
    x, y = (part.reshape(-1, batch_size, *part.shape[1:])[:, rank * own : (rank + 1) * own] for part in data)
    return x.reshape(-1, *x.shape[2:]), y.reshape(-1)


def model_fn(work: Work) -> Any:
    """The work's model in Keras 3, with the same weights in every process."""
    import keras

    keras.utils.set_random_seed(MODEL_SEED)
    return work.make_model(keras)


def _compiled(keras: Any, model: Any, optimizer: Any = None) -> Any:
    optimizer = optimizer or keras.optimizers.SGD(0.01, momentum=0.9)
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def make_mlp(keras: Any) -> Any:
    layers = keras.layers
    return _compiled(
        keras, keras.Sequential([keras.Input((100,)), layers.Dense(64, activation="relu"), layers.Dense(10)])
    )


def make_cnn(keras: Any) -> Any:
    """225,034 parameters."""
    layers = keras.layers
    return _compiled(
        keras,
        keras.Sequential(
            [
                keras.Input((28, 28, 1)),
                layers.Conv2D(32, 3, activation="relu"),
                layers.MaxPooling2D(),
                layers.Conv2D(64, 3, activation="relu"),
                layers.MaxPooling2D(),
                layers.Flatten(),
                layers.Dense(128, activation="relu"),
                layers.Dense(10),
            ]
        ),
    )


def make_with_metrics(keras: Any) -> Any:
    """The CNN with five metrics."""
    model = make_cnn(keras)
    metrics = keras.metrics
    model.compile(
        model.optimizer,
        model.loss,
        metrics=[
            "accuracy",
            metrics.SparseTopKCategoricalAccuracy(2, name="top_2"),
            metrics.SparseTopKCategoricalAccuracy(3, name="top_3"),
            metrics.SparseTopKCategoricalAccuracy(5, name="top_5"),
            metrics.SparseCategoricalCrossentropy(from_logits=True, name="crossentropy"),
        ],
    )
    return model


def make_deep(keras: Any) -> Any:
    """200 variables, of 8 numbers or 64 (the last two: of 10 and 80)."""
    layers = keras.layers
    small = keras.initializers.RandomNormal(stddev=0.02, seed=MODEL_SEED)  # or 100 layers amplify rounding
    x = inputs = keras.Input((8,))
    for _ in range(99):
        x = layers.Add()([x, layers.Dense(8, activation="tanh", kernel_initializer=small)(x)])
    return _compiled(keras, keras.Model(inputs, layers.Dense(10)(x)))


def make_embedding(keras: Any) -> Any:
    """64 million parameters, of which a mini-batch touches what its 5,000 numbers name."""
    layers = keras.layers
    return _compiled(
        keras,
        keras.Sequential(
            [
                keras.Input((50,), dtype="int32"),
                layers.Embedding(1_000_000, 64),
                layers.GlobalAveragePooling1D(),
                layers.Dense(10),
            ]
        ),
        keras.optimizers.SGD(0.1),
    )


def make_large(keras: Any, **options: Any) -> Any:
    """25.5 million parameters."""
    layers = keras.layers
    hidden = [layers.Dense(2400, activation="relu") for _ in range(5)]
    model = keras.Sequential([keras.Input((1024,)), *hidden, layers.Dense(10)])
    return _compiled(keras, model, keras.optimizers.SGD(0.001, momentum=0.9, **options))  # else rounding is amplified


def make_accumulating(keras: Any) -> Any:
    """The same, of which every fourth step updates."""
    return make_large(keras, gradient_accumulation_steps=4)


def make_normalized(keras: Any) -> Any:
    """A small CNN with three BatchNormalizations."""
    layers = keras.layers
    x = inputs = keras.Input((28, 28, 1))
    for filters in (16, 32, 64):
        x = layers.MaxPooling2D()(layers.ReLU()(layers.BatchNormalization()(layers.Conv2D(filters, 3)(x))))
    return _compiled(keras, keras.Model(inputs, layers.Dense(10)(layers.Flatten()(x))))


WORKS: Mapping[str, Work] = {
    "mlp": Work(make_mlp, (100,), 64, 200),
    "cnn": Work(make_cnn, (28, 28, 1), 128, 25),
    "metrics": Work(make_with_metrics, (28, 28, 1), 128, 100),
    "normalized": Work(make_normalized, (28, 28, 1), 128, 25),
    "deep": Work(make_deep, (8,), 64, 100),
    "large": Work(make_large, (1024,), 64, 8),
    "accumulating": Work(make_accumulating, (1024,), 64, 8),
    "embedding": Work(make_embedding, (50,), 100, 8, vocabulary=1_000_000),
}
