"""Claims about a model as a whole: what it holds, and its state."""

import functools
from typing import Any

import keras
import numpy as np
import pytest

from dtrain.accumulation import num_accumulated
from dtrain.model import has_own_loss, optimizers_of


def test_optimizers_are_found_however_deep_and_the_compiled_one_is_first() -> None:
    first, second, third, fourth, compiled, inner = (keras.optimizers.SGD(name=name) for name in "abcdef")

    class Holder(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.before = first
            self.many = {"one": second, "more": [{"deep": (third,)}]}
            self.part = keras.layers.Dense(1)
            self.part.own = [fourth]

    model = Holder()
    model.compile(keras.optimizers.LossScaleOptimizer(inner, name="outer"), "mse")
    model.inner = inner
    model.many["again"] = first
    assert [optimizer.name for optimizer in optimizers_of(model)] == ["outer", "a", "b", "c", "d"]
    model.compile(compiled, "mse")
    assert optimizers_of(model)[0] is compiled


def masked(y_true: Any, y_pred: Any) -> Any:
    return keras.ops.nan_to_num(y_true) - y_pred


class Masked(keras.losses.Loss):  # type: ignore[misc]
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return masked(y_true, y_pred)


class MaskedError(keras.losses.MeanSquaredError):  # type: ignore[misc]
    def call(self, y_true: Any, y_pred: Any) -> Any:
        return super().call(keras.ops.nan_to_num(y_true), y_pred)


class OwnStep(keras.Sequential):  # type: ignore[misc]
    def train_step(self, data: Any) -> Any:
        return super().train_step(data)


@pytest.mark.parametrize(
    ("kind", "loss", "is_own"),
    [
        (keras.Sequential, "mse", False),
        (keras.Sequential, keras.losses.mean_squared_error, False),
        (keras.Sequential, [keras.losses.Huber()], False),
        (keras.Sequential, {"a": "mse", "b": None}, False),
        (keras.Sequential, ("mse", {"a": keras.losses.Huber()}), False),
        (keras.Sequential, ("mse", {"a": masked}), True),
        (keras.Sequential, masked, True),
        (keras.Sequential, functools.partial(masked), True),
        (keras.Sequential, {"a": "mse", "b": Masked()}, True),
        (keras.Sequential, MaskedError(), True),
        (OwnStep, "mse", True),
    ],
)
def test_a_loss_that_is_not_keras_s_is_told(kind: Any, loss: Any, is_own: bool) -> None:
    model = kind([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile("sgd", loss)
    assert has_own_loss(model) is is_own


def test_how_many_mini_batches_are_accumulated_is_known_of_one_optimizer_without_averages() -> None:
    def trained(**options: Any) -> keras.Model:
        model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
        model.compile(keras.optimizers.SGD(**options), "mse")
        model.fit(np.zeros((5, 2)), np.zeros((5, 1)), batch_size=1, verbose=0)
        return model

    assert num_accumulated(trained()) == 0
    assert num_accumulated(trained(gradient_accumulation_steps=3)) == 2
    assert num_accumulated(trained(gradient_accumulation_steps=5, use_ema=True)) == 0
    assert num_accumulated(trained(gradient_accumulation_steps=3, use_ema=True)) is None
    model = trained(gradient_accumulation_steps=3)
    model.another = trained(gradient_accumulation_steps=2).optimizer
    assert num_accumulated(model) is None
