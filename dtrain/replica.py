"""Owns one rank: a model, its data and its place in the group; the loops that evaluate and predict.

Training is rank_fit.py's.

It runs in a Ray actor or in a plain process alike, knows nothing of Ray or MLflow, and talks to other ranks through
its Collective alone. All ranks make the same calls in the same order.
"""

import functools
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.accumulation import collect_accumulated, drop_accumulated, local_accumulators
from dtrain.batch_hooks import BatchHooks, newest
from dtrain.batch_norm import synchronize
from dtrain.callbacks import RankCallbacks
from dtrain.collective import Collective
from dtrain.data.checks import check_batch
from dtrain.data.given import Given
from dtrain.data.loader import Chunk, Feed, Loader
from dtrain.data.sampler import even_split, shard
from dtrain.data.source import ArraySource, Rows, common_shapes, keras_batch, leaves, map_tree, shapes_of
from dtrain.data.stream import StreamLoader
from dtrain.errors import ConfigError, DataError
from dtrain.faults import Strikes
from dtrain.feeds import OpenFeed, open_feed, to_tensors
from dtrain.fit_state import Knowledge, SavedFit, Snapshot
from dtrain.local_sgd import check_local
from dtrain.metrics import MetricState, last_of, sum_in_rank_order
from dtrain.model import (
    State,
    build,
    build_variables,
    describe,
    has_own_loss,
    label_rules,
    read_state,
    refuse_what_cannot_be_split,
    spread_seeds,
    targets_with_loss,
    write_state,
)
from dtrain.rank_fit import CALL_BYTES, RankFit
from dtrain.step import Kind, Steps, concatenate
from dtrain.types import (
    BETWEEN_SEGMENTS,
    IN_STEP,
    Array,
    Batching,
    BatchPlan,
    Beat,
    FitPlan,
    Logs,
    Predictions,
    Progress,
    Purpose,
    Segment,
    SegmentResult,
    StepOptions,
    Tree,
)

EVALUATED_AT_ONCE = 8
"""A call that evaluates has at most so many steps."""


