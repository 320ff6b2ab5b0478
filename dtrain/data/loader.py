"""Owns what a rank is fed with, chunk by chunk; here from data that are read by rows, stream.py has those in batches.

Reads ahead: this rank's rows, a few steps at a time, in a background thread; in a fit also what comes after the steps
that were asked for.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np

from dtrain.data.sampler import Sampler, shard
from dtrain.data.source import Blocked, DataSource, map_tree
from dtrain.types import BatchPlan, ModelDescription, Opened, Position, Segment, Shapes, Tree


@dataclass(frozen=True)
class Chunk:
    """This rank's rows of some consecutive steps, whose mini-batches are all of one size.

    Attributes:
        first_step: the first step, counted within the epoch.
        num_steps: K, 1 or more.
        data: (x,), (x, y) or (x, y, sample_weight); every leaf is (K, local rows, ...). It may share memory with the
            source: never write to it.
        share: what this rank's mean loss counts in the mini-batch's.
        whole: every rank has all the rows, because there are fewer rows than ranks.
        global_rows: rows of the whole mini-batch, the same for every step of the chunk.
        shapes: what leaves have behind the rows, by path, where it is known to differ between batches: None there.
    """

    first_step: int
    num_steps: int
    data: Tree
    share: float
    whole: bool
    global_rows: int
    shapes: Shapes = field(default_factory=dict)


class Feed(Protocol):
    """Where a rank's steps come from. All ranks make the same calls in the same order."""

    @property
    def plan(self) -> BatchPlan | None:
        """Counts the steps of epochs, by a Sampler; None: nobody knows how many there are."""

    @property
    def steps_per_epoch(self) -> int | None:
        """What Keras shows as the number of steps; None: unknown."""

    def steps_in_epoch(self, epoch: int) -> int | None:
        """How many steps `epoch` has; None: as many as come."""

    def first(self) -> Tree:
        """Some first rows, to build a model from: (x,), (x, y) or (x, y, sample_weight)."""

    def chunks(self, epoch: int, first_step: int, num_steps: int, steps_per_chunk: int) -> Iterator[Chunk]:
        """This rank's rows of the steps from `first_step` on, in order. Fewer come where the input ends: the epoch's
        end."""

    def one_pass(self, steps_per_chunk: int) -> Iterator[Chunk]:
        """The chunks of a whole pass, to evaluate or to predict."""

    def deal(self, rank: int, world_size: int) -> None:
        """Be fed as this rank of so many from the next chunks on."""

    def close(self) -> None:
        """End what runs in the background."""

    def opened(self, first: Tree, model: ModelDescription | None) -> Opened:
        """What there is to know of it, given what `first` returned, and the model if it was built from that."""


