"""Claims about a fit whose workers die: the others go on in place, no step is lost, and it ends as if nobody had."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import models
import numpy as np
import own_steps
import pytest
import ray
import tensorflow as tf
from models import blobs, make_exact_model

import dtrain
from dtrain.cluster import NAMESPACE
from dtrain.errors import WorkerDied, WorkerError
from dtrain.outcomes import outcome_of
from dtrain.testing import Fault, FaultPlan, delay, kill, raise_in, stop
from dtrain.types import Failure

for module in (models, own_steps, sys.modules[__name__]):  # the workers do not have the tests' folder on their path
    cloudpickle.register_pickle_by_value(module)

EPOCHS, STEPS = 4, 10


class Traced(keras.layers.Layer):  # type: ignore[misc]
    """Counts how often it is traced for training."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def call(self, x: Any, training: bool = False) -> Any:
        self.times += bool(training)
        return x


class Noise(keras.layers.Layer):  # type: ignore[misc]
    """Draws from Keras's global generator."""

    def call(self, x: Any, training: bool = False) -> Any:
        return x + 0.1 * keras.random.normal(keras.ops.shape(x)) if training else x


def make_model() -> Any:
    keras.utils.set_random_seed(4)
    model = keras.Sequential(
        [
            keras.Input((5,)),
            keras.layers.Dense(8, "relu"),
            Traced(),
            Noise(),
            keras.layers.BatchNormalization(),
            keras.layers.Dropout(0.3),
            keras.layers.Dense(3, activation="softmax"),
        ]
    )
    schedule = keras.optimizers.schedules.ExponentialDecay(0.01, 10, 0.9)
    model.compile(keras.optimizers.Adam(schedule), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def make_accumulating() -> Any:
    model = make_model()
    model.compile(keras.optimizers.Adam(0.01, gradient_accumulation_steps=4), "sparse_categorical_crossentropy")
    return model


class Notes(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps which hooks were called, over the lives of its process, and how often the model was traced in this one."""

    def __init__(self) -> None:
        super().__init__()
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.pids: list[int] = []
        self.traces = self.train_ends = 0

    def get_state(self) -> dict[str, list[int]]:
        return {"begun": self.begun, "ended": self.ended, "pids": self.pids}

    def set_state(self, state: dict[str, list[int]]) -> None:
        self.begun, self.ended, self.pids = (list(state[name]) for name in ("begun", "ended", "pids"))

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.begun.append(epoch)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.ended.append(epoch)
        self.pids.append(os.getpid())

    def on_train_end(self, logs: Any = None) -> None:
        self.train_ends += 1
        self.traces = next((layer.times for layer in self.model.layers if hasattr(layer, "times")), 0)


@dataclass(frozen=True)
class Outcome:
    history: dtrain.History
    weights: list[np.ndarray]
    optimizer: list[np.ndarray]
    notes: Notes
    pids: tuple[list[int], list[int]]
    """Of the workers before and after."""
    spares: tuple[list[int], list[int]]
    """Of those that wait."""


@pytest.fixture(scope="module", autouse=True)
def place(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Run in a folder that the tests share."""
    before, here = Path.cwd(), tmp_path_factory.mktemp("recovery")
    os.chdir(here)
    yield here
    os.chdir(before)


def train(
    name: str,
    *faults: Fault,
    num_workers: int = 2,
    model_fn: Callable[[], Any] = make_model,
    notes: "Notes | None" = None,
    data: dict[str, Any] | None = None,
    **arguments: Any,
) -> Outcome:
    x, y = blobs(100)
    data = data or {"x": x, "y": y, "batch_size": 8, "validation_split": 0.2}
    notes = notes or Notes()
    stopping = keras.callbacks.EarlyStopping("val_loss", patience=99, restore_best_weights=True)
    tracking = dtrain.MLflowConfig(log_model=False)
    given = {"checkpoint": False, "tracking": tracking, **arguments}
    with (
        FaultPlan(*faults),
        dtrain.Trainer(model_fn, num_workers=num_workers, threads_per_worker=1, run_name=name, **given) as trainer,
    ):
        trainer.evaluate(x[:8], y[:8], verbose=0)
        before, waiting = [worker.pid for worker in trainer.workers], pids_of_spares(name)
        history = trainer.fit(**data, epochs=EPOCHS, verbose=0, callbacks=[notes, stopping])
        after = [worker.pid for worker in trainer.workers]
        optimizer = [variable.numpy() for variable in trainer.model.optimizer.variables]
        spares = waiting, pids_of_spares(name)
        return Outcome(history, trainer.get_weights(), optimizer, notes, (before, after), spares)


def pids_of_spares(name: str) -> list[int]:
    """Of the processes that were started as spares, whatever they are by now."""
    actors = sorted(actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True))
    spares = [actor for actor in actors if actor.startswith(f"dtrain:{name}:spare")]
    return [ray.get(ray.get_actor(spare, namespace=NAMESPACE).where.remote()).pid for spare in spares]


def steps_on_record(name: str) -> list[int]:
    """The numbers of the steps that the run's journal has the loss of."""
    found: list[int] = []
    for line in Path(f"dtrain_runs/{name}/journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        if event["event"] == "steps" and "loss" in event["metrics"]:
            found += range(event["first_step"], event["first_step"] + len(event["metrics"]["loss"]))
    return found


def epochs_on_record(name: str) -> list[int]:
    """After which steps the metrics of an epoch were written down, with those of its validation."""
    lines = Path("dtrain_runs", name, "journal.jsonl").read_text().splitlines()
    events = [event for event in map(json.loads, lines) if event["event"] == "metrics"]
    return [event["step"] for event in events if {"loss", "val_loss", "epoch_seconds"} <= event["metrics"].keys()]


def assert_same_end(ours: Outcome, theirs: Outcome) -> None:
    for name in ("weights", "optimizer"):
        pairs = zip(getattr(ours, name), getattr(theirs, name), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), name
    assert ours.history.epoch == theirs.history.epoch
    for name, values in theirs.history.history.items():
        if name.startswith("val_"):
            assert ours.history.history[name] == values, name
    assert ours.notes.begun == ours.notes.ended == list(range(EPOCHS))


@pytest.fixture(scope="module")
def undisturbed() -> Outcome:
    return train("undisturbed")


def test_the_survivor_goes_on_in_place_with_no_step_lost_or_redone(undisturbed: Outcome) -> None:
    found = train("survived", kill(rank=1, step=13))
    assert_same_end(found, undisturbed)
    before, after = found.pids
    assert after[0] == before[0] and after[1] != before[1]
    assert set(found.notes.pids) == {before[0]}
    assert found.notes.traces == undisturbed.notes.traces == 1
    (recovery,) = found.history.recoveries
    assert recovery.rank == 1 and recovery.steps_redone == 0 and "died" in recovery.cause and recovery.seconds > 0
    assert steps_on_record("survived") == steps_on_record("undisturbed") == list(range(EPOCHS * STEPS))


def test_gradients_that_the_dead_had_accumulated_are_computed_anew() -> None:
    """Some of them in the epoch before; the new one dies while it computes them; one dies in a step that updates."""
    undisturbed = train("accumulating", model_fn=make_accumulating)
    faults = kill(rank=1, step=10), kill(rank=1, step=9, life=1), kill(rank=0, step=19)
    found = train("accumulating-killed", *faults, model_fn=make_accumulating)
    assert_same_end(found, undisturbed)
    assert found.notes.traces == undisturbed.notes.traces
    assert [recovery.rank for recovery in found.history.recoveries] == [1, 1, 0]
    assert all(recovery.steps_redone == 0 for recovery in found.history.recoveries)
    assert steps_on_record("accumulating-killed") == list(range(EPOCHS * STEPS))


def test_workers_may_die_in_any_phase_one_after_the_other(undisturbed: Outcome) -> None:
    found = train(
        "any-phase",
        kill(rank=0, step=0),
        kill(rank=1, step=17, phase="data"),
        kill(rank=1, step=0, phase="evaluate", life=1),
        kill(rank=0, step=1, phase="callback", life=1),
        kill(rank=0, step=0, phase="checkpoint", life=2),
        checkpoint=True,
    )
    assert_same_end(found, undisturbed)
    recoveries = found.history.recoveries
    assert [recovery.rank for recovery in recoveries] == [0, 1, 1, 0, 0]
    assert all(recovery.steps_redone == 0 for recovery in recoveries)
    assert steps_on_record("any-phase") == list(range(EPOCHS * STEPS))
    assert epochs_on_record("any-phase") == [epoch * STEPS + STEPS - 1 for epoch in range(EPOCHS)]


@pytest.mark.parametrize(("rank", "segment"), [(0, 1), (0, 2), (1, 2)])
def test_what_a_worker_had_finished_and_could_not_tell_is_not_lost(
    undisturbed: Outcome, rank: int, segment: int
) -> None:
    """Its random numbers are drawn on, and the hooks of its epoch are known."""
    found = train(f"untold-{rank}-{segment}", kill(rank=rank, step=segment, phase="answer"))
    assert_same_end(found, undisturbed)
    assert [recovery.steps_redone for recovery in found.history.recoveries] == [0]


def make_averaged() -> Any:
    """Averages take the weights' place in the end, and the best epoch's weights theirs."""
    model = make_model()
    model.compile(keras.optimizers.Adam(use_ema=True, ema_momentum=0.9), model.loss, metrics=["accuracy"])
    return model


def test_workers_may_die_when_nothing_more_is_trained() -> None:
    """Before `on_train_end`, after it while the last checkpoint is written, and once more."""
    found = train(
        "at-the-end",
        kill(rank=1, step=0, phase="shutdown"),
        kill(rank=0, step=1, phase="shutdown"),
        kill(rank=1, step=0, phase="checkpoint", life=1),
        kill(rank=0, step=1, phase="checkpoint", life=1),
        model_fn=make_averaged,
        checkpoint=dtrain.CheckpointConfig(every_epochs=None),
        failure=dtrain.FailureConfig(max_failures=4),
    )
    assert_same_end(found, train("averaged", model_fn=make_averaged))
    assert [recovery.rank for recovery in found.history.recoveries] == [1, 0, 1, 0]
    assert [recovery.steps_redone for recovery in found.history.recoveries] == [0] * 4
    assert found.notes.train_ends == 1
    assert steps_on_record("at-the-end") == list(range(EPOCHS * STEPS))
    manifest = json.loads(Path(str(found.history.checkpoint), "manifest.json").read_text())
    assert manifest["step"] == EPOCHS * STEPS and manifest["extra"]["finished"] is True


def test_who_takes_a_place_may_die_before_it_has_and_while_the_group_forms(undisturbed: Outcome) -> None:
    """The last one takes the other with it, which waits in Horovod's start for one that is dead."""
    found = train(
        "again-and-again",
        kill(rank=1, step=14),
        kill(rank=1, step=0, phase="start", life=1),
        kill(rank=1, step=0, phase="form", life=2),
    )
    assert_same_end(found, undisturbed)
    assert set(found.pids[0]) & set(found.pids[1]) == set()
    assert [recovery.steps_redone for recovery in found.history.recoveries] == [0, 0, 0]
    assert steps_on_record("again-and-again") == list(range(EPOCHS * STEPS))


def test_of_three_one_may_die_or_two_at_once(undisturbed: Outcome) -> None:
    control = train("three", num_workers=3)
    faults = kill(rank=2, step=5), kill(rank=0, step=22), kill(rank=2, step=22, life=1)
    found = train("some-of-three", *faults, num_workers=3)
    assert_same_end(found, control)
    before, after = found.pids
    assert after[1] == before[1] and after[0] != before[0] and after[2] != before[2]
    assert steps_on_record("some-of-three") == list(range(EPOCHS * STEPS))
    assert all("died" in recovery.cause for recovery in found.history.recoveries)  # and nobody waited for a timeout


def test_spares_take_the_places_of_the_dead_and_new_ones_wait(undisturbed: Outcome) -> None:
    found = train("spared", kill(rank=1, step=13), kill(rank=0, step=21), spares=1)
    assert_same_end(found, undisturbed)
    (first,), (same, second, waiting) = found.spares
    assert found.pids[1] == [second, first] and same == first
    assert waiting not in (*found.pids[0], *found.pids[1])


# --- without the dead


def in_batches() -> Any:
    x, y = blobs(80)
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8)


def in_other_batches_each_time() -> Any:
    """Three of four batches are looked at: which, is another matter in every pass."""
    x, y = blobs(112)
    return tf.data.Dataset.from_tensor_slices((x[80:], y[80:])).shuffle(32, seed=1).batch(8)


AS: dict[str, tuple[Callable[[], dict[str, Any]], tuple[Fault, ...]]] = {
    "rows": (
        lambda: {"x": blobs(100)[0], "y": blobs(100)[1], "batch_size": 8, "validation_split": 0.2},
        (kill(rank=2, step=2, phase="evaluate"), kill(rank=0, step=13)),
    ),
    "accumulated": (
        lambda: {"x": blobs(100)[0], "y": blobs(100)[1], "batch_size": 8, "validation_split": 0.2},
        (kill(rank=2, step=6), kill(rank=0, step=11)),
    ),
    "accumulated batches": (lambda: {"x": in_batches, "validation_data": in_batches}, (kill(rank=2, step=11),)),
    "batches": (
        lambda: {"x": in_batches, "validation_data": in_other_batches_each_time, "validation_steps": 3},
        (kill(rank=2, step=5), kill(rank=0, step=2, phase="evaluate")),
    ),
}


@pytest.mark.parametrize("kind", AS)
def test_who_is_left_goes_on_at_once_on_the_same_mini_batches(kind: str) -> None:
    make_data, faults = AS[kind]
    data, model_fn = make_data(), models.make_exact_accumulating if "accumulated" in kind else make_exact_model
    control = train("whole-" + kind, num_workers=3, model_fn=model_fn, data=data)
    found = train(
        "shrunk-" + kind,
        *faults,
        num_workers=3,
        model_fn=model_fn,
        data=data,
        checkpoint=True,
        failure=dtrain.FailureConfig(on_loss="shrink"),
    )
    before, after = found.pids
    assert after == [pid for rank, pid in enumerate(before) if rank not in {fault.rank for fault in faults}]
    for ours, theirs in zip((*found.weights, *found.optimizer), (*control.weights, *control.optimizer), strict=True):
        assert np.allclose(ours, theirs, rtol=0, atol=1e-10)
    assert found.history.epoch == control.history.epoch and found.notes.begun == found.notes.ended == list(
        range(EPOCHS)
    )
    for name, values in control.history.history.items():  # Keras's metrics are float32
        whole = 0 if name.startswith("val_") else 2  # the epochs before lack the dead ones' rows of a segment
        assert found.history.history[name][whole:] == pytest.approx(values[whole:], abs=1e-6), name
    assert [recovery.num_workers for recovery in found.history.recoveries] == [2, 1][: len(faults)]
    assert all(recovery.steps_redone == 0 for recovery in found.history.recoveries)
    assert steps_on_record("shrunk-" + kind) == list(range(EPOCHS * STEPS))
    manifest = json.loads(Path(str(found.history.checkpoint), "manifest.json").read_text())
    assert manifest["world_size"] == len(after)


def test_who_was_to_be_told_by_a_rank_that_died_has_lost_a_peer() -> None:
    class Rank:
        def hand_over(self) -> None:
            os._exit(1)

        def catch_up(self, handover: Any) -> None: ...

    first, second = (ray.remote(num_cpus=0)(Rank).remote() for _ in range(2))
    found = outcome_of(second.catch_up.remote(first.hand_over.remote()))
    assert isinstance(found, Failure) and found.lost_peer and not found.died
    ray.kill(second)


class NotesOfBatches(Notes):
    """Freezes a layer before the step is traced, slows down by what it counts, and keeps the hooks of batches."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[str] = []
        self.losses: list[float] = []

    def on_train_begin(self, logs: Any = None) -> None:
        self.model.layers[0].trainable = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        self.batches.append(f"begin {batch}")
        self.model.optimizer.learning_rate = 0.1 / (1 + len(self.batches))

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.batches.append(f"end {batch}")
        self.losses.append(logs["loss"])


def make_in_executions() -> Any:
    keras.utils.set_random_seed(4)
    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(8, "relu"), keras.layers.Dense(3, "softmax")])
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"], steps_per_execution=3)
    return model


def test_hooks_of_batches_are_called_once_and_frozen_layers_stay_so() -> None:
    control = train("executions", model_fn=make_in_executions, notes=NotesOfBatches())
    fault = kill(rank=1, step=14)  # in the middle of an execution
    found = train("executions-killed", fault, model_fn=make_in_executions, notes=NotesOfBatches())
    assert_same_end(found, control)
    (recovery,) = found.history.recoveries
    assert recovery.rank == 1 and isinstance(found.notes, NotesOfBatches) and isinstance(control.notes, NotesOfBatches)
    assert found.notes.batches == control.notes.batches and len(found.notes.batches) == 2 * EPOCHS * 4
    assert np.array_equal(found.weights[0], control.weights[0])
    assert np.all(np.isfinite(found.notes.losses))


def test_a_step_of_ones_own_that_is_half_done_is_undone_as_a_whole() -> None:
    control = train("own", model_fn=own_steps.make_eager)
    found = train("own-killed", kill(rank=1, step=13, phase="again"), model_fn=own_steps.make_eager)
    assert_same_end(found, control)
    assert [recovery.rank for recovery in found.history.recoveries] == [1]
    assert all(np.isfinite(found.history.history["own"]))


def test_what_the_users_code_raises_is_not_tried_again() -> None:
    with pytest.raises(WorkerError, match="PlannedError: planned for rank 1 in data 3") as caught:
        train("raises", raise_in("data", rank=1, step=3))
    assert not isinstance(caught.value, WorkerDied)


def test_a_step_that_kills_again_and_again_ends_the_fit_and_is_named() -> None:
    faults = [kill(rank=1, step=3, life=life) for life in range(2)]
    told = r"rank 1 .* died .* that was failure 2 in a row, after 3 steps"
    with pytest.raises(WorkerDied, match=told):
        train("hopeless", *faults, failure=dtrain.FailureConfig(max_failures=1))


def test_a_worker_that_hangs_counts_as_dead(undisturbed: Outcome) -> None:
    ending = stop(rank=1, step=0, phase="shutdown", life=1)  # where nothing more is trained
    faults = stop(rank=1, step=5), delay(rank=0, step=2, seconds=600, phase="callback"), ending
    found = train("hangs", *faults, failure=dtrain.FailureConfig(hang_timeout=8))
    assert_same_end(found, undisturbed)
    stopped, waited, ended = found.history.recoveries
    assert stopped.rank == 1 and "it hung: the process has not answered for" in stopped.cause
    assert waited.rank == 0 and "it was in callbacks, on_epoch_end (hang_timeout=8)" in waited.cause
    assert ended.rank == 1 and "has not answered for" in ended.cause and ended.steps_redone == 0


class WithoutState(keras.callbacks.Callback):  # type: ignore[misc]
    """Offers a state that cannot be had."""

    def get_state(self) -> dict[str, int]:
        raise RuntimeError("not now")

    def set_state(self, state: dict[str, int]) -> None: ...


def lines_of_two_segments(collective: Any) -> tuple[list[str], list[bool]]:
    import contextlib
    import io

    from dtrain.data.source import ArraySource
    from dtrain.replica import Replica
    from dtrain.types import BatchPlan, FitPlan, Position, Segment

    x, y = blobs(100)
    replica, printed = Replica(make_model(), collective), io.StringIO()
    with contextlib.redirect_stdout(printed):
        replica.begin_fit(FitPlan(BatchPlan(100, 8), 1), ArraySource(x, y), callbacks=[WithoutState(), Notes()])
        results = [replica.run(Segment(Position(0, step), 2)) for step in (0, 2)]
    return printed.getvalue().splitlines(), [state is not None for state in results[-1].callbacks]


def test_a_callback_whose_state_cannot_be_had_is_told_once_and_ends_no_fit(ranks: Any) -> None:
    first, second = ranks.run(2, lines_of_two_segments)
    (line,) = [line for line in first[0] if "WithoutState" in line]
    assert "RuntimeError: not now" in line and "begins anew" in line
    assert first[1] == [True, False, True] and second == ([], [])
