"""Owns MLflow: the run, what reaches it when, and the journal that stands in front of it.

What the controller records is appended to the journal, a file of JSON lines beside the run, and that is all the
caller waits for. The journal is the queue: one thread reads on from where MLflow has got to and sends. While MLflow
is away the thread waits and tries again; training never notices. Lines are sent in order, and sending one twice is
harmless, since MLflow keys a point by run, name, timestamp, step and value, and all of them stand in the journal.

Only the controller calls this, from one thread. It never touches MLflow's fluent state (active run, tracking URI,
environment), which belongs to the user, and imports mlflow only when it is about to talk to it.
"""

import contextlib
import contextvars
import getpass
import hashlib
import importlib.metadata
import json
import logging
import math
import os
import posixpath
import re
import shutil
import socket
import subprocess
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar
from urllib.parse import urlsplit

import numpy as np

from dtrain.config import MLflowConfig
from dtrain.errors import ConfigError, TrackingError
from dtrain.types import Array

if TYPE_CHECKING:
    from mlflow import MlflowClient

T = TypeVar("T")
Event = dict[str, Any]
Point = tuple[str, float, int, int]
"""A metric's name, its value, its time in milliseconds, its step."""
Status = Literal["FINISHED", "FAILED", "KILLED"]

_logger = logging.getLogger("dtrain")

POINTS_PER_BATCH = 1000
"""MLflow takes no more metrics in one request; a journal line never holds more points than that."""
PARAMS_PER_BATCH = 100
THINNED_INTERVAL_MS = 100
"""Per-step series reach MLflow as means over intervals this long, unless `log_every` says otherwise."""
FINISH_SECONDS = 30.0
"""How long finish() waits for an MLflow that does not answer."""
UPLOAD_SECONDS = 600.0
"""How long finish() waits for an upload that has not failed."""


@dataclass(frozen=True)
class DatasetDescription:
    """A data set as MLflow shows it.

    Attributes:
        name: how the user would call it: "arrays", "train.parquet".
        context: what it is used for: "train" or "validation".
        shapes: the shape of one row of each part, such as {"x": (28, 28), "y": ()}.
        dtypes: the dtype of each part.
        num_rows: rows in it, if they are known.
        digest: what tells two data sets apart; None: made from the other fields.
        source: where it came from, if anywhere.
    """

    name: str
    context: str
    shapes: Mapping[str, Sequence[int | None]] = field(default_factory=dict)
    dtypes: Mapping[str, str] = field(default_factory=dict)
    num_rows: int | None = None
    digest: str | None = None
    source: str | None = None


@dataclass(frozen=True)
class RunDescription:
    """What is known of a run before its first step.

    Attributes:
        run_name: the run's name in MLflow.
        params: parameters; nested mappings become dotted names, values are written with str().
        tags: tags, such as those of `environment_tags`.
        datasets: the data that the run reads.
        summary: the model's summary; becomes the artifact model_summary.txt.
    """

    run_name: str
    params: Mapping[str, Any] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    datasets: Sequence[DatasetDescription] = ()
    summary: str = ""


class Tracker(Protocol):
    """What records a run. Nothing here waits for a network or raises because of one, except `check`."""

    @property
    def run_id(self) -> str | None:
        """The run's id; None while there is none, because the server has not been reached yet, say."""

    def check(self) -> None:
        """Raises ConfigError for what could never work: called before anything starts."""

    def start(self, description: RunDescription) -> None:
        """Makes the run, or goes on with the one that the journal belongs to."""

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None:
        """Records metrics of an epoch or another rare event. A metric's steps must rise; older ones are left out."""

    def log_steps(
        self, first_step: int, metrics: Mapping[str, Array], seconds: float, end_ms: int | None = None
    ) -> None:
        """Records a segment: each metric's value after `first_step` and the steps that follow it, of even length.

        Steps that are on record already are left out: after a return to a checkpoint they are trained twice.
        """

    def log_text(self, text: str, file: str) -> None:
        """Keeps a text as an artifact."""

    def log_figure(self, figure: Any, file: str) -> None:
        """Keeps a matplotlib figure as an artifact."""

    def log_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Keeps a file or folder, which must stay where it is until finish() returns, as an artifact."""

    def log_model(self, model: Any, example_input: Any, example_output: Any) -> None:
        """Logs a keras.Model with the signature that the examples show. Saving happens now, sending later."""

    def finish(self, status: Status, error: str | None = None) -> None:
        """Ends the run when all has been sent, or gives up, saying so, when MLflow does not answer for 30 seconds."""

    def url(self) -> str | None:
        """The run's page, where there is a server."""

    def open_command(self) -> str | None:
        """What the user types or opens to look at the run."""


