"""Claims about what is traced: steps of a model's own, what they return, and that one rank is plain Keras."""

import functools
import sys
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
from ranks import Ranks
from warm import differences

from dtrain.collective import LocalCollective
from dtrain.data.source import ArraySource
from dtrain.errors import ConfigError
from dtrain.replica import Replica
from dtrain.types import BatchPlan, FitPlan, Position, Segment

for module in (models, warm, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)  # the ranks do not have the tests' folder on their path

ROWS, BATCH = 21, 8
"""Three mini-batches; the last has 5 rows, uneven at two ranks."""
TOLERANCE = 2e-5
"""Of float32. A mean of the ranks' running means is off by far more."""


class Extremes(keras.metrics.Metric):  # type: ignore[misc]
    """Two results by name: the part of the predictions that is above the target, and that below."""

    def __init__(self, name: str = "extremes") -> None:
        super().__init__(name=name)
        self.above = self.add_variable((), "zeros", name="above")
        self.rows = self.add_variable((), "zeros", name="rows")

    def update_state(self, y: Any, predicted: Any, sample_weight: Any = None) -> None:
        self.above.assign_add(ops.sum(ops.cast(predicted > y, self.dtype)))
        self.rows.assign_add(ops.cast(ops.shape(predicted)[0], self.dtype))

    def result(self) -> Any:
        return {"over": self.above / self.rows, "below": 1 - self.above / self.rows}


class Plain(keras.Model):  # type: ignore[misc]
    """A model with a metric of its own, and Keras's steps."""

    def __init__(self) -> None:
        super().__init__()
        self.out = layers.Dense(1)
        self.error = keras.metrics.MeanSquaredError(name="error")
        self.extremes = Extremes()

    def build(self, shape: Any) -> None:
        self.out.build(shape)
        self.built = True

    def call(self, x: Any) -> Any:
        return self.out(x)


class Renames(Plain):
    """Steps that return results under names of their own, beside a number that is no metric's."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            predicted = self(x, training=True)
            loss = ops.mean(ops.square(predicted - y))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return self._told(y, predicted)

    def test_step(self, data: Any) -> Any:
        x, y = data
        return self._told(y, self(x, training=False))

    def _told(self, y: Any, predicted: Any) -> Any:
        over = self.extremes(y, predicted)["over"]
        return {"of_squares": self.error(y, predicted), "part": over, "spread": ops.mean(ops.abs(predicted))}


class Nests(Renames):
    """With the steps of Keras's guide to custom training: each metric's result by its name, and one is a dict."""

    def _told(self, y: Any, predicted: Any) -> Any:
        self.error.update_state(y, predicted)
        self.extremes.update_state(y, predicted)
        return {metric.name: metric.result() for metric in (self.extremes, self.error)}


class ReadsValues(Renames):
    """Steps that cannot be traced, and count their calls."""

    calls = 0

    def train_step(self, data: Any) -> Any:
        self.calls += 1
        logs = super().train_step(data)
        return {**logs, "double": 2 * float(logs["spread"].numpy())}


class Adds(Plain):
    """Adds a number of its own to the metrics of Keras's steps."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        self.error.update_state(y, y_pred)
        self.extremes.update_state(y, y_pred)
        return {**super().compute_metrics(x, y, y_pred, sample_weight), "spread": ops.mean(ops.abs(y_pred))}


