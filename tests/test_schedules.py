"""Claims about `dtrain.WarmUp`: the rate of each update, in plain Keras."""

from pathlib import Path

import keras
import numpy as np
import pytest
from models import blobs, make_classifier

import dtrain

schedules = keras.optimizers.schedules


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (dtrain.WarmUp(0.4, steps=4), [0.0, 0.1, 0.2, 0.3, 0.4, 0.4, 0.4]),
        (dtrain.WarmUp(0.4, steps=3, initial=0.1), [0.1, 0.2, 0.3, 0.4, 0.4]),
        (dtrain.WarmUp(0.4, steps=1), [0.0, 0.4, 0.4]),
        (dtrain.WarmUp(schedules.InverseTimeDecay(0.4, 1, 1.0), steps=2), [0.0, 0.2, 0.4, 0.2, 0.4 / 3]),
        (dtrain.WarmUp(schedules.PiecewiseConstantDecay([1], [0.4, 0.2]), steps=2), [0.0, 0.2, 0.4, 0.4, 0.2]),
    ],
)
def test_the_rate_rises_in_a_straight_line_and_then_follows_the_target(
    schedule: dtrain.WarmUp, expected: list[float]
) -> None:
    assert [float(schedule(step)) for step in range(len(expected))] == pytest.approx(expected)
    again = dtrain.WarmUp.from_config(schedule.get_config())
    assert [float(again(step)) for step in range(len(expected))] == pytest.approx(expected)


def test_a_model_trained_with_a_warm_up_saves_loads_and_goes_on(tmp_path: Path) -> None:
    x, y = blobs(40)

    def make() -> keras.Model:
        model = make_classifier()
        model.compile(keras.optimizers.SGD(dtrain.WarmUp(0.1, steps=6)), "sparse_categorical_crossentropy")
        return model

    through, saved = make(), make()
    through.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0)
    saved.fit(x, y, batch_size=10, shuffle=False, verbose=0)
    saved.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(x, y, batch_size=10, shuffle=False, verbose=0)
    for ours, theirs in zip(loaded.get_weights(), through.get_weights(), strict=True):
        assert np.allclose(ours, theirs, atol=1e-6)


def test_a_warm_up_of_no_steps_is_refused() -> None:
    with pytest.raises(dtrain.errors.ConfigError, match=r"steps=0 must be 1 or more"):
        dtrain.WarmUp(0.1, steps=0)


def test_linear_scaling_rises_from_the_rate_of_small_mini_batches_to_its_multiple() -> None:
    rate = dtrain.WarmUp.linear_scaling(0.1, batch_size=64, base_batch_size=16, steps=3)
    assert [float(rate(step)) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4])
    decay = dtrain.WarmUp.linear_scaling(
        0.1, 64, 16, steps=3, then=lambda scaled: keras.optimizers.schedules.ExponentialDecay(scaled, 1, 0.5)
    )
    assert [float(decay(step)) for step in range(5)] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.2])


def test_linear_scaling_from_mini_batches_of_no_rows_is_refused() -> None:
    with pytest.raises(dtrain.errors.ConfigError, match=r"base_batch_size=0 must be 1 or more"):
        dtrain.WarmUp.linear_scaling(0.1, 64, 0, steps=3)
