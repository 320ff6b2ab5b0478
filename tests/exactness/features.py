"""Owns the models, the data and the callbacks of each feature; loaded by the ranks alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from dtrain.losses import whole_batch
from dtrain.optimizer import reduce_gradients

Data = tuple[Any, Any, Any]
"""x, y and sample_weight (which may be None)."""


@dataclass(frozen=True)
class Feature:
    """One thing that must be the same on any number of ranks.

    Attributes:
        model: makes the compiled model.
        data: makes so many rows.
        callbacks: makes those of a fit.
    """

    model: Callable[[], keras.Model]
    data: Callable[[np.random.Generator, int], Data]
    callbacks: Callable[[], list[keras.callbacks.Callback]] = list
    options: Mapping[str, Any] = field(default_factory=dict)
    """Of the Replica."""
    class_weight: Mapping[int, float] | None = None
    steps_per_epoch: int | None = None
    epochs: int = 3


# --- data


def classes(random: np.random.Generator, rows: int) -> Data:
    return random.normal(size=(rows, 5)), random.integers(0, 3, rows), None


def weighted_classes(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = classes(random, rows)
    return x, y, random.uniform(0.1, 3.0, size=rows)


def one_hot_classes(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = classes(random, rows)
    return x, np.eye(3)[y], None


def binary(random: np.random.Generator, rows: int) -> Data:
    x = random.normal(size=(rows, 5))
    y = (x[:, :1] + random.normal(size=(rows, 1)) > 0).astype("int32")
    return x, y, None


def numbers(random: np.random.Generator, rows: int) -> Data:
    x = random.normal(size=(rows, 5))
    return x, x[:, :2] * 2.0 + random.normal(size=(rows, 2)), None


def weighted_numbers(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = numbers(random, rows)
    return x, y, random.uniform(0.1, 3.0, size=rows)


def pictures(random: np.random.Generator, rows: int) -> Data:
    return random.normal(size=(rows, 8, 8, 2)), random.integers(0, 3, rows), None


def named_parts(random: np.random.Generator, rows: int) -> Data:
    x = {"left": random.normal(size=(rows, 3)), "right": random.normal(size=(rows, 2))}
    y = {"kind": random.integers(0, 3, rows), "size": random.normal(size=(rows, 1))}
    return x, y, None


def tokens(random: np.random.Generator, rows: int) -> Data:
    """Sequences of 1 to 6 tokens, padded with 0; a class for each token."""
    lengths = random.integers(1, 7, size=(rows, 1))
    x = np.where(np.arange(6) < lengths, random.integers(1, 9, size=(rows, 6)), 0)
    return x, random.integers(0, 3, size=(rows, 6)), None


def tokens_and_numbers(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = tokens(random, rows)
    return x, {"tokens": y, "number": random.normal(size=(rows, 1))}, None


def words(random: np.random.Generator, rows: int) -> Data:
    """Words that repeat often: within a row, between rows, between ranks."""
    return random.integers(0, 7, size=(rows, 4)), random.integers(0, 3, rows), None


# --- models


def mlp(
    optimizer: Any = None,
    *,
    loss: Any = "sparse_categorical_crossentropy",
    outputs: int = 3,
    activation: str | None = "softmax",
    **compiled: Any,
) -> keras.Model:
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(8, activation="tanh"), layers.Dense(outputs, activation=activation)]
    )
    model.compile(optimizer or keras.optimizers.SGD(0.1), loss, **compiled)
    return model


def adam_optimizer(**options: Any) -> keras.optimizers.Optimizer:
    """Adam that float32 can be measured with.

    The learning rate moves weights far enough for rounding to show in plain Keras as well. With the usual epsilon of
    1e-7, a gradient whose rows cancel to nearly 0 is blown up to a whole step, rounding and all; where plain Keras then
    errs the same way for any order of the rows, its runs differ from each other less than each from float64.
    """
    return keras.optimizers.Adam(0.02, epsilon=1e-3, **options)


def adam(**compiled: Any) -> keras.Model:
    return mlp(adam_optimizer(), **{"metrics": ["accuracy"], **compiled})


def sgd_momentum() -> keras.Model:
    return mlp(keras.optimizers.SGD(0.1, momentum=0.9), metrics=["accuracy"])


def regularizers() -> keras.Model:
    kernel, bias, output = keras.regularizers.L1(0.02), keras.regularizers.L2(0.05), keras.regularizers.L2(0.03)
    hidden = layers.Dense(
        8, activation="tanh", kernel_regularizer=kernel, bias_regularizer=bias, activity_regularizer=output
    )
    model = keras.Sequential(
        [keras.Input((5,)), hidden, layers.Dense(3, activation="softmax", kernel_regularizer="l2")]
    )
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def several_outputs() -> keras.Model:
    left, right = keras.Input((3,), name="left"), keras.Input((2,), name="right")
    hidden = layers.Dense(8, activation="tanh")(layers.concatenate([left, right]))
    outputs = {
        "kind": layers.Dense(3, activation="softmax", name="kind")(hidden),
        "size": layers.Dense(1, name="size")(hidden),
    }
    model = keras.Model({"left": left, "right": right}, outputs)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        loss={"kind": "sparse_categorical_crossentropy", "size": "mse"},
        loss_weights={"kind": 1.5, "size": 0.3},
        metrics={"kind": ["accuracy"], "size": ["mae", keras.metrics.R2Score()]},
    )
    return model


def metrics_binary() -> keras.Model:
    metrics = [
        "accuracy",
        keras.metrics.AUC(num_thresholds=50, name="auc"),
        keras.metrics.AUC(num_thresholds=50, curve="PR", name="auc_pr"),
        keras.metrics.Precision(name="precision"),
        keras.metrics.Recall(name="recall"),
        keras.metrics.F1Score(threshold=0.5, name="f1"),
        keras.metrics.BinaryIoU(name="iou"),
    ]
    return adam(loss="binary_crossentropy", outputs=1, activation="sigmoid", metrics=metrics)


def metrics_of_classes() -> keras.Model:
    metrics = [
        "accuracy",
        keras.metrics.MeanIoU(3, sparse_y_true=False, sparse_y_pred=False, name="mean_iou"),
        keras.metrics.F1Score(average="macro", name="f1"),
        keras.metrics.CategoricalCrossentropy(name="entropy"),
        keras.metrics.KLDivergence(name="kl"),
    ]
    return adam(loss="categorical_crossentropy", metrics=metrics)


def scalar_metric() -> keras.Model:
    def largest_probability(y_true: Any, y_pred: Any) -> Any:
        return keras.ops.mean(keras.ops.max(y_pred, axis=-1))

    return mlp(metrics=[largest_probability])


def sample_weight() -> keras.Model:
    return mlp(
        keras.optimizers.SGD(0.1, momentum=0.9),
        metrics=["accuracy"],
        weighted_metrics=["accuracy", keras.metrics.SparseCategoricalCrossentropy(name="entropy")],
    )


def cnn() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.DepthwiseConv2D(2, activation="tanh"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def channels_first() -> keras.Model:
    first = {"data_format": "channels_first"}
    model = keras.Sequential(
        [
            keras.Input((2, 8, 8)),
            layers.Conv2D(4, 3, activation="relu", **first),
            layers.MaxPooling2D(**first),
            layers.DepthwiseConv2D(2, activation="tanh", **first),
            layers.GlobalAveragePooling2D(**first),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def pictures_channels_first(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = pictures(random, rows)
    return np.moveaxis(x, -1, 1), y, None


def masked_lstm() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.LSTM(5, return_sequences=True),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def masked_outputs() -> keras.Model:
    """One output whose mean is over tokens, one whose mean is over rows, and a weight decay by rows."""
    x = keras.Input((6,), dtype="int32")
    embedded = layers.Embedding(9, 4, mask_zero=True)(x)
    each = layers.Dense(3, activation="softmax", kernel_regularizer="l2", name="tokens")(embedded)
    number = layers.Dense(1, name="number")(layers.GlobalAveragePooling1D()(embedded))
    model = keras.Model(x, {"tokens": each, "number": number})
    losses = {"tokens": "sparse_categorical_crossentropy", "number": "mse"}
    model.compile(adam_optimizer(), losses, metrics={"tokens": ["accuracy"]})
    return model


def ignore_class() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((6,), dtype="int32"), layers.Embedding(9, 4), layers.Dense(3, activation="softmax")]
    )
    model.compile(adam_optimizer(), keras.losses.SparseCategoricalCrossentropy(ignore_class=1))
    return model


def sparse_gradients(optimizer: Any = None, **options: Any) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(7, 3),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(optimizer or adam_optimizer(**options), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class PenaltyOnActivity(layers.Layer):
    """Adds a mean over rows to the loss."""

    def call(self, inputs: Any) -> Any:
        self.add_loss(0.1 * keras.ops.mean(keras.ops.square(inputs)))
        return inputs


def added_loss() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, activation="tanh"),
            PenaltyOnActivity(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    return model


class CustomStep(keras.Model):
    """A train_step that knows nothing of scale_loss, and returns its metrics' results."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(8, activation="tanh")
        self.out = layers.Dense(3)

    def build(self, input_shape: Any) -> None:
        self.hidden.build(input_shape)
        self.out.build((None, 8))
        self.built = True

    def call(self, inputs: Any) -> Any:
        return self.out(self.hidden(inputs))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = self.compute_loss(x=x, y=y, y_pred=predicted)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss, sample_weight=tf.shape(x)[0])
            else:
                metric.update_state(y, predicted)
        return {metric.name: metric.result() for metric in self.metrics}


