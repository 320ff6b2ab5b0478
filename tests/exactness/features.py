"""Owns the models, the data and the callbacks of each feature; loaded by the ranks alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers

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


def sparse_gradients(**clipped: float) -> keras.Model:
    model = keras.Sequential(
        [
            keras.Input((4,), dtype="int32"),
            layers.Embedding(7, 3),
            layers.Flatten(),
            layers.Dense(3, activation="softmax"),
        ]
    )
    model.compile(adam_optimizer(**clipped), "sparse_categorical_crossentropy", metrics=["accuracy"])
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
    "clipnorm": Feature(_sgd(clipnorm=0.05), classes),
    "global_clipnorm": Feature(_sgd(global_clipnorm=0.1), classes),
    "clipvalue": Feature(_sgd(clipvalue=0.02), classes),
    "weight_decay": Feature(lambda: mlp(keras.optimizers.AdamW(0.02, epsilon=1e-3, weight_decay=0.1)), classes),
    "ema": Feature(_adam(use_ema=True, ema_momentum=0.8, ema_overwrite_frequency=3), classes),
    "accumulation": Feature(_adam(gradient_accumulation_steps=3, global_clipnorm=0.5), classes),
    "schedule_nesterov": Feature(_scheduled, classes),
    "loss_scaling": Feature(
        lambda: mlp(keras.optimizers.LossScaleOptimizer(adam_optimizer(), dynamic_growth_steps=4)), classes
    ),
    "masked_lstm": Feature(masked_lstm, tokens),
    "masked_outputs": Feature(masked_outputs, tokens_and_numbers),
    "ignore_class": Feature(ignore_class, tokens),
    "loss_sum": Feature(_loss("sum"), weighted_numbers),
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
    "batch_normalization": Feature(batch_normalization, classes),
    "batch_normalization_one_step": Feature(batch_normalization, classes, epochs=1),
    "dropout": Feature(dropout, classes),
}
