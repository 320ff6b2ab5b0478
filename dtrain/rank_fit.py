"""Owns a fit on one rank: its segments, the ends of its epochs, and how it goes on when the group broke under it.

What a segment has come to is kept as it comes. When a peer is lost, wherever that is, nothing of it is thrown away:
the step under way is undone (undo.py), ranks that are behind are told by the one that is the furthest, and the new
group finishes what there is of the segment as if it had been a shorter one.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import keras
import numpy as np

from dtrain.accumulation import accumulate_anew, num_accumulated
from dtrain.callback_checkpoint import (
    matched,
    prepare_resume,
    restore_states,
    save_states,
    without_tensors,
)
from dtrain.callbacks import RankCallbacks
from dtrain.collective import is_lost_peer
from dtrain.data.loader import Chunk, Feed, Loader, chunks_of, steps_before
from dtrain.data.stream import StreamLoader
from dtrain.errors import ConfigError, LostPeer, ReplicasDiffer
from dtrain.fit_state import ACCUMULATED, Handover, Lost, SavedFit, Snapshot, Standing
from dtrain.hardware import cpu
from dtrain.metrics import last_of
from dtrain.model import (
    check_state,
    draw_on,
    draws_between,
    learning_rate,
    seeds_of,
    write_state,
)
from dtrain.rank_state import METRIC, add_own, check_own, checksum_of_shared, read_own, read_sums_and_seeds, write_own
from dtrain.types import Array, EpochEnd, FitPlan, Logs, Position, Progress, Segment, SegmentResult
from dtrain.under_way import UnderWay

if TYPE_CHECKING:
    from dtrain.replica import Replica

CALL_SECONDS = 0.15
"""A call into TensorFlow runs about so many seconds of steps where nothing needs to see each of them."""
CALL_BYTES = 64 << 20
"""A call's data takes at most about so many bytes."""
WINDOWS_BYTES = 4 << 30
"""The same of two calls, one of which is read ahead, where the user decides how many steps a rank trains by itself."""


