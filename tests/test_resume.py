"""Claims about going on from a checkpoint: bit for bit on as many ranks, on the same mini-batches on any number."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import models
import numpy as np
import played
import pytest
import ray
import resumption
from models import blobs
from ranks import Ranks

import dtrain
from dtrain import fit_state
from dtrain.callback_checkpoint import CallbackState
from dtrain.checkpoint import CheckpointStore, Manifest, load, read_manifest
from dtrain.data.source import ArraySource, describe
from dtrain.errors import CheckpointError, ConfigError, DataError, TakenOver, WorkerDied, WorkerError
from dtrain.fit_run import CURVES, newest_numbers
from dtrain.fit_state import SavedFit, Snapshot, read, write
from dtrain.interrupts import Terminated
from dtrain.lease import LEASE, Lease
from dtrain.resume import as_begun, check_plan, find, plan_on_record
from dtrain.runs import RunFolder, find_run, list_checkpoints, list_runs
from dtrain.types import Batching, BatchPlan, FitPlan, Position

for module in (models, sys.modules[__name__]):  # the workers do not have the tests' folder on their path
    cloudpickle.register_pickle_by_value(module)

NAMES = [
    "dropout, batch normalization, Adam, a schedule, early stopping",
    "accumulated gradients, averaged weights",
    "a lowered learning rate, data in batches",
]
MORE_NAMES = ["a loss scale, two steps an execution", "two optimizers in a step of its own"]


def save_after_each(
    ranks: Ranks, world_size: int, name: str, dtype: str, steps: list[int], folder: Path
) -> tuple[list[str], dict[int, SavedFit]]:
    """The digests of the fit with checkpoints after these steps, and the checkpoints, read back from their files."""
    store = CheckpointStore(str(folder))
    stagings = {step: store.stage(step) for step in steps}
    outcomes = ranks.run(world_size, resumption.with_snapshots, name, dtype, stagings)
    saved = {}
    for step, staging in stagings.items():
        files = tuple(record for _, written in outcomes for record in written[step][1])
        position = outcomes[0][1][step][0]
        manifest = Manifest(step=step, position=position, world_size=world_size, seed=0, files=files)
        saved[step] = read(load(store.commit(staging, manifest)))
    return [digest for digest, _ in outcomes], saved


@pytest.mark.parametrize(
    ("world_size", "name"), [*((n, name) for n in (1, 2, 3) for name in NAMES), *((2, name) for name in MORE_NAMES)]
)
def test_a_fit_goes_on_bit_for_bit_from_any_step(ranks: Ranks, world_size: int, name: str, tmp_path: Path) -> None:
    outcomes = ranks.run(world_size, resumption.straight, name, "float32")
    expected = [digest for digest, _, _ in outcomes]
    _, logs, steps = outcomes[0]
    assert len(steps) > 7
    # In the middle and at the end of epochs, of a window of accumulation, before the last.
    steps = [step for step in steps if step % 5 in (0, 2) or step == steps[-1]]
    digests, saved = save_after_each(ranks, world_size, name, "float32", steps, tmp_path)
    assert digests == expected, "making checkpoints changes numbers"
    for step in steps:
        is_last = step == steps[-1]  # in a replica that has never trained
        found = ranks.run(world_size, resumption.resumed, name, "float32", saved[step], is_last)
        assert [digest for digest, _ in found] == expected, f"from step {step}"
        assert found[0][1] == logs[step:], f"from step {step}"


@pytest.mark.parametrize("name", NAMES[1:])
def test_a_fit_goes_on_at_another_number_of_ranks(ranks: Ranks, name: str, tmp_path: Path) -> None:
    steps = [3, 7]
    ranks.run(2, resumption.straight, name, "float64")
    _, saved = save_after_each(ranks, 2, name, "float64", steps, tmp_path)
    expected = ranks.run(2, resumption.state_after, name, "float64", None)[0]
    for world_size in (1, 3):
        for step in steps:
            found = ranks.run(world_size, resumption.state_after, name, "float64", saved[step])[0]
            assert found.keys() == expected.keys()
            off = max(float(np.abs(found[key] - expected[key]).max(initial=0)) for key in expected)
            assert off < 1e-10, (world_size, step, off)


def test_what_all_ranks_accumulated_is_restored_where_no_fit_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    """`Trainer.restore` and a fit that falls back take the model's state alone."""
    name, step = NAMES[1], 4  # in the middle of three steps that make an update
    ranks.run(2, resumption.straight, name, "float32")
    save_after_each(ranks, 2, name, "float32", [step], tmp_path)
    store = CheckpointStore(str(tmp_path))
    newest = store.latest()
    assert newest is not None
    states = fit_state.state_of(load(newest)), ranks.run(2, resumption.whole_state, name, "float32", step)[0]
    found, expected = ({fit_state.place_of(key): value for key, value in state.items()} for state in states)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[key], expected[key]) for key in expected)
    assert any("accumul" in key and np.any(value) for key, value in states[1].items())


