"""Claims about what is looked for in what the ranks return of a segment."""

from dataclasses import replace

import pytest

from dtrain.errors import NotFinite
from dtrain.findings import MANY_SKIPPED, SLOW_SEGMENTS, Findings
from dtrain.types import Position, SegmentResult, WorkerInfo

WORKERS = [WorkerInfo(rank, 0, f"host{rank}", "node") for rank in range(3)]
FINE = SegmentResult(Position(0, 10), 10, 80, 2.0, {"loss": 1.0}, spent={"reading data": 0.0, "callbacks": 0.0})


@pytest.fixture
def notes() -> list[str]:
    return []


@pytest.fixture
def findings(notes: list[str]) -> Findings:
    return Findings(lambda: WORKERS, notes.append)


def test_steps_that_were_left_out_are_told_by_number_and_rank(findings: Findings, notes: list[str]) -> None:
    """Steps of the epoch come in, steps of the run go out; on rank 1 alone was the loss itself no number."""
    answers = [replace(FINE, skipped={3: rank == 1, 7: False, 8: False, 9: False}) for rank in range(3)]
    assert findings.look_for_skipped(answers, first=100, start=0) == {103, 107, 108, 109}
    assert findings.num_skipped == 4
    assert notes == [
        "step 103 of the run was left out: it is not finite, on rank 1 on host1",
        "step 107 of the run was left out: it is not finite, on all ranks",
        "step 108 of the run was left out: it is not finite, on all ranks",
        "1 more steps were left out after it",
    ]


def test_many_steps_left_out_in_a_row_end_the_fit_wherever_segments_end(findings: Findings) -> None:
    all_ten = [replace(FINE, skipped=dict.fromkeys(range(5, 15), False))] * 3
    findings.look_for_skipped(all_ten, first=5, start=5)
    findings.look_for_skipped([replace(FINE, skipped={})] * 3, first=15, start=5)  # which begins anew
    for first in (25, 35):
        findings.look_for_skipped(all_ten, first, start=5)
    with pytest.raises(NotFinite, match=f"the last {MANY_SKIPPED + 5} steps, up to step 54 of the run"):
        findings.look_for_skipped(all_ten, first=45, start=5)


@pytest.mark.parametrize(
    ("froms", "step", "rank", "where"),
    [
        ([None, 4, 2], 52, 2, "rank 2 on host2"),
        ([3, 3, 3], 53, 0, "rank 0 on host0, rank 1 on host1, rank 2 on host2"),
        ([None, None, None], 59, None, "all ranks"),  # each one's part is, their sum is not
    ],
)
def test_a_loss_that_is_no_number_ends_the_fit_with_step_and_rank(
    findings: Findings, froms: list[int | None], step: int, rank: int | None, where: str
) -> None:
    answers = [replace(FINE, logs={"loss": float("nan")}, not_finite_from=its) for its in froms]
    with pytest.raises(NotFinite, match=f"the loss is nan from step {step} of the run on, first on") as caught:
        findings.look_for_not_finite(answers, first=50)
    assert f"first on {where}: a smaller" in str(caught.value) and caught.value.rank == rank
    findings.look_for_not_finite([FINE] * 3, first=50)


def test_a_rank_that_is_slow_for_some_segments_is_told_once(findings: Findings, notes: list[str]) -> None:
    slow = [replace(FINE, spent={"reading data": 1.0 * (rank == 1), "callbacks": 0.0}) for rank in range(3)]
    for _ in range(SLOW_SEGMENTS - 1):
        findings.look_for_who_is_slow(slow)
    findings.look_for_who_is_slow([FINE] * 3)
    for _ in range(SLOW_SEGMENTS + 2):
        findings.look_for_who_is_slow(slow)
    assert notes == ["rank 1 on host1 is slow: the others wait 50% of the time for it, which it spends reading data"]
    findings.renumber()
    for _ in range(SLOW_SEGMENTS):
        findings.look_for_who_is_slow(slow)
    assert len(notes) == 2