class NullTracker:
    """Records nothing."""

    run_id: str | None = None

    def check(self) -> None: ...

    def start(self, description: RunDescription) -> None: ...

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None: ...

    def log_steps(
        self, first_step: int, metrics: Mapping[str, Array], seconds: float, end_ms: int | None = None
    ) -> None: ...

    def log_text(self, text: str, file: str) -> None: ...

    def log_figure(self, figure: Any, file: str) -> None: ...

    def log_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None: ...

    def log_model(self, model: Any, example_input: Any, example_output: Any) -> None: ...

    def finish(self, status: Status, error: str | None = None) -> None: ...

    def url(self) -> str | None:
        return None

    def open_command(self) -> str | None:
        return None


class MLflowTracker:
    """Records a run in MLflow, by way of a journal.

    A journal that exists is gone on with: the same run, from where MLflow has got to. So a restarted job, and
    `replay` after an outage, need nothing but the file.

    Args:
        config: where to record; what it leaves open comes from MLFLOW_* variables, then "dtrain" and
            sqlite:///mlflow.db in the working directory.
        journal: path of the journal. Beside it stand `<journal>.position`, which says how far MLflow has got, and
            until they are sent, artifacts in `<journal>.artifacts`.
        make_client: makes an mlflow.MlflowClient for a tracking URI.
    """

    def __init__(
        self,
        config: MLflowConfig | None,
        journal: str | os.PathLike[str],
        make_client: Callable[[str], "MlflowClient"] | None = None,
    ) -> None:
        self._config = config or MLflowConfig()
        self._uri = _tracking_uri(self._config)
        self._experiment = _experiment(self._config)
        self._make_client = make_client or _make_client
        self._journal = Journal(Path(journal).absolute())
        self._outbox = Path(f"{self._journal.path}.artifacts")
        self._sender = _Sender(self._journal, _Run(self._uri, self._experiment, self._make_client))
        self._finished = False
        self._recover()

    def _recover(self) -> None:
        """Reads from an earlier process's journal what is on record, so that no step is recorded twice."""
        self._key = uuid.uuid4().hex
        self._last_step: dict[str, int] = {}
        self._last_series_step = -1
        self._thinner = _Thinner(self._config.log_every)
        unthinned: list[Event] = []
        thinned = -1
        for event, _ in self._journal.read(0, skip=()):
            assert event is not None
            match event["event"]:
                case "start":
                    self._key = event["key"]
                case "metrics":
                    self._last_step |= dict.fromkeys(event["metrics"], event["step"])
                case "steps":
                    self._last_series_step = _last(event)
                    unthinned.append(event)
                case "points":
                    thinned = max(point[3] for point in event["points"])
                    unthinned = [steps for steps in unthinned if _last(steps) > thinned]
        for event in unthinned:
            self._journal.append(*_points_lines(self._thinner.feed(*_series(event, after=thinned))))

    @property
    def run_id(self) -> str | None:
        """The run's id; None until MLflow has been reached."""
        return self._sender.run.run_id

    def check(self) -> None:
        """Finds what could never work: an unknown URI scheme, a file store, refused credentials, a deleted experiment.

        A server that is down is no error: it is tried for a few seconds here and again while training runs.

        Raises:
            ConfigError: names the setting and the fix.
        """
        scheme = urlsplit(self._uri).scheme
        if scheme not in _known_schemes():
            raise ConfigError(
                f"tracking_uri={mask(self._uri)!r} is not a tracking URI that MLflow knows: use http(s)://..., "
                "sqlite:///mlflow.db or another database URL, or databricks"
            )
        if scheme in ("", "file") and self._uri != "databricks":
            raise ConfigError(
                f"tracking_uri={mask(self._uri)!r} is a file store, which MLflow no longer writes: use "
                "sqlite:///mlflow.db; `mlflow migrate-filestore` moves what is there"
            )
        if scheme == "sqlite":
            _check_sqlite(self._uri)
        if scheme in ("http", "https"):
            self._check_server()

    def _check_server(self) -> None:
        with _settings_for_this_thread(CHECK_SETTINGS):
            try:
                experiment = _Run(self._uri, self._experiment, self._make_client).experiment()
            except Exception as error:
                if _http_status(error) in (401, 403):
                    raise ConfigError(
                        f"the MLflow server at {mask(self._uri)} refused the credentials ({_brief(error)}): set "
                        "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
                    ) from None
                return
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            raise ConfigError(
                f"experiment_name={experiment.name!r} was deleted: `mlflow experiments restore --experiment-id "
                f"{experiment.experiment_id}` brings it back, or choose another name"
            )

    def start(self, description: RunDescription) -> None:
        """Makes the run, or goes on with the one that the journal belongs to; does not wait for it."""
        self._append(
            event="start",
            key=self._key,
            name=description.run_name,
            params={key: _param(value) for key, value in _flat(description.params)},
            tags=dict(description.tags) | dict(self._config.tags or {}),
            datasets=[asdict(dataset) for dataset in description.datasets],
            summary=description.summary,
        )
        self._sender.start()

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None:
        """Records metrics of an epoch or another rare event; all of them reach MLflow.

        Args:
            step: of the whole run. A metric's steps must rise: a step that is on record is left out.
            metrics: values by name.
            timestamp_ms: milliseconds since 1970; None: now.
        """
        new = {key: float(value) for key, value in metrics.items() if step > self._last_step.get(key, -1)}
        self._last_step |= dict.fromkeys(new, step)
        for chunk in _chunks(list(new.items()), POINTS_PER_BATCH):
            self._append(event="metrics", time=timestamp_ms or _now_ms(), step=int(step), metrics=dict(chunk))

    def log_steps(
        self, first_step: int, metrics: Mapping[str, Array], seconds: float, end_ms: int | None = None
    ) -> None:
        """Records a segment's per-step values: all of them in the journal, thinned in MLflow.

        MLflow gets the mean over every tenth of a second, or every `log_every`-th step; and the last step at finish.

        Args:
            first_step: step of the first value, of the whole run; those on record already are left out.
            metrics: for each metric, its value after each step; all of one length.
            seconds: how long the steps took together.
            end_ms: when the last one ended, in milliseconds since 1970; None: now.
        """
        length = max((len(values) for values in metrics.values()), default=0)
        if length == 0:
            return
        end = end_ms or _now_ms()
        event: Event = {
            "event": "steps",
            "first_step": int(first_step),
            "start": end - round(seconds * 1000),
            "end": end,
            "metrics": {key: np.asarray(values, np.float64) for key, values in metrics.items()},
        }
        steps, times, series = _series(event, after=self._last_series_step)
        if len(steps) == 0:
            return
        if len(steps) < length:
            event |= {"first_step": int(steps[0]), "start": int(times[0]), "metrics": series}
        self._last_series_step = int(steps[-1])
        event["metrics"] = {key: values.tolist() for key, values in series.items()}
        self._append_all(event, *_points_lines(self._thinner.feed(steps, times, series)))

    def log_text(self, text: str, file: str) -> None:
        """Keeps a text as the artifact `file`."""
        self._append(event="text", file=file, text=text)

    def log_figure(self, figure: Any, file: str) -> None:
        """Keeps a matplotlib figure as the artifact `file`, whose ending chooses the format."""
        with self._kept(f"the figure {file}"):
            path = self._in_outbox(posixpath.basename(file))
            figure.savefig(path)
            self._append(event="artifact", path=str(path), artifact_path=posixpath.dirname(file) or None, ours=True)

    def log_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Keeps a file or folder, which must stay where it is until finish() returns, under `artifact_path`."""
        self._append(event="artifact", path=os.path.abspath(path), artifact_path=artifact_path, ours=False)

    def log_model(self, model: Any, example_input: Any, example_output: Any) -> None:
        """Logs a keras.Model as the run's output, with signature and requirements.

        The model is saved before this returns; sending it is the thread's. A model that cannot be saved is a
        warning, not an error.

        Args:
            model: the keras.Model.
            example_input: a few rows as the model takes them: an array, or a dict or list of arrays.
            example_output: what it predicts for them.
        """
        with self._kept("the model"):
            import mlflow.keras

            path = self._in_outbox("model")
            mlflow.keras.save_model(
                model,
                str(path),
                signature=_signature(example_input, example_output),
                pip_requirements=_requirements("mlflow", "keras", "tensorflow", "numpy"),
            )
            self._append(event="model", path=str(path), name="model")

    def finish(self, status: Status, error: str | None = None) -> None:
        """Ends the run: sends what is left, the journal as an artifact, and the status.

        Waits as long as sending gets on, but not longer than 30 seconds for an MLflow that fails or does not answer.
        What is left then stays in the journal, and one line says so. A second call does nothing.

        Args:
            status: what the run ended as.
            error: why it failed, for the tag dtrain.error.
        """
        if self._finished:
            return
        self._finished = True
        self._append_all(*_points_lines(self._thinner.flush()), {"event": "finish", "status": status, "error": error})
        self.drain()

    def drain(self) -> bool:
        """Sends what is left and stops the thread; the second half of finish(). False if something is left."""
        done = self._sender.drain(FINISH_SECONDS) and not self._journal.waiting
        if done:
            shutil.rmtree(self._outbox, ignore_errors=True)
        else:
            _logger.warning(
                "MLflow at %s did not take all of the run; the rest is in %s and dtrain.tracking.replay(%r) sends it",
                mask(self._uri),
                self._journal.path,
                str(self._journal.path),
            )
        return done

    def url(self) -> str | None:
        """The run's page on the server; None without a server, or while the run is not there yet."""
        run = self._sender.run
        if not self._uri.startswith(("http://", "https://")) or run.run_id is None:
            return None
        base = re.sub(r"//[^/]*@", "//", self._uri).rstrip("/")
        return f"{base}/#/experiments/{run.experiment_id}/runs/{run.run_id}"

    def open_command(self) -> str | None:
        """What to type or open to look at the run."""
        if urlsplit(self._uri).scheme in ("http", "https"):
            return self.url() or mask(self._uri)
        if self._uri.startswith("databricks"):
            return None
        uri = self._uri
        path = _sqlite_path(uri)
        if path is not None and path.parent == Path.cwd():
            uri = f"sqlite:///{path.name}"
        return f"mlflow ui --backend-store-uri {mask(uri)}"

    def _append(self, **event: Any) -> None:
        self._append_all(event)

    def _append_all(self, *events: Event) -> None:
        self._journal.append(*({"event": e["event"], "time": _now_ms(), **e} for e in events))
        self._sender.wake()

    def _in_outbox(self, name: str) -> Path:
        folder = self._outbox / uuid.uuid4().hex
        folder.mkdir(mode=0o700, parents=True)
        return folder / name

    @contextlib.contextmanager
    def _kept(self, what: str) -> Iterator[None]:
        """A record that cannot be made is no reason to lose a training: warn and go on."""
        try:
            yield
        except Exception as error:
            _logger.warning("MLflow will not have %s: it could not be saved (%s)", what, _brief(error))


