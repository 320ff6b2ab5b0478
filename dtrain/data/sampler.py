"""Owns which rows make up a mini-batch of the whole job, and which of them are a rank's: pure functions.

Nothing here depends on what was asked before, so a run resumes, shrinks and grows at any step without saved state.

The order of rows is that of Keras 3.15 for arrays (`ArrayDataAdapter` and `EpochIterator`):

- A pass over the data is cut into mini-batches; the last one may be partial.
- With `steps_per_epoch` below a pass the next epoch goes on where this one ended. No epoch crosses the end of a pass:
  the last epoch of a pass is short, and the one after it starts the next pass.
- With `steps_per_epoch` above a pass every epoch is one whole pass (Keras warns that the input ran out of data).
- `shuffle=True` makes a new order of all rows for every pass; `shuffle="batch"` keeps the mini-batches and permutes
  the rows inside each.

Two deviations: the random orders are our own (Keras's come from TensorFlow's global generator), and an epoch has
exactly `steps_per_epoch` steps where Keras rounds them up to a multiple of `steps_per_execution`.

A plan with blocks has an order of its own, in which a rank reads few blocks: see `_BlockOrder`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

import numpy as np
import numpy.typing as npt

from dtrain.errors import ConfigError, DataError
from dtrain.types import BatchPlan

Indices = npt.NDArray[np.int64]
ALL = slice(None)


class Sampler:
    """The rows of every mini-batch of the whole job: a function of the plan, the epoch and the step alone.

    The world size is nowhere in it. Only the current pass's permutation is kept (8 bytes a row); of a plan with blocks,
    those of the blocks that mini-batches draw on at the time.

    Args:
        plan: which rows, in which order.
        first_epoch: the fit's `initial_epoch`: the number of the epoch that starts the first pass, as in Keras.

    Raises:
        ConfigError: the batch size, the steps or `shuffle` make no sense.
        DataError: there are no rows.
    """

    def __init__(self, plan: BatchPlan, first_epoch: int = 0) -> None:
        _check(plan)
        self.plan = plan
        self.first_epoch = first_epoch
        self.steps_per_pass = ceil(plan.num_rows / plan.batch_size)
        self.steps_per_epoch = plan.steps_per_epoch or self.steps_per_pass
        """What Keras shows as the number of steps; `steps_in_epoch` is what there are."""
        self._epochs_per_pass = ceil(self.steps_per_pass / self.steps_per_epoch)
        self._permutation: tuple[int, Indices] | None = None
        self._block_order = _BlockOrder(plan) if plan.blocks and plan.shuffle != "batch" else None

    def steps_in_epoch(self, epoch: int) -> int:
        """The number of steps of `epoch`: `steps_per_epoch`, or what is left of the pass."""
        start = self._start(epoch)[1]
        return min(self.steps_per_epoch, self.steps_per_pass - start)

    def batch_size_at(self, epoch: int, step: int) -> int:
        """Rows in the mini-batch, without making the permutation."""
        return len(self._rows(self._locate(epoch, step)[1]))

    def batch(self, epoch: int, step: int, part: slice = ALL) -> Indices:
        """The row numbers of the mini-batch, or of a part of it: int64, shape (rows,).

        Raises:
            IndexError: the epoch has no such step.
        """
        number, in_pass = self._locate(epoch, step)
        if self._block_order is not None:
            return self._block_order.batch(number, in_pass, part)
        rows = self._rows(in_pass)
        if self.plan.shuffle == "batch":
            return (rows.start + _generator(self.plan, number, in_pass).permutation(len(rows)))[part]
        if self.plan.shuffle:
            return self._permutation_of(number)[rows.start : rows.stop][part]
        return np.arange(rows.start, rows.stop, dtype=np.int64)[part]

    def batches(self, epoch: int, first_step: int, count: int, part: slice = ALL) -> Iterator[Indices]:
        """The mini-batches of `count` steps from `first_step` on, within one epoch, or the same part of each."""
        return (self.batch(epoch, step, part) for step in range(first_step, first_step + count))

    def open_blocks(self, world_size: int, rank: int) -> int:
        """How many blocks a rank must keep loaded so that none is loaded twice in a pass."""
        if self._block_order is None:
            return 2  # rows in order: the block that ends, and the one that begins
        # And a few that are open for a moment: those of lanes that are shared with another rank, and row 0's.
        return self._block_order.num_lanes(shard(self.batch_size_at(self.first_epoch, 0), world_size, rank).rows) + 3

    def _start(self, epoch: int) -> tuple[int, int]:
        """The pass that `epoch` is in, and the mini-batch of the pass that it starts with."""
        number, part = divmod(epoch - self.first_epoch, self._epochs_per_pass)
        return number, part * self.steps_per_epoch

    def _locate(self, epoch: int, step: int) -> tuple[int, int]:
        number, start = self._start(epoch)
        if not 0 <= step < self.steps_in_epoch(epoch) or epoch < self.first_epoch:
            raise IndexError(f"epoch {epoch} has {self.steps_in_epoch(epoch)} steps from 0; there is no step {step}")
        return number, start + step

    def _rows(self, in_pass: int) -> range:
        start = in_pass * self.plan.batch_size
        return range(start, min(start + self.plan.batch_size, self.plan.num_rows))

    def _permutation_of(self, number: int) -> Indices:
        if self._permutation is None or self._permutation[0] != number:
            self._permutation = number, _generator(self.plan, number).permutation(self.plan.num_rows)
        return self._permutation[1]


class _BlockOrder:
    """The order of rows in which a rank needs few of the blocks, and which depends on no rank all the same.

    In each pass the blocks are permuted, and the rows inside each. This order is cut into lanes, and every mini-batch
    takes the next rows of each lane, lane 0's first: as many of a lane in every mini-batch. A rank's contiguous part of
    a mini-batch is then always of the same lanes, its own, and of a neighbour's where they do not come out even.

    Every other lane runs backwards, so that two lanes which share a block reach it at the same time. Without
    `shuffle` nothing is permuted, but there are lanes.
    """

    def __init__(self, plan: BatchPlan) -> None:
        self._plan = plan
        self._lengths = np.array(plan.blocks, np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        count = min(plan.lanes, plan.batch_size, len(plan.blocks))
        self._full, rest = divmod(plan.num_rows, plan.batch_size)
        lanes = np.arange(count + 1, dtype=np.int64)
        # Where the lanes begin in a mini-batch, in the partial one, and in the order; the ends of the last come last.
        self._in_batch = lanes * plan.batch_size // count
        self._in_rest = lanes * rest // count
        self._in_order = self._full * self._in_batch + self._in_rest
        self._pass: tuple[int, Indices, Indices] | None = None
        self._permutations: OrderedDict[tuple[int, int], npt.NDArray[np.int32]] = OrderedDict()

    def num_lanes(self, part: slice) -> int:
        """How many lanes a part of a mini-batch has rows of."""
        return len(np.unique(self._lanes_of(0, part)[1]))

    def batch(self, number: int, step: int, part: slice) -> Indices:
        """The rows of a part of the mini-batch `step` of pass `number`."""
        places, lanes, begins = self._lanes_of(step, part)
        taken = step * np.diff(self._in_batch)[lanes] + places - begins[lanes]
        in_order = np.where(lanes % 2 == 0, self._in_order[lanes] + taken, self._in_order[lanes + 1] - 1 - taken)
        blocks, ends = self._blocks_of(number)
        slots = np.searchsorted(ends, in_order, side="right")
        found = blocks[slots]
        in_block = in_order - ends[slots] + self._lengths[found]
        if self._plan.shuffle:
            cuts = [0, *(np.flatnonzero(np.diff(found)) + 1).tolist(), len(found)]
            for start, stop in pairwise(cuts):
                in_block[start:stop] = self._permutation_of(number, int(found[start]))[in_block[start:stop]]
        rows: Indices = self._starts[found] + in_block
        return rows

    def _lanes_of(self, step: int, part: slice) -> tuple[Indices, Indices, Indices]:
        """Places in the mini-batch, the lane of each, and where lanes begin."""
        begins = self._in_batch if step < self._full else self._in_rest
        places = np.arange(begins[-1], dtype=np.int64)[part]
        return places, np.searchsorted(begins, places, side="right") - 1, begins

    def _blocks_of(self, number: int) -> tuple[Indices, Indices]:
        """The blocks in the order of the pass, and where each ends in it."""
        if self._pass is None or self._pass[0] != number:
            blocks = np.arange(len(self._lengths), dtype=np.int64)
            if self._plan.shuffle:
                blocks = _generator(self._plan, number).permutation(blocks)
            self._pass = number, blocks, np.cumsum(self._lengths[blocks])
        return self._pass[1:]

    def _permutation_of(self, number: int, block: int) -> npt.NDArray[np.int32]:
        """The order of the rows inside a block; those of the blocks that lanes begin and end with are kept."""
        key = number, block
        if key in self._permutations:
            self._permutations.move_to_end(key)
        else:
            # From 1, since NumPy takes a key that ends in 0 for the one without it, which has permuted the blocks.
            rows = np.arange(self._lengths[block], dtype=np.int32)
            self._permutations[key] = _generator(self._plan, number, 1 + block).permutation(rows)
            if len(self._permutations) > 2 * len(self._in_batch):
                self._permutations.popitem(last=False)
        return self._permutations[key]


@dataclass(frozen=True)
class Shard:
    """A rank's part of a mini-batch.

    Attributes:
        rows: which rows of the mini-batch; never none.
        share: what the rank's mean loss counts in the mini-batch's; over the ranks the shares add up to 1.
        whole: every rank has all the rows, because there are fewer rows than ranks.
    """

    rows: slice
    share: float
    whole: bool


def shard(num_rows: int, world_size: int, rank: int) -> Shard:
    """A rank's part of a mini-batch of `num_rows` rows.

    It is never empty (layers abort, or make garbage, on no rows): fewer rows than ranks go whole to every rank.
    """
    if num_rows < world_size:
        return Shard(slice(0, num_rows), 1 / world_size, whole=True)
    rows = even_split(num_rows, world_size, rank)
    return Shard(rows, (rows.stop - rows.start) / num_rows, whole=False)


def even_split(num_rows: int, world_size: int, rank: int) -> slice:
    """A rank's contiguous part of `num_rows` rows, in rank order; sizes differ by one at most, larger ones first."""
    size, larger = divmod(num_rows, world_size)
    start = rank * size + min(rank, larger)
    return slice(start, start + size + (rank < larger))


