"""Claims about the private names of Keras that dtrain relies on: what breaks here, a new Keras has changed."""

import itertools
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import numpy as np
import pytest
import tensorflow as tf
from ranks import Ranks

from dtrain import keras_internals
from dtrain.callback_checkpoint import KERAS_STATE
from dtrain.errors import DataError

cloudpickle.register_pickle_by_value(sys.modules[__name__])


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


STATELESS = {"LambdaCallback", "LearningRateScheduler", "RemoteMonitor", "TerminateOnNaN"}
NOT_RUN_HERE = {"BackupAndRestore", "CallbackList", "ProgbarLogger"}
PASSING = {
    *("_model", "params", "monitor_op", "min_delta"),  # given anew, or found out again
    *("writer", "csv_file", "append_header"),  # of the open file
    *("_writers", "_summary_module", "_prev_summary_state", "_log_write_dir", "_train_dir", "_val_dir"),
    *("_should_write_train_graph", "_batch_start_time"),
}
"""Attributes of Keras's callbacks that change in a fit and need not be in a checkpoint."""


def kept_names(callback: keras.callbacks.Callback) -> set[str]:
    return {name for kind in type(callback).__mro__ for name in KERAS_STATE.get(kind.__name__, ())}


def test_every_callback_of_keras_is_known() -> None:
    found = {name for name, item in vars(keras.callbacks).items() if isinstance(item, type)} - {"Callback"}
    assert found == (KERAS_STATE.keys() - {"MonitorCallback"}) | STATELESS | NOT_RUN_HERE
    for kind in (keras.callbacks.EarlyStopping, keras.callbacks.ReduceLROnPlateau, keras.callbacks.ModelCheckpoint):
        assert "MonitorCallback" in {base.__name__ for base in kind.__mro__}


