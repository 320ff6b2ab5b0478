"""Claims about what MLflow shows of a training: two workers, a real store, one fit that most tests look at."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"

import mlflow
from mlflow import MlflowClient

import dtrain
from dtrain import fit_run
from dtrain.history import History

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # The workers do not have the tests' folder on their path.

EPOCHS, STEPS = 3, 24
LAST_STEPS = [STEPS - 1, 2 * STEPS - 1, 3 * STEPS - 1]


def make_model(config: dict[str, Any]) -> Any:
    import keras

    model = keras.Sequential(
        [keras.Input((5,)), keras.layers.Dense(config["units"]), keras.layers.Dense(3, activation="softmax")]
    )
    model.compile(keras.optimizers.Adam(0.01), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def data() -> tuple[np.ndarray, np.ndarray]:
    x = np.random.default_rng(0).normal(size=(960, 5)).astype("float32")
    return x, np.argmax(x[:, :3], axis=1)


def broken_callback() -> Any:
    import keras

    class Broken(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise RuntimeError("the callback is broken")

    return Broken()


@dataclass
class Recorded:
    """Three fits of one Trainer, the last of which fails, and what they left."""

    folder: Path
    uri: str
    history: History
    second: History
    predicted: np.ndarray
    client: MlflowClient
    error: str

    @property
    def run(self) -> Any:
        return self.client.get_run(str(self.history.run_id))

    def runs(self) -> dict[str, Any]:
        experiment = self.client.get_experiment_by_name("from the environment")
        assert experiment is not None
        return {run.info.run_name: run for run in self.client.search_runs([experiment.experiment_id])}

    def points(self, key: str) -> list[tuple[int, float]]:
        """In the order of their times."""
        return [(p.step, p.value) for p in self.client.get_metric_history(str(self.history.run_id), key)]

    def artifact(self, path: str, to: Path) -> Path:
        return Path(self.client.download_artifacts(str(self.history.run_id), path, str(to)))


@pytest.fixture(scope="module")
def recorded(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    folder = tmp_path_factory.mktemp("recorded")
    uri = f"sqlite:///{folder}/mlflow.db"
    x, y = data()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", uri)
        patch.setenv("MLFLOW_EXPERIMENT_NAME", "from the environment")
        with dtrain.Trainer(
            make_model,
            num_workers=2,
            config={"units": 8, "why": {"because": "yes"}},
            seed=3,
            run_name="digits",
            storage_path=folder / "runs",
        ) as trainer:
            history = trainer.fit(x, y, batch_size=32, epochs=EPOCHS, validation_split=0.2, verbose=0)
            predicted = trainer.predict(x[:10], verbose=0)
            second = trainer.fit(x, y, batch_size=320, verbose=0)
            with pytest.raises(dtrain.errors.WorkerError) as caught:
                trainer.fit(x, y, batch_size=320, callbacks=[broken_callback()], verbose=0)
    return Recorded(folder, uri, history, second, predicted, MlflowClient(uri), str(caught.value))


def test_each_fit_is_one_run_where_the_environment_says(recorded: Recorded) -> None:
    assert set(recorded.runs()) == {"digits", "digits-2", "digits-3"}
    assert recorded.runs()["digits"].info.run_id == recorded.history.run_id
    assert recorded.runs()["digits-2"].info.run_id == recorded.second.run_id
    assert recorded.history.open_command == f"mlflow ui --backend-store-uri {recorded.uri}"


def test_a_fit_that_is_done_is_finished(recorded: Recorded) -> None:
    assert [recorded.runs()[name].info.status for name in ("digits", "digits-2")] == ["FINISHED", "FINISHED"]
    assert recorded.run.info.end_time > recorded.run.info.start_time


def test_a_fit_that_raises_is_failed_with_its_params_and_reason(recorded: Recorded) -> None:
    run = recorded.runs()["digits-3"]
    assert "the callback is broken" in recorded.error
    assert run.info.status == "FAILED"
    assert run.data.params["batch_size"] == "320"
    assert "the callback is broken" in run.data.tags["dtrain.error"]


def test_an_interrupted_fit_is_killed(local_ray: None, in_tmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Interrupted(fit_run.ProgressBar):
        def update(self, step: int, *args: Any, **kwargs: Any) -> None:
            raise KeyboardInterrupt

    monkeypatch.setattr(fit_run, "ProgressBar", Interrupted)
    monkeypatch.setattr("dtrain.tracking.KILLED_SECONDS", 300.0)  # a new database takes MLflow many seconds
    config = dtrain.MLflowConfig(tracking_uri="sqlite:///here.db", experiment_name="given", tags={"team": "blue"})
    x, y = data()
    with (
        dtrain.Trainer(make_model, config={"units": 2}, tracking=config, run_name="stopped") as trainer,
        pytest.raises(KeyboardInterrupt),
    ):
        trainer.fit(x, y, epochs=100, verbose=0)
    client = MlflowClient("sqlite:///here.db")
    experiment = client.get_experiment_by_name("given")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status, run.data.tags["team"]) == ("stopped", "KILLED", "blue")
    assert run.data.params["epochs"] == "100"


def test_params_say_what_was_trained_and_with_what(recorded: Recorded) -> None:
    params = recorded.run.data.params
    expected = {
        "batch_size": "32", "epochs": "3", "world_size": "2", "seed": "3", "config.units": "8",
        "config.why.because": "yes", "loss": "sparse_categorical_crossentropy", "optimizer": "Adam",
        "num_parameters": str(5 * 8 + 8 + 8 * 3 + 3), "versions.keras": __import__("keras").__version__,
        "metrics": "accuracy", "initial_learning_rate": "0.01",
        "train_rows": "768", "validation_rows": "192", "steps_per_epoch": "24",
    }  # fmt: skip
    assert {key: params.get(key) for key in expected} == expected
    assert params["model_fn"].endswith("test_mlflow.make_model")
    assert {f"versions.{name}" for name in ("python", "dtrain", "tensorflow", "horovod", "ray", "mlflow")} <= set(
        params
    )


def test_tags_say_where_it_came_from(recorded: Recorded) -> None:
    tags = recorded.run.data.tags
    assert {"mlflow.user", "mlflow.source.name", "dtrain.host", "ray.address"} <= set(tags)
    # Of the script that was started, where that is in a repository.
    if (
        subprocess.run(["git", "rev-parse"], cwd=Path(sys.argv[0]).absolute().parent, capture_output=True).returncode
        == 0
    ):
        assert len(tags["mlflow.source.git.commit"]) == 40
        assert tags["mlflow.source.git.dirty"] in ("true", "false")


def test_metrics_run_along_the_steps_of_the_whole_fit(recorded: Recorded) -> None:
    for key in ("loss", "accuracy", "val_loss", "val_accuracy", "learning_rate", "samples_per_second", "step_time"):
        steps = [step for step, _ in recorded.points(key)]
        assert steps == sorted(set(steps)), key
        assert steps[-1] == LAST_STEPS[-1], key
    assert all(value == pytest.approx(0.01) for _, value in recorded.points("learning_rate"))
    assert all(value > 0 for key in ("samples_per_second", "step_time") for _, value in recorded.points(key))


@pytest.mark.parametrize("key", ["loss", "accuracy", "val_loss", "val_accuracy"])
def test_at_an_epochs_end_stands_exactly_what_history_says(recorded: Recorded, key: str) -> None:
    points = dict(recorded.points(key))
    assert [points[step] for step in LAST_STEPS] == recorded.history.history[key]
    assert recorded.run.data.metrics[key] == recorded.history.history[key][-1]


def test_the_journal_is_kept_and_has_every_step(recorded: Recorded, tmp_path: Path) -> None:
    lines = recorded.artifact("journal.jsonl", tmp_path).read_text().splitlines()
    steps = [event for event in map(json.loads, lines) if event["event"] == "steps"]
    for key in ("loss", "accuracy"):
        assert [len(event["metrics"][key]) for event in steps] and sum(len(e["metrics"][key]) for e in steps) == 72
    assert [i for e in steps for i in range(e["first_step"], e["first_step"] + len(e["metrics"]["loss"]))] == [
        *range(72)
    ]


def test_summary_and_curves_are_artifacts(recorded: Recorded, tmp_path: Path) -> None:
    assert "Trainable params: 75" in recorded.artifact("model_summary.txt", tmp_path).read_text()
    assert recorded.artifact("training_curves.png", tmp_path).read_bytes().startswith(b"\x89PNG")
    assert (recorded.folder / "runs" / "digits" / "training_curves.png").exists()
    names = {item.path for item in recorded.client.list_artifacts(str(recorded.history.run_id))}
    assert names == {"journal.jsonl", "model_summary.txt", "training_curves.png"}


def test_data_sets_are_inputs(recorded: Recorded) -> None:
    found = {item.tags[0].value: item.dataset for item in recorded.run.inputs.dataset_inputs}
    assert set(found) == {"train", "validation"}
    assert json.loads(found["train"].profile) == {"num_rows": 768}
    [features] = [json.loads(json.loads(found["train"].schema)["mlflow_tensorspec"]["features"])]
    assert {(f["name"], f["tensor-spec"]["dtype"], tuple(f["tensor-spec"]["shape"])) for f in features} == {
        ("x", "float32", (-1, 5)), ("y", "int64", (-1,)),
    }  # fmt: skip
    assert found["train"].digest != found["validation"].digest


def test_the_logged_model_predicts_what_the_trainer_predicted(recorded: Recorded) -> None:
    x, _ = data()
    [output] = recorded.run.outputs.model_outputs
    try:
        mlflow.set_tracking_uri(recorded.uri)
        model = mlflow.keras.load_model(f"models:/{output.model_id}")
        as_function = mlflow.pyfunc.load_model(f"runs:/{recorded.history.run_id}/model")
    finally:
        mlflow.set_tracking_uri(None)
    assert np.allclose(model.predict(x[:10], verbose=0), recorded.predicted, atol=1e-6)
    assert np.allclose(as_function.predict(x[:10]), recorded.predicted, atol=1e-6)
    signature = as_function.metadata.signature
    assert signature.inputs.inputs[0].shape == (-1, 5)
    assert signature.outputs.inputs[0].shape == (-1, 3)


QUIET_SCRIPT = """
import sys
import dtrain
from test_mlflow_model import data, make_model

