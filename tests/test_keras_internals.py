"""Claims about the private names of Keras that dtrain relies on: what breaks here, a new Keras has changed."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dtrain import keras_internals


@pytest.fixture
def model() -> keras.Model:
    made = keras.Sequential([keras.layers.Dense(4), keras.layers.BatchNormalization(), keras.layers.Dropout(0.5)])
    made.add(keras.layers.Dense(2))
    made.compile("adam", "mse", metrics=["mae"])
    return made


BATCH = (np.zeros((3, 5), "float32"), np.zeros((3, 2), "float32"))


def test_an_unbuilt_model_is_built_from_a_batch_with_optimizer_and_metrics(model: keras.Model) -> None:
    keras_internals.build_from_batch(model, BATCH)
    assert len(model.trainable_variables) == 6
    assert model.optimizer.built and len(model.optimizer.variables) > 6
    assert {"loss", "compile_metrics"} <= {metric.name for metric in model.metrics}
    assert [v for metric in model.metrics for v in metric.variables]


def test_inputs_alone_build_the_variables_of_model_and_optimizer(model: keras.Model) -> None:
    keras_internals.build_from_inputs(model, BATCH[0])
    assert len(model.trainable_variables) == 6 and model.optimizer.built


def test_compiling_anew_and_freezing_show(model: keras.Model) -> None:
    keras_internals.build_from_batch(model, BATCH)
    before = keras_internals.compiled_parts(model)
    assert all(one is other for one, other in zip(before, keras_internals.compiled_parts(model), strict=True))
    model.layers[0].trainable = False
    assert sum(one is not other for one, other in zip(before, keras_internals.compiled_parts(model), strict=True)) == 2
    model.compile("adam", "mse", metrics=["mae"])
    after = keras_internals.compiled_parts(model)
    assert all(one is not other for one, other in zip(before[:3], after, strict=False))


def test_a_board_that_profiles_is_told_apart() -> None:
    board = keras.callbacks.TensorBoard()
    assert not keras_internals.profiles(board)
    board._init_profile_batch((0, 2))
    assert keras_internals.profiles(board)


def test_layers_and_their_seed_generators_are_found(model: keras.Model) -> None:
    layers = keras_internals.layers_of(model)
    assert model in layers and sum(isinstance(layer, keras.layers.Dense) for layer in layers) == 2
    (generator,) = keras_internals.seed_generators_of(model)
    assert tuple(generator.state.shape) == (2,)
    assert tuple(keras_internals.global_seed_generator().state.shape) == (2,)


def test_assignments_are_recorded_while_tracing_and_eagerly(model: keras.Model) -> None:
    keras_internals.build_from_batch(model, BATCH)
    moving = model.layers[1].moving_mean

    @tf.function(autograph=False)
    def forward(x: tf.Tensor) -> tf.Tensor:
        return model(x, training=True)

    with keras_internals.recorded_assignments() as assigned:
        forward.get_concrete_function(tf.TensorSpec([None, 5]))
    assert any(variable is moving for variable in assigned)
    with keras_internals.recorded_assignments() as assigned:
        model.optimizer.learning_rate = 0.5
    assert any(variable is model.optimizer._learning_rate for variable in assigned)
    with keras_internals.recorded_assignments() as assigned:
        pass
    assert assigned == []


def test_default_hooks_are_told_from_overridden_ones() -> None:
    class Own(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: object = None) -> None: ...

    assert not keras_internals.is_default(Own().on_epoch_end) and keras_internals.is_default(Own().on_epoch_begin)
    given = keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: None)
    assert not keras_internals.is_default(given.on_train_batch_end)


def test_every_loss_goes_through_the_function_that_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    plain = keras_internals.loss_module.reduce_weighted_values

    def counted(*args: object, **kwargs: object) -> object:
        calls.append(kwargs)
        return plain(*args, **kwargs)

    monkeypatch.setattr(keras_internals.loss_module, "reduce_weighted_values", counted)
    keras.losses.MeanSquaredError()(np.zeros((2, 1)), np.ones((2, 1)))
    assert len(calls) == 1 and {"sample_weight", "mask", "reduction", "dtype"} <= calls[0].keys()
