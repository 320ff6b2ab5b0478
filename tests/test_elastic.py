"""Claims about groups of (at least, at most) so many workers, on a real Ray: up, down and up again in one fit."""

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import cloudpickle
import models
import numpy as np
import own_steps
import pytest
import ray
import sizes
from models import blobs, make_exact_model
from sizes import Sizes, sizes_in

import dtrain
from dtrain import spares
from dtrain.errors import ConfigError
from dtrain.testing import Fault, FaultPlan, kill

for module in (
    models,
    own_steps,
    sizes,
    sys.modules[__name__],
):  # the tests' folder is not on the workers' path
    cloudpickle.register_pickle_by_value(module)

CPUS = 8
"""Of the tests' Ray."""


@contextmanager
def little_room(cpus: int) -> Iterator[Any]:
    """Inside, somebody else has all of the cluster but so many CPUs."""

    class Other:
        def is_here(self) -> bool:
            return True

    other = ray.remote(num_cpus=CPUS - cpus)(Other).remote()
    ray.get(other.is_here.remote())
    try:
        yield other
    finally:
        ray.kill(other)


def disturb(trainer: dtrain.Trainer, other: Any, file: Path) -> None:
    """Make room once two train (the first may have begun alone), and kill a worker once there are three."""
    while sizes_in(file)[-1:] != [2]:
        time.sleep(0.1)
    ray.kill(other)
    while sizes_in(file)[-1:] != [3]:
        time.sleep(0.1)
    os.kill(trainer.workers[1].pid, signal.SIGKILL)


def test_a_group_takes_in_workers_and_goes_on_without_the_dead(
    local_ray: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y = blobs(80)
    data = {"x": x, "y": y, "batch_size": 8}
    file = tmp_path / "sizes.txt"
    options: dict[str, Any] = {"threads_per_worker": 1, "storage_path": tmp_path, "checkpoint": True}
    tracking = dtrain.MLflowConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", log_model=False)
    with (
        little_room(2) as other,
        dtrain.Trainer(
            make_exact_model, num_workers=(1, 3), run_name="elastic", tracking=tracking, **options
        ) as trainer,
    ):
        thread = threading.Thread(target=disturb, args=(trainer, other, file), daemon=True)
        thread.start()
        history = trainer.fit(**data, epochs=500, verbose=2, callbacks=[Sizes(file, [2, 3, 2, 3])])
        weights, workers = trainer.get_weights(), trainer.workers
        evaluated = trainer.evaluate(x, y, verbose=0)
        trainer.fit(**data, epochs=1, verbose=0)
        later = trainer.get_weights()
    epochs = len(history.epoch)
    assert sizes_in(file)[-4:] == [2, 3, 2, 3] and epochs < 500 and [worker.rank for worker in workers] == [0, 1, 2]
    with dtrain.Trainer(make_exact_model, tracking=False, **{**options, "checkpoint": False}) as trainer:
        control = trainer.fit(**data, epochs=epochs, verbose=0)
        for ours, theirs in zip(weights, trainer.get_weights(), strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1e-10)
        assert evaluated == pytest.approx(trainer.evaluate(x, y, verbose=0), abs=1e-6)
        trainer.fit(**data, epochs=1, verbose=0)
        for ours, theirs in zip(later, trainer.get_weights(), strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1e-10)
    assert history.history["loss"][-1] == pytest.approx(control.history["loss"][-1], abs=1e-6)
    events = [json.loads(line) for line in (tmp_path / "elastic" / "journal.jsonl").read_text().splitlines()]
    steps = [e["first_step"] + i for e in events if e["event"] == "steps" for i in range(len(e["metrics"]["loss"]))]
    assert steps == list(range(epochs * 10))
    (recovery,) = history.recoveries
    assert recovery.num_workers == 2 and recovery.steps_redone == 0
    assert "1 more: going on with 3 workers" in capsys.readouterr().out
    manifest = json.loads(Path(str(history.checkpoint), "manifest.json").read_text())
    assert manifest["world_size"] == 3


def in_batches() -> Any:
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(blobs(80)).batch(8)


X, Y = blobs(80)
GROWING: dict[str, tuple[Any, dict[str, Any], tuple[Fault, ...]]] = {
    "batches": (make_exact_model, {"x": in_batches}, ()),
    "accumulated": (models.make_exact_accumulating, {"x": X, "y": Y, "batch_size": 8}, ()),
    "own step": (own_steps.make_exact, {"x": X, "y": Y, "batch_size": 8}, ()),
    "dying newcomers": (
        make_exact_model,
        {"x": X, "y": Y, "batch_size": 8},
        (kill(rank=1, step=0, phase="start"), kill(rank=1, step=0, phase="form", life=1)),
    ),
}


@pytest.mark.parametrize("kind", GROWING)
def test_one_worker_becomes_two(
    kind: str, local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last newcomer dies while it forms a group with the first worker, which that ends, too."""
    monkeypatch.setattr(spares, "AGAIN_SECONDS", 1.0)
    make_model, data, faults = GROWING[kind]
    file = tmp_path / "sizes.txt"
    options: dict[str, Any] = {"threads_per_worker": 1, "storage_path": tmp_path, "checkpoint": False}
    tracking = dtrain.MLflowConfig(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", log_model=False)
    with (
        little_room(1) as other,
        FaultPlan(*faults),
        dtrain.Trainer(make_model, num_workers=(1, 2), run_name="growing", tracking=tracking, **options) as trainer,
    ):

        def make_room() -> None:
            while sizes_in(file)[-1:] != [1]:
                time.sleep(0.1)
            ray.kill(other)

        threading.Thread(target=make_room, daemon=True).start()
        history = trainer.fit(**data, epochs=9999, verbose=0, callbacks=[Sizes(file, [1, 2])])
        weights = trainer.get_weights()
    epochs = len(history.epoch)
    assert sizes_in(file)[-2:] == [1, 2] and epochs < 9999
    with dtrain.Trainer(make_model, tracking=False, **options) as trainer:
        control = trainer.fit(**data, epochs=epochs, verbose=0)
        for ours, theirs in zip(weights, trainer.get_weights(), strict=True):
            assert np.allclose(ours, theirs, rtol=0, atol=1e-10)
    assert history.epoch == control.epoch and history.history.keys() == control.history.keys()
    name = "own" if kind == "own step" else "loss"
    assert history.history[name][-1] == pytest.approx(control.history[name][-1], abs=1e-6)
    events = [json.loads(line) for line in (tmp_path / "growing" / "journal.jsonl").read_text().splitlines()]
    steps = [e["first_step"] + i for e in events if e["event"] == "steps" for i in range(len(e["metrics"][name]))]
    assert steps == list(range(epochs * 10))
    assert [recovery.steps_redone for recovery in history.recoveries] == [0] * bool(faults)
    assert ("that was to join could not" in caplog.text) == bool(faults)


@pytest.mark.parametrize("given", [(3, 2), (0, 2), (1, 2, 3), (1,), "2", (1, "2")])
def test_numbers_of_workers_that_make_no_sense_are_refused(given: Any) -> None:
    with pytest.raises(ConfigError, match="num_workers"):
        dtrain.Trainer(make_exact_model, num_workers=given)


def test_spares_of_an_elastic_group_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"spares=1 contradicts num_workers=\(1, 3\)"):
        dtrain.Trainer(make_exact_model, num_workers=(1, 3), spares=1)
