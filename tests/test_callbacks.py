"""Claims about callbacks on two workers: each of Keras's, and the user's own, does what it does in one process."""

import csv
import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import models
import numpy as np
import pytest
import tensorflow as tf
import warm
from models import blobs
from warm import differences, fresh, use

import dtrain
from dtrain.callback_state import import_state
from dtrain.errors import ConfigError, ReplicasDiffer

for module in (models, warm, sys.modules[__name__]):
    cloudpickle.register_pickle_by_value(module)  # the workers do not have the tests' folder on their path

callbacks = keras.callbacks
SGD = keras.optimizers.SGD
FIT: dict[str, Any] = {"batch_size": 8, "shuffle": False, "verbose": 0}
TOLERANCE = 2e-5
"""Of float32, over a few dozen steps."""


def classifier(optimizer: Any = None, **compiled: Any) -> Callable[[], keras.Model]:
    """A factory of a small classifier; `optimizer` makes one."""

    def make() -> keras.Model:
        model = keras.Sequential(
            [keras.Input((5,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3, activation="softmax")]
        )
        chosen = optimizer() if optimizer else SGD(0.1, momentum=0.9)
        model.compile(chosen, "sparse_categorical_crossentropy", metrics=["accuracy"], **compiled)
        return model

    return fresh(make)


@pytest.fixture
def workers(two_workers: dtrain.Trainer) -> dtrain.Trainer:
    return use(two_workers, classifier())


@pytest.fixture
def trainer(workers: dtrain.Trainer) -> dtrain.Trainer:
    return workers


# --- what users write


class Rates(callbacks.Callback):  # type: ignore[misc]
    """Keeps the learning rate of each step."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.rates.append(float(self.model.optimizer.learning_rate))


class Cyclic(Rates):
    """A learning rate of its own for each step."""

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = 0.02 * (1 + batch % 3)


class Patient(callbacks.EarlyStopping):  # type: ignore[misc]
    """A user's own early stopping, which runs on rank 0."""


class Scores(callbacks.Callback):  # type: ignore[misc]
    """Puts a metric of its own into the logs, which gets worse from the third epoch on."""

    def __init__(self, x: Any) -> None:
        super().__init__()
        self.x = x
        self.means: list[float] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.means.append(float(self.model.predict(self.x, verbose=0)[:, 0].mean()))
        logs["val_score"] = -abs(epoch - 1.0)


class Explodes(callbacks.Callback):  # type: ignore[misc]
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            self.model.optimizer.learning_rate = 1e38


class Freezes(callbacks.Callback):  # type: ignore[misc]
    """Trains the last layer alone."""

    def on_train_begin(self, logs: Any = None) -> None:
        self.model.layers[0].trainable = False


class Schedules(callbacks.Callback):  # type: ignore[misc]
    def on_train_begin(self, logs: Any = None) -> None:
        self.model.optimizer.learning_rate = keras.optimizers.schedules.ExponentialDecay(0.1, 5, 0.5)


class StopsAtOnce(callbacks.Callback):  # type: ignore[misc]
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = epoch == 1


class Watches(callbacks.Callback):  # type: ignore[misc]
    """Keeps all hooks that are called, what they are given, and its params."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, Any]] = []
        self.params_then: list[Any] = []

    def _see(self, hook: str, *place: Any, logs: Any = None) -> None:
        self.seen.append((hook, *place, {k: np.asarray(v) for k, v in (logs or {}).items()}))
        if not self.params_then or self.params_then[-1] != self.params:
            self.params_then.append(dict(self.params))


def _hook(name: str) -> Any:
    def hook(self: Watches, *args: Any, logs: Any = None) -> None:
        place = [arg for arg in args if not isinstance(arg, dict)]
        self._see(name, *place, logs=logs or next((arg for arg in args if isinstance(arg, dict)), None))

    return hook


for _verb in ("train", "test", "predict"):
    for _place in ("begin", "end"):
        setattr(Watches, f"on_{_verb}_{_place}", _hook(f"{_verb}_{_place}"))
        setattr(Watches, f"on_{_verb}_batch_{_place}", _hook(f"{_verb}_batch_{_place}"))
Watches.on_epoch_begin, Watches.on_epoch_end = _hook("epoch_begin"), _hook("epoch_end")


# --- deciding


def stopping(kind: Any = callbacks.EarlyStopping, monitor: str = "val_loss", **more: Any) -> Any:
    return kind(monitor, patience=1, min_delta=0.03, restore_best_weights=True, **more)


STOPPED = ("stopped_epoch", "best_epoch", "best", "wait", "best_weights")

DECIDING: dict[str, tuple[Callable[[], list[Any]], tuple[str, ...]]] = {
    "early stopping": (lambda: [stopping()], STOPPED),
    "early stopping from an epoch on": (lambda: [stopping(start_from_epoch=3)], STOPPED),
    "early stopping with a baseline": (lambda: [stopping(baseline=0.5)], STOPPED),
    "a subclass of early stopping": (lambda: [stopping(Patient)], STOPPED),
    "early stopping at what another callback measures": (
        lambda: [Scores(blobs(16, seed=4)[0]), stopping(monitor="val_score", mode="max")],
        ("means", *STOPPED),
    ),
    "slower on a plateau": (
        lambda: [callbacks.ReduceLROnPlateau("loss", 0.5, patience=1, min_delta=0.2, cooldown=1, min_lr=0.01), Rates()],
        ("wait", "cooldown_counter", "best", "rates"),
    ),
    "a rate for each epoch": (
        lambda: [callbacks.LearningRateScheduler(lambda epoch: 0.1 / (1 + epoch)), Rates()],
        ("rates",),
    ),
    "a rate from the last": (
        lambda: [callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.5 if epoch else rate), Rates()],
        ("rates",),
    ),
    "a rate for each step": (lambda: [Cyclic()], ("rates",)),
    "an end at NaN": (lambda: [Explodes(), callbacks.TerminateOnNaN()], ()),
    "an end after one step": (lambda: [StopsAtOnce()], ()),
    "a frozen layer": (lambda: [Freezes()], ()),
    "a history of one's own": (lambda: [callbacks.History()], ("history", "epoch", "params")),
    "all hooks": (lambda: [Watches()], ("seen", "params_then", "params")),
    "nested lists": (lambda: [[Rates()], [[stopping()]]], ()),
}


def attributes_of(found: Any, names: tuple[str, ...]) -> list[Any]:
    flat = keras.tree.flatten(found)
    return [vars(callback)[name] for callback in flat for name in names if name in vars(callback)]


@pytest.mark.parametrize("name", DECIDING)
def test_what_a_callback_decides_holds_on_all_workers(trainer: dtrain.Trainer, name: str) -> None:
    make, attributes = DECIDING[name]
    x, y = blobs(45)
    validation = blobs(20, seed=9)
    theirs, ours = make(), make()
    plain = classifier()()
    expected = plain.fit(x, y, epochs=8, validation_data=validation, callbacks=theirs, **FIT)
    history = trainer.fit(x, y, epochs=8, validation_data=validation, callbacks=ours, **FIT)
    assert differences(history.history, expected.history, TOLERANCE) == []
    assert history.epoch == expected.epoch
    assert differences(attributes_of(ours, attributes), attributes_of(theirs, attributes), TOLERANCE) == []
    assert differences(trainer.get_weights(), plain.get_weights(), TOLERANCE) == []
    # Each worker predicts its own rows, so this looks at the weights of both.
    assert differences(trainer.predict(x, verbose=0), plain.predict(x, verbose=0), TOLERANCE) == []


def test_a_schedule_that_one_worker_alone_would_have_is_refused(trainer: dtrain.Trainer) -> None:
    with pytest.raises(ConfigError, match="gave an optimizer a schedule in on_train_begin.* let model_fn"):
        trainer.fit(*blobs(45), callbacks=[Schedules()], **FIT)


def with_average() -> Any:
    return SGD(0.1, use_ema=True, ema_momentum=0.8)


def test_swapped_averages_are_evaluated_saved_and_predicted_with_on_all_workers(
    workers: dtrain.Trainer, in_tmp: Path
) -> None:
    x, y = blobs(45)
    plain, trainer = classifier(with_average)(), use(workers, classifier(with_average))
    for found in (plain, trainer):
        kept = [
            callbacks.SwapEMAWeights(swap_on_epoch=True),
            callbacks.ModelCheckpoint(f"{type(found).__name__}.keras"),
        ]
        found.fit(x, y, epochs=3, callbacks=kept, **FIT)
    saved = [keras.models.load_model(f"{name}.keras").get_weights() for name in ("Trainer", "Sequential")]
    assert differences(*saved, TOLERANCE) == []
    assert differences(trainer.get_weights(), plain.get_weights(), TOLERANCE) == []
    for verb in ("evaluate", "predict"):
        for found in (plain, trainer):
            found.fit(x, y, validation_data=(x, y), callbacks=[callbacks.SwapEMAWeights()], **FIT)
        data = (x, y) if verb == "evaluate" else (x,)
        ours = getattr(trainer, verb)(*data, callbacks=[callbacks.SwapEMAWeights()], verbose=0)
        theirs = getattr(plain, verb)(*data, callbacks=[callbacks.SwapEMAWeights()], verbose=0)
        assert differences(ours, theirs, TOLERANCE) == []


def two_steps_a_call() -> Any:
    return classifier(steps_per_execution=2)


def test_batch_hooks_come_where_keras_calls_them_with_several_steps_per_execution(workers: dtrain.Trainer) -> None:
    x, y = blobs(40)
    plain, trainer = two_steps_a_call()(), use(workers, two_steps_a_call())
    theirs, ours = Watches(), Watches()
    plain.fit(x, y, epochs=3, validation_data=(x, y), callbacks=[theirs], **FIT)
    trainer.fit(x, y, epochs=3, validation_data=(x, y), callbacks=[ours], **FIT)
    assert differences(ours.seen, theirs.seen, TOLERANCE) == []


def test_evaluate_and_predict_show_their_callbacks_all_batches(trainer: dtrain.Trainer) -> None:
    x, y = blobs(45)
    plain = classifier()()
    theirs, ours = Watches(), Watches()
    for found, watching in ((plain, theirs), (trainer, ours)):
        found.evaluate(x, y, batch_size=8, verbose=0, callbacks=[watching])
        found.predict(x, batch_size=8, verbose=0, callbacks=[watching])
    assert differences(ours.seen, theirs.seen, TOLERANCE) == []
    assert ours.params_then == theirs.params_then


class Pair(keras.Model):  # type: ignore[misc]
    """Two optimizers, one of which is an attribute that only the user's code knows."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = keras.layers.Dense(1), keras.layers.Dense(1)
        self.slow = SGD(0.01)

    def call(self, x: Any) -> Any:
        return self.first(x) + self.second(x)

    def train_step(self, data: Any) -> Any:
        x, y, _ = keras.utils.unpack_x_y_sample_weight(data)
        with tf.GradientTape(persistent=True) as tape:
            loss = self.compute_loss(x, y, self(x, training=True))
            scaled, slowly = self.optimizer.scale_loss(loss), self.slow.scale_loss(loss)
        first, second = self.first.trainable_variables, self.second.trainable_variables
        self.optimizer.apply(tape.gradient(scaled, first), first)
        self.slow.apply(tape.gradient(slowly, second), second)
        return self.compute_metrics(x, y, None)


def pair() -> keras.Model:
    model = Pair()
    model(np.zeros((1, 5), "float32"))
    model.slow.build(model.second.trainable_variables)
    model.compile(SGD(0.1), "mse")
    return model


class SlowsTheSecond(callbacks.Callback):  # type: ignore[misc]
    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.model.slow.learning_rate = 0.1 / (1 + epoch)


def test_the_rate_of_an_optimizer_that_compile_does_not_know_is_set_on_all_workers(workers: dtrain.Trainer) -> None:
    x, y = blobs(40)[0], np.linspace(0, 1, 40).reshape(-1, 1)
    plain, trainer = fresh(pair)(), use(workers, fresh(pair))
    for found in (plain, trainer):
        found.fit(x, y, epochs=3, callbacks=[SlowsTheSecond()], **FIT)
    assert differences(trainer.predict(x, verbose=0), plain.predict(x, verbose=0), TOLERANCE) == []


def test_a_callback_that_opts_in_runs_on_every_worker(trainer: dtrain.Trainer, in_tmp: Path) -> None:
    @dtrain.on_every_rank
    class Signs(callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            Path(f"{os.getpid()}.{epoch}").write_text(json.dumps(logs["loss"]))
            self.model.stop_training = epoch == 1

    x, y = blobs(16)
    history = trainer.fit(x, y, epochs=4, callbacks=[Signs()], **FIT)
    found = {path.name: json.loads(path.read_text()) for path in in_tmp.iterdir()}
    assert set(found) == {f"{worker.pid}.{epoch}" for worker in trainer.workers for epoch in (0, 1)}
    assert set(found.values()) == set(history.history["loss"])


@pytest.mark.parametrize("what", ["in callbacks", "reading data", "computing"])
def test_a_worker_that_keeps_the_other_waiting_is_told(
    in_tmp: Path, local_ray: None, capsys: pytest.CaptureFixture[str], what: str
) -> None:
    def wait() -> None:
        import horovod.tensorflow as hvd

        if hvd.is_initialized() and hvd.rank() == 1:
            time.sleep(0.1)

    @dtrain.on_every_rank
    class Waits(callbacks.Callback):  # type: ignore[misc]
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            wait()

    class Slow(dtrain.data.DataSource):
        def __len__(self) -> int:
            return 800

        def read(self, indices: Any) -> Any:
            wait()
            return tuple(leaf[indices] for leaf in blobs(800))

    class Heavy(keras.layers.Layer):  # type: ignore[misc]
        def call(self, x: Any, training: bool = False) -> Any:
            import tensorflow as tf

            with tf.control_dependencies([tf.py_function(wait, [], [])] if training else []):
                return tf.identity(x)

    def make_heavy() -> Any:
        model = keras.Sequential([keras.Input((5,)), Heavy(), keras.layers.Dense(3, activation="softmax")])
        model.compile("sgd", "sparse_categorical_crossentropy")
        return model

    options: dict[str, Any] = {"threads_per_worker": 1, "checkpoint": False, "tracking": False}
    x, y = blobs(800)
    given = {"x": Slow()} if what == "reading data" else {"x": x, "y": y}
    hooks = [Waits()] if what == "in callbacks" else []
    with dtrain.Trainer(make_heavy if what == "computing" else classifier(), num_workers=2, **options) as trainer:
        trainer.fit(**given, callbacks=hooks, epochs=1, **{**FIT, "verbose": 2})
    out = capsys.readouterr().out
    assert out.count("is slow") == 1 and re.search(rf"rank 1 on .* the others wait .* which it spends {what}", out)


def test_a_worker_whose_weights_become_others_is_named(in_tmp: Path, local_ray: None) -> None:
    @dtrain.on_every_rank
    class Differs(callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            import horovod.tensorflow as hvd

            if epoch == 2 and hvd.rank() == 1:
                self.model.layers[-1].bias.assign_add([1e-7] * 3)

    x, y = blobs(16)
    with (
        dtrain.Trainer(
            classifier(),
            num_workers=2,
            threads_per_worker=1,
            checkpoint=False,
            tracking=False,
            failure=dtrain.FailureConfig(check_replicas_every=5),
        ) as trainer,
        pytest.raises(ReplicasDiffer, match="optimizer of rank 1 are not those of the others at epoch 4, step 2"),
    ):
        trainer.fit(x, y, epochs=40, callbacks=[Differs()], **FIT)  # steps 9 and 10 are those of epoch 4


# --- writing


def files_in(folder: Path) -> list[str]:
    """The files below a folder, the parts of TensorBoard's names that are the time and the process left out."""
    found = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    return sorted(str(path).split(".tfevents.")[0] for path in found)


def events_in(folder: Path) -> dict[tuple[str, int], float]:
    """What TensorBoard would show of a folder's scalars and histograms: the value, or the number of buckets."""
    found = {}
    for path in sorted(folder.rglob("*.tfevents.*")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                array = tf.make_ndarray(value.tensor)
                shown = float(array) if array.dtype.kind == "f" and array.ndim == 0 else float(array.size)
                found[f"{path.parent.name}/{value.tag}", event.step] = shown
    return dict(sorted(found.items()))


def rows_in(path: Path, separator: str) -> list[list[Any]]:
    with path.open() as file:
        return [
            [float(cell) if cell[:1] in "0123456789" else cell for cell in row]
            for row in csv.reader(file, delimiter=separator)
        ]


def test_files_are_written_once_where_keras_would_write_them(
    trainer: dtrain.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = blobs(45)
    plain = classifier()()
    for found, folder in ((plain, tmp_path / "plain"), (trainer, tmp_path / "ours")):
        folder.mkdir()
        monkeypatch.chdir(folder)
        for _ in range(2):
            writing = [
                callbacks.CSVLogger("log.csv", append=True),
                callbacks.CSVLogger("new.csv", separator=";"),
                callbacks.ModelCheckpoint("{epoch:02d}-{val_loss:.3f}.keras", verbose=1),
                callbacks.ModelCheckpoint("best.keras", "val_loss", save_best_only=True),
                callbacks.ModelCheckpoint("weights/{epoch}.weights.h5", save_weights_only=True),
                callbacks.ModelCheckpoint("every/{epoch}-{batch}.weights.h5", save_weights_only=True, save_freq=4),
            ]
            found.fit(x, y, epochs=2, validation_data=(x, y), callbacks=writing, **FIT)
    ours, theirs = tmp_path / "ours", tmp_path / "plain"
    assert files_in(ours) == files_in(theirs)
    for name, separator in (("log.csv", ","), ("new.csv", ";")):
        assert differences(rows_in(ours / name, separator), rows_in(theirs / name, separator), TOLERANCE) == []
    for path in [theirs / "best.keras", *sorted((theirs / "every").iterdir())]:
        values = []
        for root in (ours, theirs):
            model = classifier()()
            model.load_weights(root / path.relative_to(theirs))
            values.append([*model.get_weights(), *[v.numpy() for v in model.optimizer.variables]])
        assert differences(*values, TOLERANCE) == []


def test_tensorboard_shows_what_it_shows_of_keras(
    trainer: dtrain.Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = blobs(45)
    plain = classifier()()
    for found, folder in ((plain, tmp_path / "plain"), (trainer, tmp_path / "ours")):
        folder.mkdir()
        monkeypatch.chdir(folder)
        board = callbacks.TensorBoard("logs", histogram_freq=1, write_graph=True, update_freq=2)
        found.fit(x, y, epochs=2, validation_data=(x, y), callbacks=[board], **FIT)
    assert files_in(tmp_path / "ours") == files_in(tmp_path / "plain")
    events = events_in(tmp_path / "plain")
    assert {"train/epoch_loss", "train/batch_loss", "train/keras"} <= {tag for tag, _ in events}
    assert differences(events_in(tmp_path / "ours"), events, TOLERANCE) == []


def test_callbacks_that_save_each_epoch_do_not_look_at_batches(trainer: dtrain.Trainer, in_tmp: Path) -> None:
    from dtrain.callbacks import RankCallbacks
    from dtrain.collective import LocalCollective

    trainer.predict(blobs(8)[0], verbose=0)

    def looks(callback: Any) -> bool:
        return RankCallbacks([callback], trainer.model, LocalCollective()).has_batch_hooks("train")

    assert not looks(callbacks.ModelCheckpoint("a.keras")) and looks(callbacks.ModelCheckpoint("a.keras", save_freq=1))
    assert not looks(callbacks.TensorBoard("logs")) and looks(callbacks.TensorBoard("logs", update_freq="batch"))
    assert not looks(stopping()) and looks(callbacks.TerminateOnNaN()) and looks(Rates())


def test_a_remote_monitor_is_told_once_an_epoch(trainer: dtrain.Trainer) -> None:
    told: list[Any] = []

    class Server(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monitor = callbacks.RemoteMonitor(f"http://127.0.0.1:{server.server_port}", send_as_json=True)
        x, y = blobs(16)
        history = trainer.fit(x, y, epochs=2, callbacks=[monitor], **FIT)
        server.shutdown()
    assert [(one["epoch"], one["loss"]) for one in told] == list(enumerate(history.history["loss"]))


# --- what comes back


def test_what_lambdas_collect_comes_back(trainer: dtrain.Trainer) -> None:
    x, y = blobs(16)
    losses: list[float] = []
    by_epoch: dict[int, float] = {}
    count = 0

    def counted(epoch: int, logs: Any) -> None:
        nonlocal count
        count += 1
        by_epoch[epoch] = logs["loss"]

    collecting = [
        callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: losses.append(logs["loss"])),
        callbacks.LambdaCallback(on_epoch_end=counted),
    ]
    history = trainer.fit(x, y, epochs=2, callbacks=collecting, **FIT)
    assert len(losses) == 4 and count == 2
    assert by_epoch == dict(enumerate(history.history["loss"]))
    trainer.fit(x, y, callbacks=collecting, **FIT)
    assert len(losses) == 6 and count == 3


def test_a_callback_keeps_its_own_lists_and_gets_their_new_content() -> None:
    kept: list[int] = []
    callback = Rates()
    callback.rates = kept
    import_state(callback, {"rates": [1, 2], "other": 3})
    assert callback.rates is kept == [1, 2] and callback.other == 3


def test_a_callback_that_served_a_local_model_serves_here_and_leaves_it_behind(trainer: dtrain.Trainer) -> None:
    x, y = blobs(16)
    rates = Rates()
    plain = classifier()()
    plain.fit(x, y, callbacks=[rates], **FIT)
    plain.unpicklable = (i for i in ())
    trainer.fit(x, y, callbacks=[rates], **FIT)
    assert len(rates.rates) == 4 and rates.model is plain


# --- refused, or left out


def test_keras_backup_is_refused_before_anything_starts() -> None:
    trainer = dtrain.Trainer(classifier(), num_workers=2)
    x, y = blobs(8)
    with pytest.raises(ConfigError, match=r"callbacks\[1\]=BackupAndRestore .*go on with fit"):
        trainer.fit(x, y, callbacks=[callbacks.History(), callbacks.BackupAndRestore("backup")])
    assert trainer.workers == ()


def test_keras_progress_bar_does_not_double_that_of_the_job(
    trainer: dtrain.Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = blobs(16)
    trainer.fit(x, y, epochs=2, verbose=2, callbacks=[callbacks.ProgbarLogger(), stopping(monitor="loss", verbose=1)])
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("Epoch 2/2") for line in lines) == 1
    assert sum("Restoring model weights" in line for line in lines) == 1
