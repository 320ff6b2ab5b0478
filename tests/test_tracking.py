"""What reaches MLflow, and that training never waits for it."""

import contextlib
import itertools
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain import description, mlflow_run, tracking
from dtrain.config import MLflowConfig
from dtrain.errors import ConfigError, TrackingError
from dtrain.tracking import DatasetDescription, MLflowTracker, NullTracker, RunDescription, TrackedRun, Tracker

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

from mlflow import MlflowClient

DEADLINE = 120.0
DESCRIPTION = RunDescription(run_name="a run", params={"epochs": 2})


@pytest.fixture(autouse=True)
def clean_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", DEADLINE)
    for name in list(os.environ):
        if name.startswith("MLFLOW_") and name != "MLFLOW_DISABLE_TELEMETRY":
            monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One database for all tests, since making one takes seconds."""
    return f"sqlite:///{tmp_path_factory.mktemp('database')}/mlflow.db"


@pytest.fixture
def config(database: str, request: pytest.FixtureRequest) -> MLflowConfig:
    return MLflowConfig(tracking_uri=database, experiment_name=request.node.name[:60])


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    deadline = time.monotonic() + DEADLINE
    while not (value := condition()):
        assert time.monotonic() < deadline, f"no {what} within {DEADLINE} s"
        time.sleep(0.02)
    return value


def points(client: Any, run_id: str | None, key: str) -> list[tuple[int, float]]:
    return sorted((point.step, point.value) for point in client.get_metric_history(run_id, key))


def lines(journal: Path, event: str) -> list[dict[str, Any]]:
    return [line for line in map(json.loads, journal.read_text().splitlines()) if line["event"] == event]


class GatedClient:
    """A real client whose log_batch waits until the gate is open, and can be told to fail."""

    def __init__(self, uri: str) -> None:
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.error: Exception | None = None
        self._client = MlflowClient(uri)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def log_batch(self, *args: Any, **kwargs: Any) -> Any:
        self.entered.set()
        assert self.gate.wait(DEADLINE)
        if self.error is not None:
            raise self.error
        return self._client.log_batch(*args, **kwargs)


# What is recorded


def test_a_run_is_recorded_whole(config: MLflowConfig, tmp_path: Path) -> None:
    tracker = MLflowTracker(config, tmp_path / "run" / "journal.jsonl")
    tracker.check()
    tracker.start(
        RunDescription(
            run_name="whole",
            params={"optimizer": "adam", "config": {"units": 4, "deep": {"rate": 0.1}}, "nothing": None},
            tags={"team": "blue"},
            datasets=[
                DatasetDescription("arrays", "train", {"x": (28, 28), "y": ()}, {"x": "float32", "y": "int64"}, 100)
            ],
            summary="Model: small",
        )
    )
    tracker.log(10, {"loss": 0.5, "val_loss": float("nan")})
    tracker.log(20, {"loss": 0.25, "val_loss": float("inf")})
    tracker.log_text("notes", "notes.txt")
    (tmp_path / "extra.bin").write_bytes(b"1")
    tracker.log_artifact(tmp_path / "extra.bin", "more")
    tracker.finish("FINISHED")

    client = MlflowClient(config.tracking_uri)
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "whole")
    assert run.info.end_time >= run.info.start_time
    assert run.data.params == {
        "optimizer": "adam", "config.units": "4", "config.deep.rate": "0.1", "nothing": "None"
    }  # fmt: skip
    assert run.data.tags["team"] == "blue"
    assert points(client, tracker.run_id, "loss") == [(10, 0.5), (20, 0.25)]
    assert [np.isnan(value) or value > 1e308 for _, value in points(client, tracker.run_id, "val_loss")] == [True, True]
    dataset = run.inputs.dataset_inputs[0]
    assert (dataset.dataset.name, dataset.tags[0].value) == ("arrays", "train")
    assert json.loads(dataset.dataset.profile) == {"num_rows": 100}
    assert {item.path for item in client.list_artifacts(run.info.run_id)} == {
        "journal.jsonl", "model_summary.txt", "more", "notes.txt"
    }  # fmt: skip
    assert not list((tmp_path / "run").glob("*.artifacts"))


@pytest.mark.parametrize("status", ["FINISHED", "FAILED", "KILLED"])
def test_the_status_and_the_error_are_the_runs(config: MLflowConfig, tmp_path: Path, status: tracking.Status) -> None:
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    tracker.start(DESCRIPTION)
    tracker.finish(status, error="rank 1 died" if status == "FAILED" else None)
    run = MlflowClient(config.tracking_uri).get_run(tracker.run_id)
    assert run.info.status == status
    assert run.data.tags.get("dtrain.error") == ("rank 1 died" if status == "FAILED" else None)


def test_limits_of_mlflow_are_kept(config: MLflowConfig, tmp_path: Path) -> None:
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    params = {f"p{i}": i for i in range(250)} | {"long": "x" * 9000, "odd name?*": 1, "k" * 300: 1, "..": 2, "/a": 3}
    tracker.start(RunDescription(run_name="many", params=params, tags={f"t{i}": "v" for i in range(150)}))
    tracker.log(1, {f"metric {i} é": i for i in range(2500)})
    tracker.finish("FINISHED")
    run = MlflowClient(config.tracking_uri).get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert len(run.data.params) == len(params)
    assert len(run.data.params["long"]) == 6000
    assert run.data.params["odd name__"] == "1"
    assert len(run.data.metrics) == 2500
    assert run.data.metrics["metric 7 _"] == 7


@pytest.mark.parametrize(
    ("key", "name"),
    [("loss", "loss"), ("a/b", "a/b"), ("/a", "_a"), ("a//b", "a__b"), ("..", "__"), (".", "_"), ("a/../b", "a____b")],
)
def test_names_lead_nowhere(key: str, name: str) -> None:
    assert mlflow_run._name(key) == name


# Per-step series


def test_per_step_series_never_wait_for_the_store(config: MLflowConfig, tmp_path: Path) -> None:
    clients: list[GatedClient] = []

    def make(uri: str) -> Any:
        clients.append(GatedClient(uri))
        return clients[0]

    tracker = MLflowTracker(config, tmp_path / "journal.jsonl", make)
    tracker.start(DESCRIPTION)
    wait_for(lambda: clients and clients[0].entered.is_set(), "request that hangs")
    values = np.linspace(1.0, 0.0, 5000)
    for first in range(0, 5000, 1000):  # The store hangs all the while: this returning at all is the claim.
        tracker.log_steps(first, {"loss": values[first : first + 1000]}, seconds=1.0, end_ms=1_000_000 + first)
    assert not clients[0].gate.is_set()
    written = lines(tmp_path / "journal.jsonl", "steps")
    assert [x for line in written for x in line["metrics"]["loss"]] == values.tolist()
    clients[0].gate.set()
    tracker.finish("FINISHED")

    thinned = points(clients[0], tracker.run_id, "loss")
    assert 45 <= len(thinned) <= 55  # Five seconds, ten points a second.
    assert thinned[-1][0] == 4999
    assert np.allclose(sorted((v for _, v in thinned), reverse=True), [v for _, v in thinned])
    step, value = thinned[10]
    before = thinned[9][0]
    assert value == pytest.approx(values[before + 1 : step + 1].mean())


def test_log_every_keeps_every_nth_step_and_the_last(database: str, tmp_path: Path) -> None:
    config = MLflowConfig(tracking_uri=database, log_every=100)
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    tracker.start(DESCRIPTION)
    values = np.arange(1030.0)
    for first in range(0, 1030, 70):
        tracker.log_steps(first, {"loss": values[first : first + 70]}, seconds=0.01)
    tracker.finish("FINISHED")
    got = points(MlflowClient(database), tracker.run_id, "loss")
    assert [step for step, _ in got] == [*range(0, 1001, 100), 1029]
    assert [value for _, value in got[:-1]] == [float(step) for step, _ in got[:-1]]


def test_a_step_is_recorded_once_though_it_is_trained_twice(config: MLflowConfig, tmp_path: Path) -> None:
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    tracker.start(DESCRIPTION)
    tracker.log_steps(0, {"loss": np.ones(30)}, seconds=3.0, end_ms=1_003_000)
    tracker.log(30, {"epoch_loss": 1.0}, timestamp_ms=1_003_000)
    # Back at the checkpoint of step 10.
    tracker.log_steps(10, {"loss": np.full(40, 2.0)}, seconds=4.0, end_ms=1_008_000)
    tracker.log(30, {"epoch_loss": 1.0})
    tracker.finish("FINISHED")
    client = MlflowClient(config.tracking_uri)
    got = points(client, tracker.run_id, "loss")
    assert len(points(client, tracker.run_id, "epoch_loss")) == 1
    assert [step for step, _ in got] == sorted({step for step, _ in got})
    assert all(value == (1.0 if step < 30 else 2.0) for step, value in got)


def test_a_later_step_never_has_an_earlier_time(config: MLflowConfig, tmp_path: Path) -> None:
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    for first in (0, 10, 20):  # Results that arrive together, though their steps took a second each.
        tracker.log_steps(first, {"loss": np.ones(10)}, seconds=1.0, end_ms=1_000_000 + first)
        tracker.log(first + 9, {"loss": 1.0}, timestamp_ms=1_000_100 + first)
    written = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    times = [time for line in written for time in ([line["time"]] if "step" in line else [line["start"], line["end"]])]
    assert times == sorted(times)


# Outages


def test_a_restarted_job_goes_on_in_the_same_run(config: MLflowConfig, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    first = MLflowTracker(config, journal)
    first.start(DESCRIPTION)
    first.log_steps(0, {"loss": np.arange(25.0)}, seconds=2.5, end_ms=1_002_500)
    first.log(25, {"epoch_loss": 3.0}, timestamp_ms=1_002_500)
    wait_for(lambda: first._sender.done, "delivery")
    first._sender.stop()  # As a kill would: nothing is flushed or finished.
    with journal.open("ab") as file:
        file.write(b'{"event":"metrics","step":26,"metr')  # Half a line.

    second = MLflowTracker(config, journal)
    assert second.run_id == first.run_id
    second.start(RunDescription(run_name="a run", params={"epochs": 3, "new": 1}))
    second.log_steps(20, {"loss": np.arange(20.0, 50.0)}, seconds=3.0, end_ms=1_010_000)
    second.log(25, {"epoch_loss": 3.0})
    second.log(50, {"epoch_loss": 4.0})
    second.finish("FINISHED")
    client = MlflowClient(config.tracking_uri)
    run = client.get_run(first.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params == {"epochs": "2", "new": "1"}
    assert points(client, first.run_id, "epoch_loss") == [(25, 3.0), (50, 4.0)]
    got = [step for step, _ in points(client, first.run_id, "loss")]
    assert got == sorted(set(got))
    assert {24, 49} <= set(got)
    recorded = lines(journal, "steps")
    assert [value for line in recorded for value in line["metrics"]["loss"]] == np.arange(50.0).tolist()


def test_a_run_that_was_made_unheard_is_found_again(config: MLflowConfig, tmp_path: Path) -> None:
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    tracker.start(DESCRIPTION)
    tracker.finish("FINISHED")
    os.remove(tmp_path / "journal.jsonl.position")
    assert tracking.replay(tmp_path / "journal.jsonl", config) == tracker.run_id


# Resuming


def only_run(config: MLflowConfig) -> Any:
    """The experiment's run; that there is one is part of each claim."""
    client = MlflowClient(config.tracking_uri)
    experiment = client.get_experiment_by_name(str(config.experiment_name))
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    return run


