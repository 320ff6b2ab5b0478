"""Owns reading data that come in batches: each rank reads every mini-batch of the whole job and keeps its own rows.

The ranks make sure of each other as they go: before a step is trained on, all of them have said what they have for it
(rows, and a checksum of some of them), that their input has ended, or that it raised. So inputs of different or
unknown length end with an error that says so, or together; a rank never waits for one that has nothing left.

Epochs are those of Keras 3.15 (`EpochIterator`): with steps given, the next epoch goes on where the last one ended,
and a pass that runs out ends its epoch early; without, every epoch is a new pass. Two deviations: an epoch that would
be empty because the pass ended exactly before it starts a new pass at once; and a function that returns a generator is
called again for a new pass, where Keras would go on with the exhausted generator.
"""

import sys
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Protocol

import numpy as np

from dtrain.data.loader import Chunk
from dtrain.data.sampler import Sampler, shard
from dtrain.data.source import check_dense, common_shapes, content_of, leaves, map_tree, shapes_of
from dtrain.errors import DataError, LostPeer
from dtrain.types import BatchPlan, ModelDescription, Opened, Position, Purpose, Shapes, Tree

Gather = Callable[[Any], list[Any]]
"""Returns every rank's value, in rank order; all ranks must call it."""

NUM_SAMPLED = 3
"""So many rows of each mini-batch go into its checksum: the first, one in the middle, the last."""
NUM_MARKS = 4096
"""Of so many positions, the newest, it is known what was read until there."""


class Input(Protocol):
    """Batches that can be read again and again. A batch is x, (x,), (x, y) or (x, y, sample_weight)."""

    @property
    def num_batches(self) -> int | None:
        """How many batches a pass has; None: unknown, or without end."""

    def open(self) -> None:
        """Start anew, as if nothing had been read: the next passes bring what the first ones did."""

    def begin_pass(self, number: int) -> None:
        """Get ready for pass `number`, counted from 0 since it was opened."""

    def batches(self) -> Iterable[Tree]:
        """One pass. Read in one background thread."""

    def shapes(self) -> Shapes:
        """What leaves have behind the rows, by path: None where it differs between batches; empty where unknown."""

    def end_pass(self) -> None:
        """A pass was read whole, and its length was known before. Not called where steps are given to a fit."""

    def on_epoch_begin(self) -> None: ...

    def on_epoch_end(self) -> None: ...


@dataclass(frozen=True)
class Batches:
    """Batches in memory: what a small tf.data.Dataset was read into. Every pass brings them in the same order."""

    name: str
    content: tuple[Tree, ...]

    @property
    def num_batches(self) -> int:
        return len(self.content)

    def open(self) -> None: ...

    def begin_pass(self, number: int) -> None: ...

    def batches(self) -> Iterable[Tree]:
        return self.content

    def shapes(self) -> Shapes:
        return common_shapes([shapes_of(batch) for batch in self.content])

    def end_pass(self) -> None: ...

    def on_epoch_begin(self) -> None: ...

    def on_epoch_end(self) -> None: ...


def read_at_once(source: Input, limit: int, name: str) -> Batches | None:
    """All batches of one pass of what was passed as `name`; None if they are larger than `limit` bytes.

    Raises:
        DataError: a batch is none.
    """
    content, size = [], 0
    source.begin_pass(0)
    for batch in source.batches():
        parts = parts_of(batch, name)
        size += sum(leaf.nbytes for _, leaf in leaves(parts))
        if size > limit:
            return None
        content.append(parts)
    return Batches(name, tuple(content))


