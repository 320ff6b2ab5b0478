"""Owns what is recorded of a run, and by whom: `MLflowTracker`, by way of a journal, or `NullTracker`.

What the controller records is appended to the journal, a file of JSON lines beside the run, and that is all the
caller waits for; journal.py sends it on, and mlflow_run.py knows MLflow. Only the controller calls this, from one
thread.
"""

import contextlib
import logging
import os
import posixpath
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

import numpy as np

from dtrain.config import MLflowConfig
from dtrain.errors import ConfigError, TrackingError
from dtrain.journal import Journal, Sender, brief
from dtrain.journal import mask as mask
from dtrain.mlflow_run import MLflowRun, save_model, sqlite_path
from dtrain.types import Array

if TYPE_CHECKING:
    from mlflow import MlflowClient

Status = Literal["FINISHED", "FAILED", "KILLED"]

FINISH_SECONDS = 30.0
"""How long finish() waits for an MLflow that does not answer."""
KILLED_SECONDS = 5.0
"""The same after Ctrl-C, when somebody waits for the end."""

_logger = logging.getLogger("dtrain")


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


@dataclass(frozen=True)
class TrackedRun:
    """What a checkpoint says of the record, so that a resumed training goes on with it wherever it runs.

    Attributes:
        key: the run's own; MLflow and the journal have it.
        step: mini-batches on record: those before this step are not recorded again.
    """

    key: str
    step: int


class Tracker(Protocol):
    """What records a run. Nothing here waits for a network or raises because of one, except `check`."""

    @property
    def run_id(self) -> str | None:
        """The run's id; None while there is none, because the server has not been reached yet, say."""

    def check(self) -> None:
        """Raises ConfigError for what could never work: called before anything starts."""

    def start(self, description: RunDescription) -> None:
        """Makes the run, or goes on with the one that the journal belongs to."""

    def tracked(self) -> TrackedRun | None:
        """What the next checkpoint is to say of the record; from now on the record outlives a loss of power."""

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

    def drain(self) -> bool:
        """Sends what an attempt before could not send."""

    def url(self) -> str | None:
        """The run's page, where there is a server."""

    def open_command(self) -> str | None:
        """What the user types or opens to look at the run."""


class NullTracker:
    """Records nothing.

    Args:
        resume: what an earlier attempt recorded; handed on, so that a later one can go on with it.
    """

    run_id: str | None = None

    def __init__(self, resume: TrackedRun | None = None) -> None:
        self._resume = resume

    def check(self) -> None: ...

    def start(self, description: RunDescription) -> None: ...

    def tracked(self) -> TrackedRun | None:
        return self._resume

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None: ...

    def log_steps(
        self, first_step: int, metrics: Mapping[str, Array], seconds: float, end_ms: int | None = None
    ) -> None: ...

    def log_text(self, text: str, file: str) -> None: ...

    def log_figure(self, figure: Any, file: str) -> None: ...

    def log_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None: ...

    def log_model(self, model: Any, example_input: Any, example_output: Any) -> None: ...

    def finish(self, status: Status, error: str | None = None) -> None: ...

    def drain(self) -> bool:
        return True

    def url(self) -> str | None:
        return None

    def open_command(self) -> str | None:
        return None


