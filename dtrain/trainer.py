"""Owns the face that users see: Keras's verbs, for many workers.

Checks what it is given, starts workers when the first verb needs them, and puts the rooms below together. It decides
nothing about training itself.
"""

import atexit
import logging
import os
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Self, TypeVar, get_args

import numpy as np

from dtrain import arguments, cluster
from dtrain.callback_state import import_state
from dtrain.config import CheckpointConfig, FailureConfig, MLflowConfig
from dtrain.controller import Controller
from dtrain.data.given import Given
from dtrain.data.source import DataSource
from dtrain.doctor import quick_horovod_problem
from dtrain.errors import ConfigError, WorkerDied
from dtrain.fit_run import FitRun
from dtrain.history import History
from dtrain.interrupts import Interrupts
from dtrain.progress import ProgressBar
from dtrain.recoveries import Recoveries
from dtrain.resume import AUTO, check_resume
from dtrain.runs import unique_name, validate_name
from dtrain.tracking import NullTracker
from dtrain.types import (
    Array,
    Batching,
    BatchPlan,
    Compression,
    Logs,
    Opened,
    Predictions,
    Purpose,
    StepOptions,
    Tree,
    WorkerInfo,
    WorkerSettings,
)
from dtrain.weights import Weights
from dtrain.worker_group import GLOO_SECONDS, GroupSpec, WorkerGroup, check_name, threads_for

if TYPE_CHECKING:
    import keras


log = logging.getLogger("dtrain")

Config = TypeVar("Config")


