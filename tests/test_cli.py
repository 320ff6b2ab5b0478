"""Claims about the command line: what it loads, what it says of mistakes, and whole runs of it on two workers."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import psutil
import pytest

from dtrain import cli
from dtrain.checkpoint import Manifest
from dtrain.doctor import Finding
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError
from dtrain.interrupts import Terminated
from dtrain.named import find_function
from dtrain.runs import RunFolder
from dtrain.types import Position

DTRAIN = str(Path(sys.executable).with_name("dtrain"))
HEAVY = {"tensorflow", "keras", "ray", "mlflow", "horovod", "numpy", "pandas", "matplotlib", "fsspec", "cloudpickle"}
PATIENCE = 300
"""Seconds for a command that starts a Ray and two workers, on a busy machine."""

MODEL = """
import os
import numpy as np
from parts import widths

def make(config):
    import keras
    x = keras.Input((4,))
    hidden = keras.layers.Dense(widths(config["units"]), activation=config["activation"])(x)
    model = keras.Model(x, keras.layers.Dense(3, activation="softmax")(hidden))
    model.compile("sgd", "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model

def broken():
    raise RuntimeError("no such luck")

def load():
    rows = np.random.default_rng(0).random((61, 4))
    labels = (rows.sum(axis=1) * 7).astype(int) % 3
    held_out = (rows[50:], labels[50:])
    return {"train": (rows[:50], labels[:50]), "validation": held_out, "test": held_out}

def rows_alone():
    return load()["train"]

def nothing(): pass
def misnamed(): return {"train": 1, "val": 2}
def four(): return (1, 2, 3, 4)
def failing(): raise OSError("the disk is gone")
NUMBER = 3
"""


# What is loaded -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("statement", ["import dtrain", "import dtrain.cli", "from dtrain.cli import main; main()"])
def test_neither_importing_nor_asking_for_help_loads_anything_heavy(statement: str) -> None:
    script = f"""
import atexit, sys
sys.argv = ["dtrain", "--help"]
atexit.register(lambda: print("loaded:", *sys.modules))
{statement}
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    loaded = set(done.stdout.rpartition("loaded:")[2].split())
    assert "dtrain" in loaded and loaded & HEAVY == set()


def test_help_names_every_command_and_every_option_in_full() -> None:
    text = subprocess.run([DTRAIN, "--help"], capture_output=True, text=True, timeout=60, check=True).stdout
    for command in ("fit", "evaluate", "predict", "runs", "doctor", "install-horovod"):
        assert re.search(rf"^  {command} +\S", text, re.MULTILINE), command
    text = subprocess.run([DTRAIN, "fit", "-h"], capture_output=True, text=True, timeout=60, check=True).stdout
    for option in ("num-workers", "epochs", "batch-size", "steps-per-epoch", "validation-split", "run-name", "set"):
        assert f"  --{option} " in text, option


# Whole runs -----------------------------------------------------------------------------------------------------------


class Place:
    """A working folder with the user's module outside of it, and one fit that the tests below share."""

    def __init__(self, root: Path) -> None:
        self.here = root / "here"
        self.model = root / "elsewhere" / "my-model.py"
        self.here.mkdir()
        self.model.parent.mkdir()
        self.model.write_text(MODEL)
        # Beside it and not on the workers' path: it has to travel with the model.
        self.model.with_name("parts.py").write_text("def widths(units): return 2 * units\n")
        self.fitted = self.run("fit", "make", *SETTINGS, "--epochs", "2", "--batch-size", "16", "--run-name", "first")

    def run(
        self, command: str, factory: str, *options: str, ray: str | None = None
    ) -> "subprocess.CompletedProcess[str]":
        """`ray`: the address of one that runs already; else the command starts its own."""
        return subprocess.run(
            self.command(command, factory, *options),
            cwd=self.here,
            env=environment() if ray is None else {**os.environ, "RAY_ADDRESS": ray},
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )

    def command(self, command: str, factory: str, *options: str) -> list[str]:
        path = os.path.relpath(self.model, self.here)
        return [DTRAIN, command, f"{path}:{factory}", "--data", f"{path}:load", "--num-workers", "2", *options]


SETTINGS = ("--set", "units=4", "--set", "activation=relu")


def environment(**more: str) -> dict[str, str]:
    """As a user's, without a cluster."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DTRAIN_"))} | more


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("cli"))


@pytest.fixture
def address(local_ray: None) -> str:
    """Of the session's Ray."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


@pytest.fixture(scope="module")
def summary(place: Place) -> dict[str, Any]:
    """The shared fit, as `dtrain runs --json` tells it."""
    assert place.fitted.returncode == 0, place.fitted.stderr
    listed = subprocess.run(
        [DTRAIN, "runs", "--json"], cwd=place.here, capture_output=True, text=True, timeout=60, check=True
    )
    (run,) = json.loads(listed.stdout)
    return dict(run)


def test_fit_ends_with_metrics_checkpoint_folder_and_how_to_open_mlflow(place: Place, summary: dict[str, Any]) -> None:
    lines = dict(line.split(":", 1) for line in place.fitted.stdout.splitlines()[-4:])
    assert f"val_loss {summary['metrics']['val_loss']:.4f}" in lines["metrics"]
    assert lines["checkpoint"].strip() == summary["checkpoint"] and Path(summary["checkpoint"]).is_dir()
    assert Path(lines["run folder"].strip()) == place.here / "dtrain_runs" / "first"
    assert lines["MLflow"].strip() == "mlflow ui --backend-store-uri sqlite:///mlflow.db"
    assert (summary["state"], summary["step"]) == ("finished", 2 * 4) and summary["mlflow_run_id"]


def test_runs_are_listed_as_a_table(place: Place, summary: dict[str, Any]) -> None:
    listed = subprocess.run([DTRAIN, "runs"], cwd=place.here, capture_output=True, text=True, timeout=60, check=True)
    head, row = listed.stdout.splitlines()
    assert head.split()[:4] == ["run", "state", "step", "metrics"]
    assert row.split()[:3] == ["first", "finished", "8"] and summary["checkpoint"] in row


def test_what_others_wrote_does_not_move_the_cursor(capsys: pytest.CaptureFixture[str]) -> None:
    cli._print_table(["run", "metrics"], [["a\x1b[2J", "loss\x07 1"]])
    cli._note("checkpoint \x1b]0;b")
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "\x07" not in told.out and "loss" in told.out


def test_evaluate_finds_what_the_run_found_last(place: Place, summary: dict[str, Any], address: str) -> None:
    done = place.run("evaluate", "make", *SETTINGS, "--run-name", "first", "--json", ray=address)
    assert done.returncode == 0, done.stderr
    logs = json.loads(done.stdout)
    assert logs == {name: pytest.approx(summary["metrics"][f"val_{name}"], rel=1e-6) for name in ("loss", "accuracy")}
    assert f"checkpoint {summary['checkpoint']}\n" in done.stderr and "on the test data\n" in done.stderr


def test_predict_writes_a_row_for_every_row_and_overwrites_only_when_told(
    place: Place, summary: dict[str, Any], address: str
) -> None:
    options = (*SETTINGS, "--checkpoint", summary["checkpoint"], "--output", "predictions.npz", "--num-workers", "1")
    (place.here / "predictions.npz").write_text("precious")
    refused = place.run("predict", "make", *options)
    assert refused.returncode == 2 and "--output='predictions.npz' exists" in refused.stderr
    assert (place.here / "predictions.npz").read_text() == "precious"

    done = place.run("predict", "make", *options, "--force", ray=address)
    assert done.returncode == 0, done.stderr
    assert "predictions.npz: predictions float32 (11, 3)" in done.stdout
    with np.load(place.here / "predictions.npz") as arrays:
        classes = arrays["predictions"].argmax(axis=1)
    labels = (np.random.default_rng(0).random((61, 4)).sum(axis=1) * 7).astype(int)[50:] % 3
    assert (classes == labels).mean() == pytest.approx(summary["metrics"]["val_accuracy"])
    assert not list(place.here.glob(".predictions*"))


def test_export_writes_what_plain_keras_and_tensorflow_serve(place: Place, summary: dict[str, Any]) -> None:
    rows = np.random.default_rng(0).random((61, 4))
    labels = (rows.sum(axis=1) * 7).astype(int)[50:] % 3
    for command in (["--output", "digits.keras"], ["--format", "saved_model", "--output", "served"]):
        path = os.path.relpath(place.model, place.here)
        exported = subprocess.run(
            [DTRAIN, "export", f"{path}:make", *SETTINGS, "--run-name", "first", *command],
            cwd=place.here,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert exported.returncode == 0, exported.stderr
        assert exported.stdout == f"model:      {command[-1]}\n"
    script = """
import keras, numpy, sys, tensorflow as tf
rows = numpy.load(sys.argv[1])
model = keras.models.load_model("digits.keras")
assert model.optimizer.iterations == 8
served = tf.saved_model.load("served")
numpy.save(sys.argv[1], [model.predict(rows, verbose=0), served.serve(rows).numpy()])
"""
    np.save(place.here / "rows.npy", rows[50:].astype("float32"))
    subprocess.run([sys.executable, "-c", script, "rows.npy"], cwd=place.here, timeout=PATIENCE, check=True)
    for predictions in np.load(place.here / "rows.npy"):
        assert (predictions.argmax(axis=1) == labels).mean() == pytest.approx(summary["metrics"]["val_accuracy"])


def test_a_factory_that_raises_shows_its_own_traceback_first(place: Place, address: str) -> None:
    done = place.run("fit", "broken", "--no-tracking", "--no-checkpoint", ray=address)
    assert done.returncode == 1
    told = done.stderr[done.stderr.index("Traceback") :]
    assert re.match(r'Traceback .*\n  File ".*my-model.py", line \d+, in broken\n', told), told
    assert told.count("Traceback") == 1 and "RuntimeError: no such luck\n\nrank " in told


def test_interrupted_it_says_so_and_leaves_nothing_behind(place: Place) -> None:
    options = (*SETTINGS, "--epochs", "1000000", "--no-tracking", "--run-name", "endless", "--verbose", "2")
    mark = f"interrupted-{os.getpid()}-{time.monotonic_ns()}"
    with open(place.here / "errors", "w+") as errors:
        process = subprocess.Popen(
            place.command("fit", "make", *options),
            cwd=place.here,
            env=environment(PYTHONUNBUFFERED="1", MARK=mark),
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
        try:
            assert process.stdout is not None
            assert any(line.startswith("Epoch 1/") for line in process.stdout), Path(errors.name).read_text()
            threading.Thread(target=process.stdout.read, daemon=True).start()
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=60) == 130
        finally:
            process.kill()
            process.wait()
        assert Path(errors.name).read_text().endswith("interrupted\n")
    _, left = psutil.wait_procs(marked(mark), timeout=30)
    assert left == []
    assert json.loads((place.here / "dtrain_runs" / "endless" / "run.json").read_text())["state"] == "killed"


def marked(mark: str) -> list[psutil.Process]:
    """Processes that inherited an environment with this MARK."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


class TerminatedTrainer:
    """A Trainer whose process is told to end while it trains."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def fit(self, *args: Any, **kwargs: Any) -> None:
        raise Terminated

    def shutdown(self, keep_weights: bool) -> None:
        print("shut down")


def test_terminated_it_says_so_and_ends_with_the_code_for_it(run: "Run", monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.trainer.Trainer", TerminatedTrainer)
    assert run("fit", "net.py:make", "--data", "net.py:load") == (143, "shut down\nterminated\n")


# Mistakes -------------------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a command line in this process, in a folder with the user's modules: its exit code and what it printed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "net.py").write_text(MODEL)
    (tmp_path / "parts.py").write_text("def widths(units): return units\n")
    (tmp_path / "unfinished.py").write_text("def make(:\n")
    (tmp_path / "needy.py").write_text("import nothing_of_that_name\n")
    (tmp_path / "notes.txt").write_text("")
    loaded, by_value = set(sys.modules), cloudpickle.list_registry_pickle_by_value()

    def run(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["dtrain", *arguments])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert isinstance(end.value.code, int)
        captured = capsys.readouterr()
        return end.value.code, captured.out + captured.err

    yield run
    for name in cloudpickle.list_registry_pickle_by_value() - by_value:
        cloudpickle.unregister_pickle_by_value(sys.modules[name])
    for name in ("net", "parts", "unfinished", "needy"):
        if name not in loaded:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("factory", "code", "message"),
    [
        ("net.py", 2, "MODULE:FACTORY='net.py' must be MODULE:NAME"),
        (":make", 2, "MODULE:FACTORY=':make' must be MODULE:NAME"),
        ("net.py:", 2, "MODULE:FACTORY='net.py:' must be MODULE:NAME"),
        ("missing.py:make", 2, "MODULE:FACTORY='missing.py:make': there is no file missing.py"),
        ("./net:make", 2, "MODULE:FACTORY='./net:make': a path must lead to a .py file; add .py"),
        ("./notes.txt:make", 2, "a path must lead to a .py file"),
        ("missing:make", 2, "MODULE:FACTORY='missing:make': there is no module 'missing' on the path"),
        ("missing.inner:make", 2, "there is no module 'missing' on the path"),
        ("net.py:mkae", 2, "net.py has no 'mkae'; it must be a function in it, which has make, broken, load"),
        ("net:mkae", 2, "MODULE:FACTORY='net:mkae': net has no 'mkae'"),
        ("net.py:NUMBER", 2, "MODULE:FACTORY='net.py:NUMBER' is of type int; it must be a function"),
        ("needy.py:make", 1, "No module named 'nothing_of_that_name'\n\nMODULE:FACTORY='needy.py:make' raised"),
        ("needy:make", 1, "No module named 'nothing_of_that_name'\n\nMODULE:FACTORY='needy:make' raised"),
        ("unfinished.py:make", 1, "SyntaxError: invalid syntax\n\nMODULE:FACTORY='unfinished.py:make' raised"),
        ("net.py:make", 2, "model_fn=make is called as model_fn(), which does not fit its arguments"),
    ],
)
def test_a_factory_that_cannot_be_used_is_one_clear_message(run: Run, factory: str, code: int, message: str) -> None:
    ended, printed = run("fit", factory, "--data", "net.py:load")
    assert message in printed and ended == code
    assert not re.search(r"dtrain/\w+\.py", printed) and "importlib" not in printed
    if code == 2:
        assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("data", "code", "message"),
    [
        ("net.py:gone", 2, "--data='net.py:gone': net.py has no 'gone'"),
        ("net:nothing", 2, "--data='net:nothing' returned None; did you forget to return the data?"),
        ("net:misnamed", 2, "returned a dict with 'val'; its keys must be 'train', and if you like 'validation'"),
        ("net:four", 2, "a tuple of 4; it must be (x, y) or (x, y, sample_weight)"),
        ("net:failing", 1, "OSError: the disk is gone\n\n--data='net:failing' raised OSError"),
    ],
)
def test_data_that_cannot_be_used_is_one_clear_message(run: Run, data: str, code: int, message: str) -> None:
    options = ("--no-tracking", "--no-checkpoint", *SETTINGS)
    ended, printed = run("fit", "net.py:make", "--data", data, *options)
    assert message in printed and ended == code
    assert not re.search(r"dtrain/\w+\.py", printed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fit", "net:make"], "Missing option '--data'"),
        (["fit", "net:make", "--data", "net:load", "--num-workers", "two"], "Invalid value for '--num-workers'"),
        (["fit", "net:make", "--data", "net:load", *SETTINGS, "--num-workers", "0"], "num_workers=0 must be a whole"),
        (["fit", "net:make", "--data", "net:load", "--set", "units"], "--set='units' must be KEY=VALUE"),
        (["fit", "net:make", "--data", "net:load", "--no-tracking", "--experiment", "x"], "--no-tracking contradicts"),
        (["fit", "net:make", "--data", "net:load", *SETTINGS, "--run-name", "../x"], "run_name='../x' has '/'"),
        (["evaluate", "net:make", "--data", "net:load"], "either --checkpoint URL or --run-name NAME; neither"),
        (["evaluate", "net:make", "--data", "net:load", "--run-name", "a", "--checkpoint", "b"], "both were given"),
        (["evaluate", "net:make", "--data", "net:load", "--run-name", "gone"], "run_name='gone' is no run in"),
        (["runs", "gone"], "run_name='gone' is no run in storage_path='dtrain_runs'"),
        (["runs", "../gone"], "run_name='../gone' has '/'"),
        (["predict", "net:make", "--data", "net:load", "--output", "a.npz"], "neither was given"),
        (["predict", "net:make", "--data", "net:load", "--output", "no/a.npz"], "there is no folder no; make it"),
        (["predict", "net:make", "--data", "net:load", "--output", "."], "--output='.' is a folder that is there"),
        (["predict", "net:make", "--data", "net:load", "--output", "notes.txt"], "--output='notes.txt' exists"),
        (["resume"], "No such command 'resume'"),
    ],
)
def test_wrong_usage_ends_with_2(run: Run, arguments: list[str], message: str) -> None:
    code, printed = run(*arguments)
    assert code == 2 and message in printed and "Traceback" not in printed


