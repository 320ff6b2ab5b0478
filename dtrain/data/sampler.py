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
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil

import numpy as np
import numpy.typing as npt

from dtrain.errors import ConfigError, DataError
from dtrain.types import BatchPlan

Indices = npt.NDArray[np.int64]


class Sampler:
    """The rows of every mini-batch of the whole job: a function of the plan, the epoch and the step alone.

    The world size is nowhere in it. Only the current pass's permutation is kept (8 bytes a row).

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

    def steps_in_epoch(self, epoch: int) -> int:
        """The number of steps of `epoch`: `steps_per_epoch`, or what is left of the pass."""
        start = self._start(epoch)[1]
        return min(self.steps_per_epoch, self.steps_per_pass - start)

    def batch_size_at(self, epoch: int, step: int) -> int:
        """Rows in the mini-batch, without making the permutation."""
        return len(self._rows(self._locate(epoch, step)[1]))

    def batch(self, epoch: int, step: int) -> Indices:
        """The row numbers of the mini-batch: int64, shape (rows,).

        Raises:
            IndexError: the epoch has no such step.
        """
        number, in_pass = self._locate(epoch, step)
        rows = self._rows(in_pass)
        if self.plan.shuffle == "batch":
            return rows.start + self._generator(number, in_pass).permutation(len(rows))
        if self.plan.shuffle:
            return self._permutation_of(number)[rows.start : rows.stop]
        return np.arange(rows.start, rows.stop, dtype=np.int64)

    def batches(self, epoch: int, first_step: int, count: int) -> Iterator[Indices]:
        """The mini-batches of `count` steps from `first_step` on, within one epoch."""
        return (self.batch(epoch, step) for step in range(first_step, first_step + count))

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
            self._permutation = number, self._generator(number).permutation(self.plan.num_rows)
        return self._permutation[1]

    def _generator(self, *key: int) -> np.random.Generator:
        # Named, not default_rng: NumPy may change that one, and the order of rows must outlive a NumPy upgrade.
        return np.random.Generator(np.random.PCG64(np.random.SeedSequence([*self.plan.seed, *key])))


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


def _check(plan: BatchPlan) -> None:
    if plan.num_rows < 1:
        raise DataError(f"the data set has {plan.num_rows} rows: there must be at least 1; check how it was loaded")
    for name, value in (("batch_size", plan.batch_size), ("steps_per_epoch", plan.steps_per_epoch)):
        is_whole = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
        if value is not None and not (is_whole and value >= 1):
            raise ConfigError(f"{name}={value!r} must be a whole number, 1 or more")
    if plan.shuffle not in (True, False, "batch"):
        raise ConfigError(f"shuffle={plan.shuffle!r} must be True, False or 'batch'")
