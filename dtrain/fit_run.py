"""Owns one fit from its folder to its last artifact: what is on record of it, whatever becomes of it."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dtrain import cluster
from dtrain.arguments import FitArguments, pickled_hooks
from dtrain.callback_state import import_state
from dtrain.checkpoint import LoadedCheckpoint, Manifest
from dtrain.checkpointer import Saving
from dtrain.controller import Controller, FitRecord
from dtrain.data.source import DataSource, Description, describe, keras_batch
from dtrain.description import describe_run, versions
from dtrain.errors import CheckpointError, ConfigError, TakenOver, WorkerDied
from dtrain.fit_state import SavedFit, history_of, read
from dtrain.history import History
from dtrain.lease import Lease
from dtrain.progress import ProgressBar
from dtrain.recoveries import Recoveries
from dtrain.resume import (
    AUTO,
    Resume,
    as_begun,
    check_plan,
    find,
    in_words,
    is_done,
    other_circumstances,
    plan_on_record,
)
from dtrain.runs import RunFolder
from dtrain.storage import Folder
from dtrain.tracking import MLflowTracker, NullTracker, Status, TrackedRun, Tracker
from dtrain.types import BatchPlan, ModelDescription, Opened

if TYPE_CHECKING:
    from dtrain.trainer import Trainer

CURVES = "training_curves.png"
RECOVERIES = "recoveries.json"


class FitRun:
    """One fit of a Trainer.

    Args:
        trainer: whose model is trained.
        wanted: the plan and the data.
        verbose: as in Keras.
        name: of the run.
        resume: what it goes on from, as `dtrain.resume.check_resume` returns it.

    Raises:
        ConfigError: the run cannot be recorded or stored as configured, or another process holds it; nothing was
            started.
        CheckpointError: what it is to go on from is missing, damaged, or does not fit.
    """

    def __init__(
        self, trainer: "Trainer", wanted: FitArguments, verbose: int | str, name: str, resume: Resume = False
    ) -> None:
        self._trainer = trainer
        self._wanted = wanted
        self._plan = wanted.plan
        self._verbose = verbose
        self._name = name
        self._resume = resume
        self._record = FitRecord()
        self._model: ModelDescription | None = None
        self._data = {"train": wanted.train, "validation": wanted.validation}
        self._descriptions: dict[str, Description] = {}
        self._opened: dict[str, Opened] = {}
        self._display = ProgressBar(verbose, wanted.plan.epochs, workers=trainer.world_size)
        self._folder: RunFolder | None = None
        self._lease: Lease | None = None
        self._goes_on = False  # with the run of that name: another's checkpoint begins a run of its own
        self._loaded: LoadedCheckpoint | None = None
        self._passed_over: Sequence[str] = ()
        self._saved: SavedFit | None = None
        self._is_done = False  # an earlier attempt did all, and has said so
        self._recoveries = Recoveries(trainer.failure, self._log_recoveries)
        self._tracker: Tracker = NullTracker()
        if trainer.tracking is not None or trainer.checkpoint is not None:
            self._goes_on = resume == AUTO or _is_of_run(resume, trainer.storage_path, name)
            self._folder = RunFolder.create(trainer.storage_path, name, exist_ok=self._goes_on)
            self._lease = Lease.acquire(self._folder.url)  # where it is refused, the folder is its holder's
        try:
            self._find_start(resume)
            if self._folder is not None:
                self._tracker = self._new_tracker(self._folder)
                self._tracker.check()
            if not self._is_done:
                trainer.check_room(name)
        except BaseException:
            if self._folder is not None:
                self._folder.discard()  # or the next try would say that the run exists; while it is still ours
            if self._lease is not None:
                self._lease.release()
            raise

    def _find_start(self, resume: Resume) -> None:
        """Read the checkpoint to go on from, and see whether it fits, as far as that is known here."""
        self._loaded, self._passed_over = find(resume, self._folder)
        if self._loaded is None:
            return
        newest = self._folder.checkpoints.latest() if self._folder is not None and self._goes_on else None
        if resume != AUTO and newest is not None and newest != self._loaded.checkpoint:
            raise ConfigError(
                f"resume={resume!r} is not the newest checkpoint of run_name={self._name!r}, {newest.url}: going on"
                " from it would do away with what was trained since; give another run_name to begin a run of its own"
                " from there"
            )
        self._saved = read(self._loaded)
        self._loaded = dataclasses.replace(self._loaded, tensors={})  # they are in `_saved` until the workers have them
        self._record.steps, self._record.position = self._saved.step, self._saved.position
        self._record.checkpoint = self._loaded.checkpoint
        self._record.history, self._record.epochs = history_of(self._saved.callbacks)
        self._plan = as_begun(self._loaded.manifest, self._plan)
        if isinstance(self._plan.train, BatchPlan):
            check_plan(self._loaded.manifest, plan_on_record(self._plan, self._digest_of("train")))
        if self._folder is not None and self._folder.read_info().get("state") == "finished":
            self._is_done = is_done(self._loaded.manifest, self._plan.epochs)

    def _new_tracker(self, folder: RunFolder) -> Tracker:
        tracked = self._loaded.manifest.extra.get("tracked") if self._loaded is not None and self._goes_on else None
        resumed = TrackedRun(**tracked) if tracked is not None else None
        config = self._trainer.tracking
        if config is None:
            return NullTracker(resumed)
        return MLflowTracker(config, folder.journal_path, on_run=self._tell_ray, resume=resumed)

    def train(self, callbacks: Sequence[Any]) -> History:
        """Train, and put everything on record."""
        try:
            if self._is_done:
                return self._nothing_to_do()
            with self._display, self._recorded():
                self._train(callbacks)
            return self._history()
        finally:
            if self._lease is not None:
                self._lease.release()

    def _train(self, callbacks: Sequence[Any]) -> None:
        """Train to the end, with new workers from the newest checkpoint on where some have died."""
        while True:
            try:
                self._train_on(callbacks)
                break
            except WorkerDied as error:
                self._fall_back(error)
        self._recoveries.settle()
        for callback, state in zip(callbacks, self._record.callback_states, strict=True):
            import_state(callback, state)
        self._log_results()

    def _fall_back(self, error: WorkerDied) -> None:
        """Get ready to go on from the newest checkpoint; raises the error where that is not to be."""
        record = self._record
        self._recoveries.begin(error, record.steps, self._trainer.world_size)
        finished = record.steps
        if self._folder is not None and self._folder.checkpoints.latest() is not None:
            self._goes_on = True
            self._find_start(AUTO)
            assert self._loaded is not None
            self._note_passed_over()
            self._trainer.keep_for_fall_back(self._loaded.checkpoint.url)
        elif finished == (self._loaded.manifest.step if self._loaded is not None else 0):  # nothing is lost
            self._trainer.begin_again()
            self._find_start(self._resume)
        else:
            raise self._recoveries.last_word(error)
        self._recoveries.redo(max(0, finished - record.steps))
        place = in_words(record.position)
        self._display.note(f"{error.message}: going on at {place} with new workers ({self._recoveries})")

    def _log_recoveries(self) -> None:
        done = self._recoveries.done
        self._tracker.log(self._record.steps, {"recoveries": len(done)})
        self._tracker.log_text(json.dumps([dataclasses.asdict(recovery) for recovery in done], indent=1), RECOVERIES)

    def _train_on(self, callbacks: Sequence[Any]) -> None:
        trainer, wanted, plan = self._trainer, self._wanted, self._plan
        group, opened = trainer.start(wanted.train, plan.train, self._display, "train", plan.initial_epoch, self._name)
        self._opened["train"] = opened
        if wanted.validation is not None:
            assert plan.validation is not None
            _, found = trainer.start(wanted.validation, plan.validation, self._display, "validation")
            self._opened["validation"] = found
        self._display.expect(opened.steps_per_epoch)
        on_record = plan_on_record(plan, self._digest_of("train"), opened.plan)
        changed = check_plan(self._loaded.manifest, on_record) if self._loaded is not None else []
        if self._model is None:
            self._model = group.description
            self._announce(changed)
        trainer.weights_change()
        check_ours = self._lease.check_known if self._lease is not None else lambda: None
        known = self._recoveries, trainer.failure, trainer.sync_every, check_ours
        Controller(group, self._tracker, self._display, trainer.interrupts, *known).fit(
            plan,
            opened.plan or opened.steps_per_epoch,
            pickled_hooks(callbacks, self._verbose),
            self._saving(on_record),
            self._record,
            self._take_saved(),
        )

    def _take_saved(self) -> SavedFit | None:
        """Hand over what may be large, and hold it no longer."""
        saved, self._saved = self._saved, None
        return saved

    def _nothing_to_do(self) -> History:
        """An earlier attempt has finished: its weights are taken over, and nothing is trained."""
        assert self._loaded is not None
        url = self._loaded.checkpoint.url
        with self._display:
            self._display.note(f"run {self._name} is done: nothing is left to train; the weights are those of {url}")
            self._tracker.drain()
        self._trainer.restore(url)
        return self._history()

    @contextlib.contextmanager
    def _recorded(self) -> Iterator[None]:
        """End the MLflow run with the right status, and say in the folder how it went."""
        self._write_info("running")
        try:
            yield
        except TakenOver:  # the record is another's by now
            raise
        except KeyboardInterrupt:
            self._finish("KILLED", "interrupted")
            raise
        except BaseException as error:
            self._finish("FAILED", str(error))
            raise
        self._finish("FINISHED")

    def _finish(self, status: Status, error: str | None = None) -> None:
        """Put on record how it ended.

        Raises:
            TakenOver: the record is another driver's by now.
        """
        self._check_lease()
        if self._record.checkpoint is not None:
            self._trainer.keep_for_fall_back(self._record.checkpoint.url)
        if status != "FINISHED" and self._model is None:
            self._start_tracking()  # it failed before the model was known: on record all the same
        self._display.status("finishing the record")
        try:
            self._tracker.finish(status, error)
            if self._tracker.run_id is not None:
                self._tell_ray(self._tracker.run_id)  # again: Ray writes the job's state over it at times
        finally:
            self._write_info(status.lower())

    def _check_lease(self) -> None:
        """Raises TakenOver where the run is known to be another's."""
        if self._lease is not None:
            try:
                self._lease.check()
            except TakenOver:
                raise
            except CheckpointError:  # nobody can say
                return

    def _announce(self, changed: Sequence[str]) -> None:
        """What the user is told before the first step: the run, and in what it is not as one would expect."""
        self._start_tracking()
        assert self._model is not None
        self._display.note(f"run {self._name}")
        if self._loaded is not None:
            self._announce_resume(self._loaded, changed)
        if self._trainer.world_size > 1:
            for exception in self._model.exceptions:
                self._display.note(f"not as in one process: {exception}")

    def _announce_resume(self, loaded: LoadedCheckpoint, changed: Sequence[str]) -> None:
        note = self._display.note
        self._note_passed_over()
        note(f"going on at {in_words(loaded.manifest.position)} from {loaded.checkpoint.url}")
        if self._trainer.seed != loaded.manifest.seed:
            note(f"seed={self._trainer.seed} has no effect: the run goes on with {loaded.manifest.seed}")
        begun, wanted = self._plan.initial_epoch, self._wanted.plan.initial_epoch
        if wanted not in (0, begun):
            note(f"initial_epoch={wanted} has no effect: the run goes on where it was, and has begun with {begun}")
        structure = self._model.structure if self._model is not None else ""
        world_size = self._trainer.world_size
        other = [*changed, *other_circumstances(loaded.manifest, world_size, self._versions(), structure)]
        if not self._trainer.deterministic:
            other.append("deterministic=False")
        if other:
            note(f"not bit for bit what an undisturbed run would give: {', '.join(other)}")

    def _note_passed_over(self) -> None:
        for reason in self._passed_over:
            self._display.note(f"passed over: {reason}")

    def _versions(self) -> dict[str, str]:
        """What the result hangs on, besides the rows that are trained on, and in what order."""
        held_out, plan = self._digest_of("validation"), self._plan
        validation = {"validation_digest": held_out} if held_out is not None else {}
        if (passes := plan.validation) is not None:
            steps = passes.steps_per_epoch if isinstance(passes, BatchPlan) else passes.steps
            validation |= {"validation_freq": str(plan.validation_freq), "validation_steps": str(steps)}
        return {**versions(), **self._trainer.machine(), **self._trainer.circumstances(), **validation}

    def _tell_ray(self, run_id: str) -> None:
        cluster.add_job_metadata({"dtrain_run": self._name, "mlflow_run_id": run_id})

    def _start_tracking(self) -> None:
        trainer = self._trainer
        if trainer.tracking is None:
            return
        model_fn = trainer.model_fn
        settings = {
            "world_size": trainer.world_size,
            "seed": trainer.seed,
            "deterministic": trainer.deterministic,
            "model_fn": f"{model_fn.__module__}.{getattr(model_fn, '__qualname__', type(model_fn).__name__)}",
        }
        address = cluster.address() or "local"
        described = {context: self._description_of(context) for context in self._data}
        known = self._data, described, self._opened, self._model, settings, trainer.config, address
        self._tracker.start(describe_run(self._name, self._plan, *known))

    def _description_of(self, context: str) -> Description | None:
        """What is in the data, where they have rows and anybody will ask; found out once."""
        given = self._data[context]
        if (self._folder is None and self._loaded is None) or not isinstance(given, DataSource):
            return None
        if context not in self._descriptions:
            self._descriptions[context] = describe(given)
        return self._descriptions[context]

    def _digest_of(self, context: str) -> str | None:
        found = self._description_of(context)
        return found.digest if found is not None else None

    def _saving(self, plan: dict[str, Any]) -> Saving | None:
        if self._trainer.checkpoint is None or self._folder is None or self._model is None:
            return None
        manifest = Manifest(
            step=0,
            position=self._record.position,
            world_size=self._trainer.world_size,
            seed=self._loaded.manifest.seed if self._loaded is not None else self._trainer.seed,
            model_digest=self._model.structure,
            versions=self._versions(),
            extra={"plan": plan, "monitor": self._trainer.checkpoint.monitor},
        )
        known = self._folder.checkpoints, self._trainer.checkpoint, manifest, self._begin, self._before_commit
        return Saving(*known, validates=self._plan.validation is not None)

    def _begin(self) -> None:
        """The workers have taken over the checkpoint: what is newer is not to be gone on from any more."""
        assert self._folder is not None and self._lease is not None
        if self._goes_on:
            self._lease.check()
            self._folder.checkpoints.rewind(self._loaded.checkpoint if self._loaded is not None else None)

    def _before_commit(self) -> dict[str, Any]:
        """Make sure that the run is still ours, and its journal no less than the checkpoint."""
        assert self._lease is not None
        self._lease.check()
        tracked = self._tracker.tracked()
        return {"tracked": dataclasses.asdict(tracked) if tracked is not None else None}

    def _log_results(self) -> None:
        """The curves and the trained model."""
        history = self._history()
        if history.epoch and self._folder is not None:
            figure = history.plot()
            if os.path.isdir(self._folder.url):
                try:
                    figure.savefig(os.path.join(self._folder.url, CURVES))
                except OSError as error:  # a full disk must not end what has trained to the end
                    self._display.note(f"{CURVES} cannot be written: {error}")
            self._tracker.log_figure(figure, CURVES)
        tracking = self._trainer.tracking
        if tracking is not None and tracking.log_model:
            self._display.status("logging the model")
            model = self._trainer.model
            from dtrain.keras_internals import has_call  # with what has been imported in silence by now

            if not has_call(model):
                self._display.note("the model has no call, so it is not logged: nobody could predict with it")
                return
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
            recoveries=self._recoveries.done,
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
            "metrics": newest_numbers(self._record.history),
            "mlflow_run_id": self._tracker.run_id,
        }
        with contextlib.suppress(OSError):  # the list of runs is a convenience: a full disk must not end the training
            self._folder.write_info({**self._folder.read_info(), **info})


def newest_numbers(history: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
    """What the run's folder says of a history: JSON values, so no metrics that are arrays."""
    return {key: float(values[-1]) for key, values in history.items() if values and np.ndim(values[-1]) == 0}


def _is_of_run(url: Resume, storage_path: str, name: str) -> bool:
    """Whether a checkpoint lies in the folder of the run of that name."""
    run = (Folder(storage_path) / name).url
    return isinstance(url, str) and Folder(url).url.startswith(f"{run}/")