def default_batch_size(num_rows: int, steps: int | None = None) -> int:
    """The batch size where none is given: 32, or what makes a pass of `steps` mini-batches, as in Keras."""
    return ceil(num_rows / steps) if steps else 32


def _generator(plan: BatchPlan, *key: int) -> np.random.Generator:
    # Named, not default_rng: NumPy may change that one, and the order of rows must outlive a NumPy upgrade.
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*plan.seed, *key])))


def _check(plan: BatchPlan) -> None:
    if plan.num_rows < 1:
        raise DataError(f"the data set has {plan.num_rows} rows: there must be at least 1; check how it was loaded")
    for name, value in (("batch_size", plan.batch_size), ("steps_per_epoch", plan.steps_per_epoch)):
        is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= 1):
            raise ConfigError(f"{name}={value!r} must be a whole number, 1 or more")
    if plan.lanes < 1:
        raise ConfigError(f"lanes={plan.lanes!r} must be a whole number, 1 or more")
    if plan.blocks and sum(plan.blocks) != plan.num_rows:
        raise DataError(f"the blocks have {sum(plan.blocks)} rows together, the data set {plan.num_rows}: one is wrong")
    if plan.shuffle not in (True, False, "batch"):
        raise ConfigError(f"shuffle={plan.shuffle!r} must be True, False or 'batch'")