def chunks_of(
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


def steps_before(
    position: Position, number: int, first_epoch: int, steps_in_epoch: Callable[[int], int | None]
) -> list[Segment] | None:
    """The `number` steps before a position, in order; None: there are not so many, or of an epoch nobody knows."""
    found: list[Segment] = []
    while number:
        if position.step == 0:
            num_steps = steps_in_epoch(position.epoch - 1) if position.epoch > first_epoch else None
            if not num_steps:
                return None
            position = Position(position.epoch - 1, num_steps)
        count = min(number, position.step)
        position = Position(position.epoch, position.step - count)
        found.insert(0, Segment(position, count))
        number -= count
    return found


_READING = threading.Lock()
"""One thread at a time reads sources: what is validated on may share a file or a cache with what is trained on."""


@dataclass(frozen=True)
class _Early:
    """Steps of a chunk that nobody has asked for yet, and the thread that reads it.

    Attributes:
        position: of the first of them.
        steps: which of the chunk's they are.
    """

    pool: ThreadPoolExecutor
    position: Position
    steps: range
    chunk: Future[Chunk]


def _part(read: Future[Chunk], steps: range) -> Chunk:
    """Those of a chunk's steps; runs in the thread that has read it."""
    chunk = read.result()
    if len(steps) == chunk.num_steps:
        return chunk
    data = map_tree(lambda leaf: leaf[steps.start : steps.stop], chunk.data)
    return replace(chunk, first_step=chunk.first_step + steps.start, num_steps=len(steps), data=data)


class Loader:
    """Reads this rank's rows ahead of the step that needs them.

    Args:
        source: the data set, the same on all ranks.
        plan: which rows make up each mini-batch of the whole job.
        rank: this rank.
        world_size: the number of ranks.
        convert: applied to a chunk's data in the background thread; to make tensors of it, say.
        prefetch: chunks read ahead; 0: none, each is read when asked for.
        first_epoch: the fit's `initial_epoch` (see `Sampler`).
    """

    def __init__(
        self,
        source: DataSource,
        plan: BatchPlan,
        rank: int,
        world_size: int,
        convert: Callable[[Tree], Tree] = lambda data: data,
        prefetch: int = 2,
        first_epoch: int = 0,
    ) -> None:
        self.source = source
        self.sampler = Sampler(plan, first_epoch)
        self.convert = convert
        self.prefetch = prefetch
        self.epochs = 0
        """Before this one, what comes after the steps that were asked for is read early."""
        self._early: _Early | None = None
        self.deal(rank, world_size)

    @property
    def plan(self) -> BatchPlan:
        return self.sampler.plan

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.steps_per_epoch

    def steps_in_epoch(self, epoch: int) -> int:
        return self.sampler.steps_in_epoch(epoch)

    def first(self) -> Tree:
        """One row."""
        return self.source.read(np.zeros(1, np.int64))

    def one_pass(self, steps_per_chunk: int) -> Iterator[Chunk]:
        first_epoch = self.sampler.first_epoch
        return self.chunks(first_epoch, 0, self.steps_in_epoch(first_epoch), steps_per_chunk)

    def deal(self, rank: int, world_size: int) -> None:
        self.close()
        self.rank = rank
        self.world_size = world_size
        if isinstance(self.source, Blocked):
            self.source.keep(self.sampler.open_blocks(world_size, rank))

    def close(self) -> None:
        """Give up what was read early, and its thread."""
        early, self._early = self._early, None
        if early is not None:
            early.pool.shutdown(wait=True, cancel_futures=True)

    def opened(self, first: Tree, model: ModelDescription | None) -> Opened:
        kind, plan = type(self.source).__name__, self.plan
        return Opened(kind, first, plan, plan.num_rows, plan.batch_size, self.steps_per_epoch, model)

    def chunks(self, epoch: int, first_step: int, num_steps: int, steps_per_chunk: int) -> Iterator[Chunk]:
        """This rank's rows of `num_steps` steps from `first_step` on, in order, `steps_per_chunk` steps at a time.

        A chunk never mixes mini-batches of different sizes: the partial one at the end of a pass comes alone. What the
        source raises is raised here, when its chunk is due. The thread lives from the first chunk until the iterator is
        exhausted, closed, or has raised; where it has read the next chunk early, until that was asked for, or `close`.
        """
        pool, ahead, step = self._begin(Position(epoch, first_step), num_steps, steps_per_chunk)
        is_whole = False
        try:
            for span in self._spans(epoch, step, first_step + num_steps - step, steps_per_chunk):
                ahead.append(pool.submit(self._read, epoch, *span))
                if len(ahead) > self.prefetch:
                    yield ahead.popleft().result()
            self._read_early(pool, Position(epoch, first_step + num_steps), steps_per_chunk)
            while ahead:
                yield ahead.popleft().result()
            is_whole = True
        finally:
            if not is_whole:
                self.close()
            if self._early is None:
                pool.shutdown(wait=True, cancel_futures=True)

    def _begin(
        self, position: Position, num_steps: int, longest: int
    ) -> tuple[ThreadPoolExecutor, deque[Future[Chunk]], int]:
        """A thread, the chunks that it has read already, and the step after them.

        Steps that are asked for as one chunk come as one, whatever was read early.
        """
        parts: deque[Future[Chunk]] = deque()
        early, taken = self._early, 0
        if early is not None and early.position == position:
            for _, whole in self._spans(position.epoch, position.step, num_steps, longest):
                count = min(whole, len(early.steps) - taken)
                if count == 0 or (count < whole and num_steps <= longest):
                    break
                parts.append(early.pool.submit(_part, early.chunk, early.steps[taken : taken + count]))
                taken += count
        if early is None or not parts:
            self.close()
            return ThreadPoolExecutor(max_workers=1, thread_name_prefix="dtrain-loader"), parts, position.step
        position, rest = Position(position.epoch, position.step + taken), early.steps[taken:]
        self._early = replace(early, position=position, steps=rest) if rest and taken == num_steps else None
        return early.pool, parts, position.step

    def _read_early(self, pool: ThreadPoolExecutor, position: Position, longest: int) -> None:
        """The first chunk of what is likely to be asked for next, so that nobody waits for it then."""
        if self._early is not None:  # there is more of the last one
            return
        if position.step == self.steps_in_epoch(position.epoch):
            position = Position(position.epoch + 1, 0)
        if self.prefetch and position.epoch < self.epochs:
            left = self.steps_in_epoch(position.epoch) - position.step
            first_step, num_steps = next(self._spans(position.epoch, position.step, left, longest))
            chunk = pool.submit(self._read, position.epoch, first_step, num_steps)
            self._early = _Early(pool, position, range(num_steps), chunk)

    def _spans(self, epoch: int, first_step: int, num_steps: int, longest: int) -> Iterator[tuple[int, int]]:
        """The first step and the number of steps of each chunk."""
        step, end = first_step, first_step + num_steps
        while step < end:
            size, count = self.sampler.batch_size_at(epoch, step), 1
            while count < longest and step + count < end and self.sampler.batch_size_at(epoch, step + count) == size:
                count += 1
            yield step, count
            step += count

    def _read(self, epoch: int, first_step: int, num_steps: int) -> Chunk:
        global_rows = self.sampler.batch_size_at(epoch, first_step)
        part = shard(global_rows, self.world_size, self.rank)
        rows = np.stack(list(self.sampler.batches(epoch, first_step, num_steps, part.rows)))
        with _READING:
            flat = self.source.read(rows.reshape(-1))
        data = map_tree(lambda leaf: leaf.reshape(rows.shape + leaf.shape[1:]), flat)
        return Chunk(first_step, num_steps, self.convert(data), part.share, part.whole, global_rows)
