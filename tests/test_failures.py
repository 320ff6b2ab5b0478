"""Claims about what users see when a job goes wrong, on a real Ray: the error, how soon, and that nothing is left."""

import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import models
import numpy as np
import psutil
import pytest
from models import blobs, make_classifier

import dtrain
from dtrain import cluster, worker_group
from dtrain.errors import ConfigError, DataError, DtrainError, NotFinite, WorkerError
from dtrain.interrupts import Interrupts

for module in (models, sys.modules[__name__]):  # the workers do not have the tests' folder on their path
    cloudpickle.register_pickle_by_value(module)

QUIET: dict[str, Any] = {"checkpoint": False, "tracking": False}
DEADLINE = 50.0
"""Ten times the bar of five seconds."""


def wait_until(condition: Callable[[], bool], seconds: float = DEADLINE) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        time.sleep(0.05)


def nothing_is_left(pids: set[int]) -> bool:
    import ray

    actors = [actor for actor in ray.util.list_named_actors(all_namespaces=True) if actor["name"].startswith("dtrain:")]
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    return not actors and not groups and not any(psutil.pid_exists(pid) for pid in pids)


def with_nan() -> tuple[Any, Any]:
    """Mini-batches of 8: of the third one a row is NaN that rank 1 of two has."""
    x, y = blobs(64)
    x[21] = np.nan
    return x, y


def test_a_loss_that_is_nan_ends_the_fit_and_names_step_and_rank(local_ray: None, tmp_path: Path) -> None:
    x, y = with_nan()
    options = {"tracking": dtrain.MLflowConfig(log_model=False), "checkpoint": True, "storage_path": tmp_path}

    def make_with_a_metric_that_is_infinite() -> Any:
        layers = keras.layers  # no relu: some CPUs' kernels make 0 of its NaN
        model = keras.Sequential([keras.Input((5,)), layers.Dense(16, "tanh"), layers.Dense(3, "softmax")])
        metrics = ["accuracy", lambda y, p: keras.ops.sum(p) * 0 + np.inf]
        model.compile("sgd", "sparse_categorical_crossentropy", metrics=metrics)
        return model

    with dtrain.Trainer(make_with_a_metric_that_is_infinite, num_workers=2, run_name="nan", **options) as trainer:
        trainer.evaluate(x[:8], y[:8], verbose=0)
        before = trainer.get_weights()
        with pytest.raises(NotFinite, match=r"the loss is nan from step 2 of the run on, first on rank 1 on") as caught:
            trainer.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        assert caught.value.rank == 1
        for ours, theirs in zip(trainer.get_weights(), before, strict=True):
            assert np.array_equal(ours, theirs)  # of the checkpoint that was made before the first step
    events = [json.loads(line) for line in (tmp_path / "nan" / "journal.jsonl").read_text().splitlines()]
    recorded = [loss for event in events if event["event"] == "steps" for loss in event["metrics"]["loss"]]
    assert recorded[1] == recorded[1] and recorded[2] != recorded[2]  # up to what is not a number


def test_a_loss_that_is_nan_is_trained_on_where_that_is_asked_for(local_ray: None, tmp_path: Path, caplog: Any) -> None:
    x, y = with_nan()
    options = {"tracking": False, "checkpoint": True, "storage_path": tmp_path}
    with dtrain.Trainer(make_classifier, failure=dtrain.FailureConfig(on_nan="ignore"), **options) as trainer:
        history = trainer.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        assert np.isnan(history.history["loss"][0])
    assert "is NaN, so this would be a checkpoint that nothing can be gone on from" in caplog.text