class Derives(Adds):
    """Shows what is computed from a metric's result."""

    def compute_metrics(self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        super().compute_metrics(x, y, y_pred, sample_weight)
        return self.get_metrics_result()

    def get_metrics_result(self) -> Any:
        results = super().get_metrics_result()
        return {**results, "root": ops.sqrt(results["error"])}


class BuildsLate(Renames):
    """With a metric that makes its variables in its first update, and shows it alone."""

    def __init__(self) -> None:
        super().__init__()
        self.r2 = keras.metrics.R2Score()

    @property
    def metrics(self) -> Any:
        return [self.r2]

    def _told(self, y: Any, predicted: Any) -> Any:
        self.r2.update_state(y, predicted)
        return {"r2": self.r2.result()}


class Decorated(Renames):
    @tf.function
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


class UpdatesItself(Renames):
    """A step without an optimizer."""

    def train_step(self, data: Any) -> Any:
        x, y = data
        for variable in self.trainable_variables:
            variable.assign(variable * 0.5)
        return self._told(y, self(x))


def data() -> tuple[np.ndarray, np.ndarray]:
    x, _ = blobs(ROWS)
    return x, x[:, :1] * 2.0 + x[:, 1:2]


def made(kind: type[Plain], eager: bool) -> keras.Model:
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(3)
    model = kind()
    compiled = ["mae"] if issubclass(kind, Adds) else None  # Keras does not build these for steps of one's own
    model.compile(keras.optimizers.SGD(0.05), "mse", metrics=compiled, run_eagerly=eager)
    return model


def plain(kind: type[Plain], eager: bool) -> Any:
    """Weights, history, evaluation, and how often Python was in the step where it counts that."""
    model, (x, y) = made(kind, eager), data()
    history = model.fit(x, y, batch_size=BATCH, epochs=2, shuffle=False, validation_data=(x, y), verbose=0)
    logs = model.evaluate(x, y, batch_size=BATCH, return_dict=True, verbose=0)
    return model.get_weights(), history.history, logs, getattr(model, "calls", 0)


def ours(collective: Any, kind: type[Plain], eager: bool) -> Any:
    replica, source = Replica(made(kind, eager), collective), ArraySource(*data())
    rows = BatchPlan(ROWS, BATCH)
    replica.begin_fit(FitPlan(rows, 2, validation=rows), source, source)
    for epoch in range(2):
        replica.run(Segment(Position(epoch, 0), 3))
    history = replica.end_fit()
    logs = replica.evaluate(rows, source)
    return replica.model.get_weights(), history, logs, getattr(replica.model, "calls", 0)


STEPS = [
    *((Renames, False), (Renames, True), (ReadsValues, True), (Adds, False), (Derives, False)),
    *((BuildsLate, False), (BuildsLate, True), (Decorated, False)),
]


@pytest.mark.parametrize(("kind", "eager"), STEPS)
def test_what_a_step_returns_is_what_keras_shows(ranks: Ranks, kind: Any, eager: bool) -> None:
    expected = plain(kind, eager)
    assert differences(ours(LocalCollective(), kind, eager), expected, TOLERANCE) == []
    for rank in ranks.run(2, ours, kind, eager):
        assert differences(rank, expected, TOLERANCE) == []


class Keys(keras.callbacks.Callback):  # type: ignore[misc]
    """The names in the logs of each hook, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[str]] = {}

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen["train batch"] = list(logs)

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen["test batch"] = list(logs)

    def on_test_end(self, logs: Any = None) -> None:
        self.seen["test"] = list(logs)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seen["epoch"] = list(logs)

    def on_train_end(self, logs: Any = None) -> None:
        self.seen["train"] = list(logs)


@pytest.mark.parametrize(("kind", "eager"), [(Nests, False), (Nests, True), (Adds, False)])
def test_logs_are_in_the_order_in_which_keras_has_them(kind: Any, eager: bool) -> None:
    theirs, ours, (x, y) = Keys(), Keys(), data()
    keras_s, replica = made(kind, eager), Replica(made(kind, eager), LocalCollective())
    history = keras_s.fit(x, y, BATCH, epochs=1, validation_data=(x, y), callbacks=[theirs], verbose=0).history
    source, rows = ArraySource(x, y), BatchPlan(ROWS, BATCH)
    replica.begin_fit(FitPlan(rows, 1, validation=rows), source, source, [ours])
    replica.run(Segment(Position(0, 0), 3))
    assert list(replica.end_fit()) == list(history) and ours.seen == theirs.seen
    logs = keras_s.evaluate(x, y, BATCH, return_dict=True, verbose=0)
    assert list(replica.evaluate(rows, source)) == list(logs)


def test_one_rank_may_do_without_an_optimizer() -> None:
    assert differences(ours(LocalCollective(), UpdatesItself, False), plain(UpdatesItself, False), TOLERANCE) == []


class Noisy(layers.Layer):  # type: ignore[misc]
    def __init__(self, draw: Any) -> None:
        super().__init__()
        self.draw = draw

    def call(self, x: Any, training: bool = False) -> Any:
        return x + self.draw(x) if training else x


class TellsNoise(Renames):
    def _told(self, y: Any, predicted: Any) -> Any:
        return {"noise": tf.random.normal(()), "seeded": tf.random.normal((), seed=3)}


def test_tensorflow_s_own_random_numbers_differ_between_ranks_and_repeat() -> None:
    class Ranked(LocalCollective):
        def __init__(self, rank: int) -> None:
            self.rank = rank

    def noise(rank: int) -> Any:
        return Replica(made(TellsNoise, False), Ranked(rank)).on_batch("train", ArraySource(*data()))

    first, second = noise(0), noise(1)
    assert noise(0) == first and noise(1) == second
    assert first["noise"] != second["noise"] and first["seeded"] != second["seeded"]


def test_single_batches_of_many_lengths_are_traced_twice() -> None:
    calls = 0

    class Counted(layers.Layer):  # type: ignore[misc]
        def call(self, x: Any) -> Any:
            nonlocal calls
            calls += 1
            return x

    model = keras.Sequential([layers.Embedding(9, 2), Counted(), layers.GlobalAveragePooling1D(), layers.Dense(1)])
    model.compile("sgd", "mse")
    replica = Replica(model, LocalCollective())
    replica.build((np.ones((1, 3), "int32"), np.ones((1, 1))))
    calls = 0
    for length in (3, 4, 5, 6, 3):
        replica.on_batch("train", ArraySource(np.ones((4, length), "int32"), np.ones((4, 1))))
    assert calls == 2


def test_results_of_metrics_are_traced_once_besides_the_step_that_returns_them() -> None:
    calls = 0

    class Counted(keras.metrics.MeanSquaredError):  # type: ignore[misc]
        def result(self) -> Any:
            nonlocal calls
            calls += 1
            return super().result()

    model = keras.Sequential([keras.Input((5,)), layers.Dense(1)])
    model.compile("sgd", "mse", metrics=[Counted()])
    replica, (x, y) = Replica(model, LocalCollective()), blobs(8)
    replica.build((x, y))
    calls = 0
    for _ in range(3):
        replica.on_batch("train", ArraySource(x, y))
    assert calls == 2


@pytest.mark.parametrize(
    ("source", "named"),
    [
        ("tf.random", "RandomStandardNormal"),
        ("tf.random.Generator", "RngReadAndSkip"),
        ("keras.random", None),
    ],
)
def test_random_numbers_that_no_checkpoint_has_are_named_once(
    source: str, named: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = tf.random.Generator.from_seed(1)
    draw = {
        "tf.random": lambda x: tf.random.normal(tf.shape(x)),
        "tf.random.Generator": lambda x: generator.normal(tf.shape(x)),
        "keras.random": lambda x: keras.random.normal((1,), seed=3),
    }[source]
    model = keras.Sequential([keras.Input((5,)), Noisy(draw), layers.Dropout(0.1), layers.Dense(1)])
    model.compile("sgd", "mse")
    replica = Replica(model, LocalCollective())
    x, y = blobs(8)
    for _ in range(2):
        replica.on_batch("train", ArraySource(x, y))
        replica.on_batch("train", ArraySource(x, y[:, None]))
    printed = capsys.readouterr().out
    assert printed.count("in no checkpoint") == (1 if named else 0) and (named or "") in printed


class HidesItsOptimizer(Plain):
    """Where no attribute leads to it."""

    def __init__(self) -> None:
        super().__init__()
        optimizer = keras.optimizers.Adam(0.1, name="hidden")
        self._hidden = lambda: optimizer

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
        gradients = tape.gradient(loss, self.trainable_variables)
        self._hidden().apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return {"loss": loss}


def test_variables_that_a_step_changes_and_no_checkpoint_has_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    replica = Replica(made(HidesItsOptimizer, False), LocalCollective())
    for _ in range(2):
        replica.on_batch("train", ArraySource(*data()))
    printed = capsys.readouterr().out
    assert printed.count("in no checkpoint (") == 1 and "hidden" in printed
    Replica(made(Plain, False), LocalCollective()).on_batch("train", ArraySource(*data()))
    assert capsys.readouterr().out == ""


# --- steps that know better than anybody what they build


class NoCall(keras.Model):  # type: ignore[misc]
    """As many of Keras's examples are: parts and a step, and no `call`."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = keras.Sequential([keras.Input((5,)), layers.Dense(3, "tanh")])
        self.decoder = keras.Sequential([keras.Input((3,)), layers.Dense(5)])

    def train_step(self, data: Any) -> Any:
        x = data[0] if isinstance(data, tuple) else data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self.decoder(self.encoder(x)) - x))
        variables = self.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables)
        return {"error": loss}