def test_a_checkpoint_that_is_missing_ends_with_1(run: Run, tmp_path: Path) -> None:
    gone = str(tmp_path / "gone")
    code, printed = run("evaluate", "net:make", "--data", "net:load", *SETTINGS, "--checkpoint", gone)
    assert (code, printed.splitlines()[-1][: len(gone)]) == (1, gone) and "is no checkpoint" in printed


def test_runs_of_an_empty_place_are_no_error(run: Run) -> None:
    assert run("runs") == (0, "no runs in dtrain_runs\n")
    assert run("runs", "--json") == (0, "[]\n")


def test_the_checkpoints_of_a_run_are_listed(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    made = RunFolder.create("dtrain_runs", "first")
    assert run("runs", "first") == (0, "no checkpoints of first in dtrain_runs\n")
    urls = []
    for epoch, loss in enumerate([0.5, 0.25, math.nan, 1.0], 1):
        manifest = Manifest(
            step=4 * epoch,
            position=Position(epoch, 0),
            world_size=2,
            seed=0,
            metrics={"loss": loss},
            best=loss if epoch < 3 else None,
        )
        urls.append(made.checkpoints.commit(made.checkpoints.stage(4 * epoch), manifest).url)
    (Path(urls[3]) / "manifest.json").write_text("{}")
    code, printed = run("runs", "first")
    head, *rows, note = printed.splitlines()
    assert code == 0 and head.split() == ["step", "epochs", "metrics", "checkpoint"]
    assert [row.split() for row in rows] == [
        ["4", "1", "loss", "0.5000", urls[0]],
        ["8", "2", "best", "loss", "0.2500", urls[1]],
        ["12", "3", "loss", "nan", urls[2]],
        ["16", "damaged", urls[3]],
    ]
    assert note.startswith(f"{urls[3]} is damaged: ")
    listed = json.loads(run("runs", "first", "--json")[1])
    assert [(item["step"], item["is_best"]) for item in listed] == [(4, False), (8, True), (12, False), (16, False)]
    assert [item["metrics"] for item in listed] == [{"loss": 0.5}, {"loss": 0.25}, {"loss": None}, {}]


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (None, 0), (False, 1)])
def test_doctor_ends_with_1_if_something_is_broken(
    run: Run, monkeypatch: pytest.MonkeyPatch, ok: bool | None, code: int
) -> None:
    finding = Finding("Horovod", ok, "0.28.1 [x]", "" if ok is not False else "dtrain install-horovod")
    monkeypatch.setattr("dtrain.doctor.diagnose", lambda storage_path: [finding])
    ended, printed = run("doctor")
    assert ended == code and "0.28.1 [x]" in printed and ("fix: dtrain install-horovod" in printed) == (ok is False)