class CustomStepTensors(CustomStep):
    """One that returns plain tensors, and has no metrics."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            error = tf.reduce_mean(tf.square(predicted - tf.one_hot(y, 3, dtype=predicted.dtype)))
            spread = tf.reduce_mean(tf.abs(predicted))
        self.optimizer.apply_gradients(
            zip(tape.gradient(error, self.trainable_variables), self.trainable_variables, strict=True)
        )
        return {"error": error, "spread": spread}

    def test_step(self, data: Any) -> Any:
        x, y = data
        predicted = self(x, training=False)
        return {"error": tf.reduce_mean(tf.square(predicted - tf.one_hot(y, 3, dtype=predicted.dtype)))}


class UpdatesNothing(CustomStep):
    """One whose gradients go past every optimizer."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        for variable, gradient in zip(self.trainable_variables, gradients, strict=True):
            variable.assign_sub(0.1 * gradient)
        return {"loss": loss}


def custom(model_class: type[keras.Model], **compiled: Any) -> keras.Model:
    model = model_class()
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), loss, **compiled)
    return model


def unbuilt() -> keras.Model:
    model = keras.Sequential([layers.Dense(8, activation="tanh"), layers.Dense(3, activation="softmax")])
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def batch_normalization() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8),
            layers.BatchNormalization(momentum=0.9),
            layers.Activation("tanh"),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def dropout() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, activation="tanh"),
            layers.Dropout(0.4),
            layers.GaussianNoise(0.1),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# --- the whole mini-batch's statistics


