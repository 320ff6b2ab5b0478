"""Claims about reading ahead: the right rows, in order, and no thread left behind."""

import threading
import time

import numpy as np
import pytest

from dtrain.data.loader import Chunk, Loader, steps_before
from dtrain.data.sampler import Sampler
from dtrain.data.source import ArraySource
from dtrain.types import BatchPlan, Position, Segment, Tree

X = np.arange(101)


def rows_of(chunk: Chunk) -> list[list[int]]:
    rows: list[list[int]] = chunk.data[0].tolist()
    return rows


def loader_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dtrain-loader")]


class Recording:
    """A source that counts its reads, and raises at a chosen one."""

    def __init__(self, raise_at: int | None = None) -> None:
        self.reads = 0
        self.raise_at = raise_at
        self.read_once = threading.Event()

    def __len__(self) -> int:
        return len(X)

    def read(self, indices: np.ndarray) -> Tree:
        self.reads += 1
        if self.reads == self.raise_at:
            raise OSError("disk gone")
        self.read_once.set()
        return (X[indices],)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("steps_per_chunk", [1, 4, 100])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_ranks_together_read_each_batch_in_order(
    shuffle: bool, world_size: int, steps_per_chunk: int, prefetch: int
) -> None:
    plan = BatchPlan(num_rows=101, batch_size=16, shuffle=shuffle)
    want = [batch.tolist() for batch in Sampler(plan).batches(1, 2, 5)]
    chunks = [
        list(Loader(ArraySource(X), plan, rank, world_size, prefetch=prefetch).chunks(1, 2, 5, steps_per_chunk))
        for rank in range(world_size)
    ]
    got: dict[int, list[int]] = {}
    for parts in zip(*chunks, strict=True):
        assert len({(part.first_step, part.num_steps, part.global_rows, part.whole) for part in parts}) == 1
        assert sum(part.share for part in parts) == pytest.approx(1, abs=1e-12)
        for k in range(parts[0].num_steps):
            shards = [rows_of(part)[k] for part in (parts[:1] if parts[0].whole else parts)]
            got[parts[0].first_step + k] = [row for shard in shards for row in shard]
    assert list(got.values()) == want and list(got) == [2, 3, 4, 5, 6]


def test_the_partial_batch_comes_alone() -> None:
    chunks = list(Loader(ArraySource(X), BatchPlan(101, 16), 0, 2).chunks(0, 0, 7, 4))
    assert [(c.first_step, c.num_steps, c.data[0].shape, c.global_rows) for c in chunks] == [
        (0, 4, (4, 8), 16),
        (4, 2, (2, 8), 16),
        (6, 1, (1, 3), 5),
    ]


def test_fewer_rows_than_ranks_go_whole_to_every_rank() -> None:
    for rank in range(8):
        *_, last = Loader(ArraySource(X), BatchPlan(101, 16), rank, 8).chunks(0, 0, 7, 10)
        assert (last.whole, last.share, rows_of(last)) == (True, 1 / 8, [[96, 97, 98, 99, 100]])


def test_a_chunk_is_one_read_and_keeps_the_structure() -> None:
    source = Recording()
    assert len(list(Loader(source, BatchPlan(101, 10), 1, 2).chunks(0, 0, 10, 5))) == 2
    assert source.reads == 2
    nested = ArraySource({"a": np.ones((101, 2, 3)), "b": [X]}, None)
    chunk = next(Loader(nested, BatchPlan(101, 10), 1, 2).chunks(0, 0, 4, 4))
    assert chunk.data[0]["a"].shape == (4, 5, 2, 3) and chunk.data[0]["b"][0].shape == (4, 5)


def test_convert_runs_in_the_background() -> None:
    def where(data: Tree) -> Tree:
        return threading.current_thread().name

    names = [chunk.data for chunk in Loader(ArraySource(X), BatchPlan(101, 16), 0, 1, convert=where).chunks(0, 0, 7, 1)]
    assert all(name.startswith("dtrain-loader") for name in names)


def test_an_error_of_the_source_is_raised_when_its_chunk_is_due() -> None:
    chunks = Loader(Recording(raise_at=3), BatchPlan(101, 10), 0, 1).chunks(0, 0, 10, 1)
    assert rows_of(next(chunks)) == [list(range(10))]
    assert rows_of(next(chunks)) == [list(range(10, 20))]
    with pytest.raises(OSError, match="disk gone"):
        next(chunks)
    assert loader_threads() == []


@pytest.mark.parametrize("end", ["exhaust", "close", "raise", "forget", "never start"])
def test_no_thread_is_left(end: str) -> None:
    source = Recording()
    chunks = Loader(source, BatchPlan(101, 10), 0, 1).chunks(0, 0, 10, 1)
    if end == "exhaust":
        assert len(list(chunks)) == 10
    elif end == "close":
        next(chunks)
        assert loader_threads()
        chunks.close()  # type: ignore[attr-defined]
        assert source.reads < 10
    elif end == "raise":
        with pytest.raises(KeyError):
            for _ in chunks:
                raise KeyError
        del chunks
    elif end == "forget":
        next(chunks)
        del chunks
    assert loader_threads() == []


