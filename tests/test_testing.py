"""Claims about what users test their models with: real workers, and one process beside them."""

import sys
from typing import Any

import cloudpickle
import numpy as np
import pytest

import dtrain
from dtrain.errors import DataError
from dtrain.testing import check_shardable

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers do not have the tests' folder on their path


def batch(rows: int = 16) -> tuple[Any, Any]:
    random = np.random.default_rng(3)
    return random.normal(size=(rows, 4)).astype("float32"), random.normal(size=(rows, 2)).astype("float32")


def make_model(loss: Any) -> Any:
    import keras

    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, activation="tanh"), keras.layers.Dense(2)])
    model.compile(keras.optimizers.SGD(0.1), loss)
    return model


def of_rows() -> Any:
    return make_model("mse")


def mixing(marked: bool) -> Any:
    from keras import ops

    def relative(y_true: Any, y_pred: Any) -> Any:
        return ops.sum(ops.square(y_true - y_pred)) / (1.0 + ops.sum(ops.square(y_pred)))

    return make_model(dtrain.whole_batch(relative) if marked else relative)


def measuring() -> Any:
    """With a metric that does not add up."""
    import keras

    class Largest(keras.metrics.Metric):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="largest")
            self.value = self.add_variable((), "zeros", name="value")

        def update_state(self, y_true: object, y_pred: object, sample_weight: object = None) -> None:
            self.value.assign(keras.ops.maximum(self.value, keras.ops.max(keras.ops.abs(y_pred))))

        def result(self) -> object:
            return self.value

    model = make_model("mse")
    model.compile(keras.optimizers.SGD(0.1), "mse", metrics=[Largest()])
    return model


@pytest.mark.parametrize(
    ("model_fn", "exact"),
    [
        (of_rows, True),
        (lambda: mixing(marked=False), False),
        (lambda: mixing(marked=True), True),
        (measuring, False),
    ],
)
def test_a_loss_that_mixes_rows_is_told_from_a_mean_over_rows(
    local_ray: None, in_tmp: Any, model_fn: Any, exact: bool
) -> None:
    found = check_shardable(model_fn, batch())
    assert found.exact == exact, found


def test_a_batch_of_too_few_rows_is_refused() -> None:
    with pytest.raises(DataError, match="batch has 2 rows: 2 workers need at least 3"):
        check_shardable(of_rows, batch(2))
