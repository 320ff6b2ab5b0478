"""Owns data sets that are read block by block: what of them is loaded, and for how long.

It knows no file format (parquet_files.py, tf_records.py, ray_blocks.py) and does not choose rows (sampler.py).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.source import ArraySource, leaves, map_tree
from dtrain.errors import ConfigError, DataError
from dtrain.types import Tree

LOADS_AT_ONCE = 4
"""Lanes often come to the end of their blocks together, and an object store answers several requests as fast as one."""

_Part = tuple[int, npt.NDArray[np.int64]]
"""A block, and the places of its rows among those asked for."""

_Form = tuple[str, dict[str, tuple[tuple[int, ...], str]]]
"""A block, and shape and dtype of its arrays by path."""


class BlockSource:
    """A data set in blocks of consecutive rows, each loaded when one of its rows is asked for.

    With `shuffle=True`, and to evaluate, rows come in an order in which each worker reads its own part of the blocks
    only: in every pass the blocks are permuted, the rows inside each are, and a mini-batch draws on `lanes` blocks at a
    time. That is the same order for any number of workers. It is no permutation of all rows: where the rows are sorted,
    by class say, write them in another order, or use smaller blocks. With `shuffle=False` or "batch", with `steps` or
    `validation_steps`, rows come as they are stored, and every worker loads every block.

    A worker holds about `lanes / num_workers + 4` loaded blocks (of fewer than `lanes` blocks, all of its part), and
    loads about 1 + (num_workers - 1) / lanes times its part of the data in each pass: where the workers' parts of a
    mini-batch meet inside a lane, both load it. Beyond `lanes` workers each block is loaded by several. Many blocks of
    about one size serve best.

    Where a loss or a metric is no mean over rows (a mask, several outputs and a partial last mini-batch), evaluating
    depends a little on which rows are in a mini-batch together, as in Keras: give `steps` for the order in which rows
    are stored.

    Args:
        load: gives the arrays of a block by its number. It is called from several threads at once, and must pickle;
            what is loaded never travels.
        blocks: the number of rows in each block; blocks without rows may be among them.
        lanes: how many blocks a mini-batch draws on, at most.

    Raises:
        ConfigError: `lanes` makes no sense.
        DataError: there are no rows.
    """

    def __init__(self, load: Callable[[int], ArraySource], blocks: Sequence[int], *, lanes: int = 32) -> None:
        if not isinstance(lanes, int) or isinstance(lanes, bool) or lanes < 1:
            raise ConfigError(f"lanes={lanes!r} must be a whole number, 1 or more")
        if sum(blocks) < 1 or min(blocks) < 0:
            raise DataError(f"the {len(blocks)} blocks have no rows: there must be at least 1; check how it was made")
        self.blocks = tuple(map(int, blocks))
        self.lanes = lanes
        self._load = load
        self._ends = np.cumsum(self.blocks)
        self._capacity = 2
        self._loaded: dict[int, ArraySource] = {}
        self._last_used: dict[int, tuple[int, bool, int]] = {}
        self._rows_read = np.zeros(len(self.blocks), np.int64)
        self._reads = 0
        self._form: _Form | None = None

    def __len__(self) -> int:
        return int(self._ends[-1])

    def keep(self, num_blocks: int) -> None:
        """Keep so many blocks loaded, at most, from now on."""
        self._capacity = max(1, num_blocks)
        self._make_room(self._capacity)

    def read(self, indices: npt.NDArray[np.int64]) -> Tree:
        """The rows at `indices`: of a single block as its arrays give them, else gathered.

        Raises:
            IndexError: there is no such row.
            DataError: a block is not what it was said to be, or not like the others.
        """
        if len(indices) and not 0 <= indices.min() <= indices.max() < len(self):
            raise IndexError(f"rows {indices.min()} to {indices.max()} are not all in 0 to {len(self) - 1}")
        self._reads += 1
        # Of no rows, what a block gives.
        blocks = np.searchsorted(self._ends, indices if len(indices) else np.zeros(1), side="right")
        order = np.argsort(blocks, kind="stable")
        cuts = [0, *(np.flatnonzero(np.diff(blocks[order])) + 1).tolist(), len(order)]
        parts = [(int(blocks[order[start]]), order[start:stop]) for start, stop in pairwise(cuts)]
        if len(parts) == 1:
            self._load_missing(parts[:1])
            return self._read_block(parts[0][0], indices, len(indices))
        gathered: Tree = None
        for block, places in self._each_loaded(parts):
            rows = self._read_block(block, indices[places], int(places[-1]))
            if gathered is None:
                gathered = map_tree(lambda leaf: np.empty((len(indices), *leaf.shape[1:]), leaf.dtype), rows)
            for (_, target), (_, leaf) in zip(leaves(gathered), leaves(rows), strict=True):
                target[places] = leaf
        return gathered

    def _each_loaded(self, parts: list[_Part]) -> Iterator[_Part]:
        """The parts, each while its block is loaded: first those that are, before others take their place."""
        missing = [part for part in parts if part[0] not in self._loaded]
        yield from [part for part in parts if part[0] in self._loaded]
        at_once = min(LOADS_AT_ONCE, self._capacity)
        for start in range(0, len(missing), at_once):
            group = missing[start : start + at_once]
            self._load_missing(group)
            yield from group

    def _load_missing(self, parts: list[_Part]) -> None:
        missing = [block for block, _ in parts if block not in self._loaded]
        self._make_room(self._capacity - len(missing))
        if len(missing) <= 1:
            found = [self._load(block) for block in missing]
        else:
            with ThreadPoolExecutor(len(missing), thread_name_prefix="dtrain-blocks") as pool:
                found = list(pool.map(self._load, missing))
        for block, arrays in zip(missing, found, strict=True):
            self._loaded[block] = self._checked(block, arrays)
            self._last_used[block] = self._reads, True, 0

    def _read_block(self, block: int, indices: npt.NDArray[np.int64], last_place: int) -> Tree:
        self._rows_read[block] += len(indices)
        is_open = bool(self._rows_read[block] % self.blocks[block] > 0)
        self._last_used[block] = self._reads, is_open, last_place
        return self._loaded[block].read(indices - (self._ends[block] - self.blocks[block]))

    def _make_room(self, size: int) -> None:
        """Drop the blocks that were not read for longest.

        Of those read together, the ones of which every row was read go first: a pass does not come back to them.
        """
        while len(self._loaded) > size:
            oldest = min(self._loaded, key=self._last_used.__getitem__)
            del self._loaded[oldest], self._last_used[oldest]

    def _checked(self, block: int, arrays: ArraySource) -> ArraySource:
        start = self._ends[block] - self.blocks[block]
        where = f"block {block} (rows {start} to {self._ends[block] - 1})"
        if len(arrays) != self.blocks[block]:
            raise DataError(
                f"{where} has {len(arrays)} rows, but {self.blocks[block]} when the source was made: the data must not"
                " change while it is used"
            )
        form = {path: (leaf.shape[1:], leaf.dtype.name) for path, leaf in leaves(arrays.arrays)}
        if self._form is None:
            self._form = where, form
        for path in {**self._form[1], **form}:
            ours, first = form.get(path), self._form[1].get(path)
            if ours != first:
                raise DataError(
                    f"{path} is {_words(ours)} in {where}, but {_words(first)} in {self._form[0]}: all rows must have"
                    " one shape and dtype; pad or convert them where the data is written"
                )
        return arrays

    def __getstate__(self) -> dict[str, Any]:
        return {"load": self._load, "blocks": self.blocks, "lanes": self.lanes}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


def _words(form: tuple[tuple[int, ...], str] | None) -> str:
    return "missing" if form is None else f"{form[1]} of shape {('rows', *form[0])}".replace("'", "")
