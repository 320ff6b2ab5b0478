"""Owns one fit from its folder to its last artifact: what is on record of it, whatever becomes of it."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dtrain import cluster
from dtrain.arguments import FitArguments, pickled_hooks
from dtrain.callback_state import import_state
from dtrain.checkpoint import Manifest
from dtrain.controller import Controller, FitRecord, Saving
from dtrain.data.source import keras_batch
from dtrain.description import describe_run, versions
from dtrain.history import History
from dtrain.progress import ProgressBar
from dtrain.runs import RunFolder
from dtrain.tracking import MLflowTracker, NullTracker, Status, Tracker
from dtrain.types import ModelDescription, Opened

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

CURVES = "training_curves.png"


class FitRun:
    """One fit of a Trainer.

    Args:
        trainer: whose model is trained.
        wanted: the plan and the data.
        verbose: as in Keras.
        name: of the run.

    Raises:
        ConfigError: the run cannot be recorded or stored as configured; nothing was started.
    """

    def __init__(self, trainer: "Trainer", wanted: FitArguments, verbose: int | str, name: str) -> None:
        self._trainer = trainer
        self._wanted = wanted
        self._verbose = verbose
        self._name = name
        self._record = FitRecord()
        self._model: ModelDescription | None = None
        self._opened: dict[str, Opened] = {}
        self._display = ProgressBar(verbose, wanted.plan.epochs, workers=trainer.num_workers)
        self._folder: RunFolder | None = None
        self._tracker: Tracker = NullTracker()
        if trainer.tracking is not None or trainer.checkpoint is not None:
            self._folder = RunFolder.create(trainer.storage_path, name)
        try:
            if trainer.tracking is not None and self._folder is not None:
                self._tracker = MLflowTracker(trainer.tracking, self._folder.journal_path, on_run=self._tell_ray)
                self._tracker.check()
            trainer.check_room(name)
        except BaseException:
            if self._folder is not None:
                self._folder.discard()  # or the next try would say that the run exists
            raise

    def train(self, callbacks: Sequence[Any]) -> History:
        """Train, and put everything on record."""
        wanted = self._wanted
        with self._display, self._recorded():
            plan, trainer = wanted.plan, self._trainer
            group, opened = trainer.start(
                wanted.train, plan.train, self._display, "train", plan.initial_epoch, self._name
            )
            self._opened["train"] = opened
            if wanted.validation is not None:
                assert plan.validation is not None
                _, found = trainer.start(wanted.validation, plan.validation, self._display, "validation")
                self._opened["validation"] = found
            self._display.expect(opened.steps_per_epoch)
            self._model = group.description
            self._announce()
            trainer.weights_change()
            Controller(group, self._tracker, self._display).fit(
                plan,
                opened.plan or opened.steps_per_epoch,
                pickled_hooks(callbacks, self._verbose),
                self._saving(),
                self._record,
            )
            for callback, state in zip(callbacks, self._record.callback_states, strict=True):
                import_state(callback, state)
            self._log_results()
        return self._history()

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """End the MLflow run with the right status, and say in the folder how it went."""
        self._write_info("running")
        try:
            yield
        except KeyboardInterrupt:
            self._finish("KILLED", "interrupted")
            raise
        except BaseException as error:
            self._finish("FAILED", str(error))
            raise
        self._finish("FINISHED")

    def _finish(self, status: Status, error: str | None = None) -> None:
        if self._record.checkpoint is not None:
            self._trainer.keep_for_fall_back(self._record.checkpoint.url)
        if status != "FINISHED" and self._model is None:
            self._start_tracking()  # it failed before the model was known: on record all the same
        self._display.status("finishing the record")
        self._tracker.finish(status, error)
        self._write_info(status.lower())

    def _announce(self) -> None:
        self._start_tracking()
        assert self._model is not None
        self._display.note(f"run {self._name}")
        if self._trainer.num_workers > 1:
            for exception in self._model.exceptions:
                self._display.note(f"not as in one process: {exception}")

    def _tell_ray(self, run_id: str) -> None:
        cluster.add_job_metadata({"dtrain_run": self._name, "mlflow_run_id": run_id})

    def _start_tracking(self) -> None:
        trainer, wanted = self._trainer, self._wanted
        if trainer.tracking is None:
            return
        model_fn = trainer.model_fn
        settings = {
            "world_size": trainer.num_workers,
            "seed": trainer.seed,
            "deterministic": trainer.deterministic,
            "model_fn": f"{model_fn.__module__}.{getattr(model_fn, '__qualname__', type(model_fn).__name__)}",
        }
        data = {"train": wanted.train, "validation": wanted.validation}
        address = cluster.address() or "local"
        self._tracker.start(
            describe_run(self._name, wanted.plan, data, self._opened, self._model, settings, trainer.config, address)
        )

    def _saving(self) -> Saving | None:
        if self._trainer.checkpoint is None or self._folder is None or self._model is None:
            return None
        manifest = Manifest(
            step=0,
            position=self._record.position,
            world_size=self._trainer.num_workers,
            seed=self._trainer.seed,
            model_digest=self._model.signature,
            versions=versions(),
        )
        return Saving(self._folder.checkpoints, self._trainer.checkpoint, manifest)

    def _log_results(self) -> None:
        """The curves and the trained model."""
        history = self._history()
        if history.epoch and self._folder is not None:
            figure = history.plot()
            if os.path.isdir(self._folder.url):
                figure.savefig(os.path.join(self._folder.url, CURVES))
            self._tracker.log_figure(figure, CURVES)
        tracking = self._trainer.tracking
        if tracking is not None and tracking.log_model:
            self._display.status("logging the model")
            model = self._trainer.model
            batch = keras_batch(self._opened["train"].example)
            inputs = batch[0] if isinstance(batch, tuple) else batch
            self._tracker.log_model(model, inputs, model.predict_on_batch(inputs))

    def _history(self) -> History:
        record = self._record
        return History(
            history=record.history,
            epoch=record.epochs,
            params={"verbose": self._verbose, "epochs": self._wanted.plan.epochs, "steps": self._steps_per_epoch()},
            run_id=self._tracker.run_id,
            checkpoint=record.checkpoint.url if record.checkpoint else None,
            run_name=self._name,
            url=self._folder.url if self._folder is not None else None,
            open_command=self._tracker.open_command(),
        )

    def _steps_per_epoch(self) -> int | None:
        opened = self._opened.get("train")
        return (opened.steps_per_epoch if opened else None) or self._record.steps_per_epoch

    def _write_info(self, state: str) -> None:
        if self._folder is None:
            return
        info = {
            "state": state,
            "step": self._record.steps,
            "position": dataclasses.asdict(self._record.position),
            "metrics": {key: values[-1] for key, values in self._record.history.items() if values},
            "mlflow_run_id": self._tracker.run_id,
        }
        with contextlib.suppress(OSError):  # the list of runs is a convenience: a full disk must not end the training
            self._folder.write_info({**self._folder.read_info(), **info})