def test_what_keras_callbacks_change_in_a_fit_is_in_checkpoints(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    k = keras.callbacks
    board = k.TensorBoard("logs", write_graph=False, update_freq=1, write_steps_per_second=True)
    made = [
        k.EarlyStopping("loss", patience=9, restore_best_weights=True),
        k.ReduceLROnPlateau("loss", min_delta=9, patience=1, cooldown=2),
        k.ModelCheckpoint("a.weights.h5", "loss", save_weights_only=True, save_best_only=True),
        k.ModelCheckpoint("b.weights.h5", "loss", save_weights_only=True, save_freq=4),
        k.SwapEMAWeights(swap_on_epoch=True),
        board,
        k.CSVLogger("log.csv"),
        k.History(),
        k.LambdaCallback(on_epoch_end=lambda epoch, logs: None),
        k.LearningRateScheduler(lambda epoch: 0.1),
        k.TerminateOnNaN(),
    ]
    before = [dict(vars(callback)) for callback in made]
    after = []

    class Looks(k.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            after[:] = [dict(vars(callback)) for callback in made]

    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.SGD(0.1, use_ema=True), "mse")
    model.fit(X, Y, 2, epochs=3, validation_data=(X, Y), callbacks=[*made, Looks()], verbose=0)
    for callback, old, new in zip(made, before, after, strict=True):
        changed = {name for name in new if name not in old or new[name] is not old[name]}
        assert changed <= kept_names(callback) | PASSING, type(callback)
        assert kept_names(callback) <= new.keys(), type(callback)


@pytest.mark.parametrize(("mode", "sign"), [("min", -1), ("max", 1)])
def test_a_callback_can_be_told_to_find_out_what_is_better(mode: str, sign: int) -> None:
    stopping = keras.callbacks.EarlyStopping("score", mode=mode, min_delta=0.5)
    assert stopping.monitor_op is None
    stopping._set_monitor_op()
    assert stopping.min_delta == 0.5 * sign and bool(stopping.monitor_op(1.0, 2.0)) == (mode == "min")


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


X, Y = np.arange(12, dtype="float32").reshape(6, 2), np.arange(6)


class Pairs(keras.utils.PyDataset):  # type: ignore[misc]
    """Three batches of two rows."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> object:
        return X[2 * index : 2 * index + 2], Y[2 * index : 2 * index + 2]


def pairs_one_by_one() -> object:
    yield from (Pairs()[index] for index in range(3))


def first_numbers(source: keras_internals.KerasInput) -> list[int]:
    source.on_epoch_begin()
    found = [int(batch[1][0]) for batch in source.batches()]
    source.on_epoch_end()
    return found


@pytest.mark.parametrize(
    ("make", "num_batches"),
    [
        (Pairs, 3),
        (lambda: Pairs(workers=2), 3),
        (pairs_one_by_one, None),
        (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(2), 3),
        (lambda: tf.data.Dataset.from_tensor_slices((X, Y)).batch(2).repeat(), None),
    ],
)
def test_keras_adapters_bring_the_batches_of_a_pass(make: Any, num_batches: int | None) -> None:
    source = keras_internals.KerasInput(make(), make)
    assert source.num_batches == num_batches
    for number in range(2):  # a generator is made anew for the second
        source.begin_pass(number)
        source.on_epoch_begin()
        batches = list(itertools.islice(source.batches(), 3))
        source.on_epoch_end()
        assert [batch[1].tolist() for batch in batches] == [[0, 1], [2, 3], [4, 5]]
        assert all(isinstance(leaf, np.ndarray) for batch in batches for leaf in batch)


def test_class_weights_become_sample_weights_or_are_refused() -> None:
    dataset = tf.data.Dataset.from_tensor_slices((X, Y)).batch(2)
    for data in (dataset, Pairs()):
        source = keras_internals.KerasInput(data, class_weight={0: 3.0, 3: 0.5, 5: 1.0})
        assert [batch[2].tolist() for batch in source.batches()] == [[3, 1], [1, 0.5], [1, 1]]
    with pytest.raises(DataError, match="class_weight"):
        keras_internals.KerasInput(pairs_one_by_one(), class_weight={0: 3.0})


def test_a_pydataset_is_read_in_the_order_that_is_given_and_its_hooks_are_called() -> None:
    hooks = []

    class Hooked(Pairs):
        def on_epoch_begin(self) -> None:
            hooks.append("begin")

        def on_epoch_end(self) -> None:
            hooks.append("end")

    for workers in (1, 2):
        source = keras_internals.KerasInput(Hooked(workers=workers), order=lambda number, count: [2, 0, 1])
        source.begin_pass(0)
        assert first_numbers(source) == [4, 0, 2]
    assert hooks == ["begin", "end"] * 2


def test_a_reshuffling_dataset_feels_each_iterator_that_keras_makes() -> None:
    """Keras makes two for each epoch of known length; the order of its second epoch is that of the third iterator."""
    seen: list[list[int]] = []

    class Seeing(keras.Model):  # type: ignore[misc]
        def train_step(self, data: Any) -> dict[str, Any]:
            seen[-1].extend(data[1].numpy().tolist())
            return {"loss": tf.constant(0.0)}

    class Epochs(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            seen.append([])

    def make() -> tf.data.Dataset:
        return tf.data.Dataset.from_tensor_slices((X, Y)).shuffle(6, seed=1).batch(2)

    model = Seeing()
    model.compile("sgd", "mse", run_eagerly=True)
    model.fit(make(), epochs=3, callbacks=[Epochs()], verbose=0)
    source = keras_internals.KerasInput(make())
    for order in seen:
        assert [number for batch in source.batches() for number in batch[1].tolist()] == order
        source.end_pass()


def test_the_global_generator_leaves_the_states_that_are_reckoned() -> None:
    generator = keras.random.SeedGenerator(4_000_000_000)
    words = [4_000_000_000, 0]
    for _ in range(50):
        generator.next(ordered=False)
        words = keras_internals.drawn_unordered(words)
        assert generator.state.numpy().tolist() == words


def plot_in_a_worker(path: str) -> tuple[list[str], list[str]]:
    """Of what a worker hides from Keras, what is imported before and after a gallery is plotted."""

    def imported() -> list[str]:
        return [name for name in ("sklearn", "matplotlib") if name in sys.modules]

    before = imported()
    images = np.zeros((2, 8, 8, 3), "uint8")
    keras.visualization.plot_image_gallery(images, rows=1, cols=2, value_range=(0, 255), path=path)
    return before, imported()


def test_a_worker_imports_what_plots_when_it_is_used(ranks: Ranks, tmp_path: Path) -> None:
    path = tmp_path / "gallery.png"
    assert ranks.map(plot_in_a_worker, [str(path)]) == [([], ["matplotlib"])]
    assert path.stat().st_size > 0
