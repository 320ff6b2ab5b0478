"""Claims about making the checkpoints of a fit while it trains, on workers that are only played."""

import contextlib
import gc
import shutil
import sys
import time
import uuid
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import played
import pytest
from models import blobs, make_classifier

import dtrain
from dtrain import cluster, fit_state, lease
from dtrain.checkpoint import MANIFEST, CheckpointStore, Manifest, read_manifest
from dtrain.checkpointer import Checkpointer, Saving
from dtrain.config import CheckpointConfig
from dtrain.controller import Controller, FitRecord
from dtrain.errors import CheckpointError, TakenOver, WorkerError
from dtrain.lease import Lease
from dtrain.progress import ProgressBar
from dtrain.runs import list_runs
from dtrain.storage import Folder
from dtrain.tracking import NullTracker
from dtrain.types import BatchPlan, FitPlan, Position
from dtrain.worker import Worker

BLANK = Manifest(step=0, position=Position(0, 0), world_size=1, seed=0)


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"))


def test_a_worker_has_two_snapshots_in_memory_at_most(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def snapshot() -> Any:
        copy = played.snapshot_at(Position(0, len(taken) + 1))
        taken.append(weakref.ref(copy))
        return copy

    def in_memory() -> list[int]:
        gc.collect()
        return [step for step, copy in enumerate(taken, 1) if copy() is not None]

    monkeypatch.setattr(sys, "stdout", sys.stdout)  # a Worker puts its own in the place of that
    worker = Worker("played", 0)
    worker._replica = SimpleNamespace(snapshot=snapshot, beat=lambda doing: None, rest=lambda: None)
    for step, kept in ((1, [1]), (2, [1, 2]), (3, [2, 3]), (4, [3, 4])):  # nobody asks for any of them
        assert worker.snapshot(step) == Position(0, step)
        assert in_memory() == kept
    staging = store.stage(4)
    shutil.rmtree(staging.url)
    assert isinstance(worker.write_snapshot(4, staging), CheckpointError)
    assert in_memory() == []


def test_what_is_written_becomes_a_checkpoint_while_something_else_is_waited_for(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def look(method: str) -> None:
        if method == "run":  # an epoch, and the validation after it
            seen.append([checkpoint.step for checkpoint in store.list()])

    monkeypatch.setattr(cluster, "put", lambda value: value)
    group: Any = played.Workers(meanwhile=look)
    saving = Saving(store, CheckpointConfig(), BLANK)
    plan, record = FitPlan(BatchPlan(2, 1), epochs=3), FitRecord()
    Controller(group, NullTracker(), ProgressBar(0)).fit(plan, played.STEPS_PER_EPOCH, b"", saving, record)
    assert seen == [[0], [0], [0, 2], [0, 2, 4]]


def test_the_best_checkpoint_has_the_weights_that_were_measured(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The end of the fit may put others in their place, and what it saves has the last epoch's metrics."""
    monkeypatch.setattr(cluster, "put", lambda value: value)
    group: Any = played.Workers()
    ended = []
    monkeypatch.setattr(group, "end_fit", lambda: (ended.append(group.position), ({}, []))[1])
    monkeypatch.setattr(group, "snapshot", lambda key: replace(group.position, step=10 * len(ended)))
    saving = Saving(store, CheckpointConfig(monitor="loss", keep=1), replace(BLANK, extra={"monitor": "loss"}))
    Controller(group, NullTracker(), ProgressBar(0)).fit(
        FitPlan(BatchPlan(2, 1), epochs=1), played.STEPS_PER_EPOCH, b"", saving, FitRecord()
    )
    found = [read_manifest(checkpoint.url) for checkpoint in store.list()]
    assert [(each.best, each.position.step, each.extra.get("finished")) for each in found] == [
        (1.0, 0, None),
        (None, 10, True),
    ]
    best = store.best("loss")
    assert best is not None and best[0] == 1.0 and store.best("accuracy") is None


def test_a_driver_that_knows_that_it_was_taken_over_ends_at_once(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "put", lambda value: value)
    past: list[str] = []

    def check() -> None:
        if "run" in past:
            raise TakenOver("by another")

    group: Any = played.Workers(meanwhile=past.append)
    controller = Controller(group, NullTracker(), ProgressBar(0), check_ours=check)
    with pytest.raises(TakenOver):
        controller.fit(FitPlan(BatchPlan(2, 1), epochs=3), played.STEPS_PER_EPOCH, b"", None, FitRecord())
    assert past.count("run") == 1


def test_a_monitored_metric_that_is_none_is_told_once(store: CheckpointStore, caplog: pytest.LogCaptureFixture) -> None:
    group: Any = played.Workers()
    saving = Saving(store, CheckpointConfig(monitor="val_acuracy"), BLANK)
    checkpointer = Checkpointer(group, saving)
    checkpointer.save(0, {})
    group.position = Position(0, 1)
    checkpointer.save(1, {"loss": 1.0})
    assert caplog.messages == [], "metrics of the validation are there when an epoch has ended"
    group.position = Position(1, 0)
    for step in (2, 4):
        checkpointer.save(step, {"val_accuracy": 0.5, "loss": 1.0})
    told = (
        "CheckpointConfig(monitor='val_acuracy'): no best checkpoint is kept, since the metrics are loss, val_accuracy"
    )
    assert caplog.messages == [told]
    assert [checkpoint.step for checkpoint in store.list()] == [1, 2, 4], "they are made all the same"


def test_metrics_of_a_validation_that_is_yet_to_come_are_no_others(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    group: Any = played.Workers()
    checkpointer = Checkpointer(group, Saving(store, CheckpointConfig(monitor="val_loss"), BLANK, validates=True))
    for epoch, metrics in enumerate(({"loss": 1.0}, {"loss": 1.0, "val_loss": 2.0}), 1):
        group.position = Position(epoch, 0)
        checkpointer.save(epoch, metrics)
    assert caplog.messages == [] and [read_manifest(each.url).best for each in store.list()] == [None, 2.0]


def test_one_that_the_group_broke_on_the_way_to_is_late(store: CheckpointStore) -> None:
    group: Any = played.Workers()
    checkpointer = Checkpointer(group, Saving(store, CheckpointConfig(every_steps=10), BLANK))
    checkpointer.begin(4)  # goes on from there
    assert [step for step in range(5, 12) if checkpointer.is_late(step)] == [10, 11]
    checkpointer.take(14, {})
    assert not checkpointer.is_late(19) and checkpointer.is_late(20)


def test_a_checkpoint_that_cannot_be_written_is_told_and_leaves_nothing(
    store: CheckpointStore, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    group: Any = played.Workers()
    checkpointer = Checkpointer(group, Saving(store, CheckpointConfig(), BLANK))
    with monkeypatch.context() as patch:
        patch.setattr(group, "write_snapshot", lambda *_: CheckpointError("the disk is full"))
        checkpointer.save(2, {})
    assert checkpointer.newest is None and Folder(store.url).entries() == {}
    checkpointer.save(4, {})
    assert [checkpointer.newest] == list(store.list())
    assert caplog.messages == [
        "no checkpoint was made, training goes on (the newest one: none yet): the disk is full",
        f"checkpoints can be written again: {store.url}/step-000000004",
    ]


def test_a_driver_that_was_taken_over_says_nothing_of_how_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    root = f"memory://{uuid.uuid4().hex}"

    def take_over_and_fail(method: str) -> None:
        if method == "end_fit":
            others.enter_context(Lease.acquire(f"{root}/taken", lambda: time.time() + 100, lambda _: None))
            raise WorkerError("no checkpoint is made from here on")

    trainer = dtrain.Trainer(make_classifier, storage_path=root, run_name="taken", tracking=False)
    played.by(played.Workers(trainer.interrupts, take_over_and_fail), monkeypatch)
    with contextlib.ExitStack() as others:
        with pytest.raises(TakenOver, match="was taken over by process"):
            trainer.fit(*blobs(8), verbose=0)
        assert [run.state for run in list_runs(root)] == ["running"]


@pytest.mark.parametrize(
    ("moment", "step", "fails"),
    [
        *(("begin_fit", 3, False), ("run", 3, False), ("end_fit", 3, False)),
        *(("run", 100, False), ("end_fit", 100, False)),  # further than this one gets
        ("write_snapshot", 0, True),  # in the place where this one could not write
    ],
)
def test_a_driver_that_was_taken_over_in_an_object_store_removes_and_commits_nothing(
    moment: str, step: int, fails: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(lease, "SETTLE_SECONDS", 0.0)
    root = f"memory://{uuid.uuid4().hex}"
    store = CheckpointStore(f"{root}/taken/checkpoints")
    found: dict[str, bytes] = {}

    def files() -> dict[str, bytes]:
        memory = fsspec.filesystem("memory")
        return {path: memory.cat_file(path) for path in memory.find(f"{root}/taken")}

    def take_over(method: str) -> None:
        """By another driver, which has not heard of this one for long, goes on, and makes a checkpoint."""
        if method == moment and not found:
            others.enter_context(Lease.acquire(f"{root}/taken", lambda: time.time() + 100, lambda _: None))
            store.rewind(store.latest())
            staging = store.stage(step)
            written = fit_state.write(played.snapshot_at(Position(2, 0)), staging, 0)
            store.commit(staging, replace(BLANK, step=step, files=written))
            found.update(files())

    keep = CheckpointConfig(keep=1)
    trainer = dtrain.Trainer(make_classifier, storage_path=root, run_name="taken", checkpoint=keep, tracking=False)
    workers = played.Workers(trainer.interrupts, take_over)
    played.by(workers, monkeypatch)
    if fails:
        monkeypatch.setattr(workers, "write_snapshot", lambda *_: CheckpointError("no route to host"))
    with contextlib.ExitStack() as others:
        with pytest.raises(TakenOver, match="was taken over by process"):
            trainer.fit(*blobs(8), epochs=2, verbose=0, resume="auto")
        left = files()
    assert {name: left.get(name) for name in found} == found
    assert [name for name in left if name.endswith(MANIFEST) and name not in found] == []
