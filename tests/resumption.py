"""Owns the fits that are cut in two: what a rank does in tests/test_resume.py. Loaded by the ranks alone.

A fit is run once without any checkpoint, once with a snapshot after every step, and then gone on with from each of
these, as files have it. All that makes up a rank's state afterwards becomes one digest.
"""

import hashlib
import random
from collections.abc import Callable, Mapping
from typing import Any

import keras
import numpy as np
import own_steps
import tensorflow as tf
from keras import layers

import dtrain
from dtrain import fit_state
from dtrain.checkpoint import FileRecord, Staging
from dtrain.collective import Collective
from dtrain.data.given import Deferred
from dtrain.data.source import ArraySource
from dtrain.fit_state import SavedFit
from dtrain.rank_state import read_own
from dtrain.replica import Replica
from dtrain.types import Batching, BatchPlan, FitPlan, Position, Segment

ROWS, BATCH, EPOCHS = 23, 5, 3
SEED = (3, 0)


@dtrain.on_every_rank
class Draws(keras.callbacks.Callback):  # type: ignore[misc]
    """A user's callback that draws from Python's and NumPy's generators, and says how to save what it keeps."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.drawn += [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.randn())]

    def on_train_begin(self, logs: Any = None) -> None:
        self.drawn = []
        bias = self.model.layers[-1].bias
        bias.assign(bias * 0 + 1)  # which must not undo a resume

    def get_state(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def set_state(self, state: dict[str, Any]) -> None:
        self.drawn = list(state["drawn"])


class Looks(keras.callbacks.Callback):  # type: ignore[misc]
    """A user's callback that has the model draw random numbers, on rank 0 alone."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        (dropout,) = (layer for layer in self.model.layers if isinstance(layer, layers.Dropout))
        dropout(np.ones((1, 3)), training=True)


class Noise(layers.Layer):  # type: ignore[misc]
    """Draws from Keras's global generator."""

    def call(self, x: Any, training: bool = False) -> Any:
        return x + 0.1 * keras.random.normal(keras.ops.shape(x), dtype=x.dtype) if training else x


class Seen(keras.metrics.Sum):  # type: ignore[misc]
    """Counts rows and does not begin anew with an epoch."""

    def update_state(self, y: Any, prediction: Any, sample_weight: Any = None) -> None:
        super().update_state(keras.ops.ones_like(prediction[:, 0]))

    def reset_state(self) -> None:
        pass


def regularized() -> keras.Model:
    """Dropout, noise, BatchNormalization, Adam on a schedule; metrics with states of several dtypes."""
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.Dense(6, "relu", kernel_regularizer="l2"),
            layers.BatchNormalization(),
            Noise(),
            layers.Dropout(0.4),
            layers.Dense(3, activation="softmax"),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(0.05, 12)
    metrics = ["accuracy", keras.metrics.MeanIoU(3, sparse_y_pred=False), Seen(name="seen")]
    model.compile(keras.optimizers.Adam(rate), "sparse_categorical_crossentropy", metrics=metrics)
    return model