@pytest.mark.parametrize(("num_workers", "eagerly"), [(1, False), (2, False), (2, True)])
def test_a_step_that_is_nan_is_left_out_as_if_its_rows_were_not_there(
    local_ray: None, tmp_path: Path, num_workers: int, eagerly: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    def make_normalized() -> Any:
        keras.utils.set_random_seed(3)
        dense = keras.layers.Dense
        model = keras.Sequential([keras.Input((5,)), dense(4), keras.layers.BatchNormalization(), dense(3, "softmax")])
        loss = keras.losses.SparseCategoricalCrossentropy()
        model.compile(keras.optimizers.Adam(0.1), loss, metrics=["accuracy"], run_eagerly=eagerly)
        return model

    x, y = with_nan()
    without = np.delete(np.arange(64), range(16, 24))
    failure = dtrain.FailureConfig(on_nan="skip")
    found = []
    for rows in (np.arange(64), without):
        with dtrain.Trainer(make_normalized, num_workers=num_workers, failure=failure, **QUIET) as trainer:
            history = trainer.fit(x[rows], y[rows], batch_size=8, shuffle=False, epochs=2, verbose=2)
            optimizer = [variable.numpy() for variable in trainer.model.optimizer.variables]
            found.append((history.history, trainer.get_weights(), optimizer))
    (ours, weights, optimizer), (theirs, *wanted) = found
    assert ours == theirs
    for one, other in zip([*weights, *optimizer], [*wanted[0], *wanted[1]], strict=True):
        assert np.array_equal(one, other)
    out = capsys.readouterr().out
    assert f"step 2 of the run was left out: it is not finite, on rank {num_workers - 1} on" in out
    assert "step 10 of the run was left out" in out and out.count("was left out") == 2


def test_steps_that_are_all_nan_end_a_fit_that_leaves_them_out(local_ray: None) -> None:
    x, y = blobs(400)
    failure = dtrain.FailureConfig(on_nan="skip")
    with dtrain.Trainer(make_classifier, failure=failure, **QUIET) as trainer:
        with pytest.raises(NotFinite, match=r"the last \d+ steps, up to step \d+ of the run, were all left"):
            trainer.fit(x * np.nan, y, batch_size=8, verbose=0)
        assert np.isfinite(trainer.get_weights()[0]).all()


class Raise(keras.callbacks.Callback):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        raise ZeroDivisionError("the user's own mistake")


def test_a_worker_that_raises_shows_the_users_traceback_first_and_stops_all(local_ray: None) -> None:
    x, y = blobs(64)
    with dtrain.Trainer(make_classifier, num_workers=2, **QUIET) as trainer:
        trainer.evaluate(x, y, verbose=0)
        pids = {worker.pid for worker in trainer.workers}
        started = time.monotonic()
        with pytest.raises(WorkerError) as caught:
            trainer.fit(x, y, verbose=0, callbacks=[Raise()])
        assert time.monotonic() - started < DEADLINE
        error = caught.value
        assert error.rank == 0 and error.host == os.uname().nodename
        first_frame = str(error).splitlines()[1]
        assert str(error).startswith("Traceback") and "dtrain/" not in first_frame and "ray" not in first_frame
        assert "ZeroDivisionError: the user's own mistake" in str(error)
        assert "rank 0 on" in str(error) and "rank 1 was stopped" in str(error)
        wait_until(lambda: nothing_is_left(pids))


def test_a_killed_worker_that_is_not_survived_ends_the_run_with_its_rank_and_host(local_ray: None) -> None:
    x, y = blobs(640)
    none = dtrain.FailureConfig(max_failures=0)
    with dtrain.Trainer(make_classifier, num_workers=2, failure=none, **QUIET) as trainer:
        trainer.evaluate(x, y, verbose=0)
        pids = {worker.pid for worker in trainer.workers}
        victim = trainer.workers[1]
        outcome: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit(x, y, epochs=100_000, verbose=0)
            except BaseException as error:
                outcome.append(error)

        thread = threading.Thread(target=fit)
        thread.start()
        group = trainer._group
        assert group is not None
        wait_until(lambda: (progress := group.progress()) is not None and progress.epoch > 2)
        os.kill(victim.pid, signal.SIGKILL)
        thread.join(DEADLINE)
        assert not thread.is_alive()
        (error,) = outcome
        assert isinstance(error, WorkerError)
        assert error.rank == 1 and error.host == victim.host and "rank 1 on" in str(error) and "died" in str(error)
        wait_until(lambda: nothing_is_left(pids))


class RaiseOnRankOne(keras.callbacks.Callback):
    dtrain_on_every_rank = True

    def on_test_begin(self, logs: Any = None) -> None:
        if os.environ["HOROVOD_RANK"] == "1":
            raise ZeroDivisionError("the user's own mistake")


def test_what_single_batches_trained_outlives_a_failing_evaluate_and_a_death_but_not_all_of_them(
    local_ray: None, caplog: pytest.LogCaptureFixture
) -> None:
    x, y = blobs(64)
    plain = make_classifier()

    def differences(trainer: dtrain.Trainer) -> float:
        for model in (plain, trainer):
            for start in (0, 32):
                model.train_on_batch(x[start : start + 32], y[start : start + 32])
        pairs = zip(trainer.get_weights(), plain.get_weights(), strict=True)
        return max(float(np.abs(ours - theirs).max()) for ours, theirs in pairs)

    with dtrain.Trainer(make_classifier, num_workers=2, **QUIET) as trainer:
        trainer.train_on_batch(x, y)
        plain.train_on_batch(x, y)
        with pytest.raises(WorkerError, match="rank 1 on .* rank 0 was stopped"):
            trainer.evaluate(x, y, verbose=0, callbacks=[RaiseOnRankOne()])
        assert "died with the weights" not in caplog.text
        assert differences(trainer) < 2e-5  # the momentum is kept, too
        os.kill(trainer.workers[0].pid, signal.SIGKILL)
        loss = trainer.evaluate(x, y, verbose=0)[0]  # begins again, with new workers
        assert loss == pytest.approx(plain.evaluate(x, y, verbose=0)[0], abs=2e-5)
        assert differences(trainer) < 2e-5
        for model in (plain, trainer):
            model.train_on_batch(x, y)  # which only the workers know of
        os.kill(trainer.workers[1].pid, signal.SIGKILL)
        assert np.abs(trainer.get_weights()[0] - plain.get_weights()[0]).max() < 2e-5  # the other one tells
        assert "died with the weights" not in caplog.text
        trainer.train_on_batch(x, y)  # which only they know of
        for rank in (0, 1):
            os.kill(trainer.workers[rank].pid, signal.SIGKILL)
        with pytest.raises(WorkerError, match="rank [01] on .* died"):
            trainer.evaluate(x, y, verbose=0)
        assert np.array_equal(trainer.get_weights()[0], make_classifier().get_weights()[0])
        assert "died with the weights, and there is no checkpoint" in caplog.text


def start_one(runtime_env: dict[str, Any]) -> None:
    def settings(cpus: float, workers: int) -> Any:
        raise AssertionError("it was not to start")

    group = worker_group.WorkerGroup(
        worker_group.GroupSpec("unstartable", 1, {"CPU": 1.0}, "PACK", settings, runtime_env), Interrupts()
    )
    group.start()


def test_a_process_that_cannot_start_is_an_error_that_says_why(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hidden").mkdir()
    (tmp_path / "hidden" / "sitecustomize.py").write_text("import sys; sys.modules['dtrain'] = None")
    with pytest.raises(WorkerError, match="could not import dtrain; install the same dtrain") as caught:
        start_one({"env_vars": {"PYTHONPATH": str(tmp_path / "hidden")}})
    assert "No module named 'dtrain.worker'" in str(caught.value) and caught.value.rank == 0
    with pytest.raises(ConfigError, match="runtime_env=.*/nowhere.* is refused by Ray"):
        start_one({"working_dir": str(tmp_path / "nowhere")})
    (tmp_path / "sitecustomize.py").write_text("import os; os._exit(1)")
    monkeypatch.setattr(worker_group, "START_SECONDS", 2.0)
    with pytest.raises(WorkerError, match=r"rank 0 .* did not start within 2 s; .*logs/\{raylet"):
        start_one({"env_vars": {"PYTHONPATH": str(tmp_path)}})
    wait_until(lambda: nothing_is_left(set()))


def make_nothing() -> None:
    pass


def make_text() -> str:
    return "a model"


def make_uncompiled() -> keras.Model:
    import keras

    return keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])