class Trainer:
    """Trains a compiled Keras model on many workers as if they were one.

    Args:
        model_fn: makes and compiles the model: `() -> keras.Model`, or with `config` given, `(config) -> keras.Model`.
            It is called on every worker.
        num_workers: how many workers hold a replica each; or (at least, at most): a fit then begins with those that
            the cluster has room for, goes on without those that die, and takes in more when there is room for them,
            between two segments of an epoch. What it trains on is the same mini-batches; the result is as close to
            that of a fixed number as sums in another order are.
        spares: how many more processes wait, TensorFlow imported, with the resources of a worker each, to take a dead
            one's place: that then takes a second or two instead of the start of a process. A new one is started
            instead in the background.
        use_gpu: one GPU for each worker.
        resources_per_worker: Ray's resources of each; default {"CPU": 1}. Custom resources too.
        threads_per_worker: TensorFlow threads of each; None: the node's cores shared among its workers.
        placement_strategy: Ray's: PACK, SPREAD, STRICT_PACK or STRICT_SPREAD.
        runtime_env: Ray's runtime environment for the workers.
        address: of a Ray cluster; default: RAY_ADDRESS, else a local Ray.
        config: handed to `model_fn`, and logged as parameters.
        seed: of weights, shuffling and random layers.
        deterministic: the same run gives the same bits; None: yes on CPU, no on GPU.
        sync_batch_norm: every BatchNormalization uses the statistics of the whole mini-batch, as one process would;
            False: those with `synchronized=True` do, the others use each worker's own rows.
        sparse_as_dense: sum the gradients of embeddings as dense tensors, which may be faster for small tables; the
            result then differs from plain Keras where the optimizer or clipping is not linear in repeated rows (Adam,
            say), which plain Keras does not add up before. False: gathered as they are, exact.
        compression: "fp16" or "bf16": dense gradients travel between workers as floats of 16 bits, and are added up as
            they were. Half of what is sent, and as fast as that where the network is what takes the time; each sum is
            rounded twice, to 3 digits (bf16: to 2; fp16 has none below 6e-8 nor above 65,504, which becomes infinite:
            loss scaling then settles at a smaller scale). None: exact.
        sync_every: local SGD: each worker trains by itself on its rows of so many mini-batches, then weights and
            optimizer become the mean of all workers'. So much less is sent; the result is another than one process's,
            and another for each number of workers. The end of an epoch, a checkpoint within one, and mini-batches of
            other shapes end such a round early. Callbacks see every so many steps. 1: gradients are summed in every
            step, exact.
        run_name: names the MLflow run and the folder under `storage_path`; None: a unique one, which is printed.
        storage_path: folder or fsspec URL of the runs; default ./dtrain_runs.
        checkpoint: True: after every epoch, the newest 3 kept; False: none; or a `dtrain.CheckpointConfig`.
        failure: what a fit survives; None: `dtrain.FailureConfig()`: where workers die it goes on in place, with new
            processes for them; from its newest checkpoint where all do.
        tracking: True: MLflow with its defaults; False: none; or a `dtrain.MLflowConfig`.

    Raises:
        ConfigError: an argument is wrong. Nothing was started.

    Example:
        >>> with dtrain.Trainer(make_model, num_workers=4) as trainer:
        ...     history = trainer.fit(x, y, batch_size=64, epochs=5)
        ...     trainer.evaluate(x_test, y_test)

    Workers start at the first verb and stop at `shutdown`, at the end of `with`, or at exit.
    """

    def __init__(
        self,
        model_fn: "Callable[..., keras.Model]",
        *,
        num_workers: int | tuple[int, int] = 1,
        spares: int = 0,
        use_gpu: bool = False,
        resources_per_worker: Mapping[str, float] | None = None,
        threads_per_worker: int | None = None,
        placement_strategy: str = "PACK",
        runtime_env: Mapping[str, Any] | None = None,
        address: str | None = None,
        config: Mapping[str, Any] | None = None,
        seed: int = 0,
        deterministic: bool | None = None,
        sync_batch_norm: bool = False,
        sparse_as_dense: bool = False,
        compression: Compression | None = None,
        sync_every: int = 1,
        run_name: str | None = None,
        storage_path: str | os.PathLike[str] | None = None,
        checkpoint: bool | CheckpointConfig = True,
        failure: FailureConfig | None = None,
        tracking: bool | MLflowConfig = True,
    ) -> None:
        arguments.check_platform()
        self._pickled_model_fn = arguments.pickled_model_fn(model_fn, config)
        (self.min_workers, self.num_workers), self._resources = arguments.check_resources(
            num_workers, use_gpu, resources_per_worker, placement_strategy
        )
        if threads_per_worker is not None:
            arguments.whole_number("threads_per_worker", threads_per_worker, 1)
        self.spares = arguments.whole_number("spares", spares, 0)
        if self.spares and self.num_workers == 1:
            raise ConfigError(
                f"spares={spares} needs num_workers=2 or more: who takes a dead worker's place is told the state by one"
                " that lives"
            )
        problem = quick_horovod_problem(gpu=use_gpu) if self.num_workers > 1 else None
        if problem:
            raise ConfigError(problem)
        self._address = cluster.check_address(address)
        self.seed = arguments.whole_number("seed", seed, 0)
        self.run_name = validate_name(run_name) if run_name is not None else None
        self.storage_path = os.fspath(storage_path) if storage_path is not None else "dtrain_runs"
        self.checkpoint = _config("checkpoint", checkpoint, CheckpointConfig)
        self.tracking = _config("tracking", tracking, MLflowConfig)
        if failure is not None and not isinstance(failure, FailureConfig):
            raise ConfigError(f"failure={failure!r} must be a dtrain.FailureConfig, or None")
        self.failure = failure or FailureConfig()
        if self.spares and (self.failure.on_loss == "shrink" or self.min_workers < self.num_workers):
            what = "on_loss='shrink'" if self.failure.on_loss == "shrink" else f"num_workers={num_workers!r}"
            raise ConfigError(f"spares={spares} contradicts {what}, which replaces nobody; leave out one")
        self.model_fn, self.config = model_fn, config
        self.deterministic = not use_gpu if deterministic is None else deterministic
        self.sync_batch_norm, self.sparse_as_dense = bool(sync_batch_norm), bool(sparse_as_dense)
        if compression not in (None, *get_args(Compression)):
            raise ConfigError(f"compression={compression!r} must be 'fp16', 'bf16' or None")
        self.compression = compression
        self.sync_every = arguments.whole_number("sync_every", sync_every, 1)
        if self.sync_every > 1:
            refused = {
                "sync_batch_norm=True": self.sync_batch_norm,
                "sparse_as_dense=True": self.sparse_as_dense,
                f"compression={compression!r}": compression is not None,
                "on_nan='skip'": self.failure.on_nan == "skip",
            }
            for option in (option for option, is_set in refused.items() if is_set):
                raise ConfigError(
                    f"sync_every={sync_every} contradicts {option}, which is about what workers exchange in every step;"
                    " leave one out"
                )
        self._use_gpu = use_gpu
        self._threads = threads_per_worker
        self._strategy = placement_strategy
        self._runtime_env = dict(runtime_env or {})
        self.interrupts = Interrupts()
        self._group: WorkerGroup | None = None
        self._num_fits = 0
        self._last_fit_failed = False
        self._weights = Weights(model_fn, config)
        _shut_down_at_exit(self)

    # --- Keras's verbs

    def fit(
        self,
        x: Any = None,
        y: Tree = None,
        batch_size: int | None = None,
        epochs: int = 1,
        verbose: int | str = "auto",
        callbacks: Any = None,
        validation_split: float = 0.0,
        validation_data: Any = None,
        shuffle: bool | str = True,
        class_weight: Mapping[int, float] | None = None,
        sample_weight: Tree = None,
        initial_epoch: int = 0,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_batch_size: int | None = None,
        validation_freq: int | Sequence[int] = 1,
        *,
        resume: bool | str = False,
    ) -> History:
        """Train. Every argument means what it means in `keras.Model.fit`.

        `batch_size` is the mini-batch of the whole job, whatever the number of workers. `x` is an array, a nested dict
        or list of arrays, a `dtrain.data` source, a PyDataset, a small finite tf.data.Dataset, or a function that
        returns the whole data, the same on each worker: any of these, a tuple (x, y) or (x, y, sample_weight) of
        arrays, or a generator. What comes in batches brings the mini-batches of the whole job: each worker reads all
        of them and keeps its rows. A tf.data.Dataset itself is read once, here: its batches come in one order in every
        epoch. Each fit is one MLflow run; the weights go on from the last.

        `resume="auto"` goes on with the run of this Trainer's `run_name` where its newest checkpoint that is whole has
        it, or begins it; `resume=<URL>` goes on from that checkpoint. With the same arguments, data and number of
        workers the run ends bit for bit as if it had never been stopped (on CPU, where `deterministic` is on). A run
        that is done is not trained again.

        Returns:
            The history, and where the run is recorded.

        Raises:
            ConfigError, DataError: what was passed is wrong; no worker was started.
            CheckpointError: what is to be gone on from is missing, damaged, or of another model.
            WorkerError: a worker raised, or workers died more often than `failure` allows; carries the rank, host and
                traceback of the one to blame.
            KeyboardInterrupt: Ctrl-C; for SIGTERM `dtrain.interrupts.Terminated`, which is one.
        """
        resume = check_resume(resume, self.run_name, self.checkpoint is not None)
        number = self._num_fits - int(resume == AUTO and self._last_fit_failed)
        wanted = arguments.fit_arguments(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            initial_epoch=initial_epoch,
            validation_split=validation_split,
            validation_data=validation_data,
            shuffle=shuffle,
            class_weight=class_weight,
            sample_weight=sample_weight,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
            seed=(self.seed, number),
            record_steps=self.tracking is not None,
            check_replicas_every=self.failure.check_replicas_every,
        )
        hooks = arguments.callback_list(callbacks)
        with self.interrupts:
            run = FitRun(self, wanted, verbose, self._name_of_fit(number), resume)
            self._num_fits, self._last_fit_failed = number + 1, True
            history = run.train(hooks)
            self._last_fit_failed = False
            return history

    def evaluate(
        self,
        x: Any = None,
        y: Tree = None,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        sample_weight: Tree = None,
        steps: int | None = None,
        callbacks: Any = None,
        return_dict: bool = False,
    ) -> Any:
        """The loss and metrics of the whole data set, exact over all workers; as in `keras.Model.evaluate`.

        `x` is what `fit` takes.
        """
        data = arguments.data_of(x, y, sample_weight)
        plan = arguments.plan_of(data, batch_size, steps, "steps", in_any_order=True)
        logs: Logs = self._run_pass("evaluate", plan, data, callbacks, verbose)[0]
        return logs if return_dict else self._flat_logs(logs)

    def predict(
        self,
        x: Any,
        batch_size: int | None = None,
        verbose: int | str = "auto",
        steps: int | None = None,
        callbacks: Any = None,
    ) -> Any:
        """Predictions for all rows, in their order; as in `keras.Model.predict`. `x` is what `fit` takes.

        Where a callback looks at each batch the first worker predicts alone, so that it sees all of them (of data that
        come in batches it sees the first worker's rows of each). What it stops with `self.model.stop_predicting` ends
        with the rows that it has seen.
        """
        data = arguments.data_of(x)
        plan = arguments.plan_of(data, batch_size, steps, "steps")
        return _in_order(self._run_pass("predict", plan, data, callbacks, verbose))

    def train_on_batch(
        self,
        x: Any,
        y: Tree = None,
        sample_weight: Tree = None,
        class_weight: Mapping[int, float] | None = None,
        return_dict: bool = False,
    ) -> Any:
        """One update on one mini-batch, split over the workers; as in `keras.Model.train_on_batch`."""
        logs = self._on_batch("train", arguments.source_of(x, y, sample_weight, class_weight))
        return logs if return_dict else self._flat_logs(logs)

    def test_on_batch(self, x: Any, y: Tree = None, sample_weight: Tree = None, return_dict: bool = False) -> Any:
        """The loss and metrics of one mini-batch, split over the workers; as in `keras.Model.test_on_batch`."""
        logs = self._on_batch("test", arguments.source_of(x, y, sample_weight))
        return logs if return_dict else self._flat_logs(logs)

    def predict_on_batch(self, x: Any) -> Any:
        """Predictions for one mini-batch, split over the workers; as in `keras.Model.predict_on_batch`."""
        source = arguments.source_of(x)
        return self.predict(source, batch_size=len(source), verbose=0)

    # --- the model

    @property
    def model(self) -> "keras.Model":
        """A local keras.Model with the weights as they are now; built when first asked for, on the CPU."""
        self._let_go_of_the_dead()
        try:
            return self._weights.local_model(self._group)
        except WorkerDied:
            if not self._weights.outlive(self._group):  # nobody is left who has them
                raise
            self._group = None
            return self._weights.local_model(None)

    def get_weights(self) -> list[Array]:
        """As `keras.Model.get_weights`."""
        weights: list[Array] = self.model.get_weights()
        return weights

    def set_weights(self, weights: Sequence[Array]) -> None:
        """As `keras.Model.set_weights`, on all workers."""
        model = self.model
        model.set_weights(weights)
        self._weights.take_model(model, self._group)

    def load_weights(self, path: str | os.PathLike[str]) -> None:
        """As `keras.Model.load_weights`, on all workers."""
        model = self.model
        model.load_weights(path)
        self._weights.take_model(model, self._group)

    def save(self, path: str | os.PathLike[str]) -> None:
        """As `keras.Model.save`: the file is plain Keras and knows nothing of dtrain."""
        self._built_model().save(path)

    def export(self, path: str | os.PathLike[str]) -> None:
        """As `keras.Model.export`: a SavedModel, to be served."""
        self._built_model().export(os.fspath(path), verbose=False)

    def build(self, x: Any, y: Tree = None) -> None:
        """Let a model that learns its shapes from data know them before the first verb; `x` is read by rows.

        Raises:
            DataError: it is data in batches, or none.
        """
        source = arguments.source_of(x, y)
        self._weights.see(source.read(np.zeros(1, np.int64)))

    def summary(self) -> None:
        """As `keras.Model.summary`."""
        self.model.summary()

    def restore(self, url: str | os.PathLike[str]) -> None:
        """Take over the weights and the optimizer of a checkpoint; it is verified before any of them is touched.

        Raises:
            CheckpointError: it is missing, damaged, or of another model.
        """
        self._weights.take_checkpoint(os.fspath(url), self._group)

    def _built_model(self) -> "keras.Model":
        model = self.model
        if not model.built:
            raise ConfigError(
                "the model learns its shapes from its first data and has seen none: call trainer.build(x), or give its"
                " first layer an Input"
            )
        return model

    # --- workers

    @property
    def workers(self) -> tuple[WorkerInfo, ...]:
        """Where the ranks run; empty while none do."""
        return self._group.workers if self._group is not None else ()

    @property
    def world_size(self) -> int:
        """How many ranks there are, or (while none run) may be."""
        return len(self.workers) or self.num_workers

    def shutdown(self, keep_weights: bool = True) -> None:
        """Stop the workers. The weights are kept unless told otherwise; the next verb starts workers again."""
        group, self._group = self._group, None
        with self.interrupts:
            try:
                if group is not None and keep_weights:
                    self._weights.keep(group)
            finally:
                with self.interrupts.graceful():  # an end that is cut short leaves processes behind
                    if group is not None:
                        group.close()
                    cluster.disconnect(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After Ctrl-C the workers may be stuck, and are not asked for anything.
        self.shutdown(keep_weights=kind is None or issubclass(kind, Exception))

    def start(
        self,
        data: Given,
        plan: BatchPlan | Batching,
        display: ProgressBar,
        purpose: Purpose,
        first_epoch: int = 0,
        run_name: str | None = None,
    ) -> tuple[WorkerGroup, Opened]:
        """The group of workers, with the data open and the model built; its processes start now unless they run."""
        self._weights.check_local_model()
        self._let_go_of_the_dead()
        if self._group is None:
            run_name = run_name or self.run_name or unique_name()
            self.check_room(run_name)
            self._group = self._new_group(run_name, display)
        group = self._group
        self._enter_directory(group)
        if group.description is None:
            display.status("building the model")
        opened: Opened = group.call("open", purpose, cluster.put(data), plan, first_epoch)[0]
        group.description = opened.model or group.description
        self._weights.see(opened.example)
        self._weights.deliver(group)
        return group, opened

    def check_room(self, run_name: str) -> None:
        """Connect to Ray, and refuse what its workers could not be started for. Does nothing while they run.

        Raises:
            ConfigError: there is no such cluster, it can never hold the workers, or the run's are alive elsewhere.
        """
        if self._group is None or self._group.closed:
            cluster.connect(self._address, self)
            cluster.check_resources(self.min_workers, self._resources, self._strategy, self.spares)
            check_name(run_name)

    def _new_group(self, run_name: str, display: ProgressBar) -> WorkerGroup:
        spec = GroupSpec(
            run_name=run_name,
            num_workers=self.min_workers,
            extra_workers=self.num_workers - self.min_workers,
            spares=self.spares,
            resources=self._resources,
            strategy=self._strategy,
            settings=lambda cpus, workers_on_node: self._settings(run_name, cpus, workers_on_node),
            runtime_env=self._runtime_env,
            timeout=(self.failure.hang_timeout or 50.0) + GLOO_SECONDS,
        )
        group = WorkerGroup(spec, self.interrupts)
        try:
            group.start(display.status)
            self._enter_directory(group)
            group.call("make_model", self._pickled_model_fn)
        except BaseException:
            group.close()
            raise
        return group

    def _enter_directory(self, group: WorkerGroup) -> None:
        """Let relative paths in the user's code mean on the workers what they mean here, where there is that folder."""
        directory = os.getcwd()
        if group.directory != directory:
            is_there = group.call("enter", directory)[0]
            group.directory = directory
            if not is_there:
                log.info("rank 0 has no folder %s: relative paths in callbacks are relative to its own", directory)

    def _settings(self, run_name: str, cpus: float, workers_on_node: int) -> WorkerSettings:
        intra, inter = threads_for(cpus, workers_on_node)
        return WorkerSettings(
            run_name=run_name,
            seed=self.seed,
            deterministic=self.deterministic,
            use_gpu=self._use_gpu,
            intra_threads=self._threads or intra,
            inter_threads=inter,
            keras=_keras_settings(),
            steps=StepOptions(
                self.sync_batch_norm,
                self.sparse_as_dense,
                self.failure.on_nan == "skip",
                self.compression,
                self.sync_every,
            ),
            elastic=self.min_workers < self.num_workers,
        )

    def _name_of_fit(self, number: int) -> str:
        if self.run_name is None:
            return unique_name()
        return self.run_name if number == 0 else f"{self.run_name}-{number + 1}"

    def weights_change(self) -> None:
        """The workers are about to train: the local model is no longer current."""
        self._weights.change()

    def machine(self) -> dict[str, str]:
        """Of the workers, what the bits of floating-point numbers hang on: their CPUs, and the first one's threads."""
        if self._group is None:
            return {}
        cpus = dict.fromkeys(worker.cpu for worker in self._group.workers)
        return {"cpu": " and ".join(cpus), "threads": str(self._group.intra_threads)}

    def circumstances(self) -> dict[str, str]:
        """What else they hang on, of what the user has set."""
        return {
            "deterministic": str(self.deterministic),
            "sync_batch_norm": str(self.sync_batch_norm),
            "sparse_as_dense": str(self.sparse_as_dense),
            "compression": str(self.compression),
            "sync_every": str(self.sync_every),
            "on_nan": self.failure.on_nan,
            "floatx": str(_keras_settings().get("floatx", "float32")),
            "dtype_policy": str(_keras_settings().get("dtype_policy", "float32")),
        }

    def keep_for_fall_back(self, checkpoint: str) -> None:
        """The newest checkpoint: what goes on from there if the workers are lost."""
        self._weights.committed(checkpoint)

    def begin_again(self) -> None:
        """The workers died before the first step of what they trained: new ones are to begin as these did."""
        self._weights.begin_again()

    def _let_go_of_the_dead(self) -> None:
        """Workers that a failure ended are none; what became of their weights is settled before anything goes on."""
        if self._group is not None and self._group.closed:
            self._weights.keep(self._group)
            self._group = None
        self._weights.fall_back()

    def _run_pass(
        self,
        task: Literal["evaluate", "predict"],
        plan: BatchPlan | Batching,
        data: Given,
        callbacks: Any,
        verbose: int | str,
    ) -> list[Any]:
        """Run `evaluate` or `predict` on all workers; what each returned. Again with new ones where some have died."""
        hooks = arguments.callback_list(callbacks)
        with self.interrupts, ProgressBar(verbose, 1, workers=self.world_size, task=task) as display:
            recoveries = Recoveries(self.failure)
            while True:
                try:
                    return self._pass_once(task, plan, data, hooks, verbose, display)
                except WorkerDied as error:
                    recoveries.begin(error, 0, self.world_size)
                    if not self._weights.outlive(self._group):
                        raise
                    display.note(f"{error.message}: beginning {task} again with new workers ({recoveries})")

    def _pass_once(
        self,
        task: Literal["evaluate", "predict"],
        plan: BatchPlan | Batching,
        data: Given,
        hooks: Sequence[Any],
        verbose: int | str,
        display: ProgressBar,
    ) -> list[Any]:
        group, opened = self.start(data, plan, display, task)
        display.expect(opened.steps_per_epoch)
        controller = Controller(group, NullTracker(), display, self.interrupts)
        results = controller.run_pass(task, plan, arguments.pickled_hooks(hooks, verbose))
        if hooks:
            for callback, state in zip(hooks, group.call("callback_states")[0], strict=True):
                import_state(callback, state)
        return results

    def _on_batch(self, kind: str, source: DataSource) -> Logs:
        with self.interrupts, ProgressBar(0) as display:
            purpose: Purpose = "train" if kind == "train" else "evaluate"
            group, _ = self.start(source, BatchPlan(len(source), len(source)), display, purpose)
            if kind == "train":
                self._weights.change()
            logs: Logs = group.call("on_batch", kind)[0]
            return logs

    def _flat_logs(self, logs: Logs) -> Any:
        """Keras's form of logs where no dict is asked for: the loss alone, or a list, with names that occur twice."""
        assert self._group is not None and self._group.description is not None
        names = self._group.description.metrics
        others = (name for name in sorted(logs) if name not in names)
        values = [logs[name] for name in (*names, *others) if name in logs]
        return values[0] if len(values) == 1 else values


def _config(name: str, value: Any, kind: type[Config]) -> Config | None:
    """What True, False or a configuration object stand for."""
    if isinstance(value, bool):
        return kind() if value else None
    if not isinstance(value, kind):
        raise ConfigError(f"{name}={value!r} must be True, False or a dtrain.{kind.__name__}")
    return value


def _in_order(ranks: Sequence[Predictions]) -> Tree:
    """The ranks' outputs as one, mini-batch by mini-batch, and in rank order within each."""
    parts = [part for part in ranks if part.outputs is not None]
    batches = np.concatenate([np.repeat(np.arange(len(part.sizes)), part.sizes) for part in parts])
    in_order = bool(np.all(batches[1:] >= batches[:-1]))
    order = None if in_order else np.argsort(batches, kind="stable")
    return _concatenate([part.outputs for part in parts], order)


def _concatenate(parts: Sequence[Tree], order: Array | None) -> Tree:
    """Join outputs, arrays or nested dicts, lists and tuples of arrays, along their rows; then take these in `order`.

    None: as they are.
    """
    first = parts[0]
    if isinstance(first, Mapping):
        return {key: _concatenate([part[key] for part in parts], order) for key in first}
    if isinstance(first, (list, tuple)):
        return type(first)(_concatenate([part[i] for part in parts], order) for i in range(len(first)))
    joined = np.concatenate(parts)
    return joined if order is None else joined[order]


def _keras_settings() -> dict[str, Any]:
    """What this process has set in Keras; nothing where it is not imported."""
    keras = sys.modules.get("keras")
    if keras is None or not hasattr(keras, "config"):
        return {}
    return {
        "floatx": keras.config.floatx(),
        "epsilon": keras.config.epsilon(),
        "image_data_format": keras.config.image_data_format(),
        "dtype_policy": keras.config.dtype_policy().name,
    }


def _shut_down_at_exit(trainer: Trainer) -> None:
    reference = weakref.ref(trainer)

    def shut_down() -> None:
        alive = reference()
        if alive is not None:
            alive.shutdown(keep_weights=False)

    atexit.register(shut_down)