def record(tracker: MLflowTracker, *segments: int, value: float = 1.0, epoch: int = 20) -> None:
    """Steps of 40 ms from each segment's first to the next one's; the metrics of an epoch where one ends."""
    for first, behind in itertools.pairwise(segments):
        end = 1_000_000 + 40 * behind
        tracker.log_steps(first, {"loss": value + np.arange(first, behind)}, 0.04 * (behind - first), end_ms=end)
        tracker.log(behind - 1, {"rate": behind / 8}, timestamp_ms=end)
        if behind % epoch == 0:
            tracker.log(behind - 1, {"loss": -value * behind, "val_loss": value}, timestamp_ms=end)


def history(config: MLflowConfig, run_id: str) -> dict[str, list[tuple[int, float]]]:
    client = MlflowClient(config.tracking_uri)
    got = {key: points(client, run_id, key) for key in ("loss", "rate", "val_loss")}
    assert all([step for step, _ in got[key]] == sorted({step for step, _ in got[key]}) for key in got)
    return got


def last_life(tracker: MLflowTracker) -> None:
    """All of it is delivered, and the process is gone: nothing is flushed or finished."""
    wait_for(lambda: tracker._sender.done, "delivery")
    tracker._sender.stop()


class MortalClient:
    """A real client with whose n-th call the process ends: MLflow has done it, and nobody hears of it any more."""

    def __init__(self, uri: str, calls: int) -> None:
        self.calls = calls
        self.die: Callable[[], None] = lambda: None
        self._client = MlflowClient(uri)

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            if self.calls <= 0:
                raise OSError("dead")
            result = getattr(self._client, name)(*args, **kwargs)
            self.calls -= 1
            if self.calls == 0:
                self.die()
                raise OSError("dead")
            return result

        return call


