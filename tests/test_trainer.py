"""Claims about dtrain.Trainer on a real Ray: what users see of a job that goes well."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from models import blobs, make_classifier, make_two_headed, make_witnessed

import dtrain
from dtrain.errors import ConfigError

cloudpickle.register_pickle_by_value(models)  # the workers do not have the tests' folder on their path

QUIET: dict[str, Any] = {"checkpoint": False, "tracking": False}


@pytest.fixture(scope="module")
def trainer(local_ray: None) -> Iterator[dtrain.Trainer]:
    """Two workers, for the tests that leave them as they found them or do not mind."""
    with dtrain.Trainer(make_classifier, num_workers=2, **QUIET) as shared:
        yield shared


def reset(trainer: dtrain.Trainer) -> keras.Model:
    """Give the workers the weights of a new model, without momentum; return that model."""
    fresh = make_classifier()
    fresh.optimizer.build(fresh.trainable_variables)
    for variable, value in zip(trainer.model.optimizer.variables, fresh.optimizer.variables, strict=True):
        variable.assign(value)
    trainer.set_weights(fresh.get_weights())
    return fresh


def close(left: Any, right: Any, tolerance: float = 2e-5) -> bool:
    return all(
        np.allclose(a, b, atol=tolerance, rtol=tolerance)
        for a, b in zip(keras.tree.flatten(left), keras.tree.flatten(right), strict=True)
    )


def test_a_fit_on_two_workers_gives_what_keras_gives(trainer: dtrain.Trainer) -> None:
    x, y = blobs(101)
    plain = reset(trainer)
    expected = plain.fit(
        x, y, batch_size=16, epochs=3, shuffle=False, validation_split=0.2, class_weight={0: 2.0, 1: 0.5}, verbose=0
    )
    history = trainer.fit(
        x, y, batch_size=16, epochs=3, shuffle=False, validation_split=0.2, class_weight={0: 2.0, 1: 0.5}, verbose=0
    )
    assert set(history.history) == set(expected.history)
    for name, values in expected.history.items():
        assert close(history.history[name], values), name
    assert history.epoch == [0, 1, 2]
    assert close(trainer.get_weights(), plain.get_weights())
    assert close(trainer.model.optimizer.variables, plain.optimizer.variables)


def test_evaluate_and_predict_give_what_keras_gives_for_any_number_of_rows(trainer: dtrain.Trainer) -> None:
    plain = reset(trainer)
    for rows in (1, 2, 33):
        x, y = blobs(rows, seed=rows)
        assert close(trainer.evaluate(x, y, batch_size=8, verbose=0), plain.evaluate(x, y, batch_size=8, verbose=0))
        predicted = trainer.predict(x, batch_size=8, verbose=0)
        assert predicted.shape == (rows, 3) and close(predicted, plain.predict(x, verbose=0))
    assert set(trainer.evaluate(x, y, return_dict=True, verbose=0)) == {"loss", "accuracy"}


def test_single_batches_train_test_and_predict_as_in_keras(trainer: dtrain.Trainer) -> None:
    plain = reset(trainer)
    x, y = blobs(7)
    assert close(trainer.test_on_batch(x, y), plain.test_on_batch(x, y))
    assert close(trainer.train_on_batch(x, y), plain.train_on_batch(x, y))
    assert close(trainer.train_on_batch(x[:1], y[:1]), plain.train_on_batch(x[:1], y[:1]))
    assert close(trainer.predict_on_batch(x), plain.predict_on_batch(x))
    assert close(trainer.get_weights(), plain.get_weights())


def test_a_batch_that_is_refused_leaves_the_local_model_current(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise dtrain.errors.DataError("y is nan in row 0")

    trainer = dtrain.Trainer(make_classifier, num_workers=1, **QUIET)
    changes: list[None] = []
    monkeypatch.setattr(trainer, "start", refuse)
    monkeypatch.setattr(trainer._weights, "change", lambda: changes.append(None))
    with pytest.raises(dtrain.errors.DataError):
        trainer.train_on_batch(*blobs(7))
    assert not changes


def test_a_second_fit_goes_on_from_the_first(trainer: dtrain.Trainer) -> None:
    x, y = blobs(64)
    plain = reset(trainer)
    pids = {worker.pid for worker in trainer.workers}
    for epochs in (2, 1):
        plain.fit(x, y, epochs=epochs, shuffle=False, verbose=0)
        trainer.fit(x, y, epochs=epochs, shuffle=False, verbose=0)
    assert close(trainer.get_weights(), plain.get_weights())
    assert {worker.pid for worker in trainer.workers} == pids


def test_deciding_callbacks_decide_and_their_state_comes_back(trainer: dtrain.Trainer) -> None:
    x, y = blobs(64)
    reset(trainer)
    stopping = keras.callbacks.EarlyStopping("loss", min_delta=10.0, patience=1, restore_best_weights=True)

    class Halve(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.rates: list[float] = []

        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            self.model.optimizer.learning_rate = 0.1 / 2**epoch

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.rates.append(float(self.model.optimizer.learning_rate))

    halve = Halve()
    history = trainer.fit(x, y, epochs=9, verbose=0, callbacks=[stopping, halve])
    assert stopping.stopped_epoch == 1 and history.epoch == [0, 1]
    assert halve.rates == pytest.approx([0.1, 0.05])
    assert float(trainer.model.optimizer.learning_rate) == pytest.approx(0.05)


def test_batch_hooks_get_the_metrics_of_the_whole_batch_and_can_stop(trainer: dtrain.Trainer) -> None:
    x, y = blobs(64)
    plain = reset(trainer)

    class Batches(keras.callbacks.Callback):
        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            self.losses.append(logs["loss"])
            self.model.stop_training = len(self.losses) == 5

    expected, got = Batches(), Batches()
    plain.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0, callbacks=[expected])
    trainer.fit(x, y, batch_size=10, epochs=2, shuffle=False, verbose=0, callbacks=[got])
    assert len(got.losses) == 5 and close(got.losses, expected.losses)
    assert close(trainer.get_weights(), plain.get_weights())


def test_saved_models_are_plain_keras(trainer: dtrain.Trainer, tmp_path: Path) -> None:
    x, y = blobs(32)
    trainer.fit(x, y, verbose=0)
    trainer.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert close(loaded.predict(x, verbose=0), trainer.predict(x, verbose=0))
    loaded.fit(x, y, verbose=0)
    weights = tmp_path / "changed.weights.h5"
    loaded.save_weights(weights)
    trainer.load_weights(weights)
    assert close(trainer.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_a_model_that_learns_its_shapes_is_built_and_exported_without_workers(tmp_path: Path) -> None:
    def unbuilt() -> keras.Model:
        keras.utils.set_random_seed(3)
        model = keras.Sequential([keras.layers.Dense(4, "relu"), keras.layers.Dense(2)])
        model.compile("sgd", "mse")
        return model

    x, _ = blobs(8)
    with dtrain.Trainer(unbuilt, **QUIET) as trainer:
        with pytest.raises(ConfigError, match=r"has seen none: call trainer\.build\(x\)"):
            trainer.export(tmp_path / "served")
        trainer.build(x)
        trainer.export(tmp_path / "served")
        assert trainer.workers == ()
        served = tf.saved_model.load(str(tmp_path / "served"))
        assert close(served.serve(x.astype("float32")).numpy(), trainer.model.predict(x, verbose=0))


def test_rank_zero_prints_above_the_bar(trainer: dtrain.Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = blobs(32)

    class Talk(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            print(f"hello from epoch {epoch}")

    trainer.fit(x, y, epochs=2, verbose=2, callbacks=[Talk()])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "hello" in line] == ["hello from epoch 0", "hello from epoch 1"]
    assert any(line.startswith("Epoch 2/2") for line in lines)
    assert not any(":actor_name:" in line for line in lines)
    trainer.fit(x, y, verbose=0)
    assert capsys.readouterr().out == ""


def test_what_was_printed_is_shown_once_and_in_order_though_no_poll_is_answered_in_time(
    trainer: dtrain.Trainer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = blobs(32)

    class Count(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            print(f"batch {batch}")

    monkeypatch.setattr("dtrain.controller.PROGRESS_SECONDS", 0.0)
    trainer.fit(x, y, batch_size=1, verbose=0, callbacks=[Count()])
    assert capsys.readouterr().out.splitlines() == [f"batch {batch}" for batch in range(32)]


def test_a_callback_stops_predict_after_the_rows_that_it_has_seen(trainer: dtrain.Trainer) -> None:
    x, _ = blobs(40)
    everything = trainer.predict(x, verbose=0)

    class Stop(keras.callbacks.Callback):
        def on_predict_batch_end(self, batch: int, logs: Any = None) -> None:
            self.model.stop_predicting = batch == 2

    stopped = trainer.predict(x, batch_size=8, verbose=0, callbacks=[Stop()])
    assert len(stopped) == 3 * 8 and close(stopped, everything[:24])
    assert close(trainer.predict(x, verbose=0), everything)


def test_workers_are_named_actors(trainer: dtrain.Trainer) -> None:
    import ray

    x, y = blobs(8)
    trainer.evaluate(x, y, verbose=0)
    names = {actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)}
    assert {name.rsplit(":", 1)[1] for name in names if name.startswith("dtrain:")} >= {"rank0", "rank1"}
    assert [worker.rank for worker in trainer.workers] == [0, 1]
    assert len({worker.pid for worker in trainer.workers} | {os.getpid()}) == 3


def test_nested_inputs_and_weights_on_three_workers(local_ray: None) -> None:
    rng = np.random.default_rng(0)
    x = {"a": rng.normal(size=(50, 5)), "b": rng.normal(size=(50, 3))}
    y = {"class": rng.integers(0, 3, 50), "value": rng.normal(size=(50, 1))}
    weight = {"class": rng.uniform(size=50), "value": rng.uniform(size=50)}
    plain = make_two_headed()
    expected = plain.fit(x, y, sample_weight=weight, batch_size=16, epochs=2, shuffle=False, verbose=0)
    with dtrain.Trainer(make_two_headed, num_workers=3, threads_per_worker=1, **QUIET) as trainer:
        history = trainer.fit(x, y, sample_weight=weight, batch_size=16, epochs=2, shuffle=False, verbose=0)
        for name, values in expected.history.items():
            assert close(history.history[name], values), name
        outputs = trainer.predict(x, verbose=0)
        assert set(outputs) == {"class", "value"} and close(outputs, plain.predict(x, verbose=0))
        weights = trainer.get_weights()
    assert close(weights, plain.get_weights())
    assert trainer.workers == () and close(trainer.get_weights(), weights)


def test_every_worker_computes_and_the_driver_never_does(local_ray: None, tmp_path: Path) -> None:
    x = np.zeros((40, 5), "float32")
    with dtrain.Trainer(make_witnessed, num_workers=2, config={"folder": str(tmp_path)}, **QUIET) as trainer:
        for verb in (
            lambda: trainer.predict(x, verbose=0),
            lambda: trainer.evaluate(x, np.zeros((40, 3)), verbose=0),
            lambda: trainer.fit(x, np.zeros((40, 3)), verbose=0),
        ):
            verb()
            assert {int(path.name) for path in tmp_path.iterdir()} == {worker.pid for worker in trainer.workers}
            for path in tmp_path.iterdir():
                path.unlink()


def fit_plain(collective: Any, x: Any, y: Any) -> Any:
    from models import make_classifier

    model = make_classifier()
    model.fit(x, y, epochs=3, shuffle=False, verbose=0)
    return model.get_weights()


def test_one_worker_is_plain_keras_bit_for_bit_and_checkpoints_restore(
    local_ray: None, ranks: Any, in_tmp: Path
) -> None:
    x, y = blobs(50)
    (plain,) = ranks.run(1, fit_plain, x, y)
    with dtrain.Trainer(make_classifier, threads_per_worker=1, run_name="one", tracking=False) as trainer:
        history = trainer.fit(x, y, epochs=3, shuffle=False, verbose=0)
        for ours, theirs in zip(trainer.get_weights(), plain, strict=True):
            assert np.array_equal(ours, theirs)
        expected = trainer.evaluate(x, y, verbose=0)
        trainer.fit(x, y, verbose=0)
        assert history.checkpoint is not None
        trainer.restore(history.checkpoint)
        assert trainer.evaluate(x, y, verbose=0) == expected
        assert np.array_equal(trainer.get_weights()[0], plain[0])
    assert sorted(path.name for path in (in_tmp / "dtrain_runs").iterdir()) == ["one", "one-2"]
    with dtrain.Trainer(make_classifier, threads_per_worker=1, tracking=False) as other:
        other.restore(history.checkpoint)
        assert other.evaluate(x, y, verbose=0) == expected


def test_weights_outlive_the_workers(local_ray: None) -> None:
    x, y = blobs(50)
    with dtrain.Trainer(make_classifier, threads_per_worker=1, **QUIET) as trainer:
        trainer.fit(x, y, epochs=3, verbose=0)
        expected = trainer.evaluate(x, y, verbose=0)
        weights = trainer.get_weights()  # the local model has them now
        trainer.shutdown()
        assert trainer.evaluate(x, y, verbose=0) == expected
        other = [weight + 1 for weight in weights]
        trainer.shutdown()
        trainer.set_weights(weights)
        trainer.set_weights(other)
        assert close(trainer.get_weights(), other)
