"""Owns the checkpoints of one fit: taken from the workers between segments, written as they train on, then committed.

Only this commits, in the driver: the workers write their files into a staging folder, and the manifest makes a
checkpoint of them once all of them are there. A checkpoint that cannot be written is said so and is none; the ones
before it stay, and training goes on.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Self

from dtrain.checkpoint import Checkpoint, CheckpointStore, FileRecord, Manifest, Staging
from dtrain.config import CheckpointConfig
from dtrain.errors import CheckpointError, TakenOver
from dtrain.outcomes import have_answered, outcome_of
from dtrain.policy import checkpoint_is_due, is_better, steps_until_checkpoint
from dtrain.types import Failure, Logs, Position
from dtrain.worker_group import GroupBroken, WorkerGroup

log = logging.getLogger("dtrain")


@dataclass(frozen=True)
class Saving:
    """How checkpoints of a fit are made.

    Attributes:
        store: where they are.
        config: which are kept.
        manifest: what all of them have in common; step, position, files and metrics are filled in.
        begin: called once the workers stand where the fit begins or goes on.
        before_commit: called before each commit: what it returns goes into the manifest's `extra`; it raises
            CheckpointError where this process may no longer commit. Also called where one cannot be made.
        validates: after some epochs; metrics then have values of the validation, too.
    """

    store: CheckpointStore
    config: CheckpointConfig
    manifest: Manifest
    begin: Callable[[], None] = lambda: None
    before_commit: Callable[[], Mapping[str, Any]] = dict
    validates: bool = False


@dataclass(frozen=True)
class _Writing:
    """A checkpoint that the workers are writing."""

    staging: Staging
    manifest: Manifest
    calls: list[Any]


class Checkpointer:
    """Makes the checkpoints of one fit, one at a time. A context manager: what an error leaves unfinished is removed.

    Args:
        group: whose state they are of.
        saving: how they are made; None: none is.
        watch: called a few times a second while it waits for the workers.
    """

    def __init__(
        self, group: WorkerGroup, saving: Saving | None, watch: Callable[[bool], None] = lambda _: None
    ) -> None:
        self.newest: Checkpoint | None = None
        self._group = group
        self._saving = saving
        self._watch = watch
        self._best: tuple[float, Checkpoint] | None = None
        self._is_first = False
        self._asked_for = 0  # the newest, at this step
        if saving is not None:
            saving.begin()
            self._best = saving.store.best(saving.config.monitor) if saving.config.monitor is not None else None
            self._is_first = saving.store.latest() is None
        self._writing: _Writing | None = None
        self._is_finishing = False
        self._is_failing = False
        self._knows_metrics = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        writing, saving = self._writing, self._saving
        if writing is None or saving is None or (kind is not None and issubclass(kind, TakenOver)):
            return
        with suppress(Exception):  # what is all there is a checkpoint, whatever else went wrong
            self.commit()
        if self._writing is not None:
            with suppress(Exception):
                saving.before_commit()  # or what lies there may be another driver's
                saving.store.discard(writing.staging)

    def begin(self, step: int) -> bool:
        """Training begins, or goes on, after so many steps. Whether a checkpoint is due before: the run has none.

        Killed before the next one it then begins again with the weights that it began with.
        """
        self._asked_for = step
        return self._is_first

    def steps_until_due(self, step: int) -> int | None:
        """Mini-batches from `step` of the run to the next checkpoint that goes by steps; None: there is none."""
        return steps_until_checkpoint(self._saving.config if self._saving is not None else None, step)

    def is_due(self, epoch: int, step: int) -> bool:
        """Whether to make one when `epoch` has ended, `step` mini-batches into the run."""
        return self._saving is not None and checkpoint_is_due(self._saving.config, epoch, step)

    def is_late(self, step: int) -> bool:
        """Whether one that goes by steps is missing: the group broke when it was to be made."""
        every = self._saving.config.every_steps if self._saving is not None else None
        return every is not None and step // every > self._asked_for // every

    def save(self, step: int, metrics: Logs, **extra: Any) -> None:
        """Make a checkpoint of the state as it is now, and wait until it is one.

        Raises:
            GroupBroken: a worker died over it.
        """
        if self._saving is None:
            return
        self.finish()
        if self.newest is not None and self.newest.step == step and not extra:
            return
        self.take(step, metrics, **extra)
        self.finish(is_last=True)

    def take_best(self, step: int, metrics: Logs, **extra: Any) -> None:
        """Make a checkpoint of the state as it is now, where that is the best so far.

        The end of a fit may put other weights in its place: averages, or those of the best epoch by another metric.
        """
        self.finish()
        saving = self._saving
        if saving is not None and is_better(saving.config, metrics, self._best[0] if self._best else None):
            self.take(step, metrics, **extra)

    def take(self, step: int, metrics: Logs, **extra: Any) -> None:
        """Have the workers copy the state as it is now, and write that while they train on."""
        calls = self._group.submit("snapshot", step)
        position: Position = self._group.wait(calls, self._watch, survivable=True)[0]
        self.write(step, step, position, metrics, **extra)

    def write(self, key: int, step: int, position: Position, metrics: Logs, **extra: Any) -> None:
        """Have the workers write the snapshot that they keep under `key`; it is committed later.

        Waits for the one before: so training is held up where checkpoints are asked for faster than they are written,
        and there are never more copies of the state in memory than two.
        """
        self.finish()
        saving = self._saving
        assert saving is not None
        self._asked_for = step
        try:
            staging = saving.store.stage(step)
        except CheckpointError as error:
            _is_ours(saving)  # a driver that is further may be why: the store takes nothing older
            self._has_failed(error)
            return
        manifest = replace(saving.manifest, step=step, position=position, metrics=metrics)
        manifest = replace(manifest, world_size=len(self._group.workers))
        manifest = replace(manifest, extra={**manifest.extra, **extra})
        self._writing = _Writing(staging, manifest, self._group.submit("write_snapshot", key, staging, beside="files"))

    def commit(self) -> None:
        """Commit what is written by now; does not wait. Called wherever somebody waits for the workers."""
        if self._writing is not None and not self._is_finishing and self._group.have_answered(self._writing.calls):
            self.finish()

    def finish(self, is_last: bool = False) -> None:
        """Wait for what is being written, and commit it.

        What a worker died over is none: whoever waits for the workers next will see it; where it `is_last`, nobody.

        Raises:
            WorkerError: a worker raised meanwhile.
            GroupBroken: one died over what is the last.
        """
        writing, saving = self._writing, self._saving
        if writing is None or saving is None:
            return
        self._is_finishing = True
        try:
            written = self._group.wait(writing.calls, self._watch, survivable=True)
        except GroupBroken as error:
            if is_last:
                raise
            written = [CheckpointError(str(error))]
        finally:
            self._is_finishing = False
        self._writing = None
        try:
            self._commit(saving, writing, written)
        except TakenOver:  # what lies there may be the other driver's by now
            raise
        except CheckpointError as error:
            self._give_up(saving, writing, error)
            return
        try:
            saving.store.prune(saving.config.keep, self._best[1] if self._best else None)
        except CheckpointError as error:
            log.warning("an old checkpoint stays: %s", error)

    def lose(self, dead: Sequence[int]) -> None:
        """Ranks have died: what they were still writing makes no checkpoint. Does not wait."""
        writing, saving = self._writing, self._saving
        if writing is None or saving is None or not any(_is_lost(writing.calls[rank]) for rank in dead):
            return
        self._writing = None
        self._give_up(saving, writing, CheckpointError("a worker died while it wrote its part"))

    def _give_up(self, saving: Saving, writing: _Writing, error: CheckpointError) -> None:
        if _is_ours(saving):  # or what lies there may be another driver's
            with suppress(CheckpointError):
                saving.store.discard(writing.staging)
        self._has_failed(error)

    def _commit(
        self, saving: Saving, writing: _Writing, written: list[tuple[FileRecord, ...] | CheckpointError]
    ) -> None:
        files: list[FileRecord] = []
        for part in written:
            if isinstance(part, CheckpointError):
                raise part
            files += part
        metrics = writing.manifest.metrics
        # Within an epoch metrics are of the rows so far: they do not compare. Those of the end may be of other weights.
        ends_epoch = writing.manifest.position.step == 0 and "finished" not in writing.manifest.extra
        is_best = ends_epoch and is_better(saving.config, metrics, self._best[0] if self._best else None)
        if ends_epoch and (not saving.validates or any(name.startswith("val_") for name in metrics)):
            self._check_monitor(saving.config.monitor, metrics)
        best = float(metrics[saving.config.monitor or ""]) if is_best else None
        extra = {**writing.manifest.extra, **saving.before_commit()}
        manifest = replace(writing.manifest, files=tuple(files), best=best, extra=extra)
        self.newest = saving.store.commit(writing.staging, manifest)
        if best is not None:
            self._best = best, self.newest
        if self._is_failing:
            log.warning("checkpoints can be written again: %s", self.newest.url)
        self._is_failing = False

    def _check_monitor(self, monitor: str | None, metrics: Mapping[str, float]) -> None:
        """Say once, when the metrics are known, that there is none of that name."""
        if monitor is not None and metrics and not self._knows_metrics and monitor not in metrics:
            log.warning(
                "CheckpointConfig(monitor=%r): no best checkpoint is kept, since the metrics are %s",
                monitor,
                ", ".join(sorted(metrics)),
            )
        self._knows_metrics |= bool(metrics)

    def _has_failed(self, error: CheckpointError) -> None:
        kept = self.newest.url if self.newest else "none yet"
        log.warning("no checkpoint was made, training goes on (the newest one: %s): %s", kept, error)
        self._is_failing = True


def _is_lost(call: Any) -> bool:
    """Whether a call to a worker that died has come to nothing."""
    return not have_answered([call]) or isinstance(outcome_of(call), Failure)


def _is_ours(saving: Saving) -> bool:
    """Whether the run is known to be still this driver's.

    Raises:
        TakenOver: it is another's.
    """
    try:
        saving.before_commit()
    except TakenOver:
        raise
    except CheckpointError:
        return False
    return True