@pytest.mark.timeout(300)
def test_wherever_a_run_is_killed_its_resume_completes_it(database: str, tmp_path: Path) -> None:
    def attempts(name: str, calls: int) -> tuple[bool, Any]:
        config = MLflowConfig(tracking_uri=database, experiment_name=f"killed {name}")
        client = MortalClient(database, calls)
        first = MLflowTracker(config, tmp_path / name, lambda uri: client)
        client.die = first._sender.stop
        first.start(DESCRIPTION)
        record(first, 0, 12, 20, 26)
        wait_for(lambda: client.calls <= 0 or first._sender.done, "end")
        first._sender.stop()
        second = MLflowTracker(config, tmp_path / name)
        second.start(DESCRIPTION)
        record(second, 20, 31, 40)  # Back at the checkpoint of step 20.
        second.finish("FINISHED")
        run = only_run(config)
        assert (run.info.status, run.data.tags["dtrain.attempts"]) == ("FINISHED", "2")
        return client.calls <= 0, history(config, run.info.run_id)

    was_killed, whole = attempts("never", 1000)
    assert not was_killed
    assert dict(whole["loss"])[19] == -20 and dict(whole["loss"])[39] == -40
    calls = 1
    while was_killed or calls == 1:
        was_killed, got = attempts(f"at {calls}", calls)
        assert got == whole, f"killed at call {calls}"
        calls += 1
    assert calls > 5