class StreamLoader:
    """Reads batches ahead of the step that needs them, and agrees with the other ranks on each.

    It costs every rank the whole input's work (N times in all), and one small exchange for each chunk. Going to a
    position other than the one after what was last read opens the input anew and reads all that comes before it.

    Args:
        source: the same batches on all ranks.
        rank: this rank.
        world_size: the number of ranks.
        gather: exchanges JSON values; never called with one rank.
        purpose: "train" goes on over epochs where `steps` is given; all else starts a new pass each time.
        steps: mini-batches in an epoch or a pass; None: all there are.
        convert: applied to a chunk's data.
        first_epoch: the number of the epoch that starts the first pass.
        name: what the user passed the data as, for messages.
        kind: what the data are, such as "tf.data.Dataset".

    Raises:
        DataError: it is known to have no batches.
    """

    def __init__(
        self,
        source: Input,
        rank: int,
        world_size: int,
        gather: Gather,
        *,
        purpose: Purpose = "train",
        steps: int | None = None,
        convert: Callable[[Tree], Tree] = lambda data: data,
        first_epoch: int = 0,
        name: str = "x",
        kind: str = "batches",
    ) -> None:
        self.source = source
        self.rank = rank
        self.world_size = world_size
        self.kind = kind
        self.batch_rows: int | None = None
        """Rows of the whole job's first mini-batch, once it is read."""
        self.on_read_again: Callable[[], None] = lambda: None
        """Called with each batch that is read only to get to where the input is to go on."""
        self.num_batches = source.num_batches
        if self.num_batches == 0:
            raise DataError(f"{name} has no batches; check what it was made from")
        self._shapes = source.shapes()
        self._gather = gather
        self._purpose = purpose
        self._steps = steps
        self._convert = convert
        self._first_epoch = first_epoch
        self._name = name
        self._is_new = True  # opened, and nothing read
        self._reader: _Reader | None = None
        self._position: Position | None
        self._expected: Mapping[Position, int] = {}
        self._start()

    # --- what a fit asks

    @property
    def plan(self) -> BatchPlan | None:
        """Counts the steps of epochs, a batch for a row; None: nobody knows how many batches there are."""
        return None if self.num_batches is None else BatchPlan(self.num_batches, 1, self._steps)

    @property
    def steps_per_epoch(self) -> int | None:
        """What Keras shows as the number of steps; None: unknown."""
        return self._steps or self.num_batches

    def steps_in_epoch(self, epoch: int) -> int | None:
        """How many steps `epoch` has, unless the input runs out before; None: as many as the input has."""
        if self.plan is not None and self._goes_on:
            return Sampler(self.plan, self._first_epoch).steps_in_epoch(epoch)
        if self._steps is None or self.num_batches is None:
            return self._steps or self.num_batches
        return min(self._steps, self.num_batches)

    def first(self) -> Tree:
        """This rank's rows of the first mini-batch, which stays to be trained on. Collective.

        Raises:
            DataError: there is none, or the ranks' differ.
        """
        position = Position(self._first_epoch, 0)
        self._go_to(position)
        if not self._agree(position, 1):
            raise self._empty(position)
        assert self._reader is not None
        batch = self._reader.peek(1)[0][0]
        self.batch_rows = batch.global_rows
        return batch.data

    def chunks(self, epoch: int, first_step: int, num_steps: int, steps_per_chunk: int) -> Iterator[Chunk]:
        """This rank's rows of up to `num_steps` steps from `first_step` on; fewer where the input ends. Collective.

        Mini-batches that follow each other and have the same shapes share a chunk. The epoch has ended when fewer steps
        came than were asked for, or all of `steps_in_epoch`.

        Raises:
            DataError: the ranks' inputs differ, or a batch is none, or an epoch has no batch.
            LostPeer: another rank's input raised; that rank raises what it was.
        """
        self._go_to(Position(epoch, first_step))
        known = self.steps_in_epoch(epoch)
        step, end = first_step, first_step + num_steps
        if known is not None:
            end = min(end, known)
        while step < end:
            batches = self._take(Position(epoch, step), min(steps_per_chunk, end - step))
            if not batches:
                break
            for chunk in self._stacked(step, batches):
                step += chunk.num_steps
                self._position = None  # unless the caller comes back for the next
                yield chunk
            self._position = Position(epoch, step)
        if step < end or step == known:
            self._end_epoch(ran_out=step < end)

    def one_pass(self, steps_per_chunk: int) -> Iterator[Chunk]:
        """The chunks of a whole pass from the start of the input: to evaluate or to predict. Collective."""
        if self._position is None or self._position.step > 0:  # the last one was not read to its end
            self._close_reader()
            self._position, self._has_begun = Position(self._first_epoch, 0), False
        epoch = self._position.epoch
        num_steps = self.steps_in_epoch(self._first_epoch)
        yield from self.chunks(epoch, 0, sys.maxsize if num_steps is None else num_steps, steps_per_chunk)

    def skip_passes(self, number: int) -> None:
        """Go on as after so many passes: hooks are called, orders are drawn, and of each pass one batch is read."""
        for _ in range(number):
            _, _, error = self._read(1)
            if error is not None:
                raise error
            self.on_read_again()
            steps = self.num_batches if self._steps is None else self._steps
            if self.num_batches is not None and steps is not None and steps >= self.num_batches:
                self._num_read = self.num_batches  # as read whole
            self._end_epoch(ran_out=True)

    def reopen(self) -> None:
        """Stand at the beginning, as when it was opened."""
        self._close_reader()
        if not self._is_new:
            self.source.open()
        self._is_new = False
        self._start()

    def digest_at(self, position: Position) -> int | None:
        """A checksum of all batches before a position, where that was passed a short while ago."""
        return self._marks.get(position)

    def expect(self, position: Position, digest: int) -> None:
        """Refuse, when the input is to go on at `position`, batches before it that are not as they were.

        Args:
            position: of a mini-batch.
            digest: what `digest_at` gave for it.
        """
        self._expected = {position: digest}

    def deal(self, rank: int, world_size: int) -> None:
        """What was read ahead is of another split: the input is read again up to where it stands."""
        self.rank, self.world_size = rank, world_size
        self._expected = self._marks if self._purpose == "train" else {}  # of others, passes are skipped unread
        self._close_reader()
        self._position = None

    def close(self) -> None:
        """End the background thread."""
        self._close_reader()

    def opened(self, first: Tree, model: ModelDescription | None) -> Opened:
        """What there is to know of it, given what `first` returned, and the model if it was built from that."""
        example = map_tree(lambda leaf: leaf[:2], first)
        return Opened(self.kind, example, self.plan, None, self.batch_rows, self.steps_per_epoch, model)

    # --- where it stands

    @property
    def _goes_on(self) -> bool:
        return self._purpose == "train" and self._steps is not None

    def _start(self) -> None:
        """Stand at the first epoch of an input that was just opened."""
        self._reader = None
        self._position = Position(self._first_epoch, 0)
        self._has_begun = False  # the epoch has
        self._num_passes = 0
        self._num_read = 0  # batches of this pass
        self._digest = 0  # of all batches since it was opened
        self._marks = {self._position: 0}

    def _go_to(self, position: Position) -> None:
        """Make the mini-batch at `position` the next one. Not collective: a rank may stand elsewhere than another.

        Raises:
            DataError: there is no such mini-batch, or others than before come before it.
        """
        if self._position != position:
            self._read_again(position)
        if self._expected.get(position, self._digest) != self._digest:
            self._refuse_others(position)

    def _read_again(self, position: Position) -> None:
        """From the beginning up to a position."""
        self.reopen()
        while (here := self._position) is not None and (here.epoch, here.step) < (position.epoch, position.step):
            batches, ended, error = self._read(1)
            if ended and here.step == 0 and self._starts_over():
                batches, ended, error = self._read(1)
            if error is not None:
                raise error
            if ended and here.step == 0:
                raise self._empty(here)
            self._drop(batches, here)
            self.on_read_again()
            self._position = Position(here.epoch, here.step + len(batches))
            if ended or self._position.step == self.steps_in_epoch(here.epoch):
                self._end_epoch(ran_out=ended)
        if self._position != position:
            raise DataError(f"{self._name} has no batch for step {position.step} of epoch {position.epoch}")

    def _refuse_others(self, position: Position) -> None:
        """Where the input goes on within a pass; a new pass has every row all the same, in another order."""
        told = (
            f"{self._name} brought other batches before {_place(position)} than when they were trained on;"
            " seed what is random in the function (dataset.shuffle(..., seed=1), np.random.default_rng(1)), and sort"
            " lists of files"
        )
        if position.step or self._goes_on:
            raise DataError(f"{told}: going on there would leave out rows and train others twice")
        if self.rank == 0:
            print(f"not bit for bit what an undisturbed run would give: {told}")

    def _begin_epoch(self) -> None:
        if self._has_begun:
            return
        self._is_new = False
        if self._purpose in ("validation", "evaluate") or (self._purpose == "train" and not self._num_passes):
            self.source.on_epoch_end()  # Keras's `reset`: once before a fit, and before each evaluation
        is_new_pass = self._reader is None
        if is_new_pass:
            self.source.begin_pass(self._num_passes)
        self.source.on_epoch_begin()
        self._has_begun = True
        if is_new_pass:
            self._begin_pass()

    def _begin_pass(self) -> None:
        self._reader = _Reader(self.source.batches(), self._own_part)
        self._num_passes += 1
        self._num_read = 0

    def _starts_over(self) -> bool:
        """Begin a new pass where earlier epochs have read this one to its end: an epoch is due a step at least."""
        if self._num_read == 0:
            return False
        self._close_reader()
        self.source.begin_pass(self._num_passes)
        self._begin_pass()
        return True

    def _end_epoch(self, ran_out: bool) -> None:
        is_whole = self._num_read == self.num_batches
        if ran_out or not self._goes_on or is_whole:
            self._close_reader()
        if is_whole and not self._goes_on:
            self.source.end_pass()
        self.source.on_epoch_end()
        assert self._position is not None
        self._position, self._has_begun = Position(self._position.epoch + 1, 0), False
        self._mark(self._position)

    def _close_reader(self) -> None:
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    # --- reading and agreeing

    def _take(self, position: Position, count: int) -> list["_Batch"]:
        """The next batches, `count` at most; none: the input has ended."""
        agreed = self._agree(position, count)
        if not agreed and position.step == 0:
            if self._starts_over():
                agreed = self._agree(position, count)
            if not agreed:
                raise self._empty(position)
        if not agreed:
            return []
        assert self._reader is not None
        batches = self._reader.peek(agreed)[0]
        self._drop(batches, position)
        steps = self.steps_in_epoch(position.epoch)  # nothing is read in vain, or while `on_epoch_end` runs
        left = sys.maxsize if steps is None else steps - position.step - agreed
        self._reader.read_ahead(min(2 * count, left))
        return batches

    def _drop(self, batches: Sequence["_Batch"], position: Position) -> None:
        """Batches that were read, the first of them at `position`, are done with."""
        for number, batch in enumerate(batches, 1):
            assert self._reader is not None
            self._reader.drop()
            self._num_read += 1
            self._digest = zlib.crc32(f"{batch.global_rows} {batch.checksum}".encode(), self._digest)
            self._mark(Position(position.epoch, position.step + number))

    def _mark(self, position: Position) -> None:
        self._marks[position] = self._digest
        if len(self._marks) > NUM_MARKS:
            del self._marks[next(iter(self._marks))]

    def _read(self, count: int) -> tuple[list["_Batch"], bool, Exception | None]:
        """The next batches, `count` at most, whether the input ended after them, and what it raised instead."""
        try:
            self._begin_epoch()
            assert self._reader is not None
            self._reader.read_ahead(count)
            batches, ended = self._reader.peek(count)
            return batches, ended, None
        except Exception as error:
            return [], False, error

    def _agree(self, position: Position, count: int) -> int:
        """How many of the next batches all ranks have, `count` at most; 0: the input has ended on all of them."""
        batches, ended, error = self._read(count)
        if self.world_size > 1:
            own = {
                "batches": [[batch.global_rows, batch.checksum] for batch in batches],
                "ended": ended,
                "error": None if error is None else f"{type(error).__name__}: {error}"[:500],
            }
            every = self._gather(own)
            if error is None:
                _raise_for_others(every, f"{self._name} at {_place(position)}")
                return _agreed(every, position, self._name)
        if error is not None:
            raise error
        return len(batches)

    def _own_part(self, batch: Tree) -> "_Batch":
        """This rank's rows of a batch, as memory of its own. Runs in the background thread."""
        parts = parts_of(batch, self._name)
        rows = len(next(leaves(parts))[1])
        part = shard(rows, self.world_size, self.rank)
        own = map_tree(lambda leaf: np.array(leaf[part.rows]) if self.world_size > 1 else leaf, parts)
        return _Batch(own, rows, part.share, part.whole, checksum_of(parts, rows))

    def _stacked(self, step: int, batches: Sequence["_Batch"]) -> Iterator[Chunk]:
        """Chunks of consecutive batches of the same shapes."""
        for _, group in groupby(batches, key=lambda batch: batch.form):
            alike = list(group)
            data = _stack([batch.data for batch in alike])
            first = alike[0]
            rows = first.global_rows
            yield Chunk(step, len(alike), self._convert(data), first.share, first.whole, rows, self._shapes)
            step += len(alike)

    def _empty(self, position: Position) -> DataError:
        again = (
            "; a function that returns a generator must return a new one each time it is called"
            if position.epoch > self._first_epoch
            else "; check what it was made from"
        )
        return DataError(f"{self._name} brought no batch for epoch {position.epoch}{again}")


