"""Owns what is looked for in what ranks return of a segment: steps left out, losses that are no numbers, slow ranks."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from dtrain.errors import NotFinite
from dtrain.policy import who_is_slow
from dtrain.types import SegmentResult, WorkerInfo

SLOW_SEGMENTS = 3
"""A rank that keeps the others waiting for so many segments in a row is told."""
SKIPPED_SHOWN = 3
"""So many steps that were left out are told of a segment, by number."""
MANY_SKIPPED = 25
"""So many steps in a row that were left out end the fit."""


class Findings:
    """Those of one fit.

    Args:
        workers: where the ranks run by now.
        note: shows the user a line.
    """

    def __init__(self, workers: Callable[[], Sequence[WorkerInfo]], note: Callable[[str], None]) -> None:
        self._workers = workers
        self._note = note
        self.num_skipped = 0
        """Of the fit so far."""
        self._skipped_in_a_row = 0
        self._slow: tuple[Any, int] = (None, 0)  # rank and what it does, and for how many segments
        self._told_slow: list[Any] = []

    def renumber(self) -> None:
        """Ranks may have other numbers from now on."""
        self._slow, self._told_slow = (None, 0), []

    def look_for_who_is_slow(self, answers: Sequence[SegmentResult]) -> None:
        """Say, once of each, which rank has kept the others waiting for some segments in a row, and what it did.

        Args:
            answers: of a segment that builds no graph.
        """
        found = None
        if len(answers) == len(self._workers()):
            found = who_is_slow(answers[0].seconds, [answer.spent for answer in answers])
        culprit = found[:2] if found is not None else None
        self._slow = (culprit, self._slow[1] + 1 if culprit == self._slow[0] else 1)
        if found is None or self._slow[1] < SLOW_SEGMENTS or culprit in self._told_slow:
            return
        self._told_slow.append(culprit)
        rank, what, share = found
        self._note(
            f"{self._named(rank)} is slow: the others wait {share:.0%} of the time for it, which it spends"
            f" {'in callbacks' if what == 'callbacks' else what}"
        )

    def look_for_skipped(self, answers: Sequence[SegmentResult], first: int, start: int) -> set[int]:
        """Say which steps of a segment were left out, and on which ranks it began.

        Args:
            answers: of the segment.
            first: the step of the run that the segment begins with.
            start: the same step of the epoch.

        Returns:
            The steps of the run that were left out.

        Raises:
            NotFinite: there were too many in a row. The weights are whole.
        """
        skipped = {step - start for answer in answers for step in answer.skipped}
        for step in range(answers[0].num_steps):
            self._skipped_in_a_row = self._skipped_in_a_row + 1 if step in skipped else 0
        self.num_skipped += len(skipped)
        for step in sorted(skipped)[:SKIPPED_SHOWN]:
            ranks = [rank for rank, answer in enumerate(answers) if answer.skipped.get(start + step)]
            self._note(f"step {first + step} of the run was left out: it is not finite, on {self._named(*ranks)}")
        if len(skipped) > SKIPPED_SHOWN:
            self._note(f"{len(skipped) - SKIPPED_SHOWN} more steps were left out after it")
        if skipped and self._skipped_in_a_row >= MANY_SKIPPED:
            raise NotFinite(
                f"the last {self._skipped_in_a_row} steps, up to step {first + max(skipped)} of the run, were all left"
                " out: a smaller learning rate, clipnorm in the optimizer, or a look at the data may help",
                None,
                None,
            )
        return {first + step for step in skipped}

    def look_for_not_finite(self, answers: Sequence[SegmentResult], first: int) -> None:
        """See that the loss is a number.

        Args:
            answers: of a segment.
            first: the step of the run that it begins with.

        Raises:
            NotFinite: it is not. The weights are lost, so nobody need be asked for them.
        """
        loss = answers[0].logs.get("loss", 0.0)
        if math.isfinite(loss):
            return
        found = {rank: answer.not_finite_from for rank, answer in enumerate(answers)}
        step = min((step for step in found.values() if step is not None), default=answers[0].num_steps - 1)
        is_of_all = len(answers) == len(self._workers())  # else one tells it for the others
        ranks = [rank for rank, its in found.items() if its == step] if is_of_all else []
        raise NotFinite(
            f"the loss is {loss} from step {first + step} of the run on, first on {self._named(*ranks)}: a smaller"
            " learning rate, clipnorm in the optimizer, or a look at that step's data may help;"
            " FailureConfig(on_nan='ignore') trains on",
            ranks[0] if ranks else None,
            self._workers()[ranks[0]].host if ranks else None,
        )

    def _named(self, *ranks: int) -> str:
        return ", ".join(f"rank {rank} on {self._workers()[rank].host}" for rank in ranks) or "all ranks"
