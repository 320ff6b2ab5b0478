"""Claims about data sets read block by block: the right rows, few loads, and nothing loaded that travels."""

import pickle
import threading
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.blocks import BlockSource
from dtrain.data.loader import Loader
from dtrain.data.source import ArraySource, DataSource, leaves
from dtrain.errors import ConfigError, DataError
from dtrain.types import BatchPlan


@dataclass
class Blocks:
    """Loads row numbers, and counts how often it does."""

    lengths: list[int]
    loads: Counter[int] = field(default_factory=Counter)

    def __call__(self, block: int) -> ArraySource:
        self.loads[block] += 1
        start = sum(self.lengths[:block])
        rows = np.arange(start, start + self.lengths[block])
        return ArraySource({"a": rows, "b": rows[:, None] * [1.0, 2.0]}, rows * 10)


def source_of(*lengths: int, lanes: int = 32) -> tuple[BlockSource, Blocks]:
    blocks = Blocks(list(lengths))
    return BlockSource(blocks, lengths, lanes=lanes), blocks


@given(st.lists(st.integers(0, 9), min_size=1).filter(any), st.integers(1, 4), st.data())
def test_rows_come_in_the_order_asked_for(lengths: list[int], keep: int, data: st.DataObject) -> None:
    source: DataSource = source_of(*lengths)[0]
    source.keep(keep)  # type: ignore[attr-defined]
    for rows in data.draw(st.lists(st.lists(st.integers(0, sum(lengths) - 1)), max_size=4)):
        x, y = source.read(np.array(rows, np.int64))
        assert len(source) == sum(lengths)
        assert x["a"].tolist() == rows and y.tolist() == [row * 10 for row in rows]
        assert x["b"].tolist() == [[row, row * 2] for row in rows]


def test_contiguous_rows_of_a_block_are_views() -> None:
    source, _ = source_of(5, 5)
    first, again = (source.read(np.arange(6, 9))[1] for _ in range(2))
    assert np.shares_memory(first, again)


def test_a_row_that_is_not_there_is_refused() -> None:
    for row in (-1, 10):
        with pytest.raises(IndexError, match="not all in 0 to 9"):
            source_of(4, 6)[0].read(np.array([3, row]))


def test_a_block_is_kept_until_others_need_its_place() -> None:
    source, blocks = source_of(4, 4, 4)
    source.keep(2)
    for row in (0, 4, 1, 5, 8, 5):  # block 0 is the one not read for longest when block 2 comes
        source.read(np.array([row]))
    assert blocks.loads == {0: 1, 1: 1, 2: 1}
    source.read(np.array([0, 5]))
    assert blocks.loads == {0: 2, 1: 1, 2: 1}


def test_blocks_that_are_missing_are_loaded_side_by_side() -> None:
    both_load = threading.Barrier(2, timeout=60)

    def load(block: int) -> ArraySource:
        both_load.wait()
        return ArraySource(np.full(3, block))

    assert BlockSource(load, [3, 3]).read(np.array([5, 0]))[0].tolist() == [1, 0]


def test_a_block_that_cannot_be_loaded_leaves_the_others_usable() -> None:
    def load(block: int) -> ArraySource:
        return ArraySource(np.full(2 if block == 1 else 3, block))

    source = BlockSource(load, [3, 3, 3])
    for _ in range(3):
        with pytest.raises(DataError, match="block 1"):
            source.read(np.array([0, 4, 8]))
        assert source.read(np.array([8, 0]))[0].tolist() == [2, 0]


def test_nothing_loaded_travels() -> None:
    source, blocks = source_of(10_000, 10_000)
    fresh = len(pickle.dumps(source))
    source.read(np.arange(20_000))
    blocks.loads.clear()
    assert len(pickle.dumps(source)) == fresh < 1500
    again = pickle.loads(pickle.dumps(source))
    assert again.read(np.array([15_000]))[1].tolist() == [150_000] and again.blocks == (10_000, 10_000)


PASSES = [
    ([20] * 64, 32, 32),
    ([20] * 300, 256, 32),
    (list(range(10, 90)), 100, 32),
    ([100] * 24, 96, 12),
    ([3] * 600, 50, 32),
    ([10] * 100, 2000, 32),
]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("steps_per_chunk", [1, 16])
@pytest.mark.parametrize(("lengths", "batch_size", "lanes"), PASSES)
def test_each_rank_loads_at_most_a_fifth_more_than_its_part(
    lengths: list[int], batch_size: int, lanes: int, steps_per_chunk: int, world_size: int
) -> None:
    plan = BatchPlan(sum(lengths), batch_size, shuffle=True, blocks=tuple(lengths), lanes=lanes)
    for rank in range(world_size):
        source, blocks = source_of(*lengths, lanes=lanes)
        loader = Loader(source, plan, rank, world_size)
        for epoch in (0, 1):
            blocks.loads.clear()
            for _ in loader.chunks(epoch, 0, loader.sampler.steps_in_epoch(epoch), steps_per_chunk):
                pass
            rows = sum(lengths[block] * times for block, times in blocks.loads.items())
            assert rows <= 1.2 * sum(lengths) / world_size


def test_a_rank_keeps_the_blocks_of_its_lanes_only() -> None:
    for world_size, most in ((1, 35), (2, 19), (4, 11), (8, 7)):
        source, _ = source_of(*[20] * 300)
        plan = BatchPlan(6_000, 256, shuffle=True, blocks=source.blocks)
        for _ in Loader(source, plan, world_size - 1, world_size).chunks(0, 0, 24, 2):
            assert len(source._loaded) <= most


def test_blocks_that_are_not_what_they_were_are_refused() -> None:
    with pytest.raises(DataError, match=r"block 1 \(rows 4 to 6\) has 2 rows, but 3 when .* must not change"):
        BlockSource(lambda block: ArraySource(np.ones(4 - 2 * block)), [4, 3]).read(np.arange(7))


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (ArraySource(np.ones((3, 2)), np.ones(3)), r"x is float32 of shape \(rows, 2\) in block 1 .*, but .*\(rows,\)"),
        (ArraySource(np.ones(3, int), np.ones(3)), r"x is int64 .* but float32"),
        (ArraySource(np.ones(3)), r"y is missing in block 1"),
    ],
)
def test_blocks_that_differ_are_refused(second: ArraySource, message: str) -> None:
    source = BlockSource([ArraySource(np.ones(3), np.ones(3)), second].__getitem__, [3, 3])
    with pytest.raises(DataError, match=message):
        source.read(np.arange(6))


def test_a_source_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(DataError, match="2 blocks have no rows"):
        source_of(0, 0)
    with pytest.raises(ConfigError, match="lanes=0 must be"):
        source_of(3, lanes=0)


def test_leaves_keep_their_structure() -> None:
    source, _ = source_of(3, 3)
    assert [path for path, _ in leaves(source.read(np.array([5, 0])))] == ["x['a']", "x['b']", "y"]
