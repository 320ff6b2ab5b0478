"""Owns one rank: a model, its data and its place in the group; the only train, evaluate and predict loops.

It runs in a Ray actor or in a plain process alike, knows nothing of Ray or MLflow, and talks to other ranks through
its Collective alone. All ranks make the same calls in the same order.
"""

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.batch_norm import synchronize
from dtrain.callback_checkpoint import matched, prepare_resume, restore_states, save_states, without_tensors
from dtrain.callbacks import RankCallbacks
from dtrain.collective import Collective
from dtrain.data.checks import check_batch
from dtrain.data.given import Given
from dtrain.data.loader import Chunk, Feed, Loader
from dtrain.data.sampler import even_split, shard
from dtrain.data.source import ArraySource, Rows, common_shapes, keras_batch, leaves, map_tree, shapes_of
from dtrain.data.stream import StreamLoader
from dtrain.errors import ConfigError, DataError
from dtrain.feeds import OpenFeed, open_feed, to_tensors
from dtrain.fit_state import SavedFit, Snapshot
from dtrain.metrics import MetricState, sum_in_rank_order
from dtrain.model import (
    State,
    build,
    build_variables,
    check_state,
    describe,
    has_own_loss,
    label_rules,
    learning_rate,
    read_state,
    refuse_what_cannot_be_split,
    spread_seeds,
    write_state,
)
from dtrain.optimizer import collect_accumulated, drop_accumulated
from dtrain.rank_state import check_own, read_own, write_own
from dtrain.step import Kind, Steps, concatenate
from dtrain.types import (
    Array,
    Batching,
    BatchPlan,
    EpochEnd,
    FitPlan,
    Logs,
    Position,
    Predictions,
    Progress,
    Purpose,
    Segment,
    SegmentResult,
    Tree,
)

CALL_SECONDS = 0.15
"""A call into TensorFlow runs about so many seconds of steps where nothing needs to see each of them."""
CALL_BYTES = 64 << 20
"""A call's data takes at most about so many bytes."""
EVALUATED_AT_ONCE = 8
"""A call that evaluates has at most so many steps."""


@dataclass
class _Fit:
    """A fit in progress on this rank."""

    plan: FitPlan
    feed: Feed
    validation: Feed | None
    callbacks: RankCallbacks
    hooks: "_BatchHooks"
    batch_bytes: int
    validation_bytes: int
    epoch: int
    """The epoch that is running, or comes next."""
    logs: Logs = field(default_factory=dict)
    epoch_logs: Logs = field(default_factory=dict)
    stopped: bool = False
    has_warned: bool = False