def test_chunks_are_read_ahead_of_need() -> None:
    source = Recording()
    chunks = Loader(source, BatchPlan(101, 10), 0, 1, prefetch=3).chunks(0, 0, 10, 1)
    next(chunks)
    chunks.close()  # type: ignore[attr-defined]
    assert 1 <= source.reads <= 4


def test_a_fit_reads_the_next_chunk_early_up_to_its_last_step() -> None:
    source = Recording()
    loader = Loader(source, BatchPlan(101, 10), 0, 1)
    loader.epochs = 2
    plain = Loader(ArraySource(X), BatchPlan(101, 10), 0, 1)
    num_chunks, threads = 0, []
    for place in [(0, 0, 4, 2), (0, 4, 7, 2), (1, 0, 11, 2)]:
        found = [rows_of(chunk) for chunk in loader.chunks(*place)]
        assert found == [rows_of(chunk) for chunk in plain.chunks(*place)]
        num_chunks += len(found)
        threads.append(len(loader_threads()))
    assert threads == [1, 1, 0] and source.reads == num_chunks  # each was read once


def test_what_was_read_early_comes_in_chunks_that_are_short_enough() -> None:
    loader, plain = (Loader(ArraySource(X), BatchPlan(101, 10), 0, 1) for _ in range(2))
    loader.epochs = 1
    list(loader.chunks(0, 0, 2, 3))
    found, expected = ([*each.chunks(0, 2, 6, 2)] for each in (loader, plain))
    assert [chunk.num_steps for chunk in found] == [2, 1, 2, 1] and found[1].first_step == 4
    assert [row for chunk in found for row in rows_of(chunk)] == [row for chunk in expected for row in rows_of(chunk)]
    loader.close()


def test_what_is_asked_for_as_one_chunk_comes_as_one() -> None:
    loader = Loader(ArraySource(X), BatchPlan(101, 10), 0, 1)
    loader.epochs = 1
    list(loader.chunks(0, 0, 2, 3))  # 2 to 4 are read early
    assert [chunk.num_steps for chunk in loader.chunks(0, 2, 2, 3)] == [2]  # 4 is kept
    assert [chunk.num_steps for chunk in loader.chunks(0, 4, 3, 3)] == [3]
    loader.close()


def test_what_is_left_of_a_chunk_read_early_is_kept() -> None:
    source = Recording()
    loader, plain = Loader(source, BatchPlan(101, 10), 0, 1), Loader(ArraySource(X), BatchPlan(101, 10), 0, 1)
    loader.epochs = 1
    calls = [(0, 0, 1, 8), (0, 1, 2, 1), (0, 3, 1, 8), (0, 4, 7, 3)]  # 1 to 8 are read early
    found, expected = (
        [row for place in calls for chunk in each.chunks(*place) for row in rows_of(chunk)] for each in (loader, plain)
    )
    assert found == expected
    assert source.reads == 4  # 0, 1 to 8, 9, 10
    assert loader_threads() == []


def test_two_loaders_never_read_at_once() -> None:
    class Busy(Recording):
        at_once = most = 0

        def read(self, indices: np.ndarray) -> Tree:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
            time.sleep(0.002)
            self.at_once -= 1
            return X[indices]

    source = Busy()
    loaders = [Loader(source, BatchPlan(101, 10), 0, 1).chunks(0, 0, 10, 1) for _ in range(2)]
    for _ in zip(*loaders, strict=True):
        pass
    assert source.most == 1


@pytest.mark.parametrize("elsewhere", [(0, 2, 4), (0, 4, 1), (1, 0, 4)])
def test_what_was_read_early_in_vain_is_given_up(elsewhere: tuple[int, int, int]) -> None:
    loader = Loader(ArraySource(X), BatchPlan(101, 10), 0, 1)
    loader.epochs = 2
    list(loader.chunks(0, 0, 4, 2))
    found = [rows_of(chunk) for chunk in loader.chunks(*elsewhere, 2)]
    assert found == [rows_of(c) for c in Loader(ArraySource(X), BatchPlan(101, 10), 0, 1).chunks(*elsewhere, 2)]
    assert len(loader_threads()) == 1
    loader.deal(0, 2)
    assert loader_threads() == []
    list(loader.chunks(0, 0, 4, 2))
    loader.close()
    assert loader_threads() == []


@pytest.mark.parametrize(
    ("position", "number", "found"),
    [
        (Position(1, 3), 0, []),
        (Position(1, 3), 2, [Segment(Position(1, 1), 2)]),
        (Position(1, 3), 3, [Segment(Position(1, 0), 3)]),
        (Position(1, 0), 1, [Segment(Position(0, 4), 1)]),
        (Position(2, 1), 7, [Segment(Position(0, 4), 1), Segment(Position(1, 0), 5), Segment(Position(2, 0), 1)]),
        (Position(0, 2), 3, None),  # the fit has not so many
        (Position(3, 1), 3, None),  # nobody knows how many epoch 2 had
    ],
)
def test_the_last_steps_before_a_position_reach_into_earlier_epochs(
    position: Position, number: int, found: list[Segment] | None
) -> None:
    assert steps_before(position, number, 0, {0: 5, 1: 5}.get) == found