class UnbuiltParts(NoCall):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = keras.Sequential([layers.Dense(3, "tanh")], name="encoder")


class OwnTarget(keras.Model):  # type: ignore[misc]
    """Takes the loss of its own input, and is evaluated on other data than it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = layers.Dense(5)

    def call(self, x: Any) -> Any:
        return self.dense(x)

    def train_step(self, data: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = self.compute_loss(x=data, y=data, y_pred=self(data, training=True))
        self.optimizer.apply(tape.gradient(loss, self.trainable_variables), self.trainable_variables)
        return {"error": loss}

    def test_step(self, data: Any) -> Any:
        x, y = data
        return {"error": tf.reduce_mean(tf.square(self(x) - y))}


def built_by_steps(kind: Any) -> Any:
    keras.utils.set_random_seed(3)
    model = kind()
    model.compile("adam", "mse")
    return model


def weights_after(collective: Any, kind: Any, evaluate: bool) -> tuple[list[Any], list[Any], dict[str, Any]]:
    """Of a fit on several ranks, and of plain Keras."""
    x, _ = blobs(23)
    replica = Replica(built_by_steps(kind), collective)
    held_out = ArraySource(x, x) if evaluate else None
    plan = FitPlan(BatchPlan(23, 8), 2, validation=BatchPlan(23, 8) if evaluate else None)
    replica.begin_fit(plan, ArraySource(x), held_out)
    for epoch in range(2):
        replica.run(Segment(Position(epoch, 0), 3))
    history = replica.end_fit()
    model = built_by_steps(kind)
    given = {"validation_data": (x, x), "validation_batch_size": 8} if evaluate else {}
    plain = model.fit(x, batch_size=8, epochs=2, shuffle=False, verbose=0, **given)
    assert history.keys() == plain.history.keys()
    return replica.model.get_weights(), model.get_weights(), {"ours": history, "keras": plain.history}


@pytest.mark.parametrize(("kind", "evaluate"), [(NoCall, False), (OwnTarget, True)])
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_model_is_built_by_its_own_step(ranks: Ranks, world_size: int, kind: Any, evaluate: bool) -> None:
    ours, theirs, logs = ranks.run(world_size, weights_after, kind, evaluate)[0]
    for one, other in zip(ours, theirs, strict=True):
        assert np.allclose(one, other, rtol=0, atol=0 if world_size == 1 else 1e-6)
    if world_size == 1:  # what a step returns is that of the last batch in Keras, too
        assert logs["ours"] == logs["keras"]


class EveryOther(keras.Model):  # type: ignore[misc]
    """Updates its weights in a branch, which the last mini-batch does not take."""

    def __init__(self) -> None:
        super().__init__()
        self.normal, self.out = layers.BatchNormalization(), layers.Dense(1)

    def call(self, x: Any, training: bool = False) -> Any:
        return self.out(self.normal(x, training=training))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(self(x, training=True) - tf.cast(y[:, None], x.dtype)))
        gradients, variables = tape.gradient(loss, self.trainable_variables), self.trainable_variables
        tf.cond(tf.shape(x)[0] > 2, lambda: [self.optimizer.apply(gradients, variables), 0][1], lambda: 0)
        return {"loss": loss}


def test_one_mini_batch_is_trained_by_a_step_that_no_other_kind_of_data_fits(two_workers: Any) -> None:
    trainer = warm.use(two_workers, warm.fresh(functools.partial(built_by_steps, OwnTarget)))
    x, _ = blobs(8)
    before = trainer.train_on_batch(x, return_dict=True)["error"]
    assert trainer.train_on_batch(x, return_dict=True)["error"] < before
    assert trainer.test_on_batch(x, x, return_dict=True)["error"] < before


def moving_means(collective: Any) -> list[Any]:
    x, y = blobs(18)  # the last mini-batch is too small
    model = EveryOther()
    model.compile("sgd")
    replica = Replica(model, collective)
    replica.begin_fit(FitPlan(BatchPlan(18, 8), 1), ArraySource(x, y))
    replica.run(Segment(Position(0, 0), 3))
    replica.end_fit()
    return [model.normal.moving_mean.numpy(), model.normal.moving_variance.numpy()]


def test_statistics_are_equal_where_a_branch_updates_the_weights(ranks: Ranks) -> None:
    first, second = ranks.run(2, moving_means)
    assert all(np.array_equal(one, other) for one, other in zip(first, second, strict=True))
    assert np.all(first[0])


def test_a_model_whose_parts_nobody_can_build_is_refused_by_name() -> None:
    replica = Replica(built_by_steps(UnbuiltParts), LocalCollective())
    with pytest.raises(ConfigError, match="UnbuiltParts has no call, and 'encoder' is not built.* an Input"):
        replica.build((blobs(8)[0],))


def test_an_array_that_is_no_metrics_result_is_refused_by_name() -> None:
    class Vector(OwnTarget):
        def train_step(self, data: Any) -> Any:
            super().train_step(data)
            return {"all": tf.reduce_mean(data, axis=1)}

    replica = Replica(built_by_steps(Vector), LocalCollective())
    with pytest.raises(ConfigError, match=r"Vector.train_step returned 'all' of shape \(None,\).* return its mean"):
        replica.build((blobs(8)[0],))


def test_a_metric_by_its_short_name_is_chosen_as_keras_chooses_it() -> None:
    """By the shape of the output, in which a number of rows must not stand."""

    def make() -> Any:
        keras.utils.set_random_seed(3)
        x = keras.Input((5,))
        model = keras.Model(x, keras.ops.squeeze(layers.Dense(1, activation="sigmoid")(x), -1))
        model.compile("sgd", "mse", metrics=["accuracy"])
        return model

    x, y = blobs(16)
    replica = Replica(make(), LocalCollective())
    ours = replica.evaluate(BatchPlan(16, 8), ArraySource(x, y % 2))
    assert ours == make().evaluate(x, y % 2, batch_size=8, verbose=0, return_dict=True)


class Counting:
    """A collective that counts how often gradients are summed."""

    def __init__(self, collective: Any) -> None:
        self._collective = collective
        self.count = tf.Variable(0, dtype=tf.int64)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collective, name)

    def all_reduce(self, tensors: Any, name: str, compression: Any = None) -> Any:
        if tensors and name.startswith("gradients"):
            with tf.control_dependencies([self.count.assign_add(1)]):
                tensors = [tf.identity(tensor) for tensor in tensors]
        return self._collective.all_reduce(tensors, name, compression)


def sums_of_gradients(collective: Any) -> int:
    """Of 6 mini-batches, three of which make an update."""
    counting: Any = Counting(collective)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=3), "mse")
    replica = Replica(model, counting)
    replica.begin_fit(FitPlan(BatchPlan(48, 8), 1), ArraySource(*blobs(48)))
    replica.run(Segment(Position(0, 0), 6))
    replica.end_fit()
    return int(counting.count.numpy())


def test_accumulated_gradients_are_summed_once_for_each_update(ranks: Ranks) -> None:
    assert ranks.run(2, sums_of_gradients) == [2, 2]