@dataclass(frozen=True)
class _Batch:
    """This rank's part of one mini-batch."""

    data: Tree
    global_rows: int
    share: float
    whole: bool
    checksum: int

    @property
    def form(self) -> tuple[Any, ...]:
        return self.global_rows, *((path, leaf.shape, leaf.dtype.str) for path, leaf in leaves(self.data))


class _Reader:
    """One pass, read ahead in a thread."""

    def __init__(self, batches: Iterable[Tree], prepare: Callable[[Tree], _Batch]) -> None:
        self._batches = iter(batches)
        self._prepare = prepare
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="dtrain-stream")
        self._ahead: deque[Future[_Batch | None]] = deque()

    def read_ahead(self, count: int) -> None:
        """See that `count` batches are read or under way."""
        while len(self._ahead) < count:
            self._ahead.append(self._pool.submit(self._next))

    def peek(self, count: int) -> tuple[list[_Batch], bool]:
        """Wait for the next `count` batches; fewer, and True, where the pass ends."""
        found: list[_Batch] = []
        for future in list(self._ahead)[:count]:
            batch = future.result()
            if batch is None:
                return found, True
            found.append(batch)
        return found, False

    def drop(self) -> None:
        """The next batch is done with."""
        self._ahead.popleft()

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _next(self) -> _Batch | None:
        batch = next(self._batches, self)
        return None if batch is self else self._prepare(batch)