def make_by_process() -> keras.Model:
    import os

    import keras

    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3 + os.getpid() % 1000)])
    model.compile("sgd", "mse")
    return model


def test_what_the_factory_returns_is_checked_on_the_workers(local_ray: None, ranks: Any) -> None:
    with dtrain.Trainer(make_nothing, num_workers=1, **QUIET) as trainer:  # type: ignore[arg-type]
        with pytest.raises(ConfigError, match="forget to return the model"):
            trainer.fit(*blobs(8), verbose=0)
        wait_until(lambda: nothing_is_left(set()))

    def refusals(collective: Any) -> list[str]:
        from dtrain.model import make_model

        messages = []
        for model_fn in (make_text, make_uncompiled):
            with pytest.raises(ConfigError) as caught:
                make_model(model_fn, None)  # type: ignore[arg-type]
            messages.append(str(caught.value))
        return messages

    ((text, uncompiled),) = ranks.run(1, refusals)
    assert "model_fn=make_text returned str; it must return a keras.Model" in text
    assert "not compiled; call model.compile" in uncompiled


def test_different_models_on_different_ranks_are_refused(local_ray: None) -> None:
    with dtrain.Trainer(make_by_process, num_workers=2, **QUIET) as trainer:
        with pytest.raises(ConfigError, match="another model on rank 1 than on rank 0"):
            trainer.fit(*blobs(8), verbose=0)
        wait_until(lambda: nothing_is_left(set()))


