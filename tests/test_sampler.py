"""Claims about which rows make up a mini-batch, and which of them a rank reads."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtrain.data.sampler import Sampler, default_batch_size, even_split, shard
from dtrain.errors import ConfigError, DataError
from dtrain.types import BatchPlan

plans = st.builds(
    BatchPlan,
    num_rows=st.integers(1, 60),
    batch_size=st.integers(1, 70),
    steps_per_epoch=st.none() | st.integers(1, 20),
    shuffle=st.sampled_from([False, True, "batch"]),
    seed=st.tuples(st.integers(0, 2**63), st.integers(0, 5)),
)


@st.composite
def plans_with_blocks(draw: st.DrawFn) -> BatchPlan:
    blocks = tuple(draw(st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(any)))
    plan = draw(plans)
    lanes = draw(st.integers(1, 8))
    return replace(plan, num_rows=sum(blocks), blocks=blocks, lanes=lanes)


all_plans = plans | plans_with_blocks()


def epoch_of(plan: BatchPlan, epoch: int, first_epoch: int = 0) -> list[list[int]]:
    sampler = Sampler(plan, first_epoch)
    return [batch.tolist() for batch in sampler.batches(epoch, 0, sampler.steps_in_epoch(epoch))]


# What keras.Model.fit (3.15.1, TensorFlow, run_eagerly) was seen to feed for arange(7), batch_size=3, shuffle=False.
PASS = [[0, 1, 2], [3, 4, 5], [6]]
KERAS_ORDER = [
    (None, [PASS, PASS]),
    (1, [PASS[:1], PASS[1:2], PASS[2:], PASS[:1]]),
    (2, [PASS[:2], PASS[2:], PASS[:2], PASS[2:]]),
    (3, [PASS, PASS]),
    (4, [PASS, PASS, PASS]),
    (5, [PASS, PASS, PASS]),
]


@pytest.mark.parametrize(("steps", "epochs"), KERAS_ORDER)
@pytest.mark.parametrize("first_epoch", [0, 3])
def test_rows_come_in_the_order_of_keras(steps: int | None, epochs: list[list[list[int]]], first_epoch: int) -> None:
    plan = BatchPlan(num_rows=7, batch_size=3, steps_per_epoch=steps)
    assert [epoch_of(plan, first_epoch + i, first_epoch) for i in range(len(epochs))] == epochs


def test_batch_shuffle_permutes_rows_inside_each_batch_as_keras_does() -> None:
    plan = BatchPlan(num_rows=103, batch_size=10, shuffle="batch")
    first, second = epoch_of(plan, 0), epoch_of(plan, 1)
    assert [sorted(batch) for batch in first] == epoch_of(BatchPlan(num_rows=103, batch_size=10), 0)
    assert first != second


@given(all_plans)
def test_every_row_is_read_once_a_pass(plan: BatchPlan) -> None:
    sampler = Sampler(plan)
    epochs = -(-sampler.steps_per_pass // sampler.steps_per_epoch)
    for number in range(2):
        rows = [row for e in range(number * epochs, (number + 1) * epochs) for b in epoch_of(plan, e) for row in b]
        assert sorted(rows) == list(range(plan.num_rows))


@given(all_plans, st.integers(0, 9), st.integers(0, 100))
def test_a_batch_depends_on_nothing_asked_before(plan: BatchPlan, epoch: int, step: int) -> None:
    step %= Sampler(plan).steps_in_epoch(epoch)
    used = Sampler(plan)
    for other in (3, 0, epoch + 1):
        used.batch(other, 0)
    batch = used.batch(epoch, step)
    assert batch.dtype == np.int64
    assert np.array_equal(batch, Sampler(plan).batch(epoch, step))
    assert len(batch) == used.batch_size_at(epoch, step)


@given(all_plans, st.integers(1, 9))
def test_every_row_is_read_once_for_any_world_size(plan: BatchPlan, world_size: int) -> None:
    sampler = Sampler(plan)
    for step in range(sampler.steps_in_epoch(0)):
        batch = sampler.batch(0, step)
        shards = [shard(len(batch), world_size, rank) for rank in range(world_size)]
        assert sum(part.share for part in shards) == pytest.approx(1, abs=1e-12)
        if shards[0].whole:
            assert len(batch) < world_size
            assert all(np.array_equal(batch[part.rows], batch) for part in shards)
        else:
            assert np.array_equal(np.concatenate([batch[part.rows] for part in shards]), batch)
            assert all(np.array_equal(sampler.batch(0, step, part.rows), batch[part.rows]) for part in shards)


@given(st.integers(0, 1000), st.integers(1, 50))
def test_split_sizes_differ_by_at_most_one_in_rank_order(num_rows: int, world_size: int) -> None:
    parts = [even_split(num_rows, world_size, rank) for rank in range(world_size)]
    sizes = [part.stop - part.start for part in parts]
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [row for part in parts for row in range(part.start, part.stop)] == list(range(num_rows))


@given(st.integers(1, 100), st.integers(1, 50))
def test_no_shard_is_empty(num_rows: int, world_size: int) -> None:
    rows = [shard(num_rows, world_size, rank).rows for rank in range(world_size)]
    assert min(part.stop - part.start for part in rows) >= 1


def test_orders_differ_by_pass_by_fit_and_by_seed() -> None:
    orders = [
        epoch_of(BatchPlan(num_rows=50, batch_size=50, shuffle=True, seed=seed), epoch)[0]
        for seed in ((7, 0), (7, 1), (8, 0))
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 6


def test_the_order_of_a_seed_never_changes() -> None:
    plan = BatchPlan(num_rows=10, batch_size=10, shuffle=True, seed=(0, 0))
    assert epoch_of(plan, 1) == [[5, 1, 6, 3, 4, 8, 9, 7, 2, 0]]
    assert epoch_of(replace(plan, blocks=(4, 3, 3), batch_size=5), 1) == BLOCK_ORDER


BLOCK_ORDER = [[5, 9, 8, 1, 2], [4, 7, 6, 0, 3]]


def test_each_batch_takes_the_next_rows_of_every_lane() -> None:
    """Blocks of rows 0-3, 4-6 and 7-9; lanes of rows 0-1, 2-4 and 5-9, the middle one backwards."""
    plan = BatchPlan(num_rows=10, batch_size=4, blocks=(4, 3, 3))
    assert epoch_of(plan, 0) == epoch_of(plan, 1) == [[0, 4, 5, 6], [1, 3, 7, 8], [2, 9]]
    assert epoch_of(replace(plan, lanes=1), 0) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_blocks_and_the_rows_in_them_come_in_a_new_order_every_pass() -> None:
    plan = BatchPlan(num_rows=200, batch_size=20, shuffle=True, blocks=(50,) * 4, lanes=1)
    passes = [[row for batch in epoch_of(plan, epoch) for row in batch] for epoch in range(3)]
    blocks = [[row // 50 for row in rows] for rows in passes]
    assert all(len({*order[start : start + 50]}) == 1 for order in blocks for start in range(0, 200, 50))
    assert len({tuple(order) for order in blocks}) == 3
    inside = {tuple(row % 50 for row in rows[start : start + 50]) for rows in passes for start in range(0, 200, 50)}
    assert len(inside) == 12


def test_a_shuffle_inside_batches_keeps_the_batches_of_the_order_given() -> None:
    plan = BatchPlan(num_rows=23, batch_size=5, shuffle="batch", blocks=(10, 13))
    assert epoch_of(plan, 0) == epoch_of(replace(plan, blocks=()), 0)


@settings(max_examples=20)
@given(st.integers(2, 200), st.integers(1, 20))
def test_default_batch_size_makes_a_pass_of_the_given_steps(num_rows: int, steps: int) -> None:
    assert default_batch_size(num_rows) == 32
    assert Sampler(BatchPlan(num_rows, default_batch_size(num_rows, steps))).steps_per_pass <= steps


def test_a_step_beyond_the_epoch_is_refused() -> None:
    sampler = Sampler(BatchPlan(num_rows=7, batch_size=3, steps_per_epoch=2))
    with pytest.raises(IndexError, match="epoch 1 has 1 steps"):
        sampler.batch(1, 1)
    with pytest.raises(IndexError):
        Sampler(BatchPlan(num_rows=7, batch_size=3), first_epoch=2).batch(1, 0)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"num_rows": 0}, DataError, "has 0 rows"),
        ({"batch_size": 0}, ConfigError, "batch_size=0 must be"),
        ({"batch_size": 2.5}, ConfigError, "batch_size=2.5 must be"),
        ({"batch_size": True}, ConfigError, "batch_size=True must be"),
        ({"steps_per_epoch": 0}, ConfigError, "steps_per_epoch=0 must be"),
        ({"shuffle": "rows"}, ConfigError, "shuffle='rows' must be"),
        ({"lanes": 0}, ConfigError, "lanes=0 must be"),
        ({"blocks": (3, 3)}, DataError, "blocks have 6 rows together, the data set 7"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(change: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Sampler(BatchPlan(**{"num_rows": 7, "batch_size": 3, **change}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("num_rows", "world_size", "shares"),
    [(5, 2, [3 / 5, 2 / 5]), (17, 3, [6 / 17, 6 / 17, 5 / 17]), (4, 2, [0.5, 0.5]), (2, 3, [1 / 3] * 3)],
)
def test_a_share_is_the_ranks_rows_over_all_rows(num_rows: int, world_size: int, shares: list[float]) -> None:
    assert [shard(num_rows, world_size, rank).share for rank in range(world_size)] == shares