def parts_of(batch: Any, name: str = "x") -> tuple[Tree, ...]:
    """A batch as (x,), (x, y) or (x, y, sample_weight), checked.

    Raises:
        DataError: it is no batch: it has other parts, no arrays, no rows, or parts of different numbers of rows.
    """
    parts = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
    if not 1 <= len(parts) <= 3:
        raise DataError(f"{name} brought a batch of {len(parts)} parts; it must be x, (x, y) or (x, y, sample_weight)")
    while len(parts) > 1 and parts[-1] is None:
        parts = parts[:-1]
    found = list(leaves(parts))
    for path, leaf in found:
        check_dense(path, leaf, f" of a batch of {name}")
        if not isinstance(leaf, np.ndarray) and not isinstance(leaf, np.generic):
            raise DataError(
                f"{path} of a batch of {name} is a {type(leaf).__name__} ({leaf!r:.60}); it must be an array with one"
                " entry per row"
            )
    sizes = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in found}
    if not found or not found[0][0].startswith("x"):
        raise DataError(f"{name} brought a batch without inputs: {batch!r:.60}")
    if len(set(sizes.values())) > 1 or None in sizes.values():
        described = ", ".join(f"{path} {leaf.shape}" for path, leaf in found)
        raise DataError(
            f"{name} brought a batch whose parts do not have one number of rows in front ({described}); are these"
            " single examples? Put them together with dataset.batch(32), or with what your loader has for it"
        )
    if 0 in sizes.values():
        raise DataError(f"{name} brought a batch without rows; leave empty batches out")
    return parts