x, y = data()
with dtrain.Trainer(make_model, config={"units": 2}, tracking=False, checkpoint=False) as trainer:
    history = trainer.fit(x, y, batch_size=96, verbose=0)
    assert history.run_id is None
    assert not {"mlflow", "tensorflow", "keras"} & sys.modules.keys(), "loaded in the driver without need"
with dtrain.Trainer(make_model, config={"units": 2}, run_name="quiet") as trainer:
    history = trainer.fit(x, y, batch_size=96, epochs=2)
assert history.run_id
print("done")
"""


def test_a_script_that_trains_says_nothing_but_dtrains_own(tmp_path: Path) -> None:
    """With tracking off nothing of MLflow, and of TensorFlow, is loaded where the script runs."""
    source = Path(__file__).read_text()
    functions = source[source.index("def make_model") : source.index("def broken_callback")]
    (tmp_path / "test_mlflow_model.py").write_text(f"from typing import Any\nimport numpy as np\n\n\n{functions}")
    (tmp_path / "script.py").write_text(QUIET_SCRIPT)
    unset = ("TF_CPP_MIN_LOG_LEVEL", "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS")
    environment = {k: v for k, v in os.environ.items() if k not in unset and not k.startswith("MLFLOW_")}
    environment |= {"PYTHONPATH": f"{tmp_path}:{Path(dtrain.__file__).parents[1]}", "MLFLOW_DISABLE_TELEMETRY": "true"}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=400
    )
    assert (done.returncode, done.stderr) == (0, "")
    ours = ("starting ", "building ", "run quiet", "Epoch ", "logging ", "finishing ", "done")
    assert [line for line in done.stdout.splitlines() if not line.startswith(ours)] == []