class MLflowTracker:
    """Records a run in MLflow, by way of a journal.

    A journal that exists is gone on with: the same run, from where MLflow has got to. So a restarted job, and
    `replay` after an outage, need nothing but the file. Where the file is missing, because the job goes on on another
    machine, or lacks the newest steps, `resume` stands in for it.

    Args:
        config: where to record; what it leaves open comes from MLFLOW_* variables, then "dtrain" and
            sqlite:///mlflow.db in the working directory.
        journal: path of the journal. Beside it stand `<journal>.position`, which says how far MLflow has got, and
            until they are sent, artifacts in `<journal>.artifacts`.
        make_client: makes an mlflow.MlflowClient for a tracking URI.
        on_run: is called with the run's id when there is one, in another thread.
        resume: what the checkpoint that training goes on from says of the record.

    Raises:
        ConfigError: the journal is of another run than `resume`; it is left as it is.
    """

    def __init__(
        self,
        config: MLflowConfig | None,
        journal: str | os.PathLike[str],
        make_client: "Callable[[str], MlflowClient] | None" = None,
        on_run: Callable[[str], None] = lambda run_id: None,
        resume: TrackedRun | None = None,
    ) -> None:
        self._config = config or MLflowConfig()
        self._journal = Journal(Path(journal).absolute())
        self._outbox = Path(f"{self._journal.path}.artifacts")
        self._run = MLflowRun(self._config, self._journal.path, make_client)
        self._run.on_run = on_run
        self._sender = Sender(self._journal, self._run, self._config.log_every)
        self._finished = False
        self._recover(resume)

    def _recover(self, resume: TrackedRun | None) -> None:
        """Finds what is on record already, so that no step is recorded twice."""
        key: str | None = None
        self._last_step: dict[str, int] = {}
        self._last_series_step = -1
        self._last_time = 0
        for event, _ in self._journal.read():
            match event["event"]:
                case "start":
                    key = key or event["key"]
                case "metrics":
                    self._last_step |= dict.fromkeys(event["metrics"], event["step"])
                    self._last_time = event["time"]
                case "steps":
                    self._last_series_step = event["first_step"] + min(map(len, event["metrics"].values())) - 1
                    self._last_time = event["end"]
        if resume is not None and key not in (None, resume.key):
            raise ConfigError(
                f"journal={os.fspath(self._journal.path)!r} is of another run than the checkpoint to resume from: move "
                "the journal and what stands beside it under its name away, or give another run_name"
            )
        self._is_first = key is None
        self._key = key or (resume.key if resume else uuid.uuid4().hex)
        self._known_steps = 0
        if resume is not None and self._steps_on_record() < resume.step:
            self._known_steps = resume.step
            self._last_series_step = resume.step - 1

    def _steps_on_record(self) -> int:
        return max(self._last_series_step, *self._last_step.values(), -1) + 1

    @property
    def run_id(self) -> str | None:
        """The run's id; None until MLflow has been reached."""
        return self._run.run_id

    def check(self) -> None:
        """Finds what could never work: an unknown URI scheme, a file store, refused credentials, a deleted experiment.

        A server that is down is no error: it is tried for a few seconds here and again while training runs. When all
        is well the thread begins, and imports mlflow while the workers start.

        Raises:
            ConfigError: names the setting and the fix.
        """
        self._run.check()
        self._sender.start()

    def start(self, description: RunDescription) -> None:
        """Makes the run, or goes on with the one that the journal belongs to; does not wait for it.

        Called by every attempt of a run. MLflow keeps the first one's params; where a later one's differ, they are tags
        of the run, such as dtrain.attempt.2.epochs.
        """
        self._append(
            "start",
            key=self._key,
            is_first=self._is_first,
            known_steps=self._known_steps,
            name=description.run_name,
            params={key: _param(value) for key, value in _flat(description.params)},
            tags=dict(description.tags) | dict(self._config.tags or {}),
            datasets=[asdict(dataset) for dataset in description.datasets],
            summary=description.summary,
        )
        self._is_first = False
        self._sender.start()

    def tracked(self) -> TrackedRun:
        """What the next checkpoint is to say of the record.

        The journal is on the disk when this returns: a checkpoint that is committed afterwards is never ahead of it,
        whatever the machine dies of.
        """
        self._journal.sync()
        return TrackedRun(self._key, self._steps_on_record())

    def log(self, step: int, metrics: Mapping[str, float], timestamp_ms: int | None = None) -> None:
        """Records metrics of an epoch or another rare event; all of them reach MLflow.

        Args:
            step: of the whole run. A metric's steps must rise: a step that is on record is left out.
            metrics: values by name.
            timestamp_ms: milliseconds since 1970; None: now.
        """
        known = self._known_steps - 1
        new = {key: float(value) for key, value in metrics.items() if step > max(self._last_step.get(key, -1), known)}
        self._last_step |= dict.fromkeys(new, step)
        if new:
            self._last_time = max(timestamp_ms or _now_ms(), self._last_time)
            self._append("metrics", time=self._last_time, step=int(step), metrics=new)

    def log_steps(
        self, first_step: int, metrics: Mapping[str, Array], seconds: float, end_ms: int | None = None
    ) -> None:
        """Records a segment's per-step values: all of them in the journal, thinned in MLflow.

        MLflow gets the mean over every tenth of a second, or every `log_every`-th step; and the last step. Where
        `log` names the same metric, at an epoch's end, it gets that value.

        Args:
            first_step: step of the first value, of the whole run; those on record already are left out.
            metrics: for each metric, its value after each step; all of one length.
            seconds: how long the steps took together.
            end_ms: when the last one ended, in milliseconds since 1970; None: now.
        """
        length = min(map(len, metrics.values()), default=0)
        known = max(0, self._last_series_step + 1 - first_step)
        if known >= length:
            return
        if first_step > self._last_series_step + 1:
            _logger.warning(
                "steps %d to %d are not on record: they were trained without tracking, or are in another run's journal",
                self._last_series_step + 1, first_step - 1,
            )  # fmt: skip
        self._last_series_step = first_step + length - 1
        end = max(end_ms or _now_ms(), self._last_time)
        # Results may arrive late, and the next soon after: a later step must not seem to end before an earlier one.
        start = max(end - round(seconds * 1000 * (length - known) / length), self._last_time)
        self._last_time = end
        self._append(
            "steps",
            first_step=int(first_step + known),
            start=start,
            end=end,
            metrics={key: np.asarray(values, np.float64)[known:length].tolist() for key, values in metrics.items()},
        )

    def log_text(self, text: str, file: str) -> None:
        """Keeps a text as the artifact `file`."""
        self._append("text", file=file, text=text)

    def log_figure(self, figure: Any, file: str) -> None:
        """Keeps a matplotlib figure as the artifact `file`, whose ending chooses the format."""
        with self._kept(f"the figure {file}"):
            path = self._in_outbox(posixpath.basename(file))
            figure.savefig(path)
            self._append("artifact", path=str(path), artifact_path=posixpath.dirname(file) or None, ours=True)

    def log_artifact(self, path: str | os.PathLike[str], artifact_path: str | None = None) -> None:
        """Keeps a file or folder, which must stay where it is until finish() returns, under `artifact_path`."""
        self._append("artifact", path=os.path.abspath(path), artifact_path=artifact_path, ours=False)

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
            path = self._in_outbox("model")
            save_model(model, path, example_input, example_output)
            self._append("model", path=str(path), name="model")

    def finish(self, status: Status, error: str | None = None) -> None:
        """Ends the run: sends what is left, the journal as an artifact, and the status.

        Waits as long as sending gets on, but not longer than 30 seconds (5 after Ctrl-C) for an MLflow that fails or
        does not answer. What is left then stays in the journal, and one line says so. A second call does nothing.

        Args:
            status: what the run ended as.
            error: why it failed, for the tag dtrain.error.
        """
        if self._finished:
            return
        self._finished = True
        self._append("finish", status=status, error=error)
        self.drain(KILLED_SECONDS if status == "KILLED" else FINISH_SECONDS)

    def drain(self, seconds: float = FINISH_SECONDS) -> bool:
        """Sends what is left and stops the thread; the second half of finish(). False if something is left.

        Args:
            seconds: how long to wait for an MLflow that fails or does not answer.
        """
        done = self._sender.drain(seconds) and not self._journal.waiting
        if done:
            shutil.rmtree(self._outbox, ignore_errors=True)
        else:
            _logger.warning(
                "%s did not take all of the run; the rest is in %s and dtrain.tracking.replay(%r) sends it",
                self._run.name,
                self._journal.path,
                str(self._journal.path),
            )
        return done

    def url(self) -> str | None:
        """The run's page on the server; None without a server, or while the run is not there yet."""
        run = self._run
        if run.run_id is None or urlsplit(run.uri).scheme not in ("http", "https"):
            return None
        base = re.sub(r"//[^/]*@", "//", run.uri).rstrip("/")
        return f"{base}/#/experiments/{run.experiment_id}/runs/{run.run_id}"

    def open_command(self) -> str | None:
        """What to type or open to look at the run."""
        uri = self._run.uri
        if urlsplit(uri).scheme in ("http", "https"):
            return self.url() or mask(uri)
        if uri.startswith("databricks"):
            return None
        path = sqlite_path(uri)
        if path is not None and path.parent == Path.cwd():
            uri = f"sqlite:///{path.name}"
        return f"mlflow ui --backend-store-uri {mask(uri)}"

    def _append(self, event: str, **fields: Any) -> None:
        self._journal.append({"event": event, "time": _now_ms(), **fields})
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
            _logger.warning("MLflow will not have %s: it could not be saved (%s)", what, brief(error))


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


def _param(value: Any) -> str:
    """A param's value: MLflow takes no more than 6,000 characters."""
    text = mask(str(value))
    return text if len(text) <= 6000 else text[:5999] + "…"


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