def checksum_of(parts: Tree, rows: int) -> int:
    """A CRC of some rows of a batch, with shapes and dtypes."""
    sampled = sorted({0, rows // 2, rows - 1})[:NUM_SAMPLED]
    checksum = 0
    for path, leaf in leaves(parts):
        checksum = zlib.crc32(f"{path}{leaf.shape}{leaf.dtype.str}".encode(), checksum)
        checksum = zlib.crc32(content_of(leaf[sampled]), checksum)
    return checksum


def raise_together(gather: Gather, error: Exception | None, what: str) -> None:
    """Raise where any rank has an error: that rank its own, the others a LostPeer. All ranks must call it."""
    every = gather({"error": None if error is None else f"{type(error).__name__}: {error}"[:500]})
    if error is not None:
        raise error
    _raise_for_others(every, what)


def _raise_for_others(every: Sequence[Any], what: str) -> None:
    for rank, theirs in enumerate(every):
        if theirs["error"] is not None:
            raise LostPeer(f"{what} failed on rank {rank}: {theirs['error']}")


def _agreed(every: Sequence[Any], position: Position, name: str) -> int:
    """How many batches all ranks have; the same result, or the same error, on all of them."""
    count = min(len(theirs["batches"]) for theirs in every)
    for index in range(count):
        place = _place(Position(position.epoch, position.step + index))
        rows, checksum = every[0]["batches"][index]
        for rank, theirs in enumerate(every):
            if theirs["batches"][index][0] != rows:
                raise DataError(
                    f"{name} differs between workers: rank {rank}'s batch at {place} has"
                    f" {theirs['batches'][index][0]} rows, rank 0's {rows}; every worker must read the same batches"
                )
            if theirs["batches"][index][1] != checksum:
                raise DataError(
                    f"{name} differs between workers: rank {rank}'s batch at {place} holds other data than rank 0's;"
                    " every worker must read the same batches in the same order: seed what is random in the function"
                    " (dataset.shuffle(..., seed=1)), and sort lists of files"
                )
    if count == 0:
        ended = [rank for rank, theirs in enumerate(every) if not theirs["batches"]]
        longer = [rank for rank, theirs in enumerate(every) if theirs["batches"]]
        if longer:
            raise DataError(
                f"{name} differs between workers: it has ended on rank {ended[0]} at {_place(position)}, and goes on on"
                f" rank {longer[0]}; every worker must read the same batches"
            )
    return count


def _place(position: Position) -> str:
    return f"epoch {position.epoch}, step {position.step}"


def _stack(parts: Sequence[Tree]) -> Tree:
    """Trees of the same structure as one, with a first axis more. One alone is not copied."""
    if len(parts) == 1:
        return map_tree(lambda leaf: leaf[None], parts[0])
    columns = [iter(column) for column in zip(*([leaf for _, leaf in leaves(part)] for part in parts), strict=True)]
    stacked = iter([np.stack(list(column)) for column in columns])
    return map_tree(lambda _: next(stacked), parts[0])
