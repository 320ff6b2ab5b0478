"""Training on N ranks ends where plain `keras.Model.fit` in one process ends: promise 1, feature by feature."""

from typing import Any

import pytest

from exactness.cases import (
    CORE,
    FEATURES,
    MORE_FEATURES,
    ONE_RANK_ONLY,
    SUMS,
    UNEVEN,
    Run,
    Size,
    combinations,
    is_left_out,
    pairs,
    sizes_of,
    with_mistake,
)
from exactness.compare import GROUPS, compare
from exactness.table import Row

TOGETHER = [
    pytest.param(*case, marks=[pytest.mark.slow] * (case[1] not in CORE) + [pytest.mark.full] * is_left_out(*case))
    for case in combinations()
]


ALONE = [
    pytest.param(*case, marks=[pytest.mark.full] * is_left_out(1, *case))
    for case in pairs(*FEATURES, *MORE_FEATURES, *ONE_RANK_ONLY)
]


@pytest.mark.parametrize(("feature", "dtype"), ALONE)
def test_one_rank_is_plain_keras_to_the_last_bit(lab: Any, rows: list[Row], feature: str, dtype: str) -> None:
    plain, (rank,) = lab.plain(feature, dtype), lab.distributed(1, feature, dtype)
    different = {}
    for size in sizes_of(feature):
        found = compare([rank[Run(size)]], plain[size])
        rows.append(Row(feature, 1, size, dtype, found))
        different.update({f"{size} {group}": found.differences[group] for group in GROUPS if found.differences[group]})
    assert not different


@pytest.mark.parametrize(("world_size", "feature", "dtype"), TOGETHER)
def test_n_ranks_end_where_plain_keras_does(
    lab: Any, rows: list[Row], world_size: int, feature: str, dtype: str
) -> None:
    plain, ranks = lab.plain(feature, dtype), lab.distributed(world_size, feature, dtype)
    too_large = {}
    for size in sizes_of(feature):
        outcomes = [rank[Run(size)] for rank in ranks]
        assert len({outcome.digest for outcome in outcomes}) == 1, f"{size}: the ranks' bits differ"
        found = compare(outcomes, plain[size])
        rows.append(Row(feature, world_size, size, dtype, found))
        too_large.update({f"{size} {group}": excess for group, excess in found.too_large.items()})
    assert not too_large


@pytest.mark.parametrize(("world_size", "feature", "dtype"), [p for p in TOGETHER if p.values[1] not in SUMS])
def test_the_comparison_sees_a_mistake(lab: Any, world_size: int, feature: str, dtype: str) -> None:
    """The same comparison fails where every rank counts 1/N, whatever its rows, or sees its own rows alone.

    At sizes 12/1 and 23/2 no share is wrong then: their mini-batches go whole to every rank, or one row to each.
    """
    plain, ranks = lab.plain(feature, dtype), lab.distributed(world_size, feature, dtype)
    wrong = [rank[with_mistake(feature)] for rank in ranks]
    assert compare(wrong, plain[UNEVEN]).too_large


@pytest.mark.parametrize("dtype", ["float64"])
@pytest.mark.parametrize("feature", ["sgd_momentum"])
def test_the_comparison_sees_whole_mini_batches_counted_on_every_rank(lab: Any, feature: str, dtype: str) -> None:
    size = Size(23, 2)
    run = Run(size, wrong="counted N times")
    ranks = lab.run(3, feature, dtype, [run])
    assert compare([rank[run] for rank in ranks], lab.plain(feature, dtype)[size]).too_large