def test_more_workers_than_there_is_room_for_are_refused_with_a_table(local_ray: None, in_tmp: Path) -> None:
    with dtrain.Trainer(make_classifier, num_workers=99, run_name="big") as trainer:
        for _ in range(2):  # the first leaves nothing that would refuse the second
            with pytest.raises(ConfigError, match=r"num_workers=99 does not fit[\s\S]* room for 8") as caught:
                trainer.fit(*blobs(8), verbose=0)
        assert "asked 99, the cluster has 8" in str(caught.value)
    assert list((in_tmp / "dtrain_runs").iterdir()) == []
    with dtrain.Trainer(make_classifier, use_gpu=True, **QUIET) as trainer, pytest.raises(ConfigError, match="GPU"):
        trainer.fit(*blobs(8), verbose=0)


X, Y = blobs(10)


class TestBeforeAnythingStarts:
    """Phase 0: the message names argument, value, rule and fix, and no actor was started."""

    @pytest.fixture(autouse=True)
    def no_actor_starts(self, monkeypatch: pytest.MonkeyPatch) -> Any:
        import ray

        def actors() -> list[Any]:
            return ray.util.list_named_actors(all_namespaces=True) if ray.is_initialized() else []

        was_initialized, before = ray.is_initialized(), actors()
        yield
        assert ray.is_initialized() == was_initialized and actors() == before

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            ({"model_fn": "model"}, ["model_fn='model'", "function"]),
            ({"model_fn": lambda one, two: None}, ["model_fn", "called as model_fn()", "one"]),
            ({"model_fn": make_classifier, "config": {"a": 1}}, ["model_fn(config)"]),
            ({"num_workers": 0}, ["num_workers=0", "1 or more"]),
            ({"num_workers": 2.5}, ["num_workers=2.5", "whole number"]),
            ({"num_workers": (3, 1)}, ["num_workers=(3, 1)", "at least, at most"]),
            (
                {"num_workers": (1, 3), "placement_strategy": "STRICT_SPREAD"},
                ["placement_strategy='STRICT_SPREAD'", "num_workers=(1, 3)"],
            ),
            ({"resources_per_worker": {"CPU": -1}}, ["resources_per_worker['CPU']=-1", "0 or more"]),
            ({"placement_strategy": "NEAR"}, ["placement_strategy='NEAR'", "STRICT_SPREAD"]),
            ({"threads_per_worker": 0}, ["threads_per_worker=0"]),
            ({"address": "ray://head:10001"}, ["ray://head:10001", "ray job submit"]),
            ({"seed": -1}, ["seed=-1"]),
            ({"run_name": "../up"}, ["run_name='../up'"]),
            ({"run_name": "/root"}, ["run_name='/root'"]),
            ({"run_name": "nul\0"}, ["run_name="]),
            ({"checkpoint": "often"}, ["checkpoint='often'", "CheckpointConfig"]),
            ({"tracking": "yes"}, ["tracking='yes'", "MLflowConfig"]),
            ({"failure": 3}, ["failure=3", "FailureConfig"]),
        ],
    )
    def test_arguments_of_the_trainer(self, arguments: dict[str, Any], words: list[str]) -> None:
        with pytest.raises(ConfigError) as caught:
            dtrain.Trainer(**{"model_fn": make_classifier, **arguments})
        assert all(word in str(caught.value) for word in words), str(caught.value)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: dtrain.CheckpointConfig(keep=0), "keep=0 must be 1 or more"),
            (lambda: dtrain.CheckpointConfig(keep=2.5), r"keep=2\.5 must be 1 or more, and whole"),  # type: ignore[arg-type]
            (lambda: dtrain.CheckpointConfig(monitor=["loss"]), "monitor=.* name of a metric"),  # type: ignore[arg-type]
            (
                lambda: dtrain.FailureConfig(check_replicas_every=0),
                "check_replicas_every=0 must be a whole number of steps, 1 or more, or None",
            ),
            (lambda: dtrain.FailureConfig(max_failures=-1), "max_failures=-1 must be a whole number"),
            (
                lambda: dtrain.FailureConfig(hang_timeout=0),
                "hang_timeout=0 must be a number of seconds above 0, or None",
            ),
        ],
    )
    def test_configurations(self, make: Any, words: str) -> None:
        with pytest.raises(ConfigError, match=words):
            make()

    def test_a_factory_that_cannot_travel_names_the_variable(self) -> None:
        lock = threading.Lock()
        with pytest.raises(ConfigError, match="variable 'lock' cannot be pickled.*inside the function"):
            dtrain.Trainer(lambda: lock)

    def test_another_keras_backend(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("KERAS_BACKEND", "jax")
        with pytest.raises(ConfigError, match="KERAS_BACKEND='jax'.*set KERAS_BACKEND=tensorflow"):
            dtrain.Trainer(make_classifier)

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"batch_size": 0}, ConfigError, ["batch_size=0", "1 or more"]),
            ({"batch_size": 1.5}, ConfigError, ["batch_size=1.5", "whole number"]),
            ({"epochs": -1}, ConfigError, ["epochs=-1", "0 or more"]),
            ({"initial_epoch": -1}, ConfigError, ["initial_epoch=-1"]),
            ({"steps_per_epoch": 0}, ConfigError, ["steps_per_epoch=0"]),
            ({"validation_freq": 0}, ConfigError, ["validation_freq=0"]),
            ({"shuffle": "rows"}, ConfigError, ["shuffle='rows'", "'batch'"]),
            ({"validation_split": 1.5}, ConfigError, ["validation_split=1.5", "between 0 and 1"]),
            ({"x": X[:1], "y": Y[:1], "validation_split": 0.5}, DataError, ["validation_split"]),
            ({"verbose": 7}, ConfigError, ["verbose=7"]),
            ({"callbacks": ["EarlyStopping"]}, ConfigError, ["callbacks[0]", "Callback"]),
            ({"x": None}, DataError, ["x=None"]),
            ({"x": X[:0], "y": Y[:0]}, DataError, ["x", "0 rows"]),
            ({"y": Y[:7]}, DataError, ["x", "10", "y", "7"]),
            ({"x": {"a": X, "b": X[:3]}}, DataError, ["x['b']", "3", "10"]),
            ({"x": np.array([[1, 2], [3]], dtype=object), "y": Y[:2]}, DataError, ["x", "object"]),
            ({"y": np.array(["cat"] * 10)}, DataError, ["y"]),
            ({"x": iter([1])}, DataError, ["x is a", "pass a function"]),
            ({"validation_data": (X, Y[:3])}, DataError, ["10", "3"]),
            ({"class_weight": {0: 1.0}, "sample_weight": Y}, DataError, ["class_weight", "sample_weight"]),
        ],
    )
    def test_arguments_of_fit(
        self, in_tmp: Any, arguments: dict[str, Any], error: type[DtrainError], words: list[str]
    ) -> None:
        trainer = dtrain.Trainer(make_classifier)
        with pytest.raises(error) as caught:
            trainer.fit(**{"x": X, "y": Y, **arguments})
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert list(in_tmp.iterdir()) == []

    def test_where_the_run_is_kept_and_recorded(self, in_tmp: Any) -> None:
        (in_tmp / "file").touch()
        with pytest.raises(ConfigError, match="storage_path=.*file"):
            dtrain.Trainer(make_classifier, storage_path=in_tmp / "file").fit(X, Y)
        (in_tmp / "runs" / "mine").mkdir(parents=True)
        with pytest.raises(ConfigError, match="run_name='mine' exists already.*another run_name"):
            dtrain.Trainer(make_classifier, storage_path=in_tmp / "runs", run_name="mine").fit(X, Y)
        for uri in ("file:///tmp/mlruns", "gopher://host"):
            with pytest.raises(ConfigError, match=uri.split(":")[0]):
                tracking = dtrain.MLflowConfig(tracking_uri=uri)
                dtrain.Trainer(make_classifier, tracking=tracking, run_name="refused").fit(X, Y)
        assert list((in_tmp / "dtrain_runs").iterdir()) == []
        assert [path.name for path in (in_tmp / "runs").iterdir()] == ["mine"]

    @pytest.mark.parametrize("address", ["127.0.0.1:1", "127.0.0.1:99999", "[::1]:1", "no.such.host.invalid:6379"])
    def test_an_address_at_which_nobody_listens(self, address: str) -> None:
        with pytest.raises(ConfigError, match=r"address='.*no Ray cluster answers there.*ray start --head"):
            cluster.check_answers(address)

    def test_an_address_that_answers_or_that_ray_looks_up(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            cluster.check_answers(f"127.0.0.1:{server.getsockname()[1]}")
        cluster.check_answers("auto")

    def test_no_cluster_at_the_address(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import ray

        if ray.is_initialized():
            pytest.skip("this process is connected to a Ray already, which wins over any address")
        with pytest.raises(ConfigError, match=r"address='127.0.0.1:1'.*ray start --head"):
            dtrain.Trainer(make_classifier, address="127.0.0.1:1", **QUIET).fit(X, Y)