def test_a_driver_that_is_killed_while_it_sends_is_resumed(config: MLflowConfig, tmp_path: Path) -> None:
    code = """if True:
        import os, signal, sys, threading
        import numpy as np
        import mlflow, dtrain.tracking as t, dtrain.config as c

        class Client(mlflow.MlflowClient):
            def log_batch(self, run_id, metrics=(), **others):
                super().log_batch(run_id, metrics, **others)
                if metrics:
                    os.kill(os.getpid(), signal.SIGKILL)

        config = c.MLflowConfig(tracking_uri=sys.argv[1], experiment_name=sys.argv[2])
        tracker = t.MLflowTracker(config, sys.argv[3], Client)
        tracker.start(t.RunDescription(run_name="a run", params={"epochs": 2}))
        for first in range(0, 2000, 10):
            tracker.log_steps(first, {"loss": np.arange(first, first + 10.0)}, 0.4, 1_000_000 + 40 * (first + 10))
        threading.Event().wait()
    """
    journal = tmp_path / "journal.jsonl"
    environment = {**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[1])}
    command = [sys.executable, "-c", code, str(config.tracking_uri), str(config.experiment_name), str(journal)]
    assert subprocess.run(command, env=environment, timeout=DEADLINE).returncode == -signal.SIGKILL
    tracker = MLflowTracker(config, journal)
    behind = tracker.tracked().step + 10
    tracker.start(DESCRIPTION)
    tracker.log_steps(0, {"loss": np.arange(float(behind))}, 0.04 * behind, 1_000_000 + 40 * behind)
    tracker.finish("FINISHED")
    recorded = [value for line in lines(journal, "steps") for value in line["metrics"]["loss"]]
    assert recorded == np.arange(float(behind)).tolist()
    run = only_run(config)
    got = points(MlflowClient(config.tracking_uri), run.info.run_id, "loss")
    at = [step for step, _ in got]
    assert at == sorted(set(at)) and at[-1] == behind - 1 and max(np.diff([-1, *at])) <= 4
    assert all(value == (before + 1 + step) / 2 for before, (step, value) in zip([-1, *at], got, strict=False))


def test_a_run_goes_on_where_its_journal_is_not(config: MLflowConfig, tmp_path: Path) -> None:
    first = MLflowTracker(config, tmp_path / "here" / "journal.jsonl")
    first.start(DESCRIPTION)
    record(first, 0, 20)
    at_20 = TrackedRun(**json.loads(json.dumps(asdict(first.tracked()))))
    assert at_20.step == 20
    record(first, 20, 30)
    last_life(first)

    second = MLflowTracker(config, tmp_path / "there" / "journal.jsonl", resume=at_20)
    second.start(DESCRIPTION)
    second.log(19, {"loss": 5.0, "new": 5.0})  # Known, though the journal does not say so.
    record(second, 20, 40, value=2.0)
    at_40 = second.tracked()
    last_life(second)
    assert (at_40.key, at_40.step) == (at_20.key, 40)

    third = MLflowTracker(config, tmp_path / "here" / "journal.jsonl", resume=at_40)
    third.start(DESCRIPTION)
    record(third, 40, 60, value=3.0)
    third.finish("FINISHED")

    run = only_run(config)
    assert (run.info.status, run.data.tags["dtrain.attempts"]) == ("FINISHED", "3")
    assert "new" not in run.data.metrics
    assert not [tag for tag in run.data.tags if "missing" in tag]
    got = history(config, run.info.run_id)
    assert got["val_loss"] == [(19, 1.0), (39, 2.0), (59, 3.0)]
    assert [step for step, _ in got["rate"]] == [19, 29, 39, 59]
    assert max(np.diff([-1, *(step for step, _ in got["loss"])])) <= 3  # Three steps take a tenth of a second.


def test_journals_of_two_machines_are_both_kept(config: MLflowConfig, tmp_path: Path) -> None:
    first = MLflowTracker(config, tmp_path / "here" / "journal.jsonl")
    first.start(DESCRIPTION)
    first.finish("FAILED", "no power")
    second = MLflowTracker(config, tmp_path / "there" / "journal.jsonl", resume=first.tracked())
    second.start(DESCRIPTION)
    second.finish("FINISHED")
    client, run = MlflowClient(config.tracking_uri), only_run(config)
    for tracker, file in ((first, "journal.jsonl"), (second, "attempt-2/journal.jsonl")):
        kept = client.download_artifacts(run.info.run_id, file, str(tmp_path))
        assert Path(kept).read_bytes() == tracker._journal.path.read_bytes()