def normalized(**options: Any) -> keras.Model:
    """Pictures through BatchNormalization over rows and places, and numbers through one over rows."""
    model = keras.Sequential(
        [
            keras.Input((8, 8, 2)),
            layers.Conv2D(4, 3),
            layers.BatchNormalization(momentum=0.9, **options),
            layers.Activation("tanh"),
            layers.GlobalAveragePooling2D(),
            layers.Dense(6),
            layers.BatchNormalization(momentum=0.8, gamma_regularizer="l2", **options),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def masked_normalization() -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((6,), dtype="int32"),
            layers.Embedding(9, 4, mask_zero=True),
            layers.BatchNormalization(momentum=0.9, synchronized=True),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy")
    return model


# --- losses that mix rows


def overlaps(random: np.random.Generator, rows: int) -> Data:
    return random.normal(size=(rows, 5)), (random.normal(size=(rows, 3)) > 0.5).astype("float64"), None


def unit_vectors(random: np.random.Generator, rows: int) -> Data:
    return random.normal(size=(rows, 5)), random.integers(0, 3, rows), None


@whole_batch
def relative_error(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.sum(keras.ops.abs(y_true - y_pred)) / (1 + keras.ops.sum(keras.ops.abs(y_pred)))


def mixing_rows(loss: Any, activation: str = "sigmoid") -> Callable[[], keras.Model]:
    return lambda: mlp(keras.optimizers.SGD(0.3), loss=loss(), activation=activation, metrics=["mae"])


def circle() -> keras.Model:
    outputs = layers.UnitNormalization()
    model = keras.Sequential([keras.Input((5,)), layers.Dense(4), outputs])
    model.compile(keras.optimizers.SGD(0.01), keras.losses.Circle(gamma=4))
    return model


def positive_numbers(random: np.random.Generator, rows: int) -> Data:
    x = random.normal(size=(rows, 5))
    return x, {name: random.uniform(0.1, 3.0, size=(rows, 2)) for name in LOSSES_OF_NUMBERS}, None


def probabilities(random: np.random.Generator, rows: int) -> Data:
    x = random.normal(size=(rows, 5))
    y: dict[str, Any] = {name: np.eye(3)[random.integers(0, 3, rows)] for name in LOSSES_OF_CLASSES}
    return x, {**y, "generalized": random.integers(0, 3, rows)}, None


def one_output_each(losses: Mapping[str, Callable[[], Any]], size: int, activation: str) -> keras.Model:
    """A model with an output for each loss."""
    x = keras.Input((5,))
    hidden = layers.Dense(6, activation="tanh")(x)
    outputs = {name: layers.Dense(size, activation=activation, name=name)(hidden) for name in losses}
    model = keras.Model(x, outputs)
    model.compile(keras.optimizers.SGD(0.01), {name: make() for name, make in losses.items()})
    return model


LOSSES_OF_NUMBERS: dict[str, Callable[[], Any]] = {
    "squared": keras.losses.MeanSquaredError,
    "absolute": keras.losses.MeanAbsoluteError,
    "percentage": keras.losses.MeanAbsolutePercentageError,
    "logarithmic": keras.losses.MeanSquaredLogarithmicError,
    "huber": keras.losses.Huber,
    "log_cosh": keras.losses.LogCosh,
    "cosine": keras.losses.CosineSimilarity,
    "poisson": keras.losses.Poisson,
}
LOSSES_OF_CLASSES: dict[str, Callable[[], Any]] = {
    "categorical": partial(keras.losses.CategoricalCrossentropy, label_smoothing=0.1),
    "focal": keras.losses.CategoricalFocalCrossentropy,
    "generalized": keras.losses.CategoricalGeneralizedCrossEntropy,
    "hinge_of_classes": keras.losses.CategoricalHinge,
    "divergence": keras.losses.KLDivergence,
    "binary": keras.losses.BinaryCrossentropy,
    "binary_focal": partial(keras.losses.BinaryFocalCrossentropy, apply_class_balancing=True),
    "hinge": keras.losses.Hinge,
    "squared_hinge": keras.losses.SquaredHinge,
}


def ctc() -> keras.Model:
    """Labels of 2 out of sequences of 6: how they are aligned is summed over, row by row."""
    model = keras.Sequential([keras.Input((6,), dtype="int32"), layers.Embedding(9, 4), layers.Dense(5)])
    model.compile(keras.optimizers.SGD(0.05), keras.losses.CTC())
    return model


def labelled_sequences(random: np.random.Generator, rows: int) -> Data:
    return random.integers(1, 9, size=(rows, 6)), random.integers(1, 5, size=(rows, 2)), None


# --- more custom steps


class Adversaries(keras.Model):
    """Two networks, each with an optimizer of its own, and trackers of their losses."""

    def __init__(self) -> None:
        super().__init__()
        normalized = [layers.Dense(4), layers.BatchNormalization(synchronized=True), layers.Activation("tanh")]
        self.generator = keras.Sequential([keras.Input((5,)), *normalized, layers.Dense(2)])
        self.critic = keras.Sequential([keras.Input((2,)), layers.Dense(4, activation="tanh"), layers.Dense(1)])
        self.generator_tracker = keras.metrics.Mean(name="generator_loss")
        self.critic_tracker = keras.metrics.Mean(name="critic_loss")
        self.total = keras.metrics.Sum(name="total")
        self.built = True

    def compile(self, generator_optimizer: Any, critic_optimizer: Any) -> None:
        super().compile(optimizer=critic_optimizer)
        self.generator_optimizer = generator_optimizer  # built by the first step that uses it
        self.optimizer.build(self.critic.trainable_variables)

    def call(self, inputs: Any) -> Any:
        return self.generator(inputs)

    def losses_of(self, x: Any, real: Any) -> tuple[Any, Any]:
        made = self.generator(x, training=True)
        entropy = keras.losses.BinaryCrossentropy(from_logits=True)
        on_real, on_made = self.critic(real), self.critic(made)
        critic = entropy(tf.ones_like(on_real), on_real) + entropy(tf.zeros_like(on_made), on_made)
        return critic, entropy(tf.ones_like(on_made), on_made)

    def train_step(self, data: Any) -> Any:
        x, real = data
        rows = tf.shape(x)[0]
        with tf.GradientTape() as tape:
            critic_loss, _ = self.losses_of(x, real)
        variables = self.critic.trainable_variables
        self.optimizer.apply(tape.gradient(critic_loss, variables), variables)
        with tf.GradientTape() as tape:
            _, generator_loss = self.losses_of(x, real)
        variables = self.generator.trainable_variables
        self.generator_optimizer.apply(tape.gradient(generator_loss, variables), variables)
        self.critic_tracker.update_state(critic_loss, sample_weight=rows)
        self.generator_tracker.update_state(generator_loss, sample_weight=rows)
        self.total.update_state(x)
        return {metric.name: metric.result() for metric in (self.generator_tracker, self.critic_tracker, self.total)}

    def test_step(self, data: Any) -> Any:
        critic_loss, _ = self.losses_of(*data)
        self.critic_tracker.update_state(critic_loss, sample_weight=tf.shape(data[0])[0])
        return {"critic_loss": self.critic_tracker.result()}


def adversaries() -> keras.Model:
    model = Adversaries()
    model.compile(adam_optimizer(), keras.optimizers.SGD(0.1, momentum=0.9))
    return model


class LossOfRows(CustomStep):
    """A loss of each row, whose gradient TensorFlow takes the sum of; a penalty is the gradient of one by numbers."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                predicted = self(x, training=True)
            slope = tf.reduce_sum(tf.square(inner.gradient(predicted, x)), axis=1)
            error = tf.reduce_mean(tf.square(predicted - tf.one_hot(y, 3, dtype=predicted.dtype)), axis=1)
            loss = 0.01 * (error + 0.1 * slope)
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"mean": tf.reduce_mean(loss)}


class StackedLosses(CustomStep):
    """Means over rows, two of them in one tensor."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            error = tf.reduce_mean(tf.square(predicted - tf.one_hot(y, 3, dtype=predicted.dtype)))
            losses = tf.stack([error, 0.1 * tf.reduce_mean(tf.abs(predicted))])
        self.optimizer.apply(tape.gradient(losses, self.trainable_variables), self.trainable_variables)
        return {"mean": tf.reduce_sum(losses)}


class ClipsItself(CustomStep):
    """Reads and clips the gradients of the whole mini-batch before the optimizer gets them."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = reduce_gradients(tape.gradient(loss, self.trainable_variables))
        gradients, norm = tf.clip_by_global_norm(gradients, 0.2)
        self.optimizer.apply(gradients, self.trainable_variables)
        return {"loss": loss, "norm": norm}


class ReturnsSome(CustomStep):
    """Updates its metrics, and returns some of them beside a tensor of another name."""

    def train_step(self, data: Any) -> Any:
        logs = super().train_step(data)
        x, _ = data
        return {"loss": logs["loss"], "size": tf.reduce_mean(tf.abs(x))}


class OwnLoss(CustomStep):
    """Keras's train_step with a loss of its own."""

    train_step = keras.Model.train_step

    def compute_loss(self, x: Any = None, y: Any = None, y_pred: Any = None, *_: Any, **__: Any) -> Any:
        loss = tf.reduce_mean(tf.square(y_pred - tf.one_hot(y, 3, dtype=y_pred.dtype)))
        return loss + 0.01 * tf.reduce_mean(tf.abs(y_pred))


# --- more layers and metrics


def recurrent() -> keras.Model:
    x = keras.Input((6,), dtype="int32")
    embedded = layers.Embedding(9, 4, mask_zero=True)(x)
    both = layers.Bidirectional(layers.GRU(3, return_sequences=True))(embedded)
    model = keras.Model(x, layers.Dense(3, activation="softmax")(layers.SimpleRNN(4)(both)))
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def one_class(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = tokens(random, rows)
    return x, y[:, 0], None


def constrained() -> keras.Model:
    """Weights that are put back after each update, and a norm that is estimated in each forward pass."""
    spectral = layers.SpectralNormalization(layers.Dense(4, kernel_constraint=keras.constraints.MaxNorm(0.8)))
    model = keras.Sequential([keras.Input((5,)), spectral, layers.Dense(3, "softmax", kernel_constraint="unit_norm")])
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def frozen_and_unused() -> keras.Model:
    """A layer that is not trained, and one whose gradients are None."""

    class Unused(layers.Layer):
        def build(self, input_shape: Any) -> None:
            self.weight = self.add_weight(shape=(2,))

        def call(self, inputs: Any) -> Any:
            return inputs

    frozen = layers.Dense(8, activation="tanh", trainable=False)
    model = keras.Sequential([keras.Input((5,)), frozen, Unused(), layers.Dense(3, activation="softmax")])
    model.compile(adam_optimizer(), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def metrics_of_numbers() -> keras.Model:
    found = [
        keras.metrics.MeanSquaredError(),
        keras.metrics.RootMeanSquaredError(),
        keras.metrics.MeanAbsoluteError(),
        keras.metrics.MeanAbsolutePercentageError(),
        keras.metrics.MeanSquaredLogarithmicError(),
        keras.metrics.CosineSimilarity(),
        keras.metrics.LogCoshError(),
        keras.metrics.R2Score(),
        keras.metrics.PearsonCorrelation(),
        keras.metrics.ConcordanceCorrelation(),
        keras.metrics.Poisson(),
    ]
    return mlp(keras.optimizers.SGD(0.01), loss="mse", outputs=2, activation=None, metrics=found)


def metrics_of_labels() -> keras.Model:
    found = [
        keras.metrics.SparseCategoricalAccuracy(),
        keras.metrics.SparseCategoricalCrossentropy(),
        keras.metrics.MeanIoU(3, sparse_y_pred=False, name="mean_iou"),
        keras.metrics.IoU(3, [0, 2], sparse_y_pred=False, name="iou"),
    ]
    return adam(metrics=found)


def metrics_of_one_hot() -> keras.Model:
    found = [
        keras.metrics.CategoricalAccuracy(),
        keras.metrics.OneHotMeanIoU(3, name="mean_iou"),
        keras.metrics.OneHotIoU(3, [0, 1], name="iou"),
        keras.metrics.FBetaScore(average="weighted", beta=2.0, name="fbeta"),
        keras.metrics.CategoricalHinge(),
    ]
    return adam(loss="categorical_crossentropy", metrics=found)


def metrics_of_decisions() -> keras.Model:
    found = [
        keras.metrics.BinaryAccuracy(),
        keras.metrics.BinaryCrossentropy(),
        keras.metrics.TruePositives(),
        keras.metrics.TrueNegatives(),
        keras.metrics.FalsePositives(),
        keras.metrics.FalseNegatives(),
        keras.metrics.SensitivityAtSpecificity(0.5, num_thresholds=20),
        keras.metrics.SpecificityAtSensitivity(0.5, num_thresholds=20),
        keras.metrics.PrecisionAtRecall(0.5, num_thresholds=20),
        keras.metrics.RecallAtPrecision(0.5, num_thresholds=20),
        keras.metrics.Hinge(),
        keras.metrics.SquaredHinge(),
        keras.metrics.Accuracy(),
    ]
    return adam(loss="binary_crossentropy", outputs=1, activation="sigmoid", metrics=found)


def metrics_of_top_k() -> keras.Model:
    """TensorFlow finds the k largest in float32 alone."""
    x = keras.Input((5,))
    hidden = layers.Dense(8, activation="tanh")(x)
    model = keras.Model(x, {name: layers.Dense(3, activation="softmax", name=name)(hidden) for name in ("a", "b")})
    metrics = {
        "a": keras.metrics.SparseTopKCategoricalAccuracy(2),
        "b": keras.metrics.TopKCategoricalAccuracy(2),
    }
    losses = {"a": "sparse_categorical_crossentropy", "b": "categorical_crossentropy"}
    model.compile(adam_optimizer(), losses, metrics=metrics)
    return model


def two_kinds_of_labels(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = classes(random, rows)
    return x, {"a": y, "b": np.eye(3)[y]}, None


# --- optimizers


def _multi_optimizer() -> Any:
    choice = keras.optimizers.MultiOptimizer
    return choice(lambda variable: adam_optimizer() if "bias" in variable.path else keras.optimizers.SGD(0.1))


OPTIMIZERS: dict[str, Callable[[], keras.optimizers.Optimizer]] = {
    "Adadelta": lambda: keras.optimizers.Adadelta(0.5),
    "Adafactor": lambda: keras.optimizers.Adafactor(0.05),
    "Adagrad": lambda: keras.optimizers.Adagrad(0.1),
    "Adamax": lambda: keras.optimizers.Adamax(0.02),
    "Ftrl": lambda: keras.optimizers.Ftrl(0.1, l1_regularization_strength=0.01),
    "Lamb": lambda: keras.optimizers.Lamb(0.02),
    "Lion": lambda: keras.optimizers.Lion(0.01),
    "MultiOptimizer": _multi_optimizer,
    "Muon": lambda: keras.optimizers.Muon(0.02),
    "Nadam": lambda: keras.optimizers.Nadam(0.02, epsilon=1e-3),
    "RMSprop": lambda: keras.optimizers.RMSprop(0.02, momentum=0.5, centered=True),
    "ScheduleFreeAdamW": lambda: keras.optimizers.ScheduleFreeAdamW(0.02, warmup_steps=3),
}
"""Those that no other feature has."""


def mixed(policy: str) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        hidden = layers.Dense(8, activation="tanh", dtype=policy)
        model = keras.Sequential([keras.Input((5,)), hidden, layers.Dense(3, activation="softmax", dtype="float32")])
        optimizer: Any = keras.optimizers.SGD(0.1, momentum=0.9)
        if policy == "mixed_float16":
            optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=64.0)  # nothing overflows
        model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    return make


def built_first(optimizer: keras.optimizers.Optimizer) -> keras.Model:
    """ScheduleFreeAdamW needs it: in Keras it starts from other slots where they are made inside the traced step."""
    model = mlp(optimizer)
    model.optimizer.build(model.trainable_variables)
    return model


def some_zeros(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = classes(random, rows)
    x[20::60] = 0.0
    return x, y, None


def skipped_steps() -> keras.Model:
    """Rows of zeros have a finite loss and no finite gradients, and the optimizer skips their mini-batches."""
    model = keras.Sequential(
        [
            keras.Input((5,)),
            layers.Dense(8, use_bias=False),
            layers.Lambda(lambda x: keras.ops.sqrt(keras.ops.abs(x))),
            layers.Dense(3, activation="softmax"),
        ]
    )
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05), dynamic_growth_steps=1)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


# --- callbacks


def deciding_callbacks() -> list[keras.callbacks.Callback]:
    return [
        keras.callbacks.ReduceLROnPlateau("val_loss", factor=0.5, patience=1, min_delta=0.05),
        keras.callbacks.EarlyStopping("val_loss", patience=3, min_delta=0.05, restore_best_weights=True),
    ]


class SlowsDownAndStops(keras.callbacks.Callback):
    """A user's callback: halves the learning rate after an epoch, changes a weight, stops in the middle of another."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 0.5 * float(np.asarray(self.model.optimizer.learning_rate))
        bias = self.model.layers[-1].bias
        bias.assign(np.asarray(bias) * 0.5)
        logs["own"] = 0.25 * epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if np.asarray(self.model.optimizer.iterations) == 10:
            self.model.stop_training = True


class KeepsBatchLogs(keras.callbacks.Callback):
    """Puts the logs of every mini-batch into those of its epoch."""

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.kept: dict[str, float] = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.kept.update({f"{batch}.{key}": float(value) for key, value in logs.items()})

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        logs.update(self.kept)


def _sgd(**options: Any) -> Callable[[], keras.Model]:
    return lambda: mlp(keras.optimizers.SGD(0.1, momentum=0.9, **options))


def _adam(**options: Any) -> Callable[[], keras.Model]:
    return lambda: mlp(adam_optimizer(**options))


def _scheduled() -> keras.Model:
    schedule = keras.optimizers.schedules.ExponentialDecay(0.1, decay_steps=3, decay_rate=0.8)
    return mlp(keras.optimizers.SGD(schedule, momentum=0.9, nesterov=True))


def weighted_tokens() -> keras.Model:
    """A loss for each of 6 tokens, and one weight for each row of them."""
    x = keras.Input((6,), dtype="int32")
    model = keras.Model(x, layers.Dense(3, activation="softmax")(layers.Embedding(9, 4)(x)))
    loss = keras.losses.SparseCategoricalCrossentropy(reduction="mean_with_sample_weight")
    model.compile(adam_optimizer(), loss)
    return model


def tokens_with_weights(random: np.random.Generator, rows: int) -> Data:
    x, y, _ = tokens(random, rows)
    return x, y, random.uniform(0.1, 3.0, size=(rows, 1))


def mixing_custom_step() -> keras.Model:
    """A loss of the whole mini-batch in a step that knows nothing of scale_loss."""

    @whole_batch
    def relative_error(y: Any, predicted: Any) -> Any:
        return keras.ops.sum(abs(keras.ops.one_hot(y, 3) - predicted)) / (1 + keras.ops.sum(abs(predicted)))

    model = CustomStep()
    model.compile(keras.optimizers.SGD(0.1, momentum=0.9), relative_error, metrics=["accuracy"])
    return model


def scalar_loss() -> keras.Model:
    """One number for all rows, which Keras multiplies with the mean of their weights."""
    return mlp(
        keras.optimizers.SGD(0.05),
        loss=lambda y, predicted: keras.ops.mean(keras.ops.square(y - predicted)),
        outputs=2,
        activation=None,
    )


def _loss(reduction: str) -> Callable[[], keras.Model]:
    return lambda: mlp(
        keras.optimizers.SGD(0.01, momentum=0.9),
        loss=keras.losses.MeanSquaredError(reduction=reduction),
        outputs=2,
        activation=None,
        metrics=["mae"],
    )


FEATURES: dict[str, Feature] = {
    "sgd_momentum": Feature(sgd_momentum, classes),
    "adam": Feature(adam, classes),
    "adam_usual_epsilon": Feature(lambda: mlp("adam", metrics=["accuracy"]), classes),
    "regularizers": Feature(regularizers, classes),
    "sample_weight": Feature(sample_weight, weighted_classes),
    "several_outputs": Feature(several_outputs, named_parts),
    "class_weight": Feature(
        partial(mlp, metrics=["accuracy"], weighted_metrics=["accuracy"]), classes, class_weight={0: 0.3, 2: 4.0}
    ),
    "metrics_binary": Feature(metrics_binary, binary),
    "metrics_of_classes": Feature(metrics_of_classes, one_hot_classes),
    "scalar_metric": Feature(scalar_metric, classes),
    "cnn": Feature(cnn, pictures),
    "channels_first": Feature(channels_first, pictures_channels_first),
    "clipnorm": Feature(_sgd(clipnorm=0.05), classes),
    "global_clipnorm": Feature(_sgd(global_clipnorm=0.1), classes),
    "clipvalue": Feature(_sgd(clipvalue=0.02), classes),
    "weight_decay": Feature(lambda: mlp(keras.optimizers.AdamW(0.02, epsilon=1e-3, weight_decay=0.1)), classes),
    "ema": Feature(_adam(use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3), classes),
    "accumulation": Feature(_adam(gradient_accumulation_steps=3, global_clipnorm=0.5), classes),
    "accumulation_unfinished": Feature(_adam(gradient_accumulation_steps=5, weight_decay=0.1), classes),
    "accumulation_sparse": Feature(partial(sparse_gradients, gradient_accumulation_steps=3), words),
    "accumulation_loss_scaling": Feature(
        lambda: mlp(
            keras.optimizers.LossScaleOptimizer(
                keras.optimizers.SGD(0.1, momentum=0.9, gradient_accumulation_steps=3), dynamic_growth_steps=4
            )
        ),
        classes,
    ),
    "schedule_nesterov": Feature(_scheduled, classes),
    "loss_scaling": Feature(
        lambda: mlp(keras.optimizers.LossScaleOptimizer(adam_optimizer(), dynamic_growth_steps=4)), classes
    ),
    "masked_lstm": Feature(masked_lstm, tokens),
    "masked_outputs": Feature(masked_outputs, tokens_and_numbers),
    "ignore_class": Feature(ignore_class, tokens),
    "loss_sum": Feature(_loss("sum"), weighted_numbers),
    "loss_none": Feature(_loss("none"), weighted_numbers),
    "loss_mean_with_sample_weight": Feature(_loss("mean_with_sample_weight"), weighted_numbers),
    "sparse_gradients": Feature(sparse_gradients, words),
    "sparse_gradients_clipped": Feature(partial(sparse_gradients, global_clipnorm=0.1), words),
    "added_loss": Feature(added_loss, classes),
    "custom_step": Feature(partial(custom, CustomStep, metrics=["accuracy"]), classes),
    "custom_step_tensors": Feature(partial(custom, CustomStepTensors), classes),
    "short_epochs": Feature(sgd_momentum, classes, steps_per_epoch=3),
    "long_epochs": Feature(sgd_momentum, classes, steps_per_epoch=6),
    "unbuilt": Feature(unbuilt, classes),
    "eager": Feature(partial(adam, run_eagerly=True), classes),
    "deciding_callbacks": Feature(lambda: mlp(keras.optimizers.SGD(0.5)), classes, deciding_callbacks, epochs=9),
    "user_callback": Feature(sgd_momentum, classes, lambda: [SlowsDownAndStops()], epochs=5),
    "batch_hooks": Feature(sgd_momentum, classes, lambda: [KeepsBatchLogs()]),
    **{
        f"optimizer_{name}": Feature(lambda make=make: built_first(make()), classes)  # type: ignore[misc]
        for name, make in OPTIMIZERS.items()
    },
    "skipped_steps": Feature(skipped_steps, some_zeros),
    "metrics_of_top_k": Feature(metrics_of_top_k, two_kinds_of_labels),
    "losses_of_numbers": Feature(partial(one_output_each, LOSSES_OF_NUMBERS, 2, "softplus"), positive_numbers),
    "losses_of_classes": Feature(partial(one_output_each, LOSSES_OF_CLASSES, 3, "softmax"), probabilities),
    "loss_ctc": Feature(ctc, labelled_sequences),
    "mixed_float32": Feature(mixed("float32"), classes),
    "mixed_float16": Feature(mixed("mixed_float16"), classes),
    "mixed_bfloat16": Feature(mixed("mixed_bfloat16"), classes),
    "normalized_synchronized": Feature(partial(normalized, synchronized=True), pictures),
    "normalized_renorm": Feature(partial(normalized, synchronized=True, renorm=True), pictures),
    "normalized_sync_batch_norm": Feature(normalized, pictures, options={"sync_batch_norm": True}),
    "normalized_masked": Feature(masked_normalization, tokens),
    "loss_dice": Feature(mixing_rows(keras.losses.Dice), overlaps),
    "loss_tversky": Feature(mixing_rows(partial(keras.losses.Tversky, alpha=0.3, beta=0.7)), overlaps),
    "loss_circle": Feature(circle, unit_vectors),
    "loss_whole_batch": Feature(mixing_rows(lambda: relative_error, "tanh"), overlaps),
    "adversaries": Feature(adversaries, numbers),
    "loss_mixed_in_custom_step": Feature(mixing_custom_step, classes),
    "losses_stacked": Feature(partial(custom, StackedLosses), classes),
    "loss_of_rows": Feature(partial(custom, LossOfRows), classes),
    "loss_weighted_by_token": Feature(weighted_tokens, tokens_with_weights),
    "loss_scalar_weighted": Feature(scalar_loss, weighted_numbers),
    **{
        f"sparse_{name}": Feature(lambda make=make: sparse_gradients(make()), words)  # type: ignore[misc]
        for name, make in {
            "SGD": partial(keras.optimizers.SGD, 0.1, momentum=0.9, clipvalue=0.01),
            "RMSprop": partial(keras.optimizers.RMSprop, 0.01, epsilon=1e-3, clipnorm=0.05),
            "Adagrad": partial(keras.optimizers.Adagrad, 0.1),
            "Ftrl": partial(keras.optimizers.Ftrl, 0.1),
        }.items()
    },
    "clips_itself": Feature(partial(custom, ClipsItself), classes),
    "returns_some": Feature(partial(custom, ReturnsSome, metrics=["accuracy"]), classes),
    "own_loss": Feature(partial(custom, OwnLoss, metrics=["accuracy"]), classes),
    "recurrent": Feature(recurrent, one_class),
    "constrained": Feature(constrained, classes),
    "frozen_and_unused": Feature(frozen_and_unused, classes),
    "metrics_of_numbers": Feature(metrics_of_numbers, numbers),
    "metrics_of_labels": Feature(metrics_of_labels, classes),
    "metrics_of_one_hot": Feature(metrics_of_one_hot, one_hot_classes),
    "metrics_of_decisions": Feature(metrics_of_decisions, binary),
    "sparse_as_dense": Feature(
        lambda: sparse_gradients(optimizer=keras.optimizers.SGD(0.1)), words, options={"sparse_as_dense": True}
    ),
    "batch_normalization": Feature(batch_normalization, classes),
    "batch_normalization_one_step": Feature(batch_normalization, classes, epochs=1),
    "dropout": Feature(dropout, classes),
}