def test_a_state_that_is_left_out_would_show(ranks: Ranks, tmp_path: Path) -> None:
    """Each part of what a rank alone has is needed: without it the fit ends otherwise."""
    name = NAMES[0]
    outcomes = ranks.run(2, resumption.straight, name, "float32")
    _, saved = save_after_each(ranks, 2, name, "float32", [7], tmp_path)
    no_metrics = [{k: v * 0 if k.startswith("metric") else v for k, v in own.items()} for own in saved[7].own]
    *words, position, has_gauss = saved[7].own[0]["random/numpy"]
    other_numpy = np.array([*words[::-1], position, has_gauss])
    other_random = [{**own, "random/numpy": other_numpy} for own in saved[7].own]
    same_seeds = [{**own, **{k: v for k, v in saved[7].own[0].items() if k.startswith("seed")}} for own in saved[7].own]
    for own in (no_metrics, other_random, same_seeds):
        maimed = replace(saved[7], own=tuple(own))
        found = ranks.run(2, resumption.resumed, name, "float32", maimed, False)
        assert [digest for digest, _ in found] != [digest for digest, _, _ in outcomes]


# --- by Trainer, on a real Ray


def make_model() -> Any:
    import keras

    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, "relu"),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.9)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


class KillsItself(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends its process after a mini-batch of the run, once."""

    def __init__(self, step: int, mark: Path) -> None:
        super().__init__()
        self.step, self.mark = step, mark

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if int(self.model.optimizer.iterations) == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class KillsAll(KillsItself):
    """Ends every worker's process."""

    dtrain_on_every_rank = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        mark = self.mark.with_suffix("." + os.environ["HOROVOD_RANK"])
        if int(self.model.optimizer.iterations) == self.step and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Signals(KillsItself):
    """Sends the driver a signal instead."""

    def __init__(self, step: int, mark: Path, pid: int, number: signal.Signals) -> None:
        super().__init__(step, mark)
        self.pid, self.number = pid, number

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if int(self.model.optimizer.iterations) == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(self.pid, self.number)
            time.sleep(0.2)  # segments are short here: leave the driver time to hear of it


def stopping() -> keras.callbacks.EarlyStopping:
    """With a state of its own, and weights that it may put in place in the end."""
    return keras.callbacks.EarlyStopping("val_loss", patience=2, restore_best_weights=True)


FIT: dict[str, Any] = {"batch_size": 8, "epochs": 3, "validation_split": 0.2, "verbose": 0}
STEPS_PER_EPOCH = 10


def new_trainer(run_name: str, model_fn: Callable[[], Any] = make_model, **arguments: Any) -> dtrain.Trainer:
    saving = dtrain.CheckpointConfig(every_steps=4, keep=2)
    given = {"num_workers": 2, "threads_per_worker": 1, "run_name": run_name, "checkpoint": saving, **arguments}
    return dtrain.Trainer(model_fn, **given)


def journal_of(run_name: str) -> dict[str, list[tuple[int, float]]]:
    """Each per-step series of a run, as its journal has it."""
    series: dict[str, list[tuple[int, float]]] = {}
    for line in Path(f"dtrain_runs/{run_name}/journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name, values in event["metrics"].items() if event["event"] == "steps" else ():
            series.setdefault(name, []).extend((event["first_step"] + i, value) for i, value in enumerate(values))
    return series


def epoch_seconds_of(run_name: str) -> list[float]:
    lines = Path(f"dtrain_runs/{run_name}/journal.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "metrics"]
    return [event["metrics"]["epoch_seconds"] for event in events if "epoch_seconds" in event["metrics"]]


@dataclass(frozen=True)
class Straight:
    """A fit that nobody disturbs, and what it ended with."""

    history: dtrain.History
    weights: list[np.ndarray]
    optimizer: list[np.ndarray]


@pytest.fixture(scope="module")
def place(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run in a folder that the tests share."""
    before, here = Path.cwd(), tmp_path_factory.mktemp("resume")
    os.chdir(here)
    yield here
    os.chdir(before)


@pytest.fixture(scope="module")
def straight(place: Path) -> Straight:
    hooks = [KillsItself(99, place / "never"), Signals(99, place / "never", 0, signal.SIGINT), stopping()]
    with new_trainer("straight") as trainer:
        history = trainer.fit(*blobs(100), **FIT, callbacks=hooks)
        found = Straight(history, trainer.get_weights(), optimizer_of(trainer))
        longer = trainer.fit(*blobs(100), **{**FIT, "epochs": 4}, callbacks=hooks, resume=history.checkpoint)
    assert longer.run_name == "straight-2" and longer.epoch == [0, 1, 2, 3]
    assert {name: values[:3] for name, values in longer.history.items()} == history.history
    return found


def optimizer_of(trainer: dtrain.Trainer) -> list[np.ndarray]:
    return [variable.numpy() for variable in trainer.model.optimizer.variables]


def same(ours: list[np.ndarray], theirs: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_run_that_was_killed_and_interrupted_ends_as_if_it_had_not_been(
    straight: Straight, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    x, y = blobs(100)
    started = time.monotonic()
    hooks = [
        KillsItself(14, place / "killed"),
        Signals(22, place / "interrupted", os.getpid(), signal.SIGINT),
        stopping(),
    ]
    with new_trainer("disturbed", failure=dtrain.FailureConfig(max_failures=0)) as trainer:
        with pytest.raises(WorkerError, match="rank 0 .* died"):
            trainer.fit(x, y, **FIT, callbacks=hooks, resume="auto")
        assert list_runs("dtrain_runs")[0].state == "failed"
        with pytest.raises(KeyboardInterrupt):
            trainer.fit(x, y, **FIT, callbacks=hooks, resume="auto")
        run = list_runs("dtrain_runs")[0]
        assert run.state == "killed" and run.position is not None and run.position.epoch == 2
        history = trainer.fit(x, y, **FIT, callbacks=hooks, resume="auto")
        assert history.history == straight.history.history and history.epoch == straight.history.epoch
        assert same(trainer.get_weights(), straight.weights) and same(optimizer_of(trainer), straight.optimizer)
    took = epoch_seconds_of("disturbed")
    assert len(took) == 3 and 0 < max(took) < time.monotonic() - started
    expected = journal_of("straight")
    assert journal_of("disturbed") == expected and [s for s, _ in expected["loss"]] == list(range(3 * STEPS_PER_EPOCH))
    tracked = MlflowClient("sqlite:///mlflow.db").get_run(history.run_id)
    assert tracked.info.status == "FINISHED" and tracked.data.tags["dtrain.attempts"] == "3"
    with new_trainer("disturbed") as trainer:  # another process, that does not know how it went
        again = trainer.fit(x, y, **{**FIT, "verbose": 2}, callbacks=hooks, resume="auto")
        assert again.history == straight.history.history
        assert "run disturbed is done: nothing is left to train" in capsys.readouterr().out
        assert trainer.workers == () and same(trainer.get_weights(), straight.weights)


def test_a_fit_goes_on_by_itself_from_a_checkpoint_where_all_workers_died(straight: Straight, place: Path) -> None:
    from mlflow import MlflowClient

    hooks = [
        KillsAll(14, place / "died"),
        Signals(99, place / "never", 0, signal.SIGINT),
        stopping(),
    ]
    with new_trainer("survived") as trainer:
        history = trainer.fit(*blobs(100), **FIT, callbacks=hooks)
        assert history.history == straight.history.history and history.epoch == straight.history.epoch
        assert same(trainer.get_weights(), straight.weights) and same(optimizer_of(trainer), straight.optimizer)
    (recovery,) = history.recoveries
    assert recovery.rank in (0, 1) and "died" in recovery.cause and recovery.seconds > 0 and recovery.steps_redone <= 2
    assert journal_of("survived") == journal_of("straight")
    tracked = MlflowClient("sqlite:///mlflow.db").get_run(history.run_id)
    assert tracked.info.status == "FINISHED" and tracked.data.metrics["recoveries"] == 1


class KillsItselfAlways(keras.callbacks.Callback):  # type: ignore[misc]
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if int(self.model.optimizer.iterations) == 6:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_fit_that_dies_at_one_step_again_and_again_ends_and_names_it(place: Path) -> None:
    failure = dtrain.FailureConfig(max_failures=1)
    told = r"rank 0 .* died .* that was failure 2 in a row, after [456] steps"
    with new_trainer("hopeless", num_workers=1, failure=failure, tracking=False) as trainer:
        with pytest.raises(WorkerDied, match=told):
            trainer.fit(*blobs(100), **FIT, callbacks=[KillsItselfAlways()])
        assert list_checkpoints(find_run("dtrain_runs", "hopeless"))


def test_a_driver_that_was_killed_is_followed_by_another(straight: Straight, place: Path) -> None:
    code = f"import sys; sys.path[:0] = {sys.path!r}; import test_resume; test_resume.drive()"
    environment = {**os.environ, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    first, second = (subprocess.run([sys.executable, "-c", code], env=environment, timeout=280) for _ in range(2))
    assert first.returncode == -signal.SIGKILL and second.returncode == 0
    (orphaned,) = [run.checkpoint for run in list_runs("dtrain_runs") if run.name == "orphaned"]
    ours, theirs = (read_manifest(url or "").files for url in (orphaned, straight.history.checkpoint))
    assert {f.name: f.sha256 for f in ours} == {f.name: f.sha256 for f in theirs}


class LosesTheLease(keras.callbacks.Callback):  # type: ignore[misc]
    """Removes the run's lease, as whoever takes a run over on a machine that does not see the holder."""

    def __init__(self, run: Path) -> None:
        super().__init__()
        self.run = run

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        if epoch == 1:
            (self.run / LEASE).unlink()


def test_a_driver_whose_run_was_taken_over_ends_and_writes_nothing_more(place: Path) -> None:
    run = place / "dtrain_runs" / "taken"
    told = r"run_name='taken' .* was taken over by somebody who removed its lease"
    with new_trainer("taken", num_workers=1, tracking=False) as trainer, pytest.raises(TakenOver, match=told):
        trainer.fit(*blobs(100), **FIT, callbacks=[LosesTheLease(run)])
    newest = CheckpointStore(str(run / "checkpoints")).list()[-1]
    assert newest.step <= STEPS_PER_EPOCH
    (state,) = [run.state for run in list_runs("dtrain_runs") if run.name == "taken"]
    assert state == "running", "what becomes of the run is the other driver's to say"


def test_checkpoints_asked_for_faster_than_they_are_written_hold_up_the_training(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = CheckpointStore.stage

    def slow(self: CheckpointStore, step: int) -> Any:
        time.sleep(0.5)  # the workers run ahead
        return plain(self, step)

    monkeypatch.setattr(CheckpointStore, "stage", slow)
    often = dtrain.CheckpointConfig(every_steps=1, keep=100)
    with new_trainer("often", num_workers=1, checkpoint=often, tracking=False) as trainer:
        trainer.fit(*blobs(100), **{**FIT, "epochs": 1})
    store = CheckpointStore("dtrain_runs/often/checkpoints")
    assert [checkpoint.step for checkpoint in store.list()] == [*range(STEPS_PER_EPOCH), STEPS_PER_EPOCH]
    assert all(load(checkpoint) for checkpoint in store.list())


def test_the_order_of_data_in_batches_is_on_record_though_only_their_number_is_known() -> None:
    plan = FitPlan(Batching(seed=(3, 1), shuffle=True), 2)
    record = plan_on_record(plan, None, BatchPlan(5, 1))
    assert (record["num_rows"], record["seed"], record["shuffle"]) == (5, [3, 1], True)
    manifest = Manifest(step=0, position=Position(0, 0), world_size=1, seed=3, extra={"plan": record})
    assert as_begun(manifest, FitPlan(Batching(seed=(8, 0), shuffle=True), 2)).train.seed == (3, 1)
    assert check_plan(manifest, record) == []


def unseeded() -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(blobs(80)).shuffle(80).batch(8)


def test_data_that_come_in_another_order_are_not_gone_on_with(place: Path) -> None:
    """Rows would be trained twice, and others not at all."""
    hooks = [Signals(14, place / "unseeded", os.getpid(), signal.SIGTERM)]
    given: dict[str, Any] = {"epochs": 3, "verbose": 0, "callbacks": hooks, "resume": "auto"}
    with new_trainer("unseeded", num_workers=1, tracking=False) as trainer:
        with pytest.raises(Terminated):
            trainer.fit(unseeded, **given)
        with pytest.raises(DataError, match=r"other batches before epoch 1, step \d .*seed=1"):
            trainer.fit(unseeded, **given)


def test_what_is_no_state_of_a_generator_is_refused(ranks: Ranks, tmp_path: Path) -> None:
    """NumPy would read behind its end."""
    name = NAMES[1]
    ranks.run(1, resumption.straight, name, "float32")
    _, saved = save_after_each(ranks, 1, name, "float32", [7], tmp_path)
    (own,) = saved[7].own
    far = own["random/numpy"].copy()
    far[-2] = 100_000
    for wrong in ({"random/numpy": far}, {"random/numpy": far[:9]}, {"random/python_gauss": np.zeros(2)}):
        maimed = replace(saved[7], own=({**own, **wrong},))
        with pytest.raises(AssertionError, match="CheckpointError: .* no generator's state"):
            ranks.run(1, resumption.resumed, name, "float32", maimed, False)


class TakesThePlace(keras.callbacks.Callback):  # type: ignore[misc]
    """Makes a folder where a file is to be written."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def on_train_end(self, logs: Any = None) -> None:
        self.place.mkdir()


def test_a_picture_that_cannot_be_written_does_not_fail_what_has_trained(place: Path) -> None:
    curves = place / "dtrain_runs" / "no-room" / CURVES
    with new_trainer("no-room", num_workers=1, tracking=False) as trainer:
        history = trainer.fit(*blobs(100), **{**FIT, "epochs": 1}, callbacks=[TakesThePlace(curves)])
    assert history.epoch == [0] and curves.is_dir()
    (state,) = [run.state for run in list_runs("dtrain_runs") if run.name == "no-room"]
    assert state == "finished"


def drive() -> None:
    """A driver that is killed the first time."""
    dies = Signals(18, Path.cwd() / "dead", os.getpid(), signal.SIGKILL)
    hooks = [KillsItself(99, Path("never")), dies, stopping()]
    with new_trainer("orphaned", tracking=False) as trainer:
        trainer.fit(*blobs(100), **FIT, callbacks=hooks, resume="auto")


def test_a_metric_that_is_an_array_does_not_keep_a_run_from_saying_how_it_went(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "by-class")
    history = {"loss": [2.0, 1.0], "f1_score": [np.zeros(3), np.ones(3)], "val_loss": []}
    run.write_info({"state": "finished", "metrics": newest_numbers(history)})
    assert list_runs(tmp_path)[0].metrics == {"loss": 1.0}


ROWS = ArraySource(*blobs(100))
OTHER_ROWS = ArraySource(blobs(100)[0], blobs(100)[1][::-1].copy())


class TestBeforeAnythingStarts:
    @pytest.fixture
    def run(self, in_tmp: Path) -> CheckpointStore:
        """The checkpoints of a run, the newest of them in the middle of an epoch."""
        store = CheckpointStore(str(in_tmp / "dtrain_runs" / "old" / "checkpoints"))
        plan = plan_on_record(FitPlan(BatchPlan(100, 8, shuffle=True, seed=(0, 0)), 2), describe(ROWS).digest)
        for step in (13, 17):
            history = CallbackState("History", {"attributes": {"history": {}, "epoch": []}}, {})
            snapshot = Snapshot(Position(1, step - 13), {}, {}, [history])
            staging = store.stage(step)
            files = write(snapshot, staging, 0)
            store.commit(staging, Manifest(step=step, position=snapshot.position, world_size=1, seed=0, files=files,
                                           model_digest="before", extra={"plan": plan}))  # fmt: skip
        return store

    @pytest.mark.parametrize(
        ("arguments", "error", "words"),
        [
            ({"resume": True}, ConfigError, ['resume=True must be False, "auto", or the URL']),
            ({"resume": "auto", "run_name": None}, ConfigError, ['resume="auto"', "Trainer(run_name=...)"]),
            ({"resume": "auto", "checkpoint": False}, ConfigError, ["checkpoint=False", "leave out"]),
            ({"resume": "nowhere", "run_name": "new"}, CheckpointError, ["nowhere", "no checkpoint"]),
            ({"resume": "auto", "batch_size": 16}, CheckpointError, ["batch_size=16 was 8", "epoch 2"]),
            ({"resume": "auto", "data": OTHER_ROWS}, CheckpointError, ["the rows to train on are others", "epoch 2"]),
            ({"run_name": "old"}, ConfigError, ["run_name='old' exists already", 'fit(resume="auto")']),
            (
                {"resume": "dtrain_runs/old/checkpoints/step-000000013"},
                ConfigError,
                ["is not the newest checkpoint of run_name='old'", "step-000000017", "give another run_name"],
            ),
        ],
    )
    def test_what_cannot_be_gone_on_with(
        self, run: CheckpointStore, arguments: dict[str, Any], error: type[Exception], words: list[str]
    ) -> None:
        given = {"run_name": "old", "checkpoint": True, "resume": False, "batch_size": 8, "data": ROWS, **arguments}
        trainer = dtrain.Trainer(make_model, run_name=given["run_name"], checkpoint=given["checkpoint"], tracking=False)
        with pytest.raises(error) as caught:
            trainer.fit(given["data"], batch_size=given["batch_size"], epochs=2, resume=given["resume"])
        assert all(word in str(caught.value) for word in words), str(caught.value)
        assert [checkpoint.step for checkpoint in run.list()] == [13, 17]

    def test_what_is_no_longer_as_it_was_is_told(
        self, run: CheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        older, newest = run.list()
        Path(newest.url, "manifest.json").unlink()
        played.by(played.Workers(), monkeypatch)
        monkeypatch.setattr(played.Workers, "description", replace(played.MODEL, structure="now"))
        trainer = dtrain.Trainer(make_model, run_name="old", tracking=False, deterministic=False)
        trainer.fit(OTHER_ROWS, batch_size=8, initial_epoch=1, epochs=2, verbose=2, resume="auto")
        told = capsys.readouterr().out
        assert f"from {older.url}" in told and "initial_epoch=1 has no effect" in told
        (changed,) = [line for line in told.splitlines() if line.startswith("not bit for bit")]
        assert all(word in changed for word in ("data_digest", "another model", "deterministic=False")), changed

    def test_a_damaged_newest_one_is_passed_over_and_named(
        self, run: CheckpointStore, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        older, damaged = run.list()
        newest = Path(damaged.url) / "fit.json"
        size = newest.stat().st_size
        newest.write_bytes(newest.read_bytes()[:-1])
        loaded, refused = find("auto", RunFolder(str(Path(run.url).parent)))
        assert loaded is not None and loaded.manifest.step == 13 and "fit.json" in refused[0]
        with Lease.acquire(str(Path(run.url).parent)), pytest.raises(ConfigError, match="is being trained by process"):
            dtrain.Trainer(make_model, run_name="old", tracking=False).fit(*blobs(100), resume="auto")
        played.by(played.Workers(), monkeypatch)
        trainer = dtrain.Trainer(make_model, run_name="old", tracking=False)
        trainer.fit(*blobs(100), batch_size=8, epochs=2, verbose=2, resume="auto")
        told = capsys.readouterr().out.splitlines()
        assert told[1].startswith(f"passed over: {damaged.url} is damaged: fit.json has {size - 1} bytes, not {size}")
        assert told[2] == f"going on at epoch 2 from {older.url}"