def accumulating() -> keras.Model:
    """Gradients that each rank keeps for three steps, clipping, averaged weights."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(3, activation="softmax")])
    optimizer = keras.optimizers.SGD(
        0.2, momentum=0.9, clipnorm=1.0, gradient_accumulation_steps=3, use_ema=True, ema_overwrite_frequency=4
    )
    model.compile(optimizer, "sparse_categorical_crossentropy")
    return model


def scaled() -> keras.Model:
    """A loss scale that moves, and several steps an execution."""
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")])
    optimizer = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.05), 4.0, dynamic_growth_steps=3)
    model.compile(optimizer, "sparse_categorical_crossentropy", metrics=["accuracy"], steps_per_execution=2)
    return model


def plain() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(3, activation="softmax")])
    model.compile(keras.optimizers.SGD(0.5), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def deciding() -> list[keras.callbacks.Callback]:
    best = keras.callbacks.EarlyStopping("val_loss", patience=1, min_delta=0.02, restore_best_weights=True)
    return [best, Draws(), Looks()]


def lowering() -> list[keras.callbacks.Callback]:
    return [keras.callbacks.ReduceLROnPlateau("loss", factor=0.5, patience=0, min_delta=0.05)]


def in_batches() -> Any:
    x, y = data()

    def batches() -> Any:
        for start in range(0, ROWS, BATCH):
            yield x[start : start + BATCH], y[start : start + BATCH]

    return batches()


def held_out_in_batches() -> Any:
    """In another order each time; the fit looks at the first batch alone."""
    return tf.data.Dataset.from_tensor_slices(tuple(leaf[:7] for leaf in data())).shuffle(7, seed=1).batch(3)


CASES: Mapping[str, tuple[Callable[[], keras.Model], Callable[[], list[Any]], Callable[[], Any] | None]] = {
    "dropout, batch normalization, Adam, a schedule, early stopping": (regularized, deciding, None),
    "accumulated gradients, averaged weights": (accumulating, lambda: [], None),
    "a lowered learning rate, data in batches": (plain, lowering, in_batches),
    "a loss scale, two steps an execution": (scaled, lambda: [], None),
    "two optimizers in a step of its own": (lambda: own_steps.make_of_width(4), lambda: [], None),
}


def data() -> tuple[Any, Any]:
    generator = np.random.default_rng(5)
    x = generator.normal(size=(ROWS, 4)).astype(keras.config.floatx())
    return x, np.argmax(x[:, :3], axis=1)


class Fit:
    """A fit of a case on this rank, step by step."""

    def __init__(self, collective: Collective, name: str, dtype: str) -> None:
        keras.backend.clear_session(free_memory=False)
        self.dtype = dtype
        self._set_precision()
        keras.utils.set_random_seed(11)
        make, self.callbacks, self.make_data = CASES[name]
        self.replica = Replica(make(), collective)
        self.replica.build((data()[0][:1], data()[1][:1]))
        self.initial = self.replica.read_state()

    def _set_precision(self) -> None:
        keras.config.set_floatx(self.dtype)
        keras.config.set_dtype_policy(self.dtype)

    def begin(self, saved: SavedFit | None = None) -> None:
        self._set_precision()
        random.seed(11)
        np.random.seed(11)  # not Keras's: a graph would go on with the generator that it was traced with
        if saved is None:
            self.replica.write_state(self.initial)
            for variable in self.replica.metrics.variables:
                variable.assign(variable * 0)
        train: Any = ArraySource(*data())
        plan: BatchPlan | Batching = BatchPlan(ROWS, BATCH, shuffle=True, seed=SEED)
        held_out: Any = ArraySource(*(leaf[:7] for leaf in data()))
        validation: BatchPlan | Batching = BatchPlan(7, 3)
        if self.make_data is not None:
            import cloudpickle

            train, plan = Deferred("x", "function", cloudpickle.dumps(self.make_data), None), Batching(seed=SEED)
            held_out = Deferred("validation_data", "function", cloudpickle.dumps(held_out_in_batches), None)
            validation = Batching(steps=1)
        self.fit_callbacks = self.callbacks()
        self.position = saved.position if saved is not None else Position(0, 0)
        self.steps = saved.step if saved is not None else 0
        self.stopped = False
        self.logs: list[Any] = []
        whole = FitPlan(plan, EPOCHS, validation=validation)
        self.replica.begin_fit(whole, train, held_out, self.fit_callbacks, saved=saved)

    def step(self, num_steps: int = 1) -> bool:
        """Train some steps; whether there are more."""
        left = max(1, -(-ROWS // BATCH) - self.position.step)  # where nobody knows how many there are, one too many
        result = self.replica.run(Segment(self.position, min(num_steps, left)))
        self.position, self.stopped = result.position, result.stop
        self.steps += result.num_steps
        if result.num_steps:
            self.logs.append({key: values.tolist() for key, values in result.step_logs.items()})
        return self.position.epoch < EPOCHS and not self.stopped

    def end(self) -> str:
        """Finish; a digest of all that there is."""
        history = self.replica.end_fit()
        digest = hashlib.sha256(repr([history, self.position, self.steps]).encode())
        digest.update(repr([getattr(callback, "drawn", None) for callback in self.fit_callbacks]).encode())
        for values in (self.replica.read_state(), read_own(self.replica.model, self.replica.metrics)):
            for name, value in values.items():
                place = name.split("/")[:2]  # Keras numbers the names behind it within a process
                digest.update(f"{place} {value.dtype} {value.shape}".encode() + value.tobytes())
        return digest.hexdigest()


_KEPT: dict[tuple[str, str, int], Fit] = {}
"""Tracing is what costs: a fit's replica is used again, with another state."""


def fit_of(collective: Collective, name: str, dtype: str, anew: bool = False) -> Fit:
    key = (name, dtype, collective.world_size)
    if anew or key not in _KEPT:
        _KEPT[key] = Fit(collective, name, dtype)
    return _KEPT[key]


def straight(collective: Collective, name: str, dtype: str) -> tuple[str, list[Any], list[int]]:
    """The fit without a checkpoint: its digest, the logs of each step, and after which steps there are more."""
    fit = fit_of(collective, name, dtype, anew=True)
    fit.begin()
    more: dict[int, None] = {}
    while fit.step():
        more[fit.steps] = None
    return fit.end(), fit.logs, list(more)


def with_snapshots(
    collective: Collective, name: str, dtype: str, stagings: Mapping[int, Staging]
) -> tuple[str, dict[int, tuple[Position, tuple[FileRecord, ...]]]]:
    """The fit with a snapshot written after each of some steps: its digest, and what was written."""
    fit = fit_of(collective, name, dtype)
    fit.begin()
    written = {}
    while fit.step():
        if fit.steps in stagings and fit.steps not in written:
            snapshot = fit.replica.snapshot()
            written[fit.steps] = snapshot.position, fit_state.write(snapshot, stagings[fit.steps], collective.rank)
    return fit.end(), written


def resumed(collective: Collective, name: str, dtype: str, saved: SavedFit, anew: bool) -> tuple[str, list[Any]]:
    """The fit from a checkpoint on: its digest and the logs of its steps."""
    fit = fit_of(collective, name, dtype, anew)
    fit.begin(saved)
    while fit.step():
        pass
    return fit.end(), fit.logs


def whole_state(collective: Collective, name: str, dtype: str, steps: int) -> dict[str, Any]:
    """The job's state after some steps, with what all ranks have accumulated."""
    fit = fit_of(collective, name, dtype)
    fit.begin()
    while fit.steps < steps:
        fit.step()
    return fit.replica.read_state()


def state_after(collective: Collective, name: str, dtype: str, saved: SavedFit | None) -> dict[str, Any]:
    """The weights and the optimizer's state that the fit ends with, in its beginning or from a checkpoint on."""
    fit = fit_of(collective, name, dtype)
    fit.begin(saved)
    while fit.step(2):
        pass
    fit.replica.end_fit()
    state = fit.replica.read_state()
    return {"/".join(key.split("/")[:2]): value for key, value in state.items() if value.dtype.kind == "f"}
