"""What Keras documents of `fit`, `evaluate`, `predict` and `*_on_batch`, through `dtrain.Trainer` on 1 and 2 workers.

Each scenario runs in plain Keras in this process, and on the workers; all that comes back is compared: the history with
its names and their order, losses and metrics as lists, dicts and scalars, predictions with their structure, weights.
One worker must give the same bits. Two may differ by `TOLERANCE` in float32; tests/exactness has the float64 bound.

Left out, since other tests have it: shuffling and epochs longer than a pass, masks, sparse gradients, optimizers'
options, `sample_weight` with other reductions (tests/exactness); callbacks (test_callbacks.py); kinds of data sources
(test_source.py); random layers and BatchNormalization in training (tests/exactness/test_exceptions.py); progress bars
(test_progress.py). Left out, since it cannot be: `predict` with a model that was never compiled (a factory compiles),
`compile` and `trainable` between two fits (the factory is the model; another Trainer takes over the weights), ragged
and sparse inputs, distribution strategies, other backends.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import cloudpickle
import keras
import models
import numpy as np
import pytest
import tensorflow as tf
import warm
from keras import layers, ops
from models import blobs
from warm import differences, fresh, use

import dtrain
from dtrain.errors import ConfigError, DataError

for module in (models, warm, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)  # the workers do not have the tests' folder on their path

TOLERANCE = 2e-5
"""Of float32, after two epochs: the order of sums differs with two workers."""
ROWS = 21


@pytest.fixture(params=["one_worker", "two_workers"], ids=["one worker", "two workers"])
def workers(request: pytest.FixtureRequest) -> dtrain.Trainer:
    trainer: dtrain.Trainer = request.getfixturevalue(request.param)
    return use(trainer, fresh(small))


def tolerance(trainer: dtrain.Trainer) -> float:
    return 0.0 if trainer.num_workers == 1 else TOLERANCE


# --- data


def numbers(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).normal(size=(ROWS, *shape)).astype("float32")


def classes(count: int = 3, seed: int = 1) -> Any:
    return np.random.default_rng(seed).integers(0, count, ROWS)


def weights(seed: int = 2) -> Any:
    return np.random.default_rng(seed).uniform(0.1, 2.0, ROWS)


# --- one small model, and all that can be said to fit


def small() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((5,)), layers.Dense(8, "relu", kernel_regularizer="l2"), layers.Dense(3, "softmax")]
    )
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(name="ce")],
    )
    return model


def training() -> dict[str, Any]:
    x, y = blobs(ROWS)
    return {"x": x, "y": y, "batch_size": 8, "epochs": 2}


def validation(rows: int = 13) -> Any:
    return blobs(rows, seed=5)


FITS: dict[str, dict[str, Any]] = {
    "plainly": {},
    "with the default batch size": {"batch_size": None},
    "with mini-batches of one row": {"batch_size": 1},
    "with one mini-batch": {"batch_size": 100},
    "for no epochs": {"epochs": 0},
    "from an epoch on": {"initial_epoch": 2, "epochs": 4},
    "from an epoch on that is the last": {"initial_epoch": 2},
    "for some steps an epoch": {"steps_per_epoch": 2},
    "with a part held back": {"validation_split": 0.3},
    "with a part held back and sample weights": {"validation_split": 0.3, "sample_weight": weights()},
    "with validation data": {"validation_data": validation()},
    "with validation data in a list": {"validation_data": list(validation())},
    "with weighted validation data": {"validation_data": (*validation(), np.linspace(0.1, 1, 13))},
    "with validation every second epoch": {"validation_data": validation(), "validation_freq": 2, "epochs": 3},
    "with validation after some epochs": {"validation_data": validation(), "validation_freq": [1, 3], "epochs": 3},
    "with larger validation batches": {"validation_data": validation(), "validation_batch_size": 11},
    "with some validation steps": {"validation_data": validation(), "validation_steps": 1},
    "with sample weights": {"sample_weight": weights()},
    "with class weights": {"class_weight": {0: 0.5, 2: 3.0}},
    "with targets in a column": {"y": blobs(ROWS)[1].reshape(-1, 1)},
    "with integer inputs": {"x": np.arange(5 * ROWS).reshape(ROWS, 5) % 7},
    "with bool inputs": {"x": np.arange(5 * ROWS).reshape(ROWS, 5) % 3 == 0},
    "with float64 inputs": {"x": blobs(ROWS)[0].astype("float64")},
    "with lists of lists": {"x": [np.asarray(blobs(ROWS)[0])]},
}


def fit_and_look(found: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Fit a keras.Model or a Trainer: what comes of it."""
    history = found.fit(**{**training(), "shuffle": False, "verbose": 0, **arguments})
    return {
        "history": history.history,
        "epoch": history.epoch,
        "params": dict(history.params),
        "weights": found.get_weights(),
    }


