"""Owns MLflow, and is alone in importing it: the run as MLflow has it, the settings that lead there, what it accepts.

Never touches MLflow's fluent state (active run, tracking URI, environment), which belongs to the user, and imports
mlflow only when it is about to talk to it.
"""

import contextlib
import contextvars
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import platform
import posixpath
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import numpy as np

from dtrain.config import MLflowConfig
from dtrain.errors import ConfigError
from dtrain.journal import POINTS_PER_BATCH, Event, Point, Verdict, brief, mask

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")

PARAMS_PER_BATCH = 100
"""MLflow takes no more params or tags in one request."""
KEY_TAG = "dtrain.journal"
"""The tag that a run is found by again."""
ERROR_TAG = "dtrain.error"
"""Why the newest attempt failed."""
ATTEMPTS_TAG = "dtrain.attempts"
"""How many attempts a resumed run has had. What is an attempt's own is tagged dtrain.attempt.<number>.<name>."""

_logger = logging.getLogger("dtrain")


class MLflowRun:
    """Writes a journal's events to a run. Each may be sent again after a failure in the middle of it.

    MLflow keys a point by run, name, timestamp, step and value, and all of them stand in the journal: so a point
    that is sent twice is there once. Steps up to where a metric had got when this process came to the run are left
    out: an earlier attempt sent them, perhaps from another machine, whose journal is not here.

    Args:
        config: where; what it leaves open comes from MLFLOW_* variables, then "dtrain" and sqlite:///mlflow.db.
        journal: path of the journal, which becomes an artifact of the run.
        make_client: makes an mlflow.MlflowClient for a tracking URI.
    """

    def __init__(
        self, config: MLflowConfig, journal: Path, make_client: "Callable[[str], MlflowClient] | None" = None
    ) -> None:
        self.uri = _tracking_uri(config)
        self.name = f"MLflow at {mask(self.uri)}"
        self.run_id: str | None = None
        self.on_run: Callable[[str], None] = lambda run_id: None
        """Called, in the thread that sends, when the run is there."""
        self.experiment_id: str | None = None
        self.experiment_name, self._given_experiment_id = _experiment(config)
        self._journal = journal
        self._make_client = make_client
        self._made: Any = None
        self._on_record: Callable[[str, int], bool] | None = None
        self._first_attempt = self._attempt = 1
        """The attempts that began the journal and that is being sent."""

    @property
    def _client(self) -> Any:
        if self._made is None:
            if path := sqlite_path(self.uri):  # For the user alone, before MLflow makes it for everybody.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            from mlflow import MlflowClient

            self._made = (self._make_client or MlflowClient)(self.uri)
        return self._made

    # What could never work

    def check(self) -> None:
        """Finds what could never work: an unknown URI scheme, a file store, refused credentials, a deleted experiment.

        A server that is down is no error: it is tried for a few seconds here and again while training runs.

        Raises:
            ConfigError: names the setting and the fix.
        """
        scheme = urlsplit(self.uri).scheme
        if scheme not in _known_schemes():
            raise ConfigError(
                f"tracking_uri={mask(self.uri)!r} is not a tracking URI that MLflow knows: use http(s)://..., "
                "sqlite:///mlflow.db or another database URL, or databricks"
            )
        if scheme in ("", "file") and self.uri != "databricks":
            raise ConfigError(
                f"tracking_uri={mask(self.uri)!r} is a file store, which MLflow no longer writes: use "
                "sqlite:///mlflow.db; `mlflow migrate-filestore` moves what is there"
            )
        if scheme == "sqlite":
            _check_sqlite(self.uri)
        if scheme in ("http", "https"):
            self._check_server()

    def _check_server(self) -> None:
        with settings_for_this_thread(CHECK_SETTINGS):
            try:
                experiment = self._experiment()
            except Exception as error:
                if _http_status(error) in (401, 403):
                    raise ConfigError(
                        f"the MLflow server at {mask(self.uri)} refused the credentials ({brief(error)}): set "
                        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                    ) from None
                return
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"experiment_name={experiment.name!r} was deleted: `mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}` brings it back, or choose another name"
            )

    # A journal's destination

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        """Imports mlflow, keeps it quiet and its retries short: within the calling thread."""
        with settings_for_this_thread(SEND_SETTINGS):
            # It tells how it makes its tables, in the middle of the progress bar.
            logger = logging.getLogger("mlflow.store.db.utils")
            if not any(isinstance(item, _OnlyWarningsFromUs) for item in logger.filters):
                logger.addFilter(_OnlyWarningsFromUs())
            yield

    def send_points(self, points: Sequence[Point]) -> None:
        """Sends points of any number."""
        from mlflow.entities import Metric

        if self._on_record is None:
            self._on_record = _on_record(self._client.get_run(self.run_id))
        named = [(_name(key), value, when, step) for key, value, when, step in points]
        metrics = [Metric(*point) for point in named if not self._on_record(point[0], point[3])]
        for chunk in _chunks(metrics, POINTS_PER_BATCH):
            self._client.log_batch(self.run_id, metrics=chunk)

    def send(self, event: Event) -> None:
        """Sends an event that is no metric."""
        match event["event"]:
            case "start":
                self._start(event)
            case "text":
                self._client.log_text(self.run_id, event["text"], event["file"])
            case "artifact":
                self._artifact(event)
            case "model":
                self._model(event)
            case "finish":
                self._finish(event)

    def verdict(self, error: Exception) -> Verdict:
        """What an error means for what was being sent."""
        status = _http_status(error)
        if self.run_id is None or status is None:
            return "retry"
        if status != 404 and (status in (401, 403, 408, 409, 429) or status >= 500):
            return "retry"
        try:
            stage = self._client.get_run(self.run_id).info.lifecycle_stage
        except Exception as another:
            missing = getattr(another, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
            return "gone" if missing else "retry"
        if stage == "deleted":
            return "deleted"
        return "retry" if status == 404 else "skip"

    def forget(self) -> None:
        """The run is gone, and is to be made again."""
        self.run_id = self._on_record = None
        if sqlite_path(self.uri):  # The file may be a new one.
            self._made = None

    def state(self) -> dict[str, Any]:
        """What a later process needs in order to go on with the run."""
        return {
            "uri": mask(self.uri),
            "experiment_id": self.experiment_id,
            "run_id": self.run_id,
            "attempts": [self._first_attempt, self._attempt],
        }

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Goes on with an earlier process's run; False if that was somewhere else."""
        if state["uri"] != mask(self.uri):
            return False
        self.run_id, self.experiment_id = state["run_id"], state["experiment_id"]
        self._first_attempt, self._attempt = state["attempts"]
        return True

    # The events

    def _start(self, event: Event) -> None:
        """Makes the run, or goes on with it: an attempt that is not the first has its changes in tags of its own."""
        tags = {_name(key): mask(str(value))[:5000] for key, value in event["tags"].items()}
        tags[KEY_TAG] = event["key"]
        if self.run_id is None:
            self.experiment_id = self._find_experiment()
            self.run_id = self._find_run(event["key"]) or self._create_run(event, tags)
        self.on_run(self.run_id)
        run = self._client.get_run(self.run_id)
        last = _last_attempt(run)
        number = self._attempt = _attempt(run, event["time"])
        if event["is_first"]:
            self._first_attempt = number
        prefix = f"dtrain.attempt.{number}."
        if number >= last and run.info.status != "RUNNING":
            self._client.update_run(self.run_id, status="RUNNING")
        if number > last:
            self._put_error_aside(run, last)
        if number > 1:
            changed = {_name(prefix + key): value[:5000] for key, value in _changed(run, event["params"]).items()}
            tags = {f"{prefix}started": _iso(event["time"]), ATTEMPTS_TAG: str(max(number, last))} | tags | changed
        tags |= self._missing_steps(run, event["known_steps"], f"{prefix}missing")
        self._params_and_tags(run, event["params"], tags)
        if event["datasets"]:  # MLflow has each of them once.
            self._client.log_inputs(self.run_id, datasets=[_dataset_input(d) for d in event["datasets"]])
        if event["summary"]:
            self._client.log_text(self.run_id, event["summary"], "model_summary.txt")

    def _missing_steps(self, run: Any, known_steps: int, tag: str) -> dict[str, str]:
        """A tag that says which steps neither MLflow nor the journal has; a line that says so, too."""
        reached = max(_newest_steps(run).values(), default=-1) + 1
        if reached >= known_steps:
            return {}
        _logger.warning(
            "%s does not have steps %d to %d of the run: they are in the journal on the machine that trained them, and "
            "dtrain.tracking.replay sends them from there",
            self.name, reached, known_steps - 1,
        )  # fmt: skip
        return {tag: f"{reached}-{known_steps - 1}"}

    def _put_error_aside(self, run: Any, number: int) -> None:
        """An earlier attempt's error is no longer the run's."""
        if error := run.data.tags.get(ERROR_TAG):
            self._client.set_tag(self.run_id, f"dtrain.attempt.{number}.error", error)
            self._client.delete_tag(self.run_id, ERROR_TAG)

    def _experiment(self) -> Any:
        """The experiment; None if it is yet to be made."""
        if self._given_experiment_id is not None:
            return self._client.get_experiment(self._given_experiment_id)
        return self._client.get_experiment_by_name(self.experiment_name)

    def _find_experiment(self) -> str:
        experiment = self._experiment()
        if experiment is None:
            path = sqlite_path(self.uri)
            folder = re.sub(r"[^\w-]", "_", self.experiment_name or "")
            # Beside the database, and not in whatever folder the process stands in.
            location = (path.parent / "mlruns" / folder).as_uri() if path else None
            try:
                return str(self._client.create_experiment(self.experiment_name, location))
            except Exception:
                experiment = self._experiment()  # Another run may have just made it.
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _find_run(self, key: str) -> str | None:
        """The run, if an earlier attempt made it and did not live to hear of it."""
        runs = self._client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{key}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _create_run(self, event: Event, tags: Mapping[str, str]) -> str:
        run = self._client.create_run(
            self.experiment_id, start_time=event["time"], tags=dict(tags), run_name=event["name"]
        )
        return str(run.info.run_id)

    def _params_and_tags(self, run: Any, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        named = {_name(key): value for key, value in params.items()}
        new = [Param(key, value) for key, value in named.items() if key not in run.data.params]
        for params_chunk in _chunks(new, PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=params_chunk)
        for tags_chunk in _chunks([RunTag(key, value) for key, value in tags.items()], PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=tags_chunk)

    def _artifact(self, event: Event) -> None:
        if not os.path.exists(event["path"]):
            _logger.warning("the artifact %s is no longer there; MLflow will not have it", event["path"])
            return
        self._client.log_artifact(self.run_id, event["path"], event["artifact_path"])
        if event["ours"]:
            shutil.rmtree(Path(event["path"]).parent, ignore_errors=True)

    def _model(self, event: Event) -> None:
        """What mlflow.keras.log_model does, but by the client: that one goes by the user's active run and URI."""
        from mlflow.entities import LoggedModelOutput
        from mlflow.models import Model

        path = event["path"]
        if not os.path.exists(path):  # Sent by an earlier process that was killed before it could say so.
            return
        model_id = self._logged_model(event["name"])
        described = Model.load(path)
        described.run_id, described.model_id, described.model_uuid = self.run_id, model_id, model_id
        described.artifact_path = self._client.get_logged_model(model_id).artifact_location
        described.save(os.path.join(path, "MLmodel"))
        self._client.log_model_artifacts(model_id, path)
        self._client.finalize_logged_model(model_id, "READY")
        outputs = self._client.get_run(self.run_id).outputs
        if model_id not in [output.model_id for output in (outputs.model_outputs if outputs else [])]:
            self._client.log_outputs(self.run_id, [LoggedModelOutput(model_id, step=0)])
        shutil.rmtree(Path(path).parent, ignore_errors=True)

    def _logged_model(self, name: str) -> str:
        """The run's model: what is there, because sending was broken off or by an earlier attempt, is replaced."""
        mine = f"source_run_id = '{self.run_id}' AND name = '{name}'"
        found = self._client.search_logged_models([self.experiment_id], mine, max_results=1)
        model = found[0] if found else self._client.create_logged_model(self.experiment_id, name, self.run_id)
        return str(model.model_id)

    def _finish(self, event: Event) -> None:
        # A journal that began on another machine, where the run went on, stands beside the first one's.
        folder = f"attempt-{self._first_attempt}" if self._first_attempt > 1 else None
        self._client.log_artifact(self.run_id, str(self._journal), folder)
        if self._attempt < _last_attempt(self._client.get_run(self.run_id)):
            return  # This one is sent late, or again, and does not decide how the run ends.
        if event["error"]:
            self._client.set_tag(self.run_id, ERROR_TAG, mask(event["error"])[:5000])
        self._client.set_terminated(self.run_id, event["status"], event["time"])


def _newest_steps(run: Any) -> dict[str, int]:
    """The newest step of each metric."""
    return {metric.key: metric.step for metric in run.data.to_proto().metrics}


def _on_record(run: Any) -> Callable[[str, int], bool]:
    """Tells of a metric and a step whether the run has them: all up to the metric's newest but those marked missing."""
    newest = _newest_steps(run)
    tags = (f"{key}={value}" for key, value in run.data.tags.items())
    spans = (re.fullmatch(r"dtrain\.attempt\.\d+\.missing=(\d+)-(\d+)", tag) for tag in tags)
    missing = [range(int(span[1]), int(span[2]) + 1) for span in spans if span]
    return lambda key, step: step <= newest.get(key, -1) and not any(step in span for span in missing)


def _attempt(run: Any, started: int) -> int:
    """The number, from 1, of the attempt that began at this time; the next one if MLflow does not know of it yet."""
    if run.info.start_time == started:
        return 1
    numbers = range(2, _last_attempt(run) + 1)
    known = (i for i in numbers if run.data.tags.get(f"dtrain.attempt.{i}.started") == _iso(started))
    return next(known, numbers.stop)


def _last_attempt(run: Any) -> int:
    """The number of the newest attempt that MLflow knows of."""
    return next(i for i in itertools.count(1) if f"dtrain.attempt.{i + 1}.started" not in run.data.tags)


def _changed(run: Any, params: Mapping[str, str]) -> dict[str, str]:
    """The params whose value is another than the run's: MLflow keeps a param's first value for ever."""
    return {key: value for key, value in params.items() if run.data.params.get(_name(key), value) != value}


def _iso(milliseconds: int) -> str:
    return datetime.fromtimestamp(milliseconds / 1000, UTC).isoformat(timespec="milliseconds")


def save_model(model: Any, path: Path, example_input: Any, example_output: Any) -> None:
    """Saves a keras.Model as MLflow keeps it, with signature and requirements.

    Args:
        model: the keras.Model.
        path: a folder that is not there yet.
        example_input: a few rows as the model takes them: an array, or a dict or list of arrays.
        example_output: what it predicts for them.
    """
    import mlflow.keras

    mlflow.keras.save_model(
        model,
        str(path),
        signature=_signature(example_input, example_output),
        conda_env=_environment("mlflow", "keras", "tensorflow", "numpy"),
    )


def _signature(example_input: Any, example_output: Any) -> Any:
    """The signature; None, which MLflow accepts, if the model's input is of a kind that it cannot describe."""
    from mlflow.models import infer_signature

    try:
        return infer_signature(_named(example_input, "input"), _named(example_output, "output"))
    except Exception as error:
        _logger.info("the model is logged without a signature (%s)", brief(error))
        return None


def _named(tree: Any, name: str) -> Any:
    """MLflow describes an array or a dict of arrays; the parts of a list get numbers."""
    if isinstance(tree, list | tuple):
        return {f"{name}_{i}": np.asarray(part) for i, part in enumerate(tree)}
    if isinstance(tree, Mapping):
        return {str(key): np.asarray(part) for key, part in tree.items()}
    return np.asarray(tree)


def _environment(*names: str) -> dict[str, Any]:
    """What the model needs, pinned to what is installed; of TensorFlow's several distributions the one that is.

    Given whole, since MLflow otherwise loads the model to find out, and warns where there is no pip.
    """
    found = []
    for name in names:
        for distribution in (name, f"{name}-cpu"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{distribution}=={importlib.metadata.version(distribution)}")
                break
    python = f"python={platform.python_version()}"
    return {"name": "mlflow-env", "channels": ["conda-forge"], "dependencies": [python, "pip", {"pip": found}]}


def _dataset_input(dataset: Mapping[str, Any]) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    tensors = [
        {"name": key, "type": "tensor", "tensor-spec": {"dtype": dataset["dtypes"].get(key, ""), "shape": [-1, *shape]}}
        for key, shape in dataset["shapes"].items()
    ]
    rows = dataset["num_rows"]
    content = json.dumps([dataset["name"], tensors, rows, dataset["source"]])
    entity = Dataset(
        name=dataset["name"][:500],
        digest=(dataset["digest"] or hashlib.sha256(content.encode()).hexdigest()[:8])[:36],
        source_type="local",
        source=json.dumps({"uri": dataset["source"] or dataset["name"]}),
        schema=json.dumps({"mlflow_tensorspec": {"features": json.dumps(tensors), "targets": None}}),
        profile=json.dumps({} if rows is None else {"num_rows": rows}),
    )
    return DatasetInput(entity, tags=[InputTag("mlflow.data.context", dataset["context"])])


# MLflow's settings, names and limits --------------------------------------------------------------------------------

SEND_SETTINGS: Mapping[str, Any] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1,  # One, for a kept-alive connection that the server has closed meanwhile.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": 30,
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": False,
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": True,
}
CHECK_SETTINGS: Mapping[str, Any] = {**SEND_SETTINGS, "MLFLOW_HTTP_REQUEST_TIMEOUT": 5}

_thread_settings: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("settings", default=None)


@contextlib.contextmanager
def settings_for_this_thread(settings: Mapping[str, Any]) -> Iterator[None]:
    """Gives MLflow's settings other defaults within the calling thread.

    MLflow takes them from the environment only, at each request, and by default retries for minutes. The
    environment is the user's and other threads read it, so the getters are wrapped instead; outside of this
    context they do what they did. What the user has set wins.
    """
    from mlflow import environment_variables

    for name in settings:
        _wrap_getter(getattr(environment_variables, name, None))
    token = _thread_settings.set(settings)
    try:
        yield
    finally:
        _thread_settings.reset(token)


def _wrap_getter(variable: Any) -> None:
    if variable is None or hasattr(variable.get, "dtrain"):
        return
    original = variable.get

    def get() -> Any:
        settings = _thread_settings.get()
        return original() if settings is None or variable.is_set() else settings.get(variable.name, original())

    get.dtrain = True  # type: ignore[attr-defined]
    variable.get = get


class _OnlyWarningsFromUs(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return _thread_settings.get() is None or record.levelno >= logging.WARNING


def _tracking_uri(config: MLflowConfig) -> str:
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI, absolute: the process may change its folder later. None for any other."""
    if not uri.startswith("sqlite:///") or "?" in uri or ":memory:" in uri:
        return None
    return Path(uri.removeprefix("sqlite:///")).absolute()


def _experiment(config: MLflowConfig) -> tuple[str | None, str | None]:
    """The experiment's name or its id; the other is None."""
    if name := config.experiment_name or os.environ.get("MLFLOW_EXPERIMENT_NAME"):
        return name, None
    if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        return None, experiment_id
    return "dtrain", None


def _known_schemes() -> set[str]:
    plugins = {plugin.name for plugin in importlib.metadata.entry_points(group="mlflow.tracking_store")}
    databases = {"sqlite", "postgresql", "mysql", "mssql"}
    drivers = {f"{database}+{driver}" for database in databases for driver in ("psycopg2", "pymysql", "pyodbc")}
    return {"", "file", "http", "https", "databricks"} | databases | drivers | plugins


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None:
        return
    writable = os.access(path, os.W_OK) if path.exists() else path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if path.is_dir() or not writable:
        raise ConfigError(f"tracking_uri={uri!r} cannot be written: its folder must exist and be yours")


def _http_status(error: Exception) -> int | None:
    """The HTTP status that MLflow's error stands for; None if it is another kind of error."""
    get = getattr(error, "get_http_status_code", None)
    return int(get()) if get else None


def _name(key: str) -> str:
    """A name that MLflow accepts: other characters replaced, no path that leads anywhere, at most 250 long."""
    name = re.sub(r"[^/\w.\- :]", "_", str(key), flags=re.ASCII)[:250]
    normal = posixpath.normpath(name)
    if normal != name or name.startswith(("/", "..")) or name == ".":
        name = name.replace("/", "_").replace("..", "__").strip() or "_"
    return "_" if name == "." else name


def _chunks(items: Sequence[T], size: int) -> Iterator[list[T]]:
    for start in range(0, len(items), size):
        yield list(items[start : start + size])