def test_what_only_another_machine_has_is_said_and_can_be_sent_from_there(
    config: MLflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = GatedClient(str(config.tracking_uri))
    client.gate.set()
    first = MLflowTracker(config, tmp_path / "here" / "journal.jsonl", lambda uri: client)
    first.start(DESCRIPTION)
    record(first, 0, 20)
    wait_for(lambda: first._sender.done, "delivery")
    client.error = OSError("down")
    record(first, 20, 40, 50)
    wait_for(lambda: first._sender.failures, "failure")
    first._sender.stop()

    second = MLflowTracker(config, tmp_path / "there" / "journal.jsonl", resume=TrackedRun(first.tracked().key, 40))
    second.start(DESCRIPTION)
    record(second, 40, 60, value=2.0)
    second.finish("FINISHED")
    assert "does not have steps 20 to 39" in caplog.text
    assert only_run(config).data.tags["dtrain.attempt.2.missing"] == "20-39"
    for _ in range(2):
        tracking.replay(tmp_path / "here" / "journal.jsonl", config)
        got = history(config, only_run(config).info.run_id)
        assert got["val_loss"] == [(19, 1.0), (39, 1.0), (59, 2.0)]
        assert max(np.diff([-1, *(step for step, _ in got["loss"])])) <= 3
        assert only_run(config).info.status == "FINISHED"
        os.remove(tmp_path / "here" / "journal.jsonl.position")


def test_what_is_an_attempts_own_is_in_its_tags(config: MLflowConfig, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    data = [DatasetDescription("arrays", "train", {"x": (3,)}, {"x": "float32"}, 100)]
    for status, error, params in (
        ("FAILED", "rank 1 died", {"epochs": 2, "lr": 0.1}),
        ("KILLED", None, {"epochs": 3, "lr": 0.1, "new": 1}),
        ("FINISHED", None, {"epochs": 2, "lr": 0.1, "new": 2}),
    ):
        tracker = MLflowTracker(config, journal)
        tracker.start(RunDescription("a run", params, datasets=data))
        tracker.finish(status, error)  # type: ignore[arg-type]
    for _ in range(2):
        run = only_run(config)
        ours = {
            key: value for key, value in run.data.tags.items() if key.startswith("dtrain.") and "journal" not in key
        }
        started = [ours.pop(f"dtrain.attempt.{number}.started") for number in (2, 3)]
        assert started == sorted(started)
        assert ours == {
            "dtrain.attempts": "3",
            "dtrain.attempt.1.error": "rank 1 died",
            "dtrain.attempt.2.epochs": "3",
            "dtrain.attempt.3.new": "2",
        }
        assert run.data.params == {"epochs": "2", "lr": "0.1", "new": "1"}
        assert (run.info.status, run.info.end_time) == ("FINISHED", lines(journal, "finish")[-1]["time"])
        assert len(run.inputs.dataset_inputs) == 1
        # Sent again from the beginning, it comes to the same.
        os.remove(tmp_path / "journal.jsonl.position")
        tracking.replay(journal, config)


def test_the_newest_attempts_error_is_the_runs(config: MLflowConfig, tmp_path: Path) -> None:
    for number in (1, 2):
        tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
        tracker.start(DESCRIPTION)
        tracker.finish("FAILED", f"failure {number}")
    run = only_run(config)
    assert run.info.status == "FAILED"
    assert (run.data.tags["dtrain.attempt.1.error"], run.data.tags["dtrain.error"]) == ("failure 1", "failure 2")


def test_a_model_and_a_figure_of_two_attempts_are_there_once(
    config: MLflowConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.figure import Figure
    from mlflow.models import Model

    def save(model: str, path: Path, *examples: Any) -> None:
        path.mkdir()
        (path / "weights").write_text(model)
        Model().save(str(path / "MLmodel"))

    monkeypatch.setattr(tracking, "save_model", save)
    for model in ("first", "second"):
        tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
        tracker.start(DESCRIPTION)
        tracker.log_model(model, None, None)
        tracker.log_figure(Figure(), "curves.png")
        if model == "first":
            last_life(tracker)
    tracker.finish("FINISHED")
    client, run = MlflowClient(config.tracking_uri), only_run(config)
    [output] = run.outputs.model_outputs
    logged = client.get_logged_model(output.model_id)
    folder = Path(logged.artifact_location.removeprefix("file://"))
    assert (str(logged.status), (folder / "weights").read_text()) == ("READY", "second")
    assert {item.path for item in client.list_artifacts(run.info.run_id)} >= {"curves.png", "journal.jsonl"}


def test_another_runs_journal_is_an_error_and_is_left_alone(config: MLflowConfig, tmp_path: Path) -> None:
    journal = tmp_path / "journal.jsonl"
    tracker = MLflowTracker(config, journal)
    tracker._journal.append({"event": "start", "key": "one", "time": 1})
    with journal.open("ab") as file:
        file.write(b'{"event":"metr')
    before = journal.read_bytes()
    with pytest.raises(ConfigError, match=r"journal=.*journal\.jsonl' is of another run"):
        MLflowTracker(config, journal, resume=TrackedRun("another", 3))
    assert journal.read_bytes() == before


def test_steps_that_were_trained_without_tracking_are_one_line(
    config: MLflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = MLflowTracker(config, tmp_path / "journal.jsonl")
    first.start(DESCRIPTION)
    record(first, 0, 20)
    handed_on = NullTracker(resume=first.tracked()).tracked()
    last_life(first)
    assert handed_on == first.tracked()
    third = MLflowTracker(config, tmp_path / "journal.jsonl", resume=handed_on)
    third.start(DESCRIPTION)
    record(third, 40, 50, 60)
    third.finish("FINISHED")
    assert [r.message for r in caplog.records if r.name == "dtrain"] == [
        "steps 20 to 39 are not on record: they were trained without tracking, or are in another run's journal"
    ]
    run = only_run(config)
    assert [step for step, _ in history(config, run.info.run_id)["val_loss"]] == [19, 59]


def test_a_failing_store_is_one_line_and_nothing_is_lost(
    config: MLflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = GatedClient(str(config.tracking_uri))
    client.gate.set()
    client.error = OSError("http://user:CANARY@host/ is down")
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl", lambda uri: client)
    tracker.start(DESCRIPTION)
    for step in range(1, 6):
        tracker.log(step, {"loss": 1.0 / step})
    wait_for(lambda: tracker._sender.failures >= 2, "second attempt")
    assert [record.levelname for record in caplog.records if record.name == "dtrain"] == ["WARNING"]
    assert "CANARY" not in caplog.text
    client.error = None
    tracker.finish("FINISHED")
    assert [step for step, _ in points(client, tracker.run_id, "loss")] == [1, 2, 3, 4, 5]


def test_a_deleted_run_can_be_restored_while_training_goes_on(
    config: MLflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    client = MlflowClient(config.tracking_uri)
    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    tracker.start(DESCRIPTION)
    wait_for(lambda: tracker._sender.done, "delivery")
    client.delete_run(str(tracker.run_id))
    tracker.log(1, {"loss": 1.0})
    wait_for(lambda: tracker._sender.failures, "failure")
    assert "the run was deleted" in caplog.text
    client.restore_run(str(tracker.run_id))
    tracker.finish("FINISHED")
    assert points(client, tracker.run_id, "loss") == [(1, 1.0)]


def test_what_did_not_reach_mlflow_can_be_sent_later(
    config: MLflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.5)

    def unreachable(uri: str) -> Any:
        raise ConnectionError("nobody there")

    tracker = MLflowTracker(config, tmp_path / "journal.jsonl", unreachable)
    tracker.start(DESCRIPTION)
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert tracker.run_id is None
    assert "dtrain.tracking.replay" in caplog.text
    run_id = tracking.replay(tmp_path / "journal.jsonl", config)
    run = MlflowClient(config.tracking_uri).get_run(run_id)
    assert (run.info.status, run.data.metrics) == ("FINISHED", {"loss": 1.0})


def test_replay_of_no_journal_says_so(tmp_path: Path) -> None:
    with pytest.raises(TrackingError, match="does not exist"):
        tracking.replay(tmp_path / "none.jsonl")


# A real server


class Server:
    """An MLflow server behind a line that can be cut: to a client the server is gone, and nothing need start again."""

    def __init__(self, database: str, folder: Path) -> None:
        port = _free_port()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--host", "127.0.0.1", "--port", str(port),
             "--backend-store-uri", database, "--artifacts-destination", str(folder / "artifacts")],
            cwd=folder, start_new_session=True, env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            stdout=(folder / "server.log").open("ab"), stderr=subprocess.STDOUT,
        )  # fmt: skip
        self._target = ("127.0.0.1", port)
        self._port = _free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._sockets: list[socket.socket] = []
        self.connect()
        wait_for(lambda: self._answers(folder), "MLflow server")

    def connect(self) -> None:
        listener = socket.create_server(("127.0.0.1", self._port))
        self._sockets.append(listener)
        threading.Thread(target=self._accept, args=(listener,), daemon=True).start()

    def cut(self) -> None:
        for sock in self._sockets:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()
        self._sockets.clear()

    def stop(self) -> None:
        self.cut()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = listener.accept()
                try:
                    far = socket.create_connection(self._target)
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for source, sink in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, sink), daemon=True).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)

    def _answers(self, folder: Path) -> bool:
        import requests

        assert self._process.poll() is None, (folder / "server.log").read_text()
        with contextlib.suppress(requests.RequestException):
            return bool(requests.get(f"{self.uri}/health", timeout=5).ok)
        return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Stands on the database that all tests use: making another would take as long as starting it."""
    MlflowClient(database).search_experiments()
    running = Server(database, tmp_path_factory.mktemp("server"))
    yield running
    running.stop()


@pytest.mark.timeout(400)
def test_points_are_complete_and_none_doubled_after_the_server_was_away(server: Server, tmp_path: Path) -> None:
    with_secret = server.uri.replace("http://", "http://user:CANARY@")
    tracker = MLflowTracker(MLflowConfig(tracking_uri=with_secret, experiment_name="away"), tmp_path / "journal.jsonl")
    tracker.check()
    tracker.start(DESCRIPTION)
    tracker.log(1, {"loss": 1.0})
    wait_for(lambda: tracker._sender.done, "delivery")
    server.cut()
    for step in range(2, 50):
        tracker.log(step, {"loss": 1.0 / step})
    wait_for(lambda: tracker._sender.failures >= 2, "failures")
    server.connect()
    tracker.log(50, {"loss": 0.02})
    tracker.finish("FINISHED")

    client = MlflowClient(server.uri)
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    assert [step for step, _ in points(client, tracker.run_id, "loss")] == list(range(1, 51))
    assert tracker.url() == f"{server.uri}/#/experiments/{tracker._run.experiment_id}/runs/{tracker.run_id}"
    assert tracker.open_command() == tracker.url()


@pytest.mark.timeout(400)
def test_secrets_are_masked(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG, logger="dtrain")
    uri = server.uri.replace("http://", "http://user:CANARY@")
    tracker = MLflowTracker(MLflowConfig(tracking_uri=uri, experiment_name="secret"), tmp_path / "journal.jsonl")
    storage = "s3://key:CANARY@bucket/runs"
    tracker.start(RunDescription(run_name="secret", params={"storage": storage}, tags={"t": storage}, summary=storage))
    tracker.log_text(f"see {storage}", "text.txt")
    tracker.finish("FAILED", error=f"cannot write {storage}")

    client = MlflowClient(server.uri)
    run = client.get_run(str(tracker.run_id))
    folder = Path(client.download_artifacts(str(tracker.run_id), "", str(tmp_path)))
    out, err = capfd.readouterr()
    everything = [json.dumps(run.to_dictionary()), caplog.text, out, err, str(tracker.url())]
    everything += [path.read_text() for path in folder.rglob("*") if path.is_file()]
    assert run.data.params["storage"] == "s3://***@bucket/runs"
    assert len(list(folder.rglob("*.txt"))) == 2
    assert not [text for text in everything if "CANARY" in text]


class Stub:
    """An HTTP server that answers everything with one status."""

    def __init__(self) -> None:
        self.status = 500
        self.requests = 0
        stub = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stub.requests += 1
                self.send_response(stub.status)
                self.send_header("Retry-After", "3600")
                self.send_header("Content-Length", "4")
                self.end_headers()
                self.wfile.write(b"oops")

            do_POST = do_GET

            def log_message(self, format: str, *args: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.uri = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def stub() -> Iterator[Stub]:
    running = Stub()
    yield running
    running.stop()


@pytest.mark.parametrize("status", [401, 403])
def test_refused_credentials_are_an_error_before_anything_starts(stub: Stub, tmp_path: Path, status: int) -> None:
    stub.status = status
    tracker = MLflowTracker(MLflowConfig(tracking_uri=stub.uri), tmp_path / "journal.jsonl")
    with pytest.raises(ConfigError, match="MLFLOW_TRACKING_USERNAME"):
        tracker.check()


@pytest.mark.parametrize("status", [500, 429])
def test_a_server_that_cannot_answer_is_no_error_and_is_asked_again(stub: Stub, tmp_path: Path, status: int) -> None:
    stub.status = status
    tracker = MLflowTracker(MLflowConfig(tracking_uri=stub.uri), tmp_path / "journal.jsonl")
    tracker.check()
    before = stub.requests
    tracker.start(DESCRIPTION)
    # Retry-After says an hour and MLflow's own retries take minutes; neither rules here.
    wait_for(lambda: tracker._sender.failures >= 2, "second attempt")
    assert stub.requests >= before + 2
    assert tracker.run_id is None
    tracker._sender.stop()


def test_a_server_that_is_down_is_no_error(tmp_path: Path) -> None:
    MLflowTracker(MLflowConfig(tracking_uri="http://127.0.0.1:1"), tmp_path / "journal.jsonl").check()


# Settings


@pytest.mark.parametrize(
    "uri", ["ftp://host/x", "nonsense://", "file:///tmp/mlruns", "./mlruns", "sqlite:////no/such/f.db"]
)
def test_an_impossible_tracking_uri_is_an_error_before_anything_starts(tmp_path: Path, uri: str) -> None:
    with pytest.raises(ConfigError, match="tracking_uri"):
        MLflowTracker(MLflowConfig(tracking_uri=uri), tmp_path / "journal.jsonl").check()


def test_what_the_config_leaves_open_comes_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tracker(**given: Any) -> MLflowTracker:
        return MLflowTracker(MLflowConfig(**given), tmp_path / "journal.jsonl")

    def experiment(tracker: MLflowTracker) -> tuple[str | None, str | None]:
        return tracker._run.experiment_name, tracker._run._given_experiment_id

    assert tracker().open_command() == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert experiment(tracker()) == ("dtrain", None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "7")
    assert tracker().open_command() == "http://127.0.0.1:1"
    assert experiment(tracker()) == (None, "7")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "named")
    assert experiment(tracker()) == ("named", None)
    assert experiment(tracker(experiment_name="given")) == ("given", None)


def test_retries_are_short_on_our_thread_only_and_the_users_setting_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.environment_variables import MLFLOW_HTTP_REQUEST_MAX_RETRIES as RETRIES

    usual = RETRIES.get()
    elsewhere = []
    with mlflow_run.settings_for_this_thread(mlflow_run.SEND_SETTINGS):
        assert RETRIES.get() == 1 < usual
        thread = threading.Thread(target=lambda: elsewhere.append(RETRIES.get()))
        thread.start()
        thread.join()
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        assert RETRIES.get() == 3
    monkeypatch.delenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
    assert elsewhere == [usual]
    assert RETRIES.get() == usual


def test_files_are_the_users_alone(tmp_path: Path) -> None:
    tracker = MLflowTracker(None, tmp_path / "journal.jsonl")
    tracker.start(DESCRIPTION)
    tracker.finish("FINISHED")
    for name in ("journal.jsonl", "journal.jsonl.position", "mlflow.db"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600, name
    uri = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db").get_run(str(tracker.run_id)).info.artifact_uri
    assert uri.startswith((tmp_path / "mlruns" / "dtrain").as_uri())


# Models and figures


@pytest.mark.timeout(300)
def test_a_model_is_logged_without_touching_the_users_own_run(config: MLflowConfig, tmp_path: Path) -> None:
    import keras
    import mlflow

    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    x = np.ones((4, 3), np.float32)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/users.db")
    mlflow.set_experiment("the user's own")
    try:
        with mlflow.start_run() as users:
            tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
            tracker.start(DESCRIPTION)
            tracker.log_model(model, x, model.predict(x, verbose=0))
            tracker.finish("FINISHED")
            active = mlflow.active_run()
            assert active is not None and active.info.run_id == users.info.run_id
            assert mlflow.get_tracking_uri() == f"sqlite:///{tmp_path}/users.db"
            mlflow.log_metric("mine", 1.0)
        seen = MlflowClient().get_run(users.info.run_id)
        assert (seen.info.status, seen.data.metrics, seen.outputs.model_outputs) == ("FINISHED", {"mine": 1.0}, [])
        client = MlflowClient(config.tracking_uri)
        [output] = client.get_run(str(tracker.run_id)).outputs.model_outputs
        logged = client.get_logged_model(output.model_id)
        assert (str(logged.status), logged.source_run_id) == ("READY", tracker.run_id)
        mlflow.set_tracking_uri(config.tracking_uri)
        info = mlflow.models.get_model_info(f"models:/{output.model_id}")
        assert info.run_id == tracker.run_id
        assert info.signature.inputs.inputs[0].shape == (-1, 3)
        for uri in (f"models:/{output.model_id}", f"runs:/{tracker.run_id}/model"):
            assert np.array_equal(mlflow.keras.load_model(uri).predict(x, verbose=0), model.predict(x, verbose=0))
        requirements = Path(mlflow.pyfunc.get_model_dependencies(f"models:/{output.model_id}")).read_text()
        assert f"keras=={keras.__version__}" in requirements
    finally:
        mlflow.set_tracking_uri(None)
        mlflow.tracking.fluent._active_experiment_id = None
        os.environ.pop("MLFLOW_EXPERIMENT_ID", None)


def test_what_cannot_be_saved_is_a_warning(
    config: MLflowConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from matplotlib.figure import Figure

    tracker = MLflowTracker(config, tmp_path / "journal.jsonl")
    tracker.start(DESCRIPTION)
    tracker.log_figure(Figure(), "plots/curves.png")
    tracker.log_figure(Figure(), "curves.nonsense")
    tracker.log_model(object(), np.ones(1), np.ones(1))
    tracker.log_artifact(tmp_path / "not there")
    tracker.finish("FINISHED")
    client = MlflowClient(config.tracking_uri)
    assert client.get_run(str(tracker.run_id)).info.status == "FINISHED"
    assert [item.path for item in client.list_artifacts(str(tracker.run_id), "plots")] == ["plots/curves.png"]
    assert len([record for record in caplog.records if "MLflow will not have" in record.message]) == 3


def test_the_null_tracker_takes_everything() -> None:
    tracker: Tracker = NullTracker()
    tracker.check()
    tracker.start(DESCRIPTION)
    tracker.log_steps(0, {"loss": np.ones(3)}, seconds=1.0)
    tracker.finish("FINISHED")
    assert tracker.run_id is None and tracker.url() is None and tracker.tracked() is None


def test_tags_name_the_commit_and_whether_it_is_dirty(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("1\n")
    assert "mlflow.source.git.commit" not in description.environment_tags(str(script))
    identity = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    for command in (["init", "-q"], ["add", "train.py"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    tags = description.environment_tags(str(script))
    assert len(tags["mlflow.source.git.commit"]) == 40
    assert (tags["mlflow.source.git.dirty"], tags["mlflow.source.name"]) == ("false", str(script))
    script.write_text("2\n")
    assert description.environment_tags(str(script))["mlflow.source.git.dirty"] == "true"


def test_the_caller_does_not_wait_for_mlflows_import(tmp_path: Path) -> None:
    code = (
        "import sys, dtrain.tracking as t, dtrain.config as c\n"
        "run = t.MLflowTracker(c.MLflowConfig(), sys.argv[1])\n"
        "run._sender.start = lambda: None\n"
        "run.check()\n"
        "assert not {'mlflow', 'keras', 'tensorflow'} & sys.modules.keys()"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(tracking.__file__).parents[1])}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "journal.jsonl")], check=True, env=environment)