class Replica:
    """A model on one rank.

    Args:
        model: compiled; built by the first verb that brings data.
        collective: this rank's group.
        options: what steps are to be like.
        strikes: the faults that a test has planned.
    """

    def __init__(
        self,
        model: keras.Model,
        collective: Collective,
        options: StepOptions | None = None,
        strikes: Strikes | None = None,
    ) -> None:
        self.model = model
        self.collective = collective
        self.progress = Progress("idle")
        self.strikes = strikes or Strikes()
        self._beats, self._doing = 0, "the beginning"
        self._built: set[Kind] = set()  # all that these steps need
        self._called: set[Kind] = set()
        self._is_first_call = True
        self._options = options or StepOptions()
        self._has_variables = False
        self._waiting: State = {}  # of optimizers that train_step has yet to build
        self._steps: dict[Kind, Steps] = {}
        self._predict_function: Any = None
        self._shapes_on_batch: dict[str, tuple[int | None, ...]] = {}
        """Of the data of single steps so far, by path, without the rows; None: more than one size."""
        self._fit: RankFit | None = None
        """The fit that is in progress, or the last one."""

    def beat(self, doing: str) -> None:
        """Something is finished, and something else begins."""
        self._beats += 1
        self._doing = doing

    def rest(self) -> None:
        """Whatever became of the last call, this rank waits for the next."""
        self.beat(BETWEEN_SEGMENTS)

    def heartbeat(self) -> Beat:
        """What this rank does; for another thread to ask while it does it."""
        waits = self._doing in (IN_STEP, BETWEEN_SEGMENTS) or self.collective.is_waiting
        return Beat(self._beats, self._doing, waits, self._is_first_call)

    # --- state

    def build(self, batch: Tree, purpose: Purpose = "train") -> bool:
        """Create all variables from a batch, check that the ranks made the same model, take over rank 0's state.

        Args:
            batch: (x,), (x, y) or (x, y, sample_weight) of any number of rows.
            purpose: what it is for; to predict needs no targets.

        Returns:
            Whether there was anything left to build.

        Raises:
            ConfigError: the factory made different models on different ranks.
        """
        kind: Kind = "train" if purpose == "train" else "test"
        is_new = not self._has_variables
        if is_new:
            self._build_variables(batch)
        if purpose != "predict" and kind not in self._built:
            is_new = True
            self._build_steps(kind, batch)
        return is_new

    def _build_variables(self, batch: Tree) -> None:
        """Those of the model, and of its optimizer."""
        build_variables(self.model, keras_batch(batch))
        if not self.collective.is_alone:
            refuse_what_cannot_be_split(self.model)
            if self._options.sync_batch_norm:
                synchronize(self.model)
            if self._options.sync_every > 1:
                check_local(self.model, self._options.sync_every)
        if self._options.skip_nan and local_accumulators(self.model):
            raise ConfigError(
                "on_nan='skip' does not go with gradient_accumulation_steps: what is accumulated before a step"
                " that is left out may hold its NaN; leave out one"
            )
        self._check_same_model()
        self._take_over()
        self._has_variables = True

    def _build_steps(self, kind: Kind, batch: Tree) -> None:
        """What steps of a kind need besides: loss, metrics, and what only a step of the model's own makes."""
        if not self._steps:
            self.metrics = MetricState(self.model)
            self._steps = self._new_steps()
        num_metrics = len(self.metrics.variables)
        if not self._steps[kind].is_custom or self.model.run_eagerly:  # of those the first one tells
            build(self.model, keras_batch(batch))
            self.metrics.take_up()
        elif self._steps[kind].probe(batch):
            self._waiting = write_state(self.model, self._waiting)
            self._take_over()
        self._built.add(kind)
        if self._called and len(self.metrics.variables) > num_metrics:
            self._trace_anew()

    def _new_steps(self) -> dict[Kind, Steps]:
        kinds: tuple[Kind, ...] = ("train", "test")
        return {kind: Steps(self.model, self.collective, self.metrics, kind, self._options) for kind in kinds}

    def resize(self) -> None:
        """The group has another size, or this rank another number."""
        self._trace_anew()

    def _trace_anew(self) -> None:
        before, self._steps = self._steps, self._new_steps()
        for kind, steps in self._steps.items():
            steps.knowledge = before[kind].knowledge
        self._called.clear()

    def read_state(self, alone: bool = False) -> State:
        """The job's state, on rank 0; the others' may be parts of it.

        Collective, unless `alone`: what the others have accumulated since the last update is then left out.
        """
        if self.collective.world_size > 1 and not alone:
            collect_accumulated(self.model, self.collective)
        return {**read_state(self.model), **self._waiting}

    def read_state_as_first(self) -> State:
        """The job's state from any rank, with random seeds as rank 0 has them. Not collective."""
        spread_seeds(self.model, -self.collective.rank)
        try:
            return self.read_state(alone=True)
        finally:
            self.spread_seeds()

    def spread_seeds(self) -> None:
        """Make rank 0's random seeds this rank's own."""
        spread_seeds(self.model, self.collective.rank)

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
        feed = open_feed(data, plan, self.collective, purpose, first_epoch)
        if isinstance(feed, StreamLoader):
            feed.on_read_again = functools.partial(self.beat, "reading data again, up to where they go on")
        return feed

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
        if self._fit is not None:
            self._fit.close()  # one that was interrupted
        feed = self.open(train, plan.train, "train", plan.initial_epoch)
        validating = None
        if validation is not None:
            assert plan.validation is not None
            validating = self.open(validation, plan.validation, "validation")
        first = feed.first()
        self.build(first, "train")
        self._check_first_rows(feed, first)
        validation_bytes = 0
        if validating is not None:
            held_out = validating.first()
            self.build(held_out, "validation")
            validation_bytes = self._batch_bytes(validating, held_out)
        ranked = RankCallbacks(
            callbacks,
            self.model,
            self.collective,
            add_history=True,
            verbose=verbose,
            epochs=plan.epochs,
            steps=feed.steps_per_epoch,
        )
        batch_bytes = self._batch_bytes(feed, first), validation_bytes
        self._fit = RankFit(self, plan, feed, validating, ranked, batch_bytes)
        self._fit.begin(saved)

    @property
    def fit(self) -> RankFit:
        """The fit that is in progress, or was the last.

        Raises:
            ConfigError: there is none.
        """
        if self._fit is None:
            raise ConfigError("no fit is in progress; begin_fit comes first")
        return self._fit

    def run(self, segment: Segment) -> SegmentResult:
        """Train the segment's steps; where it ends an epoch, validate and call the epoch's hooks too."""
        return self.fit.run(segment)

    def snapshot(self) -> Snapshot:
        """A copy of all that a checkpoint holds of this rank, between two segments or after a fit. Changes nothing."""
        return self.fit.snapshot()

    def end_fit(self) -> dict[str, list[float]]:
        """Finish: averages become the weights, `on_train_end`. Returns Keras's history. May be called again."""
        history = self.fit.end()
        self.progress = Progress("idle")
        return history

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
        is_own, with_loss = has_own_loss(self.model), targets_with_loss(self.model)
        if with_loss is not None and not any(path.startswith(tuple(with_loss)) for path, _ in leaves(batch)):
            with_loss = None  # losses go by names, say, and the targets are a list
        check_batch(batch, rows, num_classes=classes, ignore_class=ignored, has_own_loss=is_own, with_loss=with_loss)

    def _batch_bytes(self, feed: OpenFeed, first: Tree) -> int:
        """About how many bytes this rank's rows of a mini-batch take, given what `feed.first` returned."""
        size = sum(leaf.nbytes for _, leaf in leaves(first))
        return size * -(-feed.plan.batch_size // self.collective.world_size) if isinstance(feed, Loader) else size

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
        self.build(first, "evaluate")
        ranked = RankCallbacks(
            callbacks, self.model, self.collective, verbose=verbose, epochs=1, steps=feed.steps_per_epoch
        )
        logs = self.evaluate_on(feed, ranked, self._batch_bytes(feed, first))
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
            self.strikes("predict", chunk.first_step)
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
        self.build(batch.read(np.zeros(1, np.int64)), "train" if kind == "train" else "evaluate")
        self.model.reset_metrics()
        part = shard(len(batch), self.collective.world_size, self.collective.rank)
        rows = batch.read(np.arange(len(batch), dtype=np.int64)[part.rows])
        data = to_tensors(map_tree(lambda leaf: leaf[None], rows))
        self._shapes_on_batch = common_shapes([self._shapes_on_batch, shapes_of(rows)])
        chunk = Chunk(0, 1, data, part.share, part.whole, len(batch), self._shapes_on_batch)
        state, own = self.call(kind, chunk)
        return last_of(self.global_logs(kind, [state], [own], "batch"))

    def evaluate_on(self, feed: Feed, callbacks: RankCallbacks, batch_bytes: int) -> Logs:
        """The metrics of a pass over open data; this rank's rows of a mini-batch take so many bytes. Collective."""
        num_steps = feed.steps_per_epoch
        hooks = self.batch_hooks("test", callbacks)
        steps_per_call = max(1, min(EVALUATED_AT_ONCE, CALL_BYTES // max(1, batch_bytes)))
        self.model.reset_metrics()
        self.model.stop_evaluating = False
        callbacks("on_test_begin")
        state, own = None, None
        for chunk in feed.one_pass(1 if hooks.are_used else steps_per_call):
            self.beat("the callbacks of a validation")
            self.strikes("evaluate", chunk.first_step, chunk.num_steps)
            hooks.begin(chunk)
            state, own = self.call("test", chunk)
            hooks.end(chunk, state, own)
            self.beat("reading data to validate on")
            self.progress = Progress("evaluate", 0, chunk.first_step + chunk.num_steps, num_steps or 0)
            if self.model.stop_evaluating:
                break
        hooks.finish()
        assert state is not None and own is not None
        last_state, last_own = newest(state, own)
        logs = last_of(self.global_logs("test", [last_state], [last_own], "test"))
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

    @property
    def knowledge(self) -> Knowledge:
        """See `dtrain.step.Steps.knowledge`."""
        return self._steps["train"].knowledge

    @knowledge.setter
    def knowledge(self, known: Knowledge) -> None:
        self._steps["train"].knowledge = known

    @property
    def own_logs(self) -> list[str]:
        """What a training step of the model's own returns besides the results of metrics."""
        return self._steps["train"].own_logs

    @property
    def has_own_step(self) -> bool:
        """The model's class has a training step of its own."""
        return self._steps["train"].is_custom

    @property
    def skipped(self) -> dict[int, bool]:
        """Of the newest call of training steps (see `dtrain.undo.Skips.read`)."""
        return self._steps["train"].skipped

    def undo(self) -> tuple[int, list[Array], dict[str, Array]]:
        """See `dtrain.step.Steps.undo`."""
        return self._steps["train"].undo()

    def call(self, kind: Kind, chunk: Chunk) -> tuple[list[Array], dict[str, Array]]:
        """Run the steps of a chunk (see `dtrain.step.Steps`). Collective."""
        self._is_first_call = kind not in self._called
        self.beat(IN_STEP)
        if kind == "train" and self._waiting and self.model.run_eagerly:
            raise ConfigError(
                "run_eagerly=True does not go with an optimizer that only train_step builds, once it has a state to go"
                " on from; build it where it is made: optimizer.build(variables)"
            )
        returned = self._steps[kind](chunk.data, chunk.share, chunk.whole, chunk.shapes)
        self._called.add(kind)
        return returned

    def nested(self, kind: Kind, logs: Logs) -> Logs:
        """See `dtrain.step.Steps.nested`."""
        return self._steps[kind].nested(logs)

    def batch_hooks(self, kind: Kind, callbacks: RankCallbacks) -> BatchHooks:
        nested = functools.partial(self.nested, kind)
        return BatchHooks(kind, callbacks, self.steps_per_execution(kind), self.global_logs, nested)

    @property
    def trains_by_itself(self) -> bool:
        """Whether this rank trains by itself between two averages."""
        return self._options.sync_every > 1 and not self.collective.is_alone

    def steps_per_execution(self, kind: Kind) -> int:
        """Keras's; where ranks train by themselves, the steps from one average to the next."""
        is_window = kind == "train" and self.trains_by_itself
        return self._options.sync_every if is_window else int(self.model.steps_per_execution)

    def global_logs(
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
            kept = states if self.metrics.records_steps else states[-1:]
            name = f"{kind}.{name}.metrics"
            logs.update(self.metrics.global_logs(concatenate(kept), self.collective, name, results))
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
        self.spread_seeds()


def _joined(*parts: Array) -> Array:
    shapes = {part.shape[1:] for part in parts}
    if len(shapes) > 1:
        found = " and ".join(map(str, sorted(shapes)[:2]))
        raise DataError(
            f"predictions of different mini-batches have shapes that cannot be put into one array, {found} behind the"
            " rows: pad all of them to one length, as with dataset.padded_batch(32, padded_shapes=[100])"
        )
    return np.concatenate(parts)