def replay(journal: str | os.PathLike[str], config: MLflowConfig | None = None) -> str:
    """Sends to MLflow what a journal still holds, after an outage that lasted longer than the run.

    Args:
        journal: the run's journal.jsonl.
        config: where to, if it is not what MLFLOW_* variables say.

    Returns:
        The id of the run.

    Raises:
        TrackingError: MLflow did not take all of it.
    """
    if not os.path.exists(journal):
        raise TrackingError(f"journal={os.fspath(journal)!r} does not exist")
    tracker = MLflowTracker(config, journal)
    tracker.check()
    if not tracker.drain() or tracker.run_id is None:
        raise TrackingError(f"MLflow did not take all of {os.fspath(journal)}; try again when it answers")
    return tracker.run_id


def environment_tags(script: str | None) -> dict[str, str]:
    """Tags for where a run comes from: user, host, script, git commit. To be resolved where the script starts.

    Args:
        script: the script that the user started; None: unknown, as in a notebook.
    """
    tags = {"mlflow.source.type": "LOCAL", "dtrain.host": socket.gethostname()}
    with contextlib.suppress(OSError, KeyError):  # A container's user may have no name.
        tags["mlflow.user"] = getpass.getuser()
    if script:
        tags["mlflow.source.name"] = script
    folder = Path(script).absolute().parent if script else Path.cwd()
    if commit := _git(folder, "rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        if changes is not None:
            tags["mlflow.source.git.dirty"] = "true" if changes else "false"
    return tags


def mask(text: str) -> str:
    """Hides user names and passwords in the URLs of a text."""
    return re.sub(r"(?<=://)[^/?#\s'\"]+@", "***@", text)


# The journal --------------------------------------------------------------------------------------------------------


class Journal:
    """A file of JSON lines that is only ever appended to, by one thread, and read by another.

    Appending does not raise: while the disk is full the newest lines wait in memory. Numbers are written as Python's
    json does, so NaN and Infinity may stand for themselves.

    Args:
        path: the file; made, for the user alone, if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._waiting: deque[bytes] = deque(maxlen=10_000)
        self._failing = False
        self.size = self._cut_torn_line()

    def _cut_torn_line(self) -> int:
        """A process that was killed while writing leaves half a line behind."""
        size = os.fstat(self._fd).st_size
        end = size
        while end > 0:
            start = max(0, end - 65_536)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            end = start + newline + 1 if newline >= 0 else start
            if newline >= 0:
                break
        if end < size:
            os.ftruncate(self._fd, end)
        return end

    @property
    def waiting(self) -> bool:
        """Whether lines wait in memory, because the file cannot be written."""
        return bool(self._waiting)

    def append(self, *events: Event) -> None:
        """Writes events, a line each, without user info in URLs."""
        self._waiting.extend(
            mask(json.dumps(event, default=str, separators=(",", ":"))).encode() + b"\n" for event in events
        )
        data = b"".join(self._waiting)
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self.size)
            if not self._failing:
                _logger.warning("cannot write %s (%s); the newest lines wait in memory", self.path, error)
            self._failing = True
            return
        self._failing = False
        self.size += sum(map(len, self._waiting))
        self._waiting.clear()

    def read(self, offset: int, skip: Sequence[str] = ("steps",)) -> Iterator[tuple[Event | None, int]]:
        """The events from `offset` on, each with the offset behind it; None for an event that is in `skip`."""
        size = self.size
        prefixes = tuple(f'{{"event":"{name}",'.encode() for name in skip)
        with open(self.path, "rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                if offset > size:
                    return
                # Not parsed if skipped: the series are most of the file, and only their thinned points are sent.
                yield (None if prefixes and line.startswith(prefixes) else json.loads(line)), offset


class _Thinner:
    """Turns per-step series into the points that MLflow gets."""

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._steps: Array = np.zeros(0, np.int64)
        self._times: Array = np.zeros(0, np.int64)
        self._series: dict[str, Array] = {}

    def feed(self, steps: Array, times: Array, series: dict[str, Array]) -> list[Point]:
        """Takes more steps and gives the points that are complete; the last interval stays open for more."""
        points = [] if series.keys() == self._series.keys() else self.flush()
        if len(self._steps):
            steps, times = np.concatenate([self._steps, steps]), np.concatenate([self._times, times])
            series = {key: np.concatenate([self._series[key], values]) for key, values in series.items()}
        if self._every:
            first = last = np.flatnonzero(steps % self._every == 0)
            done = len(steps) - 1 if len(steps) and steps[-1] % self._every else len(steps)
        else:
            # An interval is a fixed piece of time, so where one segment ends and the next begins makes no difference.
            ends = np.flatnonzero(np.diff(times // THINNED_INTERVAL_MS))
            done = int(ends[-1]) + 1 if len(ends) else 0
            first, last = np.append(0, ends[:-1] + 1)[: len(ends)], ends
        points += _means(steps, times, series, first, last)
        self._keep(steps[done:], times[done:], {key: values[done:] for key, values in series.items()})
        return points

    def flush(self) -> list[Point]:
        """Gives the point of what is still open, so that the last step is on record."""
        if len(self._steps) == 0:
            return []
        last = np.array([len(self._steps) - 1])
        points = _means(self._steps, self._times, self._series, last if self._every else np.array([0]), last)
        self._keep(self._steps[:0], self._times[:0], {key: values[:0] for key, values in self._series.items()})
        return points

    def _keep(self, steps: Array, times: Array, series: dict[str, Array]) -> None:
        self._steps, self._times, self._series = steps, times, series


def _means(steps: Array, times: Array, series: Mapping[str, Array], first: Array, last: Array) -> list[Point]:
    """A point for each stretch of steps: the mean over it, at its last step and time."""
    return [
        (key, float(np.mean(values[i : j + 1])), int(times[j]), int(steps[j]))
        for key, values in series.items()
        for i, j in zip(first, last, strict=True)
    ]


def _series(event: Event, after: int) -> tuple[Array, Array, dict[str, Array]]:
    """Steps, times and values of a "steps" event, from the step behind `after` on."""
    series = {key: np.asarray(values, np.float64) for key, values in event["metrics"].items()}
    length = min(len(values) for values in series.values())
    steps = event["first_step"] + np.arange(length)
    # The i-th of n steps ends when i of n parts of the time are over.
    times = np.rint(np.linspace(event["start"], event["end"], length + 1)[1:]).astype(np.int64)
    new = steps > after
    return steps[new], times[new], {key: values[:length][new] for key, values in series.items()}


def _last(event: Event) -> int:
    return int(event["first_step"]) + min(len(values) for values in event["metrics"].values()) - 1


def _points_lines(points: Sequence[Point]) -> list[Event]:
    return [{"event": "points", "points": list(chunk)} for chunk in _chunks(points, POINTS_PER_BATCH)]


# The thread that sends ----------------------------------------------------------------------------------------------


class _Sender:
    """Sends the journal's lines, in order, to the run; remembers beside the journal how far it got."""

    def __init__(self, journal: Journal, run: "_Run") -> None:
        self.run = run
        self._journal = journal
        self._state_path = Path(f"{journal.path}.position")
        self._offset = 0
        self._load()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._draining = False
        self._progress = time.monotonic()
        self._uploading = False
        self._failures = 0

    def start(self) -> None:
        if self._thread is None:
            # A daemon: a request that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._work, name=THREAD_NAME, daemon=True)
            self._thread.start()

    def wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Waits until all is sent, as long as it gets on; then stops the thread."""
        self.start()
        with self._changed:
            self._draining = True
            self._progress = start = time.monotonic()
            self._changed.notify_all()
            while self._offset < self._journal.size:
                patience = UPLOAD_SECONDS if self._uploading and not self._failures else seconds
                deadline = min(self._progress + patience, start + UPLOAD_SECONDS)
                if time.monotonic() >= deadline:
                    break
                self._changed.wait(min(1.0, deadline - time.monotonic()))
            self._stopping = True
            self._changed.notify_all()
        if self._offset < self._journal.size:
            return False
        assert self._thread is not None
        self._thread.join(seconds)
        return True

    def _work(self) -> None:
        _quieten_mlflow()
        with _settings_for_this_thread(SEND_SETTINGS):
            while not self._stopping:
                if self._offset >= self._journal.size:
                    self._wait(None)
                    continue
                try:
                    self._send_next()
                except Exception as error:
                    self._failed(error)
                else:
                    self._succeeded()

    def _send_next(self) -> None:
        """Sends one event, or as many points as fit into a batch."""
        points: list[Point] = []
        end = self._offset
        for event, behind in self._journal.read(self._offset):
            found = _points_of(event)
            if found is None or len(points) + len(found) > POINTS_PER_BATCH:
                if end > self._offset:  # What came before goes first.
                    break
                assert event is not None
                self._uploading = event["event"] in ("artifact", "model", "finish")
                self._next = behind
                self.run.send(event, self._journal.path)
                end = behind
                break
            points += found
            end = self._next = behind
        if points:
            self.run.send_points(points)
        self._offset = end
        self._save()

    def _succeeded(self) -> None:
        with self._changed:
            if self._failures:
                _logger.warning("MLflow answers again; what it missed is being sent")
            self._failures = 0
            self._uploading = False
            self._progress = time.monotonic()
            self._changed.notify_all()

    def _failed(self, error: Exception) -> None:
        verdict = self._diagnose(error)
        if verdict == "skip":
            _logger.warning("MLflow refused a part of the run, which stays in the journal only: %s", _brief(error))
            self._offset = self._next
            return self._succeeded()
        if verdict == "gone":
            _logger.warning("MLflow no longer has run %s; it is made again from the journal", self.run.run_id)
            self.run.forget()
            self._offset = 0
        elif self._failures == 0:
            _logger.warning(
                "MLflow at %s cannot be written (%s); training goes on, %s keeps everything and is sent when it can be",
                mask(self.run.uri),
                "the run was deleted: mlflow runs restore brings it back" if verdict == "deleted" else _brief(error),
                self._journal.path,
            )
        self._failures += 1
        self._wait(min(0.25 * 2.0 ** min(self._failures, 10), 1.0 if self._draining else 30.0))

    def _diagnose(self, error: Exception) -> Literal["retry", "skip", "gone", "deleted"]:
        status = _http_status(error)
        if self.run.run_id is None or status is None:
            return "retry"
        if status != 404 and (status in (401, 403, 408, 409, 429) or status >= 500):
            return "retry"
        try:
            stage = self.run.lifecycle_stage()
        except Exception as another:
            missing = getattr(another, "error_code", None) == "RESOURCE_DOES_NOT_EXIST"
            return "gone" if missing else "retry"
        if stage == "deleted":
            return "deleted"
        return "retry" if status == 404 else "skip"

    def _wait(self, seconds: float | None) -> None:
        with self._changed:
            if self._stopping or (seconds is None and self._offset < self._journal.size):
                return
            deadline = math.inf if seconds is None else time.monotonic() + seconds
            draining = self._draining
            while not self._stopping and self._draining == draining and time.monotonic() < deadline:
                self._changed.wait(None if seconds is None else deadline - time.monotonic())
                if seconds is None:  # Waiting for work, and something has happened.
                    return

    def _load(self) -> None:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._state_path.read_text())
            # Another store knows nothing of this run: all of the journal is sent there.
            if state["uri"] == mask(self.run.uri) and 0 <= int(state["offset"]) <= self._journal.size:
                self._offset = int(state["offset"])
                self.run.run_id, self.run.experiment_id = state["run_id"], state["experiment_id"]

    def _save(self) -> None:
        state = {
            "uri": mask(self.run.uri),
            "experiment_id": self.run.experiment_id,
            "run_id": self.run.run_id,
            "offset": self._offset,
        }
        temporary = Path(f"{self._state_path}.new")
        with contextlib.suppress(OSError):  # Without it more is sent again, which is harmless.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump(state, file)
            os.replace(temporary, self._state_path)


def _points_of(event: Event | None) -> list[Point] | None:
    """The points of an event; None if it is another kind of event."""
    if event is None:
        return []
    if event["event"] == "points":
        return [(key, value, when, step) for key, value, when, step in event["points"]]
    if event["event"] == "metrics":
        return [(key, value, event["time"], event["step"]) for key, value in event["metrics"].items()]
    return None


# The run, as MLflow has it ------------------------------------------------------------------------------------------


class _Run:
    """Writes events to MLflow. Each may be sent again after a failure in the middle of it."""

    def __init__(self, uri: str, experiment: tuple[str | None, str | None], make_client: Callable[[str], Any]) -> None:
        self.uri = uri
        self.run_id: str | None = None
        self.experiment_id: str | None = None
        self._experiment_name, self._given_experiment_id = experiment
        self._make_client = make_client
        self._made: Any = None
        self._model_ids: dict[str, str] = {}

    @property
    def _client(self) -> Any:
        if self._made is None:
            if path := _sqlite_path(self.uri):  # For the user alone, before MLflow makes it for everybody.
                os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
            self._made = self._make_client(self.uri)
        return self._made

    def experiment(self) -> Any:
        """The experiment; None if it is yet to be made."""
        if self._given_experiment_id is not None:
            return self._client.get_experiment(self._given_experiment_id)
        return self._client.get_experiment_by_name(self._experiment_name)

    def lifecycle_stage(self) -> str:
        return str(self._client.get_run(self.run_id).info.lifecycle_stage)

    def forget(self) -> None:
        self.run_id = None
        self._model_ids.clear()
        if _sqlite_path(self.uri):  # The file may be a new one.
            self._made = None

    def send_points(self, points: Sequence[Point]) -> None:
        from mlflow.entities import Metric

        assert self.run_id is not None
        metrics = [Metric(_name(key), value, when, step) for key, value, when, step in points]
        self._client.log_batch(self.run_id, metrics=metrics)

    def send(self, event: Event, journal: Path) -> None:
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
                self._finish(event, journal)

    def _start(self, event: Event) -> None:
        tags = {_name(key): mask(str(value))[:5000] for key, value in event["tags"].items()}
        tags[KEY_TAG] = event["key"]
        if self.run_id is None:
            self.experiment_id = self._find_experiment()
            self.run_id = self._find_run(event) or self._create_run(event, tags)
        else:
            self._client.update_run(self.run_id, status="RUNNING")
        self._params_and_tags(event["params"], tags)
        if event["datasets"]:
            self._client.log_inputs(self.run_id, datasets=[_dataset_input(d) for d in event["datasets"]])
        if event["summary"]:
            self._client.log_text(self.run_id, event["summary"], "model_summary.txt")

    def _find_experiment(self) -> str:
        experiment = self.experiment()
        if experiment is None:
            path = _sqlite_path(self.uri)
            folder = re.sub(r"[^\w-]", "_", self._experiment_name or "")
            # Beside the database, and not in whatever folder the process stands in.
            location = (path.parent / "mlruns" / folder).as_uri() if path else None
            try:
                return str(self._client.create_experiment(self._experiment_name, artifact_location=location))
            except Exception:
                experiment = self.experiment()  # Another run may have just made it.
                if experiment is None:
                    raise
        return str(experiment.experiment_id)

    def _find_run(self, event: Event) -> str | None:
        """The run, if an earlier attempt made it and did not live to hear of it."""
        runs = self._client.search_runs([self.experiment_id], f"tags.`{KEY_TAG}` = '{event['key']}'", max_results=1)
        return str(runs[0].info.run_id) if runs else None

    def _create_run(self, event: Event, tags: Mapping[str, str]) -> str:
        run = self._client.create_run(
            self.experiment_id, start_time=event["time"], tags=dict(tags), run_name=event["name"]
        )
        return str(run.info.run_id)

    def _params_and_tags(self, params: Mapping[str, str], tags: Mapping[str, str]) -> None:
        from mlflow.entities import Param, RunTag

        known = self._client.get_run(self.run_id).data.params
        named = {_name(key): value for key, value in params.items()}
        # MLflow keeps a param's first value for ever, and refuses another.
        changed = [key for key, value in named.items() if key in known and known[key] != value]
        if changed:
            _logger.info("MLflow keeps the run's first values of the params %s", ", ".join(changed))
        new = [Param(key, value) for key, value in named.items() if key not in known]
        for params_chunk in _chunks(new, PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, params=list(params_chunk))
        for tags_chunk in _chunks([RunTag(key, value) for key, value in tags.items()], PARAMS_PER_BATCH):
            self._client.log_batch(self.run_id, tags=list(tags_chunk))

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
        model_id = self._model_ids.get(path)
        if model_id is None:
            made = self._client.create_logged_model(self.experiment_id, name=event["name"], source_run_id=self.run_id)
            model_id = self._model_ids[path] = made.model_id
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

    def _finish(self, event: Event, journal: Path) -> None:
        if event["error"]:
            self._client.set_tag(self.run_id, "dtrain.error", mask(event["error"])[:5000])
        self._client.log_artifact(self.run_id, str(journal))
        self._client.set_terminated(self.run_id, event["status"], event["time"])


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


def _signature(example_input: Any, example_output: Any) -> Any:
    """The signature; None, which MLflow accepts, if the model's input is of a kind that it cannot describe."""
    from mlflow.models import infer_signature

    try:
        return infer_signature(_named(example_input, "input"), _named(example_output, "output"))
    except Exception as error:
        _logger.info("the model is logged without a signature (%s)", _brief(error))
        return None


def _named(tree: Any, name: str) -> Any:
    """MLflow describes an array or a dict of arrays; the parts of a list get numbers."""
    if isinstance(tree, list | tuple):
        return {f"{name}_{i}": np.asarray(part) for i, part in enumerate(tree)}
    if isinstance(tree, Mapping):
        return {str(key): np.asarray(part) for key, part in tree.items()}
    return np.asarray(tree)


def _requirements(*names: str) -> list[str]:
    """Pinned to what is installed; of TensorFlow's several distributions the one that is."""
    found = []
    for name in names:
        for distribution in (name, f"{name}-cpu"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.append(f"{distribution}=={importlib.metadata.version(distribution)}")
                break
    return found


# MLflow's settings, names and limits --------------------------------------------------------------------------------

KEY_TAG = "dtrain.journal"
THREAD_NAME = "dtrain-mlflow"
SEND_SETTINGS: Mapping[str, Any] = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": 1,  # One, for a kept-alive connection that the server has closed meanwhile.
    "MLFLOW_HTTP_REQUEST_TIMEOUT": 30,
    "MLFLOW_HTTP_RESPECT_RETRY_AFTER_HEADER": False,
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": True,
}
CHECK_SETTINGS: Mapping[str, Any] = {**SEND_SETTINGS, "MLFLOW_HTTP_REQUEST_TIMEOUT": 5}

_thread_settings: contextvars.ContextVar[Mapping[str, Any] | None] = contextvars.ContextVar("settings", default=None)


@contextlib.contextmanager
def _settings_for_this_thread(settings: Mapping[str, Any]) -> Iterator[None]:
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


class _NotFromOurThread(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.threadName != THREAD_NAME or record.levelno >= logging.WARNING


def _quieten_mlflow() -> None:
    """MLflow tells how it makes its tables, in the middle of the progress bar."""
    logger = logging.getLogger("mlflow.store.db.utils")
    if not any(isinstance(f, _NotFromOurThread) for f in logger.filters):
        logger.addFilter(_NotFromOurThread())


def _make_client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _tracking_uri(config: MLflowConfig) -> str:
    uri = config.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    path = _sqlite_path(uri)
    return uri if path is None else f"sqlite:///{path}"


def _sqlite_path(uri: str) -> Path | None:
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
    path = _sqlite_path(uri)
    if path is None:
        return
    writable = os.access(path, os.W_OK) if path.exists() else path.parent.is_dir() and os.access(path.parent, os.W_OK)
    if path.is_dir() or not writable:
        raise ConfigError(f"tracking_uri={uri!r} cannot be written: its folder must exist and be yours")


def _http_status(error: Exception) -> int | None:
    """The HTTP status that MLflow's error stands for; None if it is another kind of error."""
    get = getattr(error, "get_http_status_code", None)
    return int(get()) if get else None


def _brief(error: Exception) -> str:
    """An error in one line, without secrets."""
    lines = str(error).strip().splitlines() or [""]
    return mask(f"{type(error).__name__}: {lines[0]}")[:300]


def _name(key: str) -> str:
    """A name that MLflow accepts: other characters replaced, no path that leads anywhere, at most 250 long."""
    name = re.sub(r"[^/\w.\- :]", "_", str(key), flags=re.ASCII)[:250]
    normal = posixpath.normpath(name)
    if normal != name or name.startswith(("/", "..")) or name == ".":
        name = name.replace("/", "_").replace("..", "__").strip() or "_"
    return "_" if name == "." else name


def _param(value: Any) -> str:
    text = mask(str(value))
    return text if len(text) <= 6000 else text[:5999] + "…"


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def _now_ms() -> int:
    return time.time_ns() // 1_000_000


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's answer; None without git or outside of a repository."""
    # fsmonitor names a program that git would start, and the folder may be anybody's.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
