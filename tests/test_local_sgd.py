"""Claims about local SGD: ranks that train by themselves between two averages."""

import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from ranks import Ranks

import dtrain
from dtrain.collective import LocalCollective
from dtrain.data.sampler import shard
from dtrain.data.source import ArraySource
from dtrain.errors import ConfigError
from dtrain.local_sgd import average
from dtrain.replica import Replica
from dtrain.testing import FaultPlan, kill
from dtrain.types import BatchPlan, FitPlan, Position, Segment, StepOptions

cloudpickle.register_pickle_by_value(sys.modules[__name__])

ROWS, BATCH, STEPS, EVERY = 77, 8, 10, 3  # the last mini-batch has 5 rows, and is a window by itself
X = np.random.default_rng(0).standard_normal((ROWS, 5), np.float32)
Y = np.random.default_rng(1).standard_normal((ROWS, 3), np.float32)


class Scale(layers.Layer):  # type: ignore[misc]
    """Times one number, which is trained."""

    def build(self, shape: Any) -> None:
        self.factor = self.add_weight(shape=(), initializer="ones")

    def call(self, x: Any) -> Any:
        return x * self.factor


def make_model(**compiled: Any) -> keras.Model:
    keras.utils.set_random_seed(1)
    frozen = layers.Dense(5, trainable=False, name="frozen", dtype="float64")
    hidden = [layers.Dense(8, activation="tanh", dtype="float64"), layers.BatchNormalization(dtype="float64")]
    model = keras.Sequential(
        [keras.Input((5,), dtype="float64"), frozen, *hidden, Scale(dtype="float64"), layers.Dense(3, dtype="float64")]
    )
    model.compile(keras.optimizers.Adam(0.05), "mse", metrics=["mae"], **compiled)
    return model


def by_hand(ranks: int, epochs: int, cuts: tuple[int, ...]) -> list[Any]:
    """Plain Keras models, one a rank, with their variables averaged by rows at the end of each window."""
    models = [make_model() for _ in range(ranks)]
    for model in models:
        model.optimizer.build(model.trainable_variables)
    ends = sorted({*range(0, STEPS - 1, EVERY), STEPS - 1, STEPS, *cuts})
    for _ in range(epochs):
        for begin, end in pairwise(ends):
            parts = [shard(min(BATCH, ROWS - begin * BATCH), ranks, rank) for rank in range(ranks)]
            for model, part in zip(models, parts, strict=True):
                for step in range(begin, end):
                    rows = slice(step * BATCH, (step + 1) * BATCH)
                    model.train_on_batch(X[rows][part.rows], Y[rows][part.rows])
            for variables in zip(*([*m.variables, *m.optimizer.variables] for m in models), strict=True):
                if variables[0].name not in ("learning_rate", "iteration"):
                    values = [part.share * variable.numpy() for part, variable in zip(parts, variables, strict=True)]
                    for variable in variables:
                        variable.assign(np.sum(values, axis=0))
    return models[0].get_weights()  # type: ignore[no-any-return]


def trained(collective: Any, cuts: tuple[int, ...], eager: bool) -> tuple[list[Any], float]:
    """Weights after two epochs in segments that end at these steps, and the loss of the last."""
    model = make_model(run_eagerly=eager)
    replica = Replica(model, collective, StepOptions(sync_every=EVERY))
    replica.begin_fit(FitPlan(BatchPlan(ROWS, BATCH), 2), ArraySource(X, Y))
    for epoch in range(2):
        for begin, end in pairwise((0, *cuts, STEPS)):
            result = replica.run(Segment(Position(epoch, begin), end - begin))
    replica.end_fit()
    return model.get_weights(), result.logs["loss"]


@pytest.mark.parametrize(
    ("world_size", "cuts", "eager"),
    [(2, (), False), (2, (4,), False), (2, (6,), True), (3, (), False), (3, (3, 6), False), (3, (4,), False)],
)
def test_a_window_is_plain_keras_on_each_rank_and_a_mean(
    ranks: Ranks, world_size: int, cuts: tuple[int, ...], eager: bool
) -> None:
    every = ranks.run(world_size, partial(trained, cuts=cuts, eager=eager))
    for (weights, loss), expected in zip(every, [by_hand(world_size, 2, cuts)] * world_size, strict=True):
        for mine, its in zip(weights, expected, strict=True):
            np.testing.assert_allclose(mine, its, rtol=0, atol=1e-10)
        assert loss == every[0][1]
        assert all(np.array_equal(*pair) for pair in zip(weights[:2], make_model().get_weights()[:2], strict=True))