# What the user named --------------------------------------------------------------------------------------------------


def test_what_lies_beside_the_users_module_travels_with_it(run: Run, tmp_path: Path) -> None:
    for name in ("net", str(tmp_path / "net.py")):
        found = find_function("MODULE:FACTORY", f"{name}:make")
        pickled = cloudpickle.dumps(found)
        script = f"import cloudpickle; print(cloudpickle.loads({pickled!r}).__globals__['widths'](3))"
        done = subprocess.run(
            [sys.executable, "-c", script], cwd="/", capture_output=True, text=True, timeout=60, check=True
        )
        assert done.stdout == "3\n"


def test_what_is_installed_does_not_travel_by_value(run: Run) -> None:
    find_function("MODULE:FACTORY", "net:make")
    registered = cloudpickle.list_registry_pickle_by_value()
    assert {"net", "parts"} <= registered
    assert not [name for name in registered if name.split(".")[0] in ("numpy", "dtrain", "json")]


def test_a_file_named_like_a_library_is_not_the_library(run: Run, tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def make(): return 'mine'\n")
    assert find_function("MODULE:FACTORY", "json.py:make")() == "mine"
    assert json.loads("1") == 1 and sys.modules["json"] is json


def test_a_file_is_run_once_for_factory_and_loader(run: Run, tmp_path: Path) -> None:
    first = find_function("MODULE:FACTORY", "net.py:make")
    assert first.__globals__ is find_function("--data", str(tmp_path / "net.py") + ":load").__globals__


@pytest.mark.parametrize(
    ("pairs", "config"),
    [
        ([], None),
        (["a=1", "b=1e-3", "c=relu", "d=[1, 2]", 'e="1"', "f=true", "g=", "h=x=y", "i=null"],
         {"a": 1, "b": 1e-3, "c": "relu", "d": [1, 2], "e": "1", "f": True, "g": "", "h": "x=y", "i": None}),
        (["a=1", "a=2"], {"a": 2}),
    ],
)  # fmt: skip
def test_settings_are_json_else_text(pairs: list[str], config: dict[str, Any] | None) -> None:
    assert cli.read_settings(pairs) == config


@pytest.mark.parametrize("pair", ["", "a", "=1"])
def test_settings_without_key_or_value_are_refused(pair: str) -> None:
    with pytest.raises(ConfigError, match="must be KEY=VALUE"):
        cli.read_settings([pair])


def test_the_newest_checkpoint_that_is_whole_is_used_and_the_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunFolder.create(tmp_path, "run")
    urls = []
    for step in (1, 2):
        staging = run.checkpoints.stage(step)
        files = (staging.write_tensors("model.safetensors", {"w": np.arange(step)}),)
        manifest = Manifest(step=step, position=Position(0, step), world_size=2, seed=0, files=files)
        urls.append(run.checkpoints.commit(staging, manifest).url)
    assert cli.find_checkpoint(None, "run", str(tmp_path)) == urls[1]
    (Path(urls[1]) / "model.safetensors").write_bytes(b"short")
    capsys.readouterr()
    assert cli.find_checkpoint(None, "run", str(tmp_path)) == urls[0]
    assert f"passed over: {urls[1]} is damaged: model.safetensors has 5 bytes" in capsys.readouterr().err
    (Path(urls[0]) / "manifest.json").write_text("{}")
    with pytest.raises(CheckpointError, match="--run-name='run' has no checkpoint that is whole"):
        cli.find_checkpoint(None, "run", str(tmp_path))


# What is written ------------------------------------------------------------------------------------------------------


def test_nested_outputs_become_arrays_named_by_their_path(tmp_path: Path) -> None:
    tree = {"file": np.arange(3), "boxes": [np.ones((3, 2), np.float32), (np.zeros(3, bool),)]}
    cli.write_npz(tmp_path / "p.npz", cli.name_arrays(tree))
    with np.load(tmp_path / "p.npz", allow_pickle=False) as arrays:
        assert {name: arrays[name].tolist() for name in arrays} == {
            "file": [0, 1, 2], "boxes/0": [[1, 1]] * 3, "boxes/1/0": [False] * 3
        }  # fmt: skip
    assert os.listdir(tmp_path) == ["p.npz"]


def test_one_output_is_called_predictions_and_small_floats_are_widened() -> None:
    import ml_dtypes

    (item,) = cli.name_arrays(np.ones(2, ml_dtypes.bfloat16)).items()
    assert item[0] == "predictions" and item[1].dtype == np.float32 and item[1].tolist() == [1, 1]


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "p.npz").write_text("before")

    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(DtrainError, match=r"--output='.*p.npz' cannot be written \(No space left on device\)"):
        cli.write_npz(tmp_path / "p.npz", {"a": np.ones(3)})
    assert os.listdir(tmp_path) == ["p.npz"] and (tmp_path / "p.npz").read_text() == "before"


def test_evaluation_takes_test_then_validation_then_train(capsys: pytest.CaptureFixture[str]) -> None:
    for parts, name in (("train test validation", "test"), ("train validation", "validation"), ("train", "train")):
        assert cli.held_out("m:load", {part: part for part in parts.split()}) == name
        assert capsys.readouterr().err == f"on the {name} data\n"
    with pytest.raises(DataError, match="nothing but None"):
        cli.held_out("m:load", {})