class Replica:
    """A model on one rank.

    Args:
        model: compiled; built by the first verb that brings data.
        collective: this rank's group.
        sync_batch_norm: every BatchNormalization uses the statistics of the whole mini-batch.
        sparse_as_dense: sparse gradients are made dense and summed, instead of gathered as they are.
    """

    def __init__(
        self, model: keras.Model, collective: Collective, sync_batch_norm: bool = False, sparse_as_dense: bool = False
    ) -> None:
        self.model = model
        self.collective = collective
        self.progress = Progress("idle")
        self._sync_batch_norm = sync_batch_norm
        self._sparse_as_dense = sparse_as_dense
        self._has_variables = False
        self._waiting: State = {}  # of optimizers that train_step has yet to build
        self._steps: dict[Kind, Steps] = {}
        self._predict_function: Any = None
        self._shapes_on_batch: dict[str, tuple[int | None, ...]] = {}
        """Of the data of single steps so far, by path, without the rows; None: more than one size."""
        self._fit: _Fit | None = None
        self._fitted: tuple[Position, RankCallbacks, Logs] | None = None
        """Where the fit that is in progress, or the last one, stands, its callbacks, and the newest logs."""
        self._seconds_per_step: float | None = None

    # --- state

    def build(self, batch: Tree, with_loss: bool = True) -> bool:
        """Create all variables from a batch, check that the ranks made the same model, take over rank 0's state.

        Args:
            batch: (x,), (x, y) or (x, y, sample_weight) of any number of rows.
            with_loss: False: to predict, which needs no targets.

        Returns:
            Whether there was anything left to build.

        Raises:
            ConfigError: the factory made different models on different ranks.
        """
        lacks_loss = with_loss and not self._steps
        if self._has_variables and not lacks_loss:
            return False
        if not self._has_variables:
            build_variables(self.model, keras_batch(batch))
            if self.collective.world_size > 1:
                refuse_what_cannot_be_split(self.model)
                if self._sync_batch_norm:
                    synchronize(self.model)
            self._check_same_model()
            self._take_over()
            self._has_variables = True
        if lacks_loss:
            build(self.model, keras_batch(batch))
            self._metrics = MetricState(self.model)
            self._steps = {
                kind: Steps(self.model, self.collective, self._metrics, kind, self._sparse_as_dense)
                for kind in ("train", "test")
            }
            probed = [steps.probe(batch) for steps in self._steps.values()]
            if any(probed):
                self._waiting = write_state(self.model, self._waiting)
                self._take_over()  # what only the model's own step has built
        return True

    def read_state(self, alone: bool = False) -> State:
        """The job's state, on rank 0; the others' may be parts of it.

        Collective, unless `alone`: what the others have accumulated since the last update is then left out.
        """
        if self.collective.world_size > 1 and not alone:
            collect_accumulated(self.model, self.collective)
        return {**read_state(self.model), **self._waiting}

    def write_state(self, state: State) -> None:
        """Assign a state on every rank; collective."""
        self._waiting = write_state(self.model, state) or self._waiting
        self._take_over()

    def open(
        self, data: Given | OpenFeed, plan: BatchPlan | Batching, purpose: Purpose = "train", first_epoch: int = 0
    ) -> OpenFeed:
        """Open data for a verb (see `dtrain.feeds.open_feed`); what is open already is returned as it is."""
        if isinstance(data, (Loader, StreamLoader)):
            return data
        return open_feed(data, plan, self.collective, purpose, first_epoch)

    # --- fit

    def begin_fit(
        self,
        plan: FitPlan,
        train: Given | OpenFeed,
        validation: Given | OpenFeed | None = None,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int | str = 0,
        saved: SavedFit | None = None,
    ) -> None:
        """Get ready to run the segments of a fit.

        Args:
            plan: what to train.
            train: the data; may be what `open` returned, as `validation`.
            validation: what to validate on.
            callbacks: the user's.
            verbose: what they find in their `params`.
            saved: a fit to go on with from where it was saved; its state holds once `on_train_begin` was called.

        Raises:
            CheckpointError: `saved` is of another model.
        """
        collective = self.collective
        self._close_feeds()  # of a fit that was interrupted
        feed = self.open(train, plan.train, "train", plan.initial_epoch)
        validating = None
        if validation is not None:
            assert plan.validation is not None
            validating = self.open(validation, plan.validation, "validation")
        first = feed.first()
        self.build(first)
        self._check_first_rows(feed, first)
        validation_bytes = self._batch_bytes(validating, validating.first()) if validating is not None else 0
        ranked = RankCallbacks(
            callbacks,
            self.model,
            collective,
            add_history=True,
            verbose=verbose,
            epochs=plan.epochs,
            steps=feed.steps_per_epoch,
        )
        hooks = _BatchHooks("train", ranked, self.model.steps_per_execution, self._global_logs)
        batch_bytes = self._batch_bytes(feed, first)
        start = saved.position if saved is not None else Position(plan.initial_epoch, 0)
        self._fit = _Fit(plan, feed, validating, ranked, hooks, batch_bytes, validation_bytes, start.epoch)
        self._fitted = start, ranked, {}
        self.model.stop_training = False
        if saved is not None:
            saved = self._prepare(saved, ranked)
        ranked("on_train_begin")
        if saved is not None:
            self._go_on_from(saved, self._fit)

    def snapshot(self) -> Snapshot:
        """A copy of all that a checkpoint holds of this rank, between two segments or after a fit. Changes nothing."""
        assert self._fitted is not None
        position, ranked, logs = self._fitted
        own = read_own(self.model, self._metrics)
        if self.collective.rank > 0:
            return Snapshot(position, own)
        return Snapshot(
            position, own, self.read_state(alone=True), save_states(ranked.with_state()), without_tensors(logs)
        )

    def _prepare(self, saved: SavedFit, ranked: RankCallbacks) -> SavedFit:
        """Check it, find each callback's state, and get ready what `on_train_begin` would otherwise begin anew."""
        check_state(self.model, saved.state)
        check_own(self.model, self._metrics, saved.own, in_epoch=saved.position.step > 0)
        states, notes = matched(ranked.with_state(), saved.callbacks)
        if self.collective.rank == 0:
            prepare_resume(ranked.with_state(), states)
            for note in notes:
                print(note)
        return replace(saved, callbacks=states)

    def _go_on_from(self, saved: SavedFit, fit: _Fit) -> None:
        restore_states(fit.callbacks.with_state(), saved.callbacks)
        fit.logs = dict(saved.logs)
        if saved.position.step == 0:
            fit.epoch_logs = dict(saved.logs)
        if isinstance(fit.validation, StreamLoader):
            done = range(fit.plan.initial_epoch, saved.position.epoch)
            fit.validation.skip_passes(sum(_is_due(fit.plan.validation_freq, epoch) for epoch in done))
        self.write_state(dict(saved.state))
        write_own(self.model, self._metrics, saved.own, self.collective, in_epoch=saved.position.step > 0)

    def _check_first_rows(self, feed: OpenFeed, first: Tree) -> None:
        """Look at this rank's rows of the first mini-batch before any of it trains the model."""
        world_size, rank = self.collective.world_size, self.collective.rank
        if isinstance(feed, Loader):
            sampler = feed.sampler
            size = sampler.batch_size_at(sampler.first_epoch, 0)
            rows = sampler.batch(sampler.first_epoch, 0, shard(size, world_size, rank).rows)
            batch = feed.source.read(rows)
        else:
            assert feed.batch_rows is not None
            rows = np.arange(feed.batch_rows, dtype=np.int64)[shard(feed.batch_rows, world_size, rank).rows]
            batch = first
        classes, ignored = label_rules(self.model)
        is_own = has_own_loss(self.model)
        check_batch(batch, rows, num_classes=classes, ignore_class=ignored, has_own_loss=is_own)

    def _batch_bytes(self, feed: OpenFeed, first: Tree) -> int:
        """About how many bytes this rank's rows of a mini-batch take, given what `feed.first` returned."""
        size = sum(leaf.nbytes for _, leaf in leaves(first))
        return size * -(-feed.plan.batch_size // self.collective.world_size) if isinstance(feed, Loader) else size

    def run(self, segment: Segment) -> SegmentResult:
        """Train the segment's steps; where it ends an epoch, validate and call the epoch's hooks too."""
        fit = self._running_fit()
        epoch, step = segment.position.epoch, segment.position.step
        if fit.stopped or epoch < fit.epoch:  # sent before anybody knew that the epoch ends before it
            return SegmentResult(segment.position, 0, 0, 0.0, {}, stop=fit.stopped)
        fit.stopped = True  # until it ends well: one that was sent ahead must not go on from one that raised
        if step == 0:
            self.model.reset_metrics()
            fit.callbacks("on_epoch_begin", epoch)
        started = time.perf_counter()
        step_logs, num_steps, rows = self._train(fit, segment)
        seconds = time.perf_counter() - started
        if num_steps:
            self._seconds_per_step = seconds / num_steps
            fit.logs = _last(step_logs)
        has_ended = num_steps < segment.num_steps or step + num_steps == fit.feed.steps_in_epoch(epoch)
        if has_ended and not self.model.stop_training:
            self._warn_of_early_end(fit, Position(epoch, step + num_steps))
        ends_epoch = has_ended or self.model.stop_training
        fit.epoch = epoch + ends_epoch
        position = Position(epoch + 1, 0) if ends_epoch else Position(epoch, step + num_steps)
        logs = _numbers(fit.logs)
        epoch_end = self._end_epoch(fit, epoch) if ends_epoch else None
        fit.stopped = bool(self.model.stop_training)
        self._fitted = position, fit.callbacks, fit.logs
        return SegmentResult(
            position=position,
            num_steps=num_steps,
            rows=rows,
            seconds=seconds,
            logs=logs,
            step_logs={k: v for k, v in step_logs.items() if v.ndim == 1} if fit.plan.record_steps else {},
            learning_rate=learning_rate(self.model),
            epoch_end=epoch_end,
            stop=fit.stopped,
        )

    def end_fit(self) -> dict[str, list[float]]:
        """Finish: averages become the weights, `on_train_end`. Returns Keras's history."""
        fit = self._running_fit()
        optimizer = self.model.optimizer
        if isinstance(optimizer, keras.optimizers.Optimizer) and fit.plan.epochs > 0:
            optimizer.finalize_variable_values(self.model.trainable_weights)
        fit.callbacks("on_train_end", logs=fit.epoch_logs)
        self._close_feeds()
        self._fit = None
        self.progress = Progress("idle")
        return fit.callbacks.history()

    def _close_feeds(self) -> None:
        for feed in (self._fit.feed, self._fit.validation) if self._fit is not None else ():
            if feed is not None:
                feed.close()

    def _train(self, fit: _Fit, segment: Segment) -> tuple[dict[str, Array], int, int]:
        """Run the steps. Returns each metric's value after each step, the number of steps and of rows."""
        epoch, step = segment.position.epoch, segment.position.step
        looked_at = fit.hooks.are_used or self.model.stop_training  # by Keras, too, after a first call
        steps_per_call = self.model.steps_per_execution if looked_at else self._steps_per_call(fit)
        states, own, rows = [], [], 0
        chunks = _chunks(fit.feed, epoch, step, segment.num_steps, steps_per_call, looked_at)
        for chunk in chunks:
            fit.hooks.begin(chunk)
            state, returned = self._call("train", chunk)
            step = chunk.first_step + chunk.num_steps
            rows += chunk.global_rows * chunk.num_steps
            fit.hooks.end(chunk, state, returned)
            states.append(state)
            own.append(returned)
            self.progress = Progress("train", epoch, step, fit.feed.steps_in_epoch(epoch) or 0, fit.logs)
            if self.model.stop_training:
                chunks.close()
                break
        num_steps = step - segment.position.step
        if num_steps < segment.num_steps or step == fit.feed.steps_in_epoch(epoch):
            fit.hooks.finish()
        step_logs = self._global_logs("train", states, own, "segment") if states else {}
        return step_logs, num_steps, rows

    def _steps_per_call(self, fit: _Fit) -> int:
        if self._seconds_per_step is None:
            return 1
        by_time = int(CALL_SECONDS / max(self._seconds_per_step, 1e-6))
        return max(1, min(by_time, CALL_BYTES // max(1, fit.batch_bytes), 1024))

    def _end_epoch(self, fit: _Fit, epoch: int) -> EpochEnd:
        logs = dict(fit.logs)
        if fit.validation is not None and _is_due(fit.plan.validation_freq, epoch):
            found = self._evaluate(fit.validation, fit.callbacks, fit.validation_bytes)
            logs.update({f"val_{key}": value for key, value in found.items()})
        fit.epoch_logs = logs
        known = {key: len(values) for key, values in fit.callbacks.history().items()}
        fit.callbacks("on_epoch_end", epoch, logs=logs)
        history = fit.callbacks.history()  # it has what callbacks added to the logs, too
        fit.logs = {key: values[-1] for key, values in history.items() if len(values) > known.get(key, 0)}
        return EpochEnd(epoch, _numbers(fit.logs), learning_rate(self.model))

    def _warn_of_early_end(self, fit: _Fit, end: Position) -> None:
        """Keras's warning, once a fit, where the user sees it: above the bar."""
        promised = fit.feed.steps_per_epoch
        if promised is None or end.step >= promised or fit.has_warned:
            return
        fit.has_warned = True
        if self.collective.rank == 0:
            print(
                f"the input ran out of data in epoch {end.epoch + 1}, after {end.step} of {promised} steps: the epoch"
                " ends there. It must bring steps_per_epoch * epochs batches; a data set does with .repeat()"
            )

    def _running_fit(self) -> _Fit:
        if self._fit is None:
            raise ConfigError("no fit is in progress; begin_fit comes first")
        return self._fit

    # --- evaluate, predict, and single batches

    def evaluate(
        self,
        plan: BatchPlan | Batching,
        data: Given | OpenFeed,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int | str = 0,
    ) -> Logs:
        """The metrics of the whole data set, the same on all ranks. Collective."""
        feed = self.open(data, plan, "evaluate")
        first = feed.first()
        self.build(first)
        ranked = RankCallbacks(
            callbacks, self.model, self.collective, verbose=verbose, epochs=1, steps=feed.steps_per_epoch
        )
        logs = self._evaluate(feed, ranked, self._batch_bytes(feed, first))
        feed.close()
        return logs

    def predict(
        self,
        plan: BatchPlan | Batching,
        data: Given | OpenFeed,
        callbacks: Sequence[keras.callbacks.Callback] = (),
        verbose: int | str = 0,
    ) -> Predictions:
        """Predictions for this rank's rows: a contiguous part of all, or its part of each mini-batch.

        Collective where the data come in batches or each rank makes its own, and where there are callbacks. One that
        looks at each batch is to see all of them: of data read by rows rank 0 then predicts alone. Of data in batches
        it sees rank 0's part of each.
        """
        feed = self.open(data, plan, "predict")
        ranked = RankCallbacks(
            callbacks, self.model, self.collective, verbose=verbose, epochs=1, steps=feed.steps_per_epoch
        )
        self.model.stop_predicting = False
        ranked("on_predict_begin")
        in_batches = isinstance(feed, StreamLoader)
        own = feed if isinstance(feed, StreamLoader) else self._own_rows(feed, ranked.has_batch_hooks("predict"))
        call = ranked if in_batches else ranked.call_here
        outputs, sizes = [], []
        for chunk in own.one_pass(1) if own is not None else ():
            call("on_predict_batch_begin", chunk.first_step)
            output = self._predict_batch(map_tree(lambda leaf: leaf[0], chunk.data))
            outputs.append(tf.nest.map_structure(lambda leaf: leaf.numpy(), output))
            sizes.append(len(tf.nest.flatten(outputs[-1])[0]))
            call("on_predict_batch_end", chunk.first_step, logs={"outputs": outputs[-1]})
            self.progress = Progress("predict", 0, chunk.first_step + 1, feed.steps_per_epoch or 0)
            if chunk.whole and self.collective.rank > 0:  # rank 0 has them all
                outputs[-1], sizes[-1] = tf.nest.map_structure(lambda leaf: leaf[:0], outputs[-1]), 0
            if self.model.stop_predicting:
                break
        ranked("on_predict_end")
        feed.close()
        self.progress = Progress("idle")
        if not outputs:
            return Predictions(None, (0,))
        joined = tf.nest.map_structure(_joined, *outputs)
        return Predictions(joined, tuple(sizes) if in_batches else (sum(sizes),))

    def _own_rows(self, loader: Loader, alone: bool) -> Loader | None:
        """What reads this rank's contiguous part of the rows, all on rank 0 if `alone`; None where it has none."""
        rank, world_size, plan = self.collective.rank, 1 if alone else self.collective.world_size, loader.plan
        steps = plan.steps_per_epoch
        num_rows = plan.num_rows if steps is None else min(plan.num_rows, steps * plan.batch_size)
        rows = even_split(num_rows, world_size, rank) if rank < world_size else slice(0, 0)
        if rows.stop == rows.start:
            return None
        part = Rows(loader.source, rows.start, rows.stop)
        own_plan = BatchPlan(num_rows=len(part), batch_size=max(1, plan.batch_size // world_size))
        return Loader(part, own_plan, 0, 1, to_tensors)

    def on_batch(self, kind: Kind, batch: ArraySource) -> Logs:
        """One step on the rows of `batch`, the whole mini-batch on every rank; metrics of it alone. Collective."""
        self.build(batch.read(np.zeros(1, np.int64)))
        self.model.reset_metrics()
        part = shard(len(batch), self.collective.world_size, self.collective.rank)
        rows = batch.read(np.arange(len(batch), dtype=np.int64)[part.rows])
        data = to_tensors(map_tree(lambda leaf: leaf[None], rows))
        self._shapes_on_batch = common_shapes([self._shapes_on_batch, shapes_of(rows)])
        chunk = Chunk(0, 1, data, part.share, part.whole, len(batch), self._shapes_on_batch)
        state, own = self._call(kind, chunk)
        return _last(self._global_logs(kind, [state], [own], "batch"))

    def _evaluate(self, feed: Feed, callbacks: RankCallbacks, batch_bytes: int) -> Logs:
        num_steps = feed.steps_per_epoch
        hooks = _BatchHooks("test", callbacks, self.model.steps_per_execution, self._global_logs)
        steps_per_call = max(1, min(EVALUATED_AT_ONCE, CALL_BYTES // max(1, batch_bytes)))
        self.model.reset_metrics()
        self.model.stop_evaluating = False
        callbacks("on_test_begin")
        state, own = None, None
        for chunk in feed.one_pass(1 if hooks.are_used else steps_per_call):
            hooks.begin(chunk)
            state, own = self._call("test", chunk)
            hooks.end(chunk, state, own)
            self.progress = Progress("evaluate", 0, chunk.first_step + chunk.num_steps, num_steps or 0)
            if self.model.stop_evaluating:
                break
        hooks.finish()
        assert state is not None and own is not None
        last_state = [values[-1:] for values in state]
        last_own = {key: values[-1:] for key, values in own.items()}
        logs = _last(self._global_logs("test", [last_state], [last_own], "test"))
        callbacks("on_test_end", logs=logs)
        self.progress = Progress("idle")
        return logs

    def _predict_batch(self, data: Tree) -> Any:
        batch = keras_batch(data)
        if self.model.run_eagerly:
            return self.model.predict_step(batch)
        if self._predict_function is None:
            self._predict_function = tf.function(self.model.predict_step, autograph=False, reduce_retracing=True)
        return self._predict_function(batch)

    # --- over ranks

    def _call(self, kind: Kind, chunk: Chunk) -> tuple[list[Array], dict[str, Array]]:
        if kind == "train" and self._waiting and self.model.run_eagerly:
            raise ConfigError(
                "run_eagerly=True does not go with an optimizer that only train_step builds, once it has a state to go"
                " on from; build it where it is made: optimizer.build(variables)"
            )
        return self._steps[kind](chunk.data, chunk.share, chunk.whole, chunk.shapes)

    def _global_logs(
        self, kind: Kind, states: Sequence[Sequence[Array]], own: Sequence[dict[str, Array]], name: str
    ) -> dict[str, Array]:
        """Each metric's value over all ranks after each step of some consecutive calls. Collective."""
        steps = self._steps[kind]
        own_logs, results = steps.own_logs, steps.results
        logs: dict[str, Array] = {}
        if own_logs:
            local = [tf.constant(np.concatenate([returned[key] for returned in own])) for key in own_logs]
            summed = sum_in_rank_order(local, self.collective, f"{kind}.{name}.logs")
            logs.update((key, value.numpy()) for key, value in zip(own_logs, summed, strict=True))
        if results is None or results:
            kept = states if self._metrics.records_steps else states[-1:]
            name = f"{kind}.{name}.metrics"
            logs.update(self._metrics.global_logs(concatenate(kept), self.collective, name, results))
        return {key: logs[key] for key in (logs if steps.returned is None else steps.returned)}

    def _check_same_model(self) -> None:
        signatures = self.collective.all_gather_json(describe(self.model).signature, "signature")
        for rank, signature in enumerate(signatures):
            if signature != signatures[0]:
                raise ConfigError(
                    f"model_fn made another model on rank {rank} than on rank 0 (variables, optimizer, loss or learning"
                    " rate differ); it must not depend on the rank, the host or unseeded random numbers"
                )

    def _take_over(self) -> None:
        """Make rank 0's state everybody's; random numbers then differ by rank."""
        if self.collective.world_size > 1:
            own = read_state(self.model)
            received = self.collective.broadcast(list(own.values()), "state")
            write_state(self.model, dict(zip(own, received, strict=True)))
        if self.collective.rank > 0:
            drop_accumulated(self.model)
        spread_seeds(self.model, self.collective.rank)


def _joined(*parts: Array) -> Array:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        found = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(
            f"predictions of different mini-batches have shapes that cannot be put into one array, {found} behind the"
            " rows: pad all of them to one length, as with dataset.padded_batch(32, padded_shapes=[100])"
        )
    return np.concatenate(parts)


class _BatchHooks:
    """Calls the hooks of single batches, if there are any, where Keras does: around each execution of some steps.

    Args:
        kind: "train" or "test".
        callbacks: whose hooks.
        steps: of an execution; the last of an epoch may have fewer. No chunk reaches over its end.
        global_logs: a Replica's.
    """

    def __init__(
        self, kind: Kind, callbacks: RankCallbacks, steps: int, global_logs: Callable[..., dict[str, Array]]
    ) -> None:
        self.are_used = callbacks.has_batch_hooks(kind)
        self._kind: Kind = kind
        self._callbacks = callbacks
        self._steps = steps
        self._global_logs = global_logs
        self._last: tuple[Chunk, list[Array], dict[str, Array]] | None = None  # of an execution that has not ended

    def begin(self, chunk: Chunk) -> None:
        if self.are_used and chunk.first_step % self._steps == 0:
            self._callbacks(f"on_{self._kind}_batch_begin", chunk.first_step)

    def end(self, chunk: Chunk, state: list[Array], own: dict[str, Array]) -> None:
        if not self.are_used:
            return
        self._last = (chunk, state, own)
        if (chunk.first_step + chunk.num_steps) % self._steps == 0:
            self.finish()

    def finish(self) -> None:
        """End the execution that is under way, if there is one: the epoch ends."""
        last, self._last = self._last, None
        if last is not None:
            chunk, state, own = last
            logs = _last(self._global_logs(self._kind, [state], [own], "batch"))
            # What Keras gives as the last step of an execution may be beyond the last of the epoch.
            step = (chunk.first_step // self._steps + 1) * self._steps - 1
            self._callbacks(f"on_{self._kind}_batch_end", step, logs=logs)


def _chunks(
    feed: Feed, epoch: int, first_step: int, num_steps: int, steps_per_chunk: int, aligned: bool
) -> Generator[Chunk, None, None]:
    """A feed's chunks; `aligned`: none reaches over a multiple of `steps_per_chunk`, wherever the segments end."""
    end = first_step + num_steps
    while first_step < end:
        stop = end
        if aligned and steps_per_chunk > 1:
            stop = min(end, (first_step // steps_per_chunk + 1) * steps_per_chunk)
        for chunk in feed.chunks(epoch, first_step, stop - first_step, steps_per_chunk):
            first_step = chunk.first_step + chunk.num_steps
            yield chunk
        if first_step < stop:  # the input has ended
            return


def _last(logs: dict[str, Array]) -> Logs:
    """The logs after the last step; of a metric that is an array (an F1Score by class), the array, as in Keras."""
    return {key: float(values[-1]) if values.ndim == 1 else values[-1] for key, values in logs.items()}


def _numbers(logs: Logs) -> Logs:
    """The logs without metrics that are arrays: these are in the history alone."""
    return {key: value for key, value in logs.items() if np.ndim(value) == 0}


def _is_due(frequency: int | Sequence[int], epoch: int) -> bool:
    """Whether Keras validates after `epoch`: every n-th, or those in a list (both count epochs from 1)."""
    if isinstance(frequency, int):
        return (epoch + 1) % frequency == 0
    return epoch + 1 in frequency