def averaged(collective: Any) -> list[Any]:
    """A layer that was frozen after the optimizer had been built for it, as the half of a GAN is."""
    model = keras.Sequential([keras.Input((2,)), layers.Dense(2), layers.Dense(1)])
    model.compile("sgd", "mse")
    model.optimizer.build(model.trainable_variables)
    model.layers[0].trainable = False
    for variable in model.variables:
        variable.assign(np.full(variable.shape, 1.0 + 2 * collective.rank))
    average(model, collective, tf.constant(0.5, tf.float64), [])
    return model.get_weights()  # type: ignore[no-any-return]


def test_what_an_optimizer_was_built_for_is_averaged_even_if_it_is_frozen(ranks: Ranks) -> None:
    for weights in ranks.run(2, averaged):
        assert all((weight == 2.0).all() for weight in weights)


def test_one_rank_is_plain_keras() -> None:
    model = make_model()
    model.fit(X, Y, batch_size=BATCH, epochs=2, shuffle=False, verbose=0)
    mine, _ = trained(LocalCollective(), (), False)
    assert all(np.array_equal(own, its) for own, its in zip(mine, model.get_weights(), strict=True))


class Counts(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[int] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.steps.append(batch)


def test_a_window_that_a_death_cuts_short_is_trained_anew(local_ray: None, in_tmp: Path) -> None:
    def weights(*faults: Any) -> tuple[Any, list[int], int]:
        hook = Counts()
        options: Any = {"tracking": False, "checkpoint": False, "sync_every": EVERY}
        with FaultPlan(*faults), dtrain.Trainer(make_model, num_workers=2, **options) as trainer:
            history = trainer.fit(X, Y, batch_size=BATCH, epochs=2, verbose=0, callbacks=[hook])
            return trainer.get_weights(), hook.steps, len(history.recoveries)

    expected, steps, none = weights()
    found, others, one = weights(kill(1, STEPS + EVERY))
    assert (none, one) == (0, 1)
    assert steps == others == 2 * [2, 5, 8, 11]
    assert all(np.array_equal(mine, its) for mine, its in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sync_batch_norm": True}, "contradicts sync_batch_norm=True"),
        ({"sparse_as_dense": True}, "contradicts sparse_as_dense=True"),
        ({"compression": "bf16"}, "contradicts compression='bf16'"),
        ({"failure": dtrain.FailureConfig(on_nan="skip")}, "contradicts on_nan='skip'"),
        ({"sync_every": 0}, "sync_every=0 must be a whole number, 1 or more"),
    ],
)
def test_what_contradicts_it_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        dtrain.Trainer(make_model, num_workers=2, **{"sync_every": 4, **options})


def refused(collective: Any, make: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        Replica(make(), collective, StepOptions(sync_every=4)).build((X[:8], Y[:8]))
    return str(caught.value)


def accumulating() -> keras.Model:
    model = make_model()
    model.compile(keras.optimizers.SGD(gradient_accumulation_steps=2), "mse")
    return model


def scaled() -> keras.Model:
    model = make_model()
    inner = keras.optimizers.SGD(gradient_accumulation_steps=2)
    model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse")
    return model


def with_loss(loss: Any) -> keras.Model:
    model = make_model()
    model.compile("sgd", loss)
    return model


def synchronized() -> keras.Model:
    model = keras.Sequential([keras.Input((5,)), layers.BatchNormalization(synchronized=True), layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (accumulating, "gradient_accumulation_steps"),
        (scaled, "gradient_accumulation_steps"),
        (partial(with_loss, keras.losses.Dice()), "loss 'dice'"),
        (partial(with_loss, "dice"), "dice"),
        (partial(with_loss, keras.losses.MeanSquaredError(reduction="none")), "loss 'mean_squared_error'"),
        (partial(with_loss, keras.losses.MeanSquaredError(reduction="sum")), "loss 'mean_squared_error'"),
        (synchronized, "synchronized=True"),
        (partial(make_model, steps_per_execution=2), "steps_per_execution=2"),
    ],
)
def test_a_model_that_contradicts_it_is_refused(ranks: Ranks, make: Any, named: str) -> None:
    for message in ranks.run(2, partial(refused, make=make)):
        assert "sync_every=4" in message and named in message