def reset(found: Any) -> Any:
    """Give a keras.Model or a Trainer of `small` the state of a new one: what was traced for it serves again."""
    if isinstance(found, dtrain.Trainer):
        found.predict(blobs(1)[0], verbose=0)  # which builds it
    model = found.model if isinstance(found, dtrain.Trainer) else found
    new = small()
    for some in (new, model):
        some.optimizer.build(some.trainable_variables)
    for variable, other in zip(model.optimizer.variables, new.optimizer.variables, strict=True):
        variable.assign(other)
    values = np.random.default_rng(0)
    found.set_weights([values.normal(size=weight.shape) * 0.3 for weight in new.get_weights()])
    return found


def plain_small() -> keras.Model:
    return reset(fresh(small)())


def in_a_process_of_its_own(ranks: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Plain Keras with the threads and settings of a worker: bits depend on both."""
    return ranks.run(1, lambda collective, *args: function(*args), *args)[0]


def fits_of_keras() -> dict[str, Any]:
    model, found = plain_small(), {}
    for name, arguments in FITS.items():
        # Keras cannot trace a model again for targets of another rank.
        found[name] = fit_and_look(plain_small() if np.ndim(arguments.get("y", 0)) > 1 else reset(model), arguments)
    return found


@pytest.fixture(scope="module")
def fitted(ranks: Any) -> dict[str, Any]:
    """What plain Keras makes of `FITS`."""
    found: dict[str, Any] = in_a_process_of_its_own(ranks, fits_of_keras)
    return found


@pytest.fixture
def trainer(workers: dtrain.Trainer) -> dtrain.Trainer:
    """The workers with `small`, as it is at first."""
    if getattr(workers.model_fn, "__wrapped__", None) is not small:
        use(workers, fresh(small))
    reset(workers)
    return workers


@pytest.mark.parametrize("name", FITS)
def test_a_model_is_fitted(trainer: dtrain.Trainer, fitted: dict[str, Any], name: str) -> None:
    assert differences(fit_and_look(trainer, FITS[name]), fitted[name], tolerance(trainer)) == []


@pytest.mark.parametrize("verbose", [0, 1, 2, "auto"])
def test_the_history_says_how_it_was_asked_for(trainer: dtrain.Trainer, verbose: Any, capsys: Any) -> None:
    history = trainer.fit(**{**training(), "verbose": verbose})
    assert history.params == {"verbose": verbose, "epochs": 2, "steps": 3}
    assert ("Epoch 2/2" in capsys.readouterr().out) == (verbose != 0)


def session(found: Any) -> list[Any]:
    """One verb after the other on a keras.Model or a Trainer of `small`: what each returns."""
    x, y = blobs(ROWS)
    seen = [fit_and_look(found, {}), fit_and_look(found, {})]  # the second goes on where the first ended
    for steps in ({"batch_size": 8, "steps": 2}, {"batch_size": 8, "steps": 3}, {"batch_size": 2, "steps": 1}):
        seen += [found.evaluate(x, y, verbose=0, **steps), found.predict(x, verbose=0, **steps)]
    for size in (1, 4, ROWS, None):
        seen.append(found.evaluate(x, y, sample_weight=weights(), batch_size=size, verbose=0))
        seen.append(found.evaluate(x, y, batch_size=size, return_dict=True, verbose=0))
    seen.append(found.train_on_batch(x, y))
    seen.append(found.train_on_batch(x, y, return_dict=True))
    seen.append(found.train_on_batch(x[:1], y[:1], sample_weight=weights()[:1]))
    seen.append(found.train_on_batch(x, y, class_weight={0: 2.0, 1: 0.5, 2: 1.0}, return_dict=True))
    seen.append(found.test_on_batch(x, y))
    seen.append(found.test_on_batch(x, y, sample_weight=weights(), return_dict=True))
    seen += [found.predict_on_batch(x), found.predict_on_batch(x[:1]), found.get_weights()]
    return seen


def session_of_keras() -> list[Any]:
    return session(plain_small())


def test_verbs_follow_each_other_and_return_what_keras_returns(trainer: dtrain.Trainer, ranks: Any) -> None:
    expected = in_a_process_of_its_own(ranks, session_of_keras)
    assert differences(session(trainer), expected, tolerance(trainer)) == []


def test_metrics_do_not_depend_on_the_batch_size(trainer: dtrain.Trainer) -> None:
    x, y = blobs(ROWS)
    whole = trainer.evaluate(x, y, batch_size=ROWS, verbose=0)
    for size in (1, 4, 8):
        assert differences(trainer.evaluate(x, y, batch_size=size, verbose=0), whole, TOLERANCE) == []


def test_what_keras_refuses_is_refused(trainer: dtrain.Trainer) -> None:
    x, y = blobs(ROWS)
    plain = fresh(small)()
    both = {"class_weight": {0: 1.0}, "sample_weight": weights()}
    calls: list[Callable[[Any], Any]] = [
        lambda model: model.train_on_batch(x, y, **both),
        lambda model: model.fit(x, y, verbose=0, **both),
        lambda model: model.fit(x, y[:-1], verbose=0),
        lambda model: model.fit(x, y, validation_split=1.0, verbose=0),
    ]
    for call in calls:
        with pytest.raises(ValueError):  # noqa: PT011 - Keras's words are Keras's
            call(plain)
        with pytest.raises((ConfigError, DataError)):
            call(trainer)
    # Keras gives zeros here, with a warning.
    for call in (lambda: trainer.fit(x, y, validation_data=(x[:0], y[:0])), lambda: trainer.evaluate(x[:0], y[:0])):
        with pytest.raises(DataError, match="rows"):
            call()
    assert trainer.workers  # none of that has cost the workers


def thawed() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.BatchNormalization(), layers.Dense(1)])
    model.layers[1].trainable = False
    model.compile(keras.optimizers.SGD(0.01), "mse")
    return model


def thaw_in_keras() -> list[Any]:
    model = fresh(partly_frozen)()
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    between = model.get_weights()
    model.layers[0].trainable = True
    model.compile(keras.optimizers.SGD(0.01), "mse")
    model.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    return [between, model.get_weights()]


def test_layers_are_thawed_and_compiled_anew_by_another_factory(workers: dtrain.Trainer, ranks: Any) -> None:
    trainer = use(workers, fresh(partly_frozen))
    trainer.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    between = trainer.get_weights()
    use(workers, fresh(thawed)).set_weights(between)
    trainer.fit(X, Y, batch_size=8, shuffle=False, verbose=0)
    expected = in_a_process_of_its_own(ranks, thaw_in_keras)
    assert differences([between, trainer.get_weights()], expected, tolerance(workers)) == []


@pytest.mark.parametrize("change", ["compile", "freeze"])
def test_a_change_of_the_local_model_that_the_workers_would_not_see_is_refused(
    trainer: dtrain.Trainer, change: str
) -> None:
    x, y = blobs(ROWS)
    trainer.fit(x, y, verbose=0)
    if change == "compile":
        trainer.model.compile("adam", "sparse_categorical_crossentropy")
    else:
        trainer.model.layers[0].trainable = False
    with pytest.raises(ConfigError, match="another Trainer"):
        trainer.fit(x, y, verbose=0)
    use(trainer, fresh(small))


# --- models of all kinds, each with the same round of verbs


@dataclass(frozen=True)
class Model:
    """A model and its data.

    Attributes:
        make: the factory's body.
        x: the inputs.
        y: the targets; None: there are none.
        fit: more arguments of `fit`.
        evaluates: whether `evaluate` can be asked for.
        tolerance: of two workers.
        exact: one worker gives the bits of plain Keras.
    """

    make: Callable[[], keras.Model]
    x: Any
    y: Any = None
    fit: dict[str, Any] = field(default_factory=dict)
    tolerance: float = TOLERANCE
    exact: bool = True


def all_verbs(found: Any, model: Model) -> dict[str, Any]:
    """Every verb once, on a keras.Model or a Trainer: what comes of it."""
    validation = (model.x,) if model.y is None else (model.x, model.y)
    if "sample_weight" in model.fit:
        validation = (*validation, model.fit["sample_weight"])
    history = found.fit(
        model.x,
        model.y,
        batch_size=8,
        epochs=2,
        shuffle=False,
        validation_data=validation,
        verbose=0,
        **model.fit,
    )
    return {
        "history": history.history,
        "predict": found.predict(model.x, batch_size=6, verbose=0),
        "evaluate": found.evaluate(*validation[:2], batch_size=6, verbose=0),
        "evaluate by name": found.evaluate(*validation[:2], batch_size=6, verbose=0, return_dict=True),
        "test_on_batch": found.test_on_batch(*validation),
        "train_on_batch": found.train_on_batch(*validation),
        "train_on_batch by name": found.train_on_batch(*validation, return_dict=True),
        "predict_on_batch": found.predict_on_batch(model.x),
        "weights": found.get_weights(),
    }


def dense(*units: int) -> keras.Sequential:
    return keras.Sequential([layers.Dense(size, "tanh") for size in units])


def regression(loss: Any = "mse", **compiled: Any) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(1)])
        model.compile(keras.optimizers.SGD(0.05), loss, **compiled)
        return model

    return make


def binary(metrics: Callable[[], list[Any]]) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.Dense(1, "sigmoid")])
        model.compile(keras.optimizers.SGD(0.05), "binary_crossentropy", metrics=metrics())
        return model

    return make


def dict_of_two(**compiled: Any) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        inputs = {"a": keras.Input((4,), name="a"), "b": keras.Input((3,), name="b")}
        hidden = layers.Dense(6, "tanh")(layers.Concatenate()([inputs["a"], inputs["b"]]))
        outputs = {
            "kind": layers.Dense(3, "softmax", name="kind")(hidden),
            "size": layers.Dense(1, name="size")(hidden),
        }
        model = keras.Model(inputs, outputs)
        model.compile(keras.optimizers.SGD(0.05), **compiled)
        return model

    return make


def list_of_two(**compiled: Any) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        a, b = keras.Input((4,)), keras.Input((3,))
        hidden = layers.Dense(6, "tanh")(layers.Concatenate()([a, b]))
        model = keras.Model([a, b], [layers.Dense(3, "softmax", name="kind")(hidden), layers.Dense(1)(hidden)])
        model.compile(keras.optimizers.SGD(0.05), **compiled)
        return model

    return make


def nested() -> keras.Model:
    a, b, c = keras.Input((4,)), keras.Input((3,)), keras.Input((2,))
    hidden = layers.Dense(6, "tanh")(layers.Concatenate()([a, b, c]))
    model = keras.Model({"a": a, "rest": (b, c)}, (layers.Dense(1)(hidden), {"second": layers.Dense(2)(hidden)}))
    model.compile(keras.optimizers.SGD(0.05), loss=("mse", {"second": "mae"}))
    return model


def own_loss(y: Any, prediction: Any) -> Any:
    return ops.mean(ops.abs(y - prediction) ** 1.5, axis=-1)


def own_metric(y: Any, prediction: Any) -> Any:
    return ops.max(ops.abs(y - prediction), axis=-1)


class Errors(keras.metrics.Metric):  # type: ignore[misc]
    """A user's own: adds up errors, and counts rows."""

    def __init__(self, name: str = "errors", **more: Any) -> None:
        super().__init__(name=name, **more)
        self.rows = self.add_variable((), "zeros", name="rows")
        self.errors = self.add_variable((), "zeros", name="errors")

    def update_state(self, y: Any, prediction: Any, sample_weight: Any = None) -> None:
        self.rows.assign_add(ops.cast(ops.shape(y)[0], "float32"))
        self.errors.assign_add(ops.sum(ops.abs(ops.cast(y, "float32") - prediction)))

    def result(self) -> Any:
        return self.errors / ops.maximum(self.rows, 1.0)


class ErrorsAndRows(Errors):
    """Keras puts both where the metric's name comes in the alphabet; in a history of ours each is by its own name."""

    def result(self) -> Any:
        return {"errors_rows": self.rows, "errors_mean": super().result()}


class AddsLoss(layers.Layer):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        self.add_loss(0.1 * ops.mean(ops.square(x)))
        return x


def with_added_losses() -> keras.Model:
    model = keras.Sequential(
        [keras.Input((4,)), layers.Dense(6, "tanh", activity_regularizer="l2"), AddsLoss(), layers.Dense(1)]
    )
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
    return model


class Autoencoder(keras.Model):  # type: ignore[misc]
    """A loss of its own and no targets."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = layers.Dense(3, "tanh"), layers.Dense(4)

    def call(self, x: Any) -> Any:
        y = self.outer(self.inner(x))
        self.add_loss(ops.mean(ops.square(x - y)))
        return y


def autoencoder() -> keras.Model:
    model = Autoencoder()
    model.compile(keras.optimizers.SGD(0.05))
    return model


class OwnLoss(keras.Model):  # type: ignore[misc]
    """Built by the first batch."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = layers.Dense(6, "tanh"), layers.Dense(1)
        self.tracker = keras.metrics.Mean(name="doubled")

    def call(self, x: Any, training: bool = False) -> Any:
        return self.last(self.hidden(x)) * (1.0 if training else 2.0)


class ComputesLoss(OwnLoss):
    def compute_loss(
        self, x: Any = None, y: Any = None, y_pred: Any = None, sample_weight: Any = None, training: bool = True
    ) -> Any:
        loss = ops.mean(ops.square(y - y_pred)) + 0.01 * ops.mean(ops.square(y_pred))
        self.tracker.update_state(2.0 * loss)
        return loss


class ComputesMetrics(OwnLoss):
    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        results = super().compute_metrics(x, y, y_pred, sample_weight)
        self.tracker.update_state(ops.mean(ops.square(2.0 * y_pred), axis=-1))
        return {**results, "doubled": self.tracker.result()}


class OwnSteps(OwnLoss):
    def __init__(self) -> None:
        super().__init__()
        self.error = keras.metrics.MeanAbsoluteError(name="error")

    @property
    def metrics(self) -> list[Any]:
        return [self.tracker, self.error]

    def train_step(self, data: Any) -> Any:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape() as tape:
            prediction = self(x, training=True)
            loss = ops.mean(keras.losses.mean_squared_error(y, prediction))
            scaled = self.optimizer.scale_loss(loss)
        self.optimizer.apply_gradients(
            zip(tape.gradient(scaled, self.trainable_variables), self.trainable_variables, strict=True)
        )
        self.tracker.update_state(loss)
        self.error.update_state(y, prediction, sample_weight=weight)
        return {metric.name: metric.result() for metric in self.metrics}

    def test_step(self, data: Any) -> Any:
        x, y, weight = keras.utils.unpack_x_y_sample_weight(data)
        prediction = self(x, training=False)
        self.tracker.update_state(ops.mean(keras.losses.mean_squared_error(y, prediction)))
        self.error.update_state(y, prediction, sample_weight=weight)
        return {metric.name: metric.result() for metric in self.metrics}

    def predict_step(self, data: Any) -> Any:
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return {"value": self(x, training=False), "input": x[:, :1]}


class TellsSome(OwnSteps):
    def test_step(self, data: Any) -> Any:
        return {"error": super().test_step(data)["error"]}


def subclass(kind: Any, **compiled: Any) -> Callable[[], keras.Model]:
    def make() -> keras.Model:
        model = kind()
        model.compile(keras.optimizers.SGD(0.05), "mse", **compiled)
        return model

    return make


def built_late() -> keras.Model:
    model = keras.Sequential([layers.Flatten(), layers.Dense(6, "tanh"), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
    return model


def partly_frozen() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh"), layers.BatchNormalization(), layers.Dense(1)])
    model.layers[0].trainable = model.layers[1].trainable = False
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def without_weights() -> keras.Model:
    model = keras.Sequential([keras.Input((4,)), layers.Flatten(), layers.Rescaling(0.5)])
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
    return model


def compiled_twice() -> keras.Model:
    model = regression("mae", metrics=["mse"])()
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=["mae"])
    return model


def of_words() -> keras.Model:
    lookup = layers.StringLookup(vocabulary=["red", "green", "blue"])
    model = keras.Sequential([keras.Input((2,), dtype="string"), lookup, layers.Embedding(4, 3), layers.Flatten()])
    model.add(layers.Dense(1))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def of_sentences() -> keras.Model:
    vectors = layers.TextVectorization(max_tokens=12, output_sequence_length=4)
    vectors.adapt(np.array(["the cat sat", "the dog ran", "a cat ran home"]))
    inputs = keras.Input((), dtype="string")
    hidden = layers.GlobalAveragePooling1D()(layers.Embedding(12, 3)(vectors(inputs)))
    model = keras.Model(inputs, layers.Dense(1)(hidden))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def normalised() -> keras.Model:
    scale = layers.Normalization()
    scale.adapt(10.0 * numbers(4, seed=8) + 3.0)
    model = keras.Sequential([keras.Input((4,)), scale, layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


class AddsIfGiven(layers.Layer):  # type: ignore[misc]
    def call(self, x: Any, extra: Any = None) -> Any:
        return x if extra is None else x + extra


def with_optional_input() -> keras.Model:
    a, b = keras.Input((4,), name="a"), keras.Input((3,), name="b", optional=True)
    model = keras.Model({"a": a, "b": b}, AddsIfGiven()(layers.Dense(3)(a), b))
    model.compile("sgd", "mse")
    return model


def of_mixed_kinds() -> keras.Model:
    inputs = {
        "id": keras.Input((), dtype="int64", name="id"),
        "flag": keras.Input((1,), dtype="bool", name="flag"),
        "value": keras.Input((2,), name="value"),
    }
    flag = layers.Lambda(lambda x: ops.cast(x, "float32"), output_shape=(1,))(inputs["flag"])
    hidden = layers.Concatenate()([layers.Embedding(9, 3)(inputs["id"]), flag, inputs["value"]])
    model = keras.Model(inputs, layers.Dense(1)(hidden))
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


def of_half_precision() -> keras.Model:
    policy = keras.DTypePolicy("mixed_bfloat16")
    model = keras.Sequential([keras.Input((4,)), layers.Dense(6, "tanh", dtype=policy), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.05), "mse")
    return model


X, Y = numbers(4), numbers(1, seed=3)
TWO = {"a": X, "b": numbers(3, seed=4)}
TWO_Y = {"kind": classes(), "size": Y}
LIST, LIST_Y = [X, numbers(3, seed=4)], [classes(), Y]
CE = "sparse_categorical_crossentropy"
COLOURS = np.array(["red", "green", "grey", "blue"])[np.random.default_rng(6).integers(0, 4, (ROWS, 2))]
SENTENCES = np.array(["the cat", "a dog ran home", "cat cat dog"])[classes()]


MODELS: dict[str, Model] = {
    "losses and metrics by name": Model(regression("huber", metrics=["mae", "mse"]), X, Y),
    "losses and metrics as objects": Model(
        regression(keras.losses.LogCosh(), metrics=[keras.metrics.RootMeanSquaredError(), keras.metrics.R2Score()]),
        X,
        Y,
    ),
    "losses and metrics as functions": Model(
        regression(own_loss, metrics=[own_metric, keras.losses.mean_squared_error]),
        X,
        Y,
        exact=False,  # Keras traces train_on_batch for its number of rows, which shows in the last bit here
    ),
    "metrics with state": Model(
        binary(lambda: ["accuracy", "auc", keras.metrics.Precision(name="p"), Errors()]), X, classes(2).reshape(-1, 1)
    ),
    "a metric that gives a dict": Model(binary(lambda: [ErrorsAndRows()]), X, classes(2).reshape(-1, 1)),
    "metrics that are arrays": Model(
        binary(lambda: [keras.metrics.F1Score(threshold=0.5)]), X, classes(2).reshape(-1, 1).astype("float32")
    ),
    "weighted metrics": Model(
        regression(metrics=["mae"], weighted_metrics=["mae", "mse"]), X, Y, {"sample_weight": weights()}
    ),
    "a loss in a list": Model(regression(["mse"], metrics=[["mae"]]), X, Y),
    "no loss but added ones": Model(autoencoder, X),
    "added losses": Model(with_added_losses, X, Y),
    "dicts of inputs and outputs": Model(
        dict_of_two(
            loss={"kind": CE, "size": "mse"},
            loss_weights={"kind": 0.5, "size": 2.0},
            metrics={"kind": ["accuracy"], "size": ["mae", "mse"]},
            weighted_metrics={"size": ["mae"]},
        ),
        TWO,
        TWO_Y,
        {"sample_weight": {"kind": weights(), "size": weights(5)}},
    ),
    "a loss for one of the outputs": Model(dict_of_two(loss={"kind": CE}, metrics={"kind": "accuracy"}), TWO, TWO_Y),
    "lists of inputs and outputs": Model(
        list_of_two(loss=[CE, "mse"], loss_weights=[1.0, 0.3], metrics=[["accuracy"], ["mae"]]), LIST, LIST_Y
    ),
    "one loss for all outputs": Model(list_of_two(loss="mse"), LIST, [numbers(3, seed=5), Y]),
    "None among the losses": Model(list_of_two(loss=[CE, None], metrics=[None, ["mae"]]), LIST, LIST_Y),
    "losses by the outputs' names": Model(list_of_two(loss={"kind": CE, "dense_1": "mae"}), LIST, LIST_Y),
    "nested inputs and outputs": Model(
        nested, {"a": X, "rest": (TWO["b"], numbers(2, seed=6))}, (Y, {"second": numbers(2, seed=7)})
    ),
    "a subclass that computes its loss": Model(subclass(ComputesLoss, metrics=["mae"]), X, Y),
    "a subclass that computes its metrics": Model(subclass(ComputesMetrics, metrics=["mae"]), X, Y),
    "a subclass with steps of its own": Model(subclass(OwnSteps), X, Y),
    "a subclass whose test_step tells some of its metrics": Model(subclass(TellsSome), X, Y),
    "a model built by its first batch": Model(built_late, X.reshape(ROWS, 2, 2), Y),
    "frozen layers": Model(partly_frozen, X, Y),
    "nothing to train": Model(without_weights, X, numbers(4, seed=3)),
    "a model compiled twice": Model(compiled_twice, X, Y),
    "run eagerly": Model(regression(run_eagerly=True, metrics=["mae"]), X, Y),
    "several steps per execution": Model(regression(steps_per_execution=2, metrics=["mae"]), X, Y),
    "compiled with XLA": Model(regression(jit_compile=True, metrics=["mae"]), X, Y, exact=False),
    "scaled losses": Model(regression(auto_scale_loss=True), X, Y),
    "words": Model(of_words, COLOURS, Y),
    "sentences": Model(of_sentences, SENTENCES, Y),
    "normalised inputs": Model(normalised, X, Y),
    "inputs of several kinds": Model(
        of_mixed_kinds, {"id": classes(9), "flag": X[:, :1] > 0, "value": X[:, :2].astype("float64")}, Y
    ),
    "an input that is left out": Model(with_optional_input, {"b": None, "a": X}, numbers(3, seed=3)),
    "half precision": Model(of_half_precision, X, Y, tolerance=2e-2),
    "integer targets": Model(regression(), X, classes()),
}


def verbs_of_keras(name: str) -> Any:
    """What plain Keras makes of a model, or what it says is wrong."""
    model = MODELS[name]
    if getattr(model.x, "dtype", np.dtype(float)).kind == "U":
        model = replace(model, x=tf.constant(model.x))  # Keras takes text as tensors only
    try:
        return all_verbs(fresh(model.make)(), model)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.fixture(scope="module")
def done(ranks: Any) -> dict[str, Any]:
    """What plain Keras makes of `MODELS`."""
    return dict(zip(MODELS, ranks.map(verbs_of_keras, list(MODELS)), strict=True))


ON_TWO = (
    *("weighted metrics", "metrics that are arrays", "a metric that gives a dict", "dicts of inputs and outputs"),
    *("nested inputs and outputs", "a subclass that computes its metrics", "a subclass with steps of its own"),
    *("a model built by its first batch", "run eagerly", "several steps per execution", "sentences", "half precision"),
    *("inputs of several kinds", "an input that is left out"),
)
"""What two workers do, and one does the others; --full: both all of them. Training itself is in tests/exactness."""


@pytest.mark.parametrize(
    ("workers", "name"),
    [
        pytest.param(workers, name, marks=[pytest.mark.full] * ((workers == "two_workers") != (name in ON_TWO)))
        for workers in ("one_worker", "two_workers")
        for name in MODELS
    ],
    indirect=["workers"],
)
def test_a_model_does_all_verbs(workers: dtrain.Trainer, done: dict[str, Any], name: str) -> None:
    model = MODELS[name]
    assert not isinstance(done[name], str), f"Keras itself refuses: {done[name]}"
    found = all_verbs(use(workers, fresh(model.make)), model)
    exact = workers.num_workers == 1 and model.exact
    different = differences(found, done[name], 0.0 if exact else model.tolerance)
    assert not different, "\n".join(different)


def test_a_model_that_is_not_compiled_is_refused(workers: dtrain.Trainer) -> None:
    with pytest.raises(ConfigError, match="not compiled"):
        use(workers, fresh(lambda: keras.Sequential([keras.Input((4,)), layers.Dense(1)])))
