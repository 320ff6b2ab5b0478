"""No number depends on where segments end or on how many steps a call takes; every N reads the rows in one order."""

from typing import Any

import pytest

from exactness.cases import DTYPES, Run, Size
from exactness.compare import compare, largest_difference

SIZE = Size(101, 16)
CUTS = [
    Run(SIZE, segment=1),
    Run(SIZE, segment=3),
    Run(SIZE, segment=5, steps_per_call=2),
    Run(SIZE, steps_per_call=1),
    Run(SIZE, steps_per_call=4),
    Run(SIZE, steps_per_call=64),
]


@pytest.mark.parametrize(
    ("world_size", "feature"),
    [
        (1, "accumulation"),
        (2, "dropout"),
        (2, "user_callback"),
        (3, "accumulation"),
        (3, "several_outputs"),
        (3, "custom_step_tensors"),
        (3, "user_callback"),
    ],
)
def test_segments_cut_elsewhere_change_no_bit(lab: Any, world_size: int, feature: str) -> None:
    ranks = lab.run(world_size, feature, "float32", [Run(SIZE), *CUTS])
    for rank in ranks:
        for run in CUTS:
            assert rank[run].digest == rank[Run(SIZE)].digest, run
    for run in CUTS:
        assert largest_difference(ranks[0][run].history, ranks[0][Run(SIZE)].history) == 0, run


@pytest.mark.parametrize("dtype", DTYPES)
def test_shuffled_rows_come_in_the_same_order_for_any_n(lab: Any, dtype: str) -> None:
    """One rank is plain Keras on the sampler's order, to the last bit; three ranks agree with it."""
    run = Run(SIZE, shuffle=True)
    reference = lab.plain_at("sgd_momentum", dtype, [SIZE], shuffle=True)[SIZE]
    (alone,) = lab.run(1, "sgd_momentum", dtype, [run])
    assert set(compare([alone[run]], reference).differences.values()) == {0.0}
    together = [rank[run] for rank in lab.run(3, "sgd_momentum", dtype, [run])]
    assert len({outcome.digest for outcome in together}) == 1
    assert not compare(together, reference).too_large


def test_another_order_would_be_seen(lab: Any) -> None:
    run = Run(SIZE)
    (unshuffled,) = lab.run(1, "sgd_momentum", "float32", [run])
    assert compare([unshuffled[run]], lab.plain_at("sgd_momentum", "float32", [SIZE], shuffle=True)[SIZE]).too_large