class RankFit:
    """A fit in progress on this rank.

    Args:
        replica: whose model is trained.
        plan: what to train.
        feed: the data.
        validation: what to validate on.
        callbacks: the user's, on this rank.
        batch_bytes: about how many bytes this rank's rows of a mini-batch take; of one of the validation.
    """

    def __init__(
        self,
        replica: "Replica",
        plan: FitPlan,
        feed: Feed,
        validation: Feed | None,
        callbacks: RankCallbacks,
        batch_bytes: tuple[int, int],
    ) -> None:
        self._replica = replica
        self._model: keras.Model = replica.model
        self._collective = replica.collective
        self._plan = plan
        self._feed = feed
        if isinstance(feed, Loader):
            feed.epochs = plan.epochs
        self._validation = validation
        self._callbacks = callbacks
        self._hooks = replica.batch_hooks("train", callbacks)
        self._batch_bytes = batch_bytes
        self._position = Position(plan.initial_epoch, 0)
        self._logs: Logs = {}
        self._epoch_logs: Logs = {}
        self._stopped = False
        self._has_begun = False  # the epoch that `_position` is in
        self._has_warned = False
        self._is_final = False  # averages are in the weights' place
        self._has_ended = False
        self._is_validation_astray = False
        self._part: UnderWay | None = None
        self._segments = 0
        self._ends: dict[int, int] = {}  # of epochs that are over, how many steps they had
        self._seeds: dict[int, list[list[int]]] = {}  # as they were after so many segments: the last, and one before
        self._result: SegmentResult | None = None

    # --- undisturbed

    def begin(self, saved: SavedFit | None) -> None:
        """Call `on_train_begin`, and put back what was saved."""
        if saved is None and self._replica.trains_by_itself:
            self._check_window()
        self._model.stop_training = False
        if saved is not None:
            saved = self._prepared(saved)
        self._callbacks("on_train_begin")
        if saved is not None:
            self._go_on_from(saved)
        if saved is None or saved.own:
            self._seeds = {0: seeds_of(self._model)}

    def _check_window(self) -> None:
        every, size = self._replica.steps_per_execution("train"), self._batch_bytes[0]
        if 2 * every * size > WINDOWS_BYTES:
            raise ConfigError(
                f"sync_every={every}: a worker holds the rows of twice so many mini-batches at once, {size / 2**20:.0f}"
                f" MiB each, and may hold {WINDOWS_BYTES / 2**30:g} GiB of them; make it smaller"
            )

    def run(self, segment: Segment) -> SegmentResult:
        """Train the segment's steps; where it ends an epoch, validate and call the epoch's hooks too."""
        if self._part is not None:  # sent before anybody knew
            raise LostPeer("the segment before this one was interrupted")
        if self._stopped or segment.position.epoch < self._position.epoch:  # nor that the epoch ends before it
            return SegmentResult(segment.position, 0, 0, 0.0, {}, stop=self._stopped)
        part = self._part = UnderWay(segment)
        self._begin_epoch(segment.position)
        self._train(part)
        return self._finish(part)

    def end(self) -> dict[str, list[float]]:
        """Averages become the weights, `on_train_end`. Returns Keras's history. May be called again."""
        optimizer = self._model.optimizer
        if not self._is_final and isinstance(optimizer, keras.optimizers.Optimizer) and self._plan.epochs > 0:
            optimizer.finalize_variable_values(self._model.trainable_weights)
        self._is_final = True
        if not self._has_ended:
            self._replica.beat("callbacks, on_train_end")
            self._callbacks("on_train_end", logs=self._replica.nested("train", self._epoch_logs))
        self._has_ended = True
        self._replica.beat("reading data")
        self.close()
        return self._callbacks.history()

    def close(self) -> None:
        for feed in (self._feed, self._validation):
            if feed is not None:
                feed.close()

    def snapshot(self) -> Snapshot:
        """A copy of all that a checkpoint holds of this rank, between two segments or after the fit."""
        if self._part is not None:
            raise LostPeer("the segment before was interrupted")
        own = read_own(self._model, self._replica.metrics)
        if self._collective.rank > 0:
            return Snapshot(self._position, own)
        states = save_states(self._callbacks.with_state())
        state, logs = self._replica.read_state(alone=True), without_tensors(self._logs)
        return Snapshot(self._position, own, state, states, logs, self._has_begun, self._batches_before(self._position))

    def _batches_before(self, position: Position) -> int | None:
        return self._feed.digest_at(position) if isinstance(self._feed, StreamLoader) else None

    def _begin_epoch(self, position: Position) -> None:
        if position.step == 0 and not self._has_begun:
            self._replica.beat("callbacks, on_epoch_begin")
            self._model.reset_metrics()
            self._callbacks("on_epoch_begin", position.epoch)
        self._has_begun = True

    def _train(self, part: UnderWay) -> None:
        epoch, step = part.segment.position.epoch, part.segment.position.step
        # By Keras, too, after a first call.
        looked_at = self._hooks.are_used or self._model.stop_training or self._replica.trains_by_itself
        steps_per_call = self._replica.steps_per_execution("train") if looked_at else self._steps_per_call()
        if self._model.stop_training and isinstance(self._feed, Loader):
            self._feed.close()  # what was read early has another number of steps than Keras would take now
        started, waited = time.perf_counter(), self._collective.waited_in_all
        chunks = chunks_of(self._feed, epoch, step, part.segment.num_steps, steps_per_call, looked_at)
        with contextlib.closing(chunks):
            while (chunk := self._next_chunk(part, chunks)) is not None:
                with self._spends(part, "callbacks", "callbacks, of a batch"):
                    self._hooks.begin(chunk)
                state, returned = self._call(part, chunk)
                part.add(chunk, chunk.num_steps, state, returned)
                part.skipped.update({chunk.first_step + step: own for step, own in self._replica.skipped.items()})
                with self._spends(part, "callbacks", "callbacks, of a batch"):
                    self._hooks.end(chunk, state, returned)
                part.seconds = time.perf_counter() - started
                num_steps = self._feed.steps_in_epoch(epoch) or 0
                self._replica.progress = Progress("train", epoch, part.position.step, num_steps, self._logs)
                if self._model.stop_training:
                    break
        if waited is not None and (now := self._collective.waited_in_all) is not None:
            part.spent["computing"] = part.seconds - sum(part.spent.values()) - (now - waited)
        part.ended = part.steps < part.segment.num_steps or self._is_end(part.position)

    def _next_chunk(self, part: UnderWay, chunks: Iterator[Chunk]) -> Chunk | None:
        with self._spends(part, "reading data", "reading data"):
            chunk = next(chunks, None)
            if chunk is not None and self._replica.strikes:
                self._meet_faults(chunk)
            return chunk

    @contextlib.contextmanager
    def _spends(self, part: UnderWay, what: str, doing: str) -> Iterator[None]:
        """Inside, time is spent on something, but for what is waited for the others."""
        self._replica.beat(doing)
        began, waited = time.perf_counter(), self._collective.waited
        yield
        part.spent[what] += time.perf_counter() - began - (self._collective.waited - waited)

    def _call(self, part: UnderWay, chunk: Chunk) -> tuple[list[Array], dict[str, Array]]:
        started = time.perf_counter()
        try:
            return self._replica.call("train", chunk)
        except Exception as error:
            if is_lost_peer(error):
                finished, states, own = self._replica.undo()
                if finished:
                    part.add(chunk, finished, states, own)
                    skipped = {step: own for step, own in self._replica.skipped.items() if step < finished}
                    part.skipped.update({chunk.first_step + step: own for step, own in skipped.items()})
                    part.seconds += time.perf_counter() - started
            raise

    def _meet_faults(self, chunk: Chunk) -> None:
        step = self._step_of_fit(self._position.epoch, chunk)
        self._replica.strikes("data", step, chunk.num_steps)
        self._replica.strikes.call_begins(step)

    def _step_of_fit(self, epoch: int, chunk: Chunk) -> int:
        """The number that a test plans a fault for, as far as epochs are known to have any."""
        return (
            sum(self._feed.steps_in_epoch(each) or 0 for each in range(self._plan.initial_epoch, epoch))
            + chunk.first_step
        )

    def _is_end(self, position: Position) -> bool:
        return position.step == self._feed.steps_in_epoch(position.epoch)

    def _steps_per_call(self) -> int:
        newest = self._result
        if newest is None or not newest.num_steps:
            return 1
        by_time = int(CALL_SECONDS * newest.num_steps / max(newest.seconds, 1e-6))
        return max(1, min(by_time, CALL_BYTES // max(1, self._batch_bytes[0]), 1024))

    def _finish(self, part: UnderWay) -> SegmentResult:
        """What is left to do once the steps are trained. May be called again where a lost peer cut it short."""
        epoch = part.segment.position.epoch
        self._replica.beat("the end of a segment")
        if part.ended:
            self._hooks.finish()
        if self._has_others and self._are_replicas_due(part):
            self._check_replicas(part.position)
        if part.step_logs is None:
            part.step_logs = self._replica.global_logs("train", part.states, part.own, "segment") if part.steps else {}
        if part.steps:
            self._logs = last_of(part.step_logs)
        if part.ended and not self._model.stop_training:
            self._warn_of_early_end(part.position)
        ends_epoch = part.ended or bool(self._model.stop_training)
        logs = _numbers(self._logs)
        epoch_end = self._end_epoch(part, epoch) if ends_epoch else None
        return self._close(part, logs, epoch_end)

    def _are_replicas_due(self, part: UnderWay) -> bool:
        """Whether the number of steps so far has passed a multiple of `check_replicas_every` in this segment."""
        every = self._plan.check_replicas_every
        if every is None:
            return False
        begun = sum(self._ends.values()) + part.segment.position.step
        return begun // every != (begun + part.steps) // every

    def _check_replicas(self, position: Position) -> None:
        """Compare a checksum of what is to be equal on all ranks. Collective.

        Raises:
            ReplicasDiffer: on all of them, naming those that differ from most, or from rank 0.
        """
        found = self._collective.all_gather_json([checksum_of_shared(self._model), cpu()], "checksum")
        every = [checksum for checksum, _ in found]
        if len(set(every)) == 1 or len({model for _, model in found}) > 1:
            return  # other CPUs may round otherwise, in what each rank computes of equal gradients
        usual = max(every, key=lambda checksum: (every.count(checksum), -every.index(checksum)))
        others = [rank for rank, checksum in enumerate(every) if checksum != usual]
        raise ReplicasDiffer(
            f"the weights or the optimizer of rank {', '.join(map(str, others))} are not those of the others at epoch"
            f" {position.epoch}, step {position.step}: a callback that runs on every rank and does not do the same"
            " there, or a machine whose memory or CPU fails",
            others[0],
        )

    def _close(self, part: UnderWay, logs: Logs, epoch_end: EpochEnd | None) -> SegmentResult:
        self._stopped = bool(self._model.stop_training)
        if epoch_end is not None:
            self._ends[part.position.epoch] = part.position.step
        self._position = Position(part.position.epoch + 1, 0) if epoch_end is not None else part.position
        self._has_begun = epoch_end is None
        step_logs = part.step_logs or {}
        self._result = SegmentResult(
            position=self._position,
            num_steps=part.steps,
            rows=part.rows,
            seconds=part.seconds,
            logs=logs,
            step_logs={k: v for k, v in step_logs.items() if v.ndim == 1} if self._plan.record_steps else {},
            learning_rate=learning_rate(self._model),
            epoch_end=epoch_end,
            stop=self._stopped,
            own=read_sums_and_seeds(self._model, self._replica.metrics) if self._has_others else {},
            callbacks=self._callbacks.told_of_first() if self._has_others else (),
            not_finite_from=part.not_finite_from(self._replica.metrics.is_of_loss()),
            skipped=part.skipped,
            spent=part.spent,
        )
        self._part = None
        before = {self._segments: self._seeds[self._segments]} if self._segments in self._seeds else {}
        self._segments += 1
        self._seeds = {**before, self._segments: seeds_of(self._model)}
        return self._result

    def _end_epoch(self, part: UnderWay, epoch: int) -> EpochEnd:
        logs = dict(self._logs)
        if self._validation is not None and _is_due(self._plan.validation_freq, epoch):
            if part.validation is None:
                self._replica.beat("reading data to validate on")
                part.validation = self._validate(epoch)
            logs.update({f"val_{key}": value for key, value in part.validation.items()})
        self._epoch_logs = logs
        known = {key: len(values) for key, values in self._callbacks.history().items()}
        self._replica.beat("callbacks, on_epoch_end")
        self._replica.strikes("callback", epoch)
        self._callbacks("on_epoch_end", epoch, logs=self._replica.nested("train", logs))
        history = self._callbacks.history()  # it has what callbacks added to the logs, too
        # A hook that the ranks had yet to agree on has written them down before, as far as they are the epoch's own.
        new = {key for key, values in history.items() if len(values) > known.get(key, 0)}
        self._logs = {key: values[-1] for key, values in history.items() if key in new or key in logs}
        return EpochEnd(epoch, _numbers(self._logs), learning_rate(self._model))

    def _validate(self, epoch: int) -> Logs:
        assert self._validation is not None
        if self._is_validation_astray and isinstance(self._validation, StreamLoader):
            self._validation.reopen()
            self._validation.skip_passes(self._num_validated(epoch))
        self._is_validation_astray = True  # until it has come to its end
        logs = self._replica.evaluate_on(self._validation, self._callbacks, self._batch_bytes[1])
        self._is_validation_astray = False
        return logs

    def _num_validated(self, epoch: int) -> int:
        """How many validations this fit has done before that of an epoch."""
        before = range(self._plan.initial_epoch, epoch)
        return sum(_is_due(self._plan.validation_freq, each) for each in before)

    def _warn_of_early_end(self, end: Position) -> None:
        """Keras's warning, once a fit, where the user sees it: above the bar."""
        promised = self._feed.steps_per_epoch
        if promised is None or end.step >= promised or self._has_warned:
            return
        self._has_warned = True
        if self._collective.rank == 0:
            print(
                f"the input ran out of data in epoch {end.epoch + 1}, after {end.step} of {promised} steps: the epoch"
                " ends there. It must bring steps_per_epoch * epochs batches; a data set does with .repeat()"
            )

    # --- from a checkpoint

    def _prepared(self, saved: SavedFit) -> SavedFit:
        """Check it, find each callback's state, and get ready what `on_train_begin` would otherwise begin anew."""
        check_state(self._model, saved.state)
        if saved.own:
            check_own(self._model, self._replica.metrics, saved.own, _needed(saved))
        states, notes = matched(self._callbacks.with_state(), saved.callbacks)
        if self._collective.rank == 0:
            prepare_resume(self._callbacks.with_state(), states)
            for note in notes:
                print(note)
        return replace(saved, callbacks=states)

    def _go_on_from(self, saved: SavedFit) -> None:
        restore_states(self._callbacks.with_state(), saved.callbacks)
        self._position, self._has_begun = saved.position, saved.has_begun
        self._logs = dict(saved.logs)
        if saved.position.step == 0:
            self._epoch_logs = dict(saved.logs)
        if isinstance(self._feed, StreamLoader) and saved.batches is not None:
            self._feed.expect(saved.position, saved.batches)
        if isinstance(self._validation, StreamLoader):
            self._validation.skip_passes(self._num_validated(saved.position.epoch))
        self._replica.write_state(dict(saved.state))
        if saved.own:
            write_own(self._model, self._replica.metrics, saved.own, self._collective, _needed(saved))
        if saved.is_own_older:
            self._model.reset_metrics()

    # --- in another group

    @property
    def _has_others(self) -> bool:
        return self._collective.world_size > 1

    def _since_update(self) -> list[Segment] | None:
        """The mini-batches that are accumulated and not applied; None: they cannot be gone through again."""
        number = num_accumulated(self._model)
        if number is None or (number and (self._replica.has_own_step or self._is_final)):
            return None
        position = self._part.position if self._part is not None else self._position
        return steps_before(position, number, self._plan.initial_epoch, self._steps_that_were_in)

    def _steps_that_were_in(self, epoch: int) -> int | None:
        """An epoch that is over; None: nobody knows. What the data promise may not have come."""
        promised = self._feed.steps_in_epoch(epoch) if isinstance(self._feed, Loader) else None
        return self._ends.get(epoch, promised)

    def _accumulate_anew(self) -> None:
        """In the new group, what each rank is to have accumulated since the last update. Collective."""
        since = self._since_update()
        if since is None:
            raise LostPeer("the mini-batches since the last update cannot be gone through again")
        if since and isinstance(self._feed, StreamLoader):
            position = self._part.position if self._part is not None else self._position
            if (digest := self._feed.digest_at(position)) is not None:
                self._feed.expect(position, digest)
        steps = (
            partial(self._train_again, segment.position.epoch, chunk)
            for segment in since
            for chunk in self._feed.chunks(segment.position.epoch, segment.position.step, segment.num_steps, 1)
        )
        with contextlib.closing(steps):
            accumulate_anew(self._model, self._replica.metrics, sum(each.num_steps for each in since), steps)

    def _train_again(self, epoch: int, chunk: Chunk) -> None:
        self._replica.strikes.call_begins(self._step_of_fit(epoch, chunk))
        self._replica.call("train", chunk)
        self._replica.beat("the gradients since the last update")

    def standing(self) -> Standing:
        """How far this rank is, once its last call has ended, well or not."""
        part = self._part
        stage = 0
        if part is not None and self._has_begun:
            stage = 1 + part.ended + (part.step_logs is not None) + (part.validation is not None)
        elif part is None:
            stage = self._is_final + self._has_ended
        steps = part.steps if part is not None else 0
        hooks = 2 * self._callbacks.completed + (self._callbacks.half_done is not None)
        return Standing(self._segments, steps, stage, hooks, self._result, self._since_update() is not None)

    def hand_over(self) -> Handover:
        """What a rank that is behind, or new, has to know to be where this one is. Changes nothing."""
        part = self._part
        position = part.position if part is not None else self._position
        states, logs = self._callbacks.told(), without_tensors(self._logs)
        state, batches = self._replica.read_state_as_first(), self._batches_before(position)
        return Handover(
            SavedFit(position, 0, state, (), states, logs, {}, batches=batches),
            self._segments,
            self._result,
            part.told() if part is not None else None,
            self._has_begun,
            self._callbacks.half_done,
            self._callbacks.completed,
            self._hooks.place,
            part.own_logs() if part is not None else {},
            self._replica.knowledge,
            bool(self._model.stop_training),
            self._callbacks.leads,
            {after: draws_between(seeds, seeds_of(self._model)) for after, seeds in self._seeds.items()},
            self._is_final,
            self._has_ended,
            self._ends,
        )

    def take_over(self, handover: Handover, lost: Lost) -> None:
        """Be, from the beginning, where the rank is that hands over: for a newcomer that began with `handover.fit`.

        Args:
            handover: of that rank.
            lost: what the one has told last in whose place this is.
        """
        self._model.stop_training = handover.stop
        self._replica.knowledge = handover.knowledge
        self._segments, self._result = handover.segments, handover.result
        self._has_begun = handover.has_begun
        self._is_final, self._has_ended = handover.is_final, handover.has_ended
        self._ends = dict(handover.ends)
        part = handover.part
        if isinstance(self._validation, StreamLoader) and part is not None and part.validation is not None:
            self._validation.skip_passes(1)
        self._take_over_callbacks(handover, lost)
        if self._seeds:
            self._seeds = {lost.segments: self._seeds[0]}
        self.catch_up(handover)

    def _take_over_callbacks(self, handover: Handover, lost: Lost) -> None:
        part = handover.part
        begun_since = handover.has_begun and part is not None and part.segment.position.step == 0
        is_behind = self._callbacks.leads and not handover.leads  # the callbacks' state is lost from there on
        if is_behind and handover.result is not None and handover.segments > lost.segments:
            self._make_up_for_segment(handover.result)
        if is_behind and begun_since:
            self._callbacks.make_up_for("on_epoch_begin", self._position.epoch)
        if is_behind and handover.has_ended:
            self._callbacks.make_up_for("on_train_end", logs=self._replica.nested("train", self._epoch_logs))
        self._callbacks.take_over(handover.half_done, handover.hooks, is_behind)

    def _make_up_for_segment(self, result: SegmentResult) -> None:
        """Of a segment of which the one that died could not tell any more: its epoch's hooks."""
        end = result.epoch_end
        if end is None:
            return
        if result.num_steps == self._feed.steps_in_epoch(end.epoch):
            self._callbacks.make_up_for("on_epoch_begin", end.epoch)
        self._callbacks.make_up_for("on_epoch_end", end.epoch, logs=self._replica.nested("train", end.logs))

    def resize(self, handover: Handover, lost: Lost) -> dict[str, Array]:
        """Be where the rank is that hands over, in a group of another size; the collective knows its place there.

        Args:
            handover: of that rank.
            lost: of the ranks that are no more.

        Returns:
            What this rank alone has now.
        """
        rank, world_size = self._collective.rank, self._collective.world_size
        self._replica.beat("reading data")
        self._replica.resize()
        for feed in (self._feed, self._validation):
            if feed is not None:
                feed.deal(rank, world_size)
        self._is_validation_astray = True
        if rank == 0 and not self._callbacks.leads:
            self._lead(handover, lost)
        if rank == 0:
            self._add(lost)
        self._come_to(handover)
        self._replica.spread_seeds()
        self._seeds = {self._segments: seeds_of(self._model)}
        return read_sums_and_seeds(self._model, self._replica.metrics)

    def _add(self, lost: Lost) -> None:
        """Make what ranks that are no more had of the metrics' sums this rank's: now, and after each step."""
        added = add_own(self._replica.metrics, lost.own)
        for states in self._part.states if self._part is not None else ():
            for state, more in zip(states, added, strict=True):
                state += more

    def _lead(self, handover: Handover, lost: Lost) -> None:
        """Run here what ran on rank 0 alone, with the states that it has told."""
        states, notes = matched(self._callbacks.with_state(), lost.with_callbacks_of(handover.fit))
        for note in notes:
            print(note)
        prepare_resume(self._callbacks.with_state(), states)
        self._callbacks.lead()
        restore_states(self._callbacks.with_state(), states)
        self._take_over_callbacks(handover, lost)

    def catch_up(self, handover: Handover) -> None:
        """Make the update that the rank that hands over is ahead by (see `Standing.can_catch_up_with`)."""
        self._come_to(handover)
        known = [after for after in self._seeds if after in handover.draws]
        if known:  # numbers of its own, which hang on nobody else's
            draw_on(self._model, self._seeds[max(known)], handover.draws[max(known)])
        else:
            self._replica.spread_seeds()

    def _come_to(self, handover: Handover) -> None:
        write_state(self._model, handover.fit.state)
        own = {key: np.zeros(1) for key in self._replica.own_logs}
        if handover.part is not None:
            part = self._part = self._part or UnderWay(handover.part.segment)
            missing = handover.part.steps - part.steps
            times = missing if self._replica.metrics.records_steps else 1
            part.come_to(handover.part, self._newest(times) if missing > 0 else None, handover.own)
            own = {key: values for key, values in part.own_logs().items() if len(values)} or own
        else:
            self._part = None
        self._hooks.take_over(handover.batch, self._newest(1), own)

    def _newest(self, times: int) -> list[Array]:
        """The metrics as they are here, as if so many steps had left them so."""
        return [np.repeat(np.asarray(value)[None], times, axis=0) for value in self._replica.metrics.read()]

    def go_on(self) -> SegmentResult | None:
        """In the new group, finish what there is of the interrupted segment; None: nothing of it. Collective.

        Raises:
            LostPeer: the ranks are not at one place, whatever they were told.
        """
        part = self._part
        here = [self.standing().place, self._hooks.place, self._callbacks.half_done, self._replica.own_logs]
        if len({json.dumps(place) for place in self._collective.all_gather_json(here, "place")}) > 1:
            raise LostPeer("after a recovery the ranks are not at one place")
        self._accumulate_anew()
        if part is None:
            return None
        part.ended |= self._has_begun and part.steps > 0 and self._is_end(part.position)
        if not part.steps and not part.ended:
            self._part = None
            return None
        if self._hooks.is_due:
            self._hooks.finish()
        return self._finish(part)


def _needed(saved: SavedFit) -> tuple[str, ...]:
    """What must be there of what each rank alone had: when an epoch begins, metrics begin anew."""
    in_epoch = saved.position.step > 0 and not saved.is_own_older
    return (METRIC,) * in_epoch + (ACCUMULATED,) * (not saved.is_own_told)


def _numbers(logs: Logs) -> Logs:
    """The logs without metrics that are arrays: these are in the history alone."""
    return {key: value for key, value in logs.items() if np.ndim(value) == 0}


def _is_due(frequency: int | Sequence[int], epoch: int) -> bool:
    """Whether Keras validates after `epoch`: every n-th, or those in a list (both count epochs from 1)."""
    if isinstance(frequency, int):
        return (epoch + 1) % frequency == 0
    return epoch + 1 in frequency
