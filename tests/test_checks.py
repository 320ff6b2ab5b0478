"""Claims about wrong values in a mini-batch: found, named by their place, and refused or warned of."""

import logging
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from dtrain.data.checks import check_batch
from dtrain.errors import DataError

ROWS = np.array([40, 17, 5])
NAN = float("nan")
X = np.zeros((3, 2))
OK = np.zeros(3)

WRONG: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
    ((X, np.array([0, NAN, NAN])), {}, r"y is nan in row 17: .* must be finite.*drop such rows"),
    ((X, np.array([[0, 1], [2, 3], [4, np.inf]])), {}, "y is inf in row 5, column 1"),
    ((X, {"a": OK, "b": np.full((3, 2, 2), -np.inf)}), {}, r"y\['b'\] is -inf in row 40, column 0, 0"),
    ((X, np.array([0, NAN, 0], ml_dtypes.bfloat16)), {}, "y is nan in row 17"),
    ((X, OK, np.array([1, 1, NAN])), {}, "sample_weight is nan in row 5"),
    ((X, np.array([0, 3, 1])), {"num_classes": 3}, "y is 3 in row 17: the model has 3 classes, so .* 0 to 2; give"),
    ((X, np.array([1, 3, 2])), {"num_classes": 3}, "y is 3 in row 17: .* count from 0: subtract 1"),
    ((X, np.array([[0], [-1], [1]])), {"num_classes": 3}, "y is -1 in row 17, column 0"),
    ((X, np.array([0, 1, 0.5])), {"num_classes": 3}, "y is 0.5 in row 5: the numbers of classes must be whole"),
    ((X, np.array([0, 255, 3])), {"num_classes": 3, "ignore_class": 255}, "y is 3 in row 5: .* or 255, which is ign"),
    ((X, {"a": np.array([9, 9, 9])}), {"num_classes": {"y['a']": 3}}, r"y\['a'\] is 9 in row 40"),
    ((X, np.array([1j, 0, 0])), {"num_classes": 3}, "y has dtype complex128: .* must be integers"),
    ((X, np.array(["a", "b", "c"])), {}, "y holds text"),
    ((np.array([None, 1, 2], object),), {}, r"x has dtype object, first at \[0\]: None"),
    ((X, OK, np.array(["1", "2", "3"])), {}, "sample_weight holds text"),
]


@pytest.mark.parametrize(("batch", "classes", "message"), WRONG)
def test_a_wrong_value_is_named_by_its_place(batch: Any, classes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        check_batch(batch, ROWS, **classes)


RIGHT: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
    ((X,), {}),
    (((X, {"a": np.array(["text", "is", "fine"])}), OK, None), {}),
    ((X, np.array([0, 2, 1], np.uint8), OK), {"num_classes": 3}),
    ((X, np.array([0.0, 2.0, 1.0])), {"num_classes": 3}),
    ((X, np.array([0, -1, 255])), {}),
    ((X, np.array([[0, -1], [2, -1], [1, 1]])), {"num_classes": 3, "ignore_class": -1}),
    ((X, {"a": np.array([0, 1, 2]), "b": np.array([7, 8, 9])}), {"num_classes": {"y['a']": 3}}),
    ((np.array([1, 300, 70], ml_dtypes.bfloat16), np.array([True, False, True])), {"num_classes": 2}),
]


@pytest.mark.parametrize(("batch", "classes"), RIGHT)
def test_what_can_be_trained_on_passes_without_a_word(
    batch: Any, classes: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    check_batch(batch, ROWS, **classes)
    assert caplog.records == []


def test_what_a_model_may_mask_in_x_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    x = {"image": np.array([[0, 1], [NAN, 0], [0, -np.inf]])}
    with caplog.at_level(logging.WARNING, "dtrain"):
        check_batch((x, OK), ROWS)
    (record,) = caplog.records
    assert record.getMessage().startswith("x['image'] is nan in row 17, column 0; there are 2 such values")


def test_what_a_loss_of_the_user_s_may_mask_in_y_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dtrain"):
        check_batch((X, np.array([0, NAN, NAN])), ROWS, has_own_loss=True)
    (record,) = caplog.records
    assert "y is nan in row 17; there are 2 such values" in record.message
    with pytest.raises(DataError, match="sample_weight is nan"):
        check_batch((X, OK, np.array([1, 1, NAN])), ROWS, has_own_loss=True)


def test_what_no_loss_is_taken_of_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    batch = (np.zeros((2, 3)), {"used": np.zeros(2), "unused": np.array([0, np.nan])})
    check_batch(batch, np.arange(2), with_loss={"y['used']"})
    assert "y['unused'] is nan in row 1" in caplog.text
    with pytest.raises(DataError, match=r"y\['unused'\] is nan in row 1"):
        check_batch(batch, np.arange(2))


def test_weights_below_0_are_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "dtrain"):
        check_batch((X, OK, np.array([1, -0.5, 1])), ROWS)
    (record,) = caplog.records
    assert record.getMessage().startswith("sample_weight is -0.5 in row 17")


def fit_of(model: Any, x: Any, y: Any) -> None:
    """Begin a fit of 9 mini-batches in an order of their own, on one rank."""
    from dtrain.collective import LocalCollective
    from dtrain.data.source import ArraySource
    from dtrain.replica import Replica
    from dtrain.types import BatchPlan, FitPlan

    plan = FitPlan(BatchPlan(len(x), 2, shuffle=True), epochs=1)
    Replica(model, LocalCollective()).begin_fit(plan, ArraySource(x, y))


def test_the_first_mini_batch_of_a_fit_is_checked_against_the_models_classes() -> None:
    import keras
    from keras import layers

    inputs = keras.Input((2,))
    kinds, sizes = layers.Dense(3, name="kind")(inputs), layers.Dense(1, name="size")(inputs)
    several = keras.Model(inputs, {"kind": kinds, "size": sizes})
    several.compile("sgd", {"kind": keras.losses.SparseCategoricalCrossentropy(ignore_class=-1), "size": "mse"})
    one = keras.Sequential([keras.Input((2,)), layers.Dense(3)])
    one.compile("sgd", "sparse_categorical_crossentropy")
    x, wrong, right = np.zeros((18, 2)), np.full(18, 3), np.full(18, 2)
    with pytest.raises(DataError, match=r"y\['kind'\] is 3 in row \d+: .*0 to 2, or -1, which is ignored"):
        fit_of(several, x, {"kind": wrong, "size": np.zeros(18)})
    with pytest.raises(DataError, match=r"y is 3 in row \d+: the model has 3 classes"):
        fit_of(one, x, wrong)
    fit_of(several, x, {"kind": np.where(right == 2, -1, 0), "size": np.zeros(18)})
    fit_of(one, x, right)
