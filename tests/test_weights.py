"""Claims about the job's weights as the driver sees them; the workers are a Replica in this process."""

from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import layers, ops
from models import blobs

from dtrain import checkpoint as checkpoints
from dtrain import cluster
from dtrain.collective import LocalCollective
from dtrain.data.source import ArraySource
from dtrain.model import describe
from dtrain.replica import Replica
from dtrain.types import BatchPlan, FitPlan, Position, Segment
from dtrain.weights import Weights

X = blobs(16)[0]
Y = X[:, :1]


class TwoOptimizers(keras.Model):  # type: ignore[misc]
    """The second one is built by the first step that uses it."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(4)
        self.drop = layers.Dropout(0.5)
        self.out = layers.Dense(1)
        self.second = keras.optimizers.SGD(0.1, momentum=0.9)

    def build(self, shape: Any) -> None:
        self.hidden.build(shape)
        self.out.build((None, 4))
        self.built = True

    def call(self, x: Any, training: bool = False) -> Any:
        return self.out(self.drop(self.hidden(x), training=training))

    def train_step(self, data: Any) -> Any:
        x, y = data
        with tf.GradientTape(persistent=True) as tape:
            loss = ops.mean(ops.square(self(x, training=True) - y))
        for optimizer, layer in ((self.optimizer, self.hidden), (self.second, self.out)):
            optimizer.apply(tape.gradient(loss, layer.trainable_variables), layer.trainable_variables)
        return {"loss": loss}


def make() -> keras.Model:
    model = TwoOptimizers()
    model.compile("sgd", "mse")
    return model


class Group:
    """One worker: a Replica, behind the calls that Weights makes of a WorkerGroup."""

    def __init__(self, seed: int = 7) -> None:
        keras.utils.set_random_seed(seed)
        self.replica = Replica(make(), LocalCollective())
        self.description: Any = None
        self.closed, self.rescued = False, None

    def build(self, purpose: Any = "train") -> "Group":
        self.replica.build((X[:1], Y[:1]), purpose)
        self.description = SimpleNamespace(structure=describe(self.replica.model).structure)
        return self

    def call(self, method: str, *args: Any) -> list[Any]:
        return [getattr(self.replica, method)(*args)]

    def train(self) -> "Group":
        self.replica.begin_fit(FitPlan(BatchPlan(16, 8), 1), ArraySource(X, Y))
        self.replica.run(Segment(Position(0, 0), 2))
        self.replica.end_fit()
        self.description = SimpleNamespace(structure=describe(self.replica.model).structure)
        return self

    def state(self) -> dict[str, Any]:
        """By group and place, since Keras numbers layers; without the process's own random numbers."""
        state = {"/".join(name.split("/")[:2]): value for name, value in self.replica.read_state().items()}
        return {name: value for name, value in state.items() if not name.startswith("random")}

    @property
    def seed(self) -> Any:
        return self.replica.model.drop.seed_generator.state.numpy()


@pytest.fixture
def weights(monkeypatch: pytest.MonkeyPatch) -> Weights:
    monkeypatch.setattr(cluster, "put", lambda value: value)
    found = Weights(make, None)
    found.see((X[:1], Y[:1]))
    return found


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def momenta(group: Group) -> Any:
    return [variable.numpy() for variable in group.replica.model.second.variables[2:]]


@pytest.mark.parametrize("is_looked_at", [False, True])
def test_an_optimizer_that_a_step_builds_outlives_the_workers(weights: Weights, is_looked_at: bool) -> None:
    first = Group().train()
    assert any(np.any(value) for value in momenta(first))
    if is_looked_at:
        weights.local_model(first)
    weights.keep(first)
    second = Group(8).build()
    weights.deliver(second)
    assert same(second.state(), first.state())


def test_it_outlives_workers_that_only_predict_and_weights_that_are_set(weights: Weights) -> None:
    first = Group().train()
    model = weights.local_model(first)
    model.set_weights([value + 1 for value in model.get_weights()])
    weights.take_model(model, first)
    weights.keep(first)
    second = Group(8).build("predict")
    weights.deliver(second)
    weights.keep(second)
    third = Group(9).build()
    weights.deliver(third)
    assert same(third.state(), first.state())
    again = second.build()
    assert same(again.state(), first.state())


@pytest.mark.parametrize("is_another", [False, True])
def test_it_is_restored_from_a_checkpoint(
    weights: Weights, is_another: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Of another model with the same shapes, too, which is said once."""
    first = Group().train()
    tensors = {checkpoints.MODEL_FILE: first.replica.read_state(), "rank-0000.safetensors": {}}
    digest = "another" if is_another else describe(first.replica.model).structure
    loaded = SimpleNamespace(
        tensors=tensors,
        manifest=SimpleNamespace(world_size=1, model_digest=digest),
        checkpoint=SimpleNamespace(url="there"),
    )
    monkeypatch.setattr("dtrain.weights.load", lambda url: loaded)
    weights.take_checkpoint("somewhere", None)
    weights.local_model(None)
    second = Group(8).build()
    weights.deliver(second)
    assert same(second.state(), first.state())
    assert caplog.text.count("there is of another model") == is_another


def test_workers_that_die_before_a_step_is_trained_are_followed_by_some_with_the_same_weights(
    weights: Weights,
) -> None:
    model = weights.local_model(None)
    weights.take_model(model, None)
    first = Group().build()
    weights.deliver(first)
    weights.change()  # as a fit is about to begin
    first.closed = True
    weights.begin_again()
    weights.keep(first)
    second = Group(8).build()
    weights.deliver(second)
    assert np.array_equal(second.replica.model.out.kernel, model.out.kernel)
    weights.change()
    second.train()
    weights.change()  # the next one: what was delivered is no longer what it begins with
    second.closed = True
    weights.begin_again()
    weights.keep(second)
    assert not weights.outlive(None)


def test_weights_set_before_the_first_fit_leave_the_workers_their_seeds(weights: Weights) -> None:
    keras.utils.set_random_seed(99)  # the driver's, which nobody seeds
    for _ in range(2):
        model = weights.local_model(None)
        weights.take_model(model, None)
    alone, group = Group().build(), Group().build()
    weights.deliver(group)
    assert np.array_equal(group.seed, alone.seed)
    assert np.array_equal(group.replica.model.out.kernel, model.out.kernel)


def test_random_layers_go_on_where_they_were_with_new_workers(weights: Weights) -> None:
    first = Group().train()
    weights.local_model(first)
    weights.keep(first)
    second = Group(8).build()
    weights.deliver(second)
    assert np.array_equal(second.seed, first.seed)
