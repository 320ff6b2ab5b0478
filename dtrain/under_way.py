"""Owns what a rank has done of the segment under way, from its first step until the segment's result is told."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from dtrain.data.loader import Chunk
from dtrain.fit_state import Part
from dtrain.step import concatenate
from dtrain.types import Array, Logs, Position, Segment

SPENT_ON = "reading data", "callbacks", "computing"


@dataclass
class UnderWay:
    """A segment that is not finished.

    Attributes:
        segment: it.
        steps: how many of its steps are finished.
        rows: of these, of the whole job.
        seconds: that they took.
        ended: the epoch has no more of them.
        skipped: steps that did not change the model, and whether that was for this rank's own gradients.
        spent: seconds by what they were spent on, besides waiting for others.
        states: of each call, the metrics' variables after each of its steps.
        own: of each call, what a custom step returned besides metrics, times this rank's share.
        step_logs: the steps' logs over all ranks, once the ranks have got as far as that.
        validation: the same of the validation.
    """

    segment: Segment
    steps: int = 0
    rows: int = 0
    seconds: float = 0.0
    ended: bool = False
    skipped: dict[int, bool] = field(default_factory=dict)
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPENT_ON, 0.0))
    states: list[list[Array]] = field(default_factory=list)
    own: list[dict[str, Array]] = field(default_factory=list)
    step_logs: dict[str, Array] | None = None
    validation: Logs | None = None

    @property
    def position(self) -> Position:
        """The next mini-batch."""
        start = self.segment.position
        return Position(start.epoch, start.step + self.steps)

    def add(self, chunk: Chunk, steps: int, states: list[Array], own: dict[str, Array]) -> None:
        """Steps of a chunk that are finished."""
        self.steps += steps
        self.rows += chunk.global_rows * steps
        self.states.append(states)
        self.own.append(own)

    def own_logs(self) -> dict[str, Array]:
        """Of all of its steps, what a custom step returned besides metrics."""
        return {key: np.concatenate([own[key] for own in self.own]) for key in (self.own[0] if self.own else ())}

    def not_finite_from(self, is_of_loss: Sequence[bool]) -> int | None:
        """See `SegmentResult.not_finite_from`; what of the metrics' states is the loss's."""
        states = concatenate(self.states) if self.states else []
        looked_at = [state for state, is_loss in zip(states, is_of_loss, strict=False) if is_loss]
        looked_at += [values for key, values in self.own_logs().items() if key == "loss"]
        firsts = [_first_not_finite(values, self.steps) for values in looked_at]
        return min((first for first in firsts if first is not None), default=None)

    def told(self) -> Part:
        """What others need of it."""
        return Part(self.segment, self.steps, self.rows, self.seconds, self.ended, self.step_logs, self.validation)

    def come_to(self, told: Part, newest: list[Array] | None, own: Mapping[str, Array]) -> None:
        """Be where another rank is, with as many records as there.

        Args:
            told: by the other.
            newest: the metrics as they are here, for each step that only the other has done; None: there is none.
            own: what a custom step returned there, of all steps.
        """
        if newest is not None:
            self.states.append(newest)
            self.own.append({key: values[self.steps :] for key, values in own.items()})
        self.steps, self.rows, self.seconds, self.ended = told.steps, told.rows, told.seconds, told.ended
        self.step_logs = dict(told.step_logs) if told.step_logs is not None else None
        self.validation = told.validation


def _first_not_finite(values: Array, num_steps: int) -> int | None:
    """Of values after each step, or (one alone) after the last."""
    wrong = np.flatnonzero(~np.isfinite(values).reshape(len(values), -1).all(axis=1))
    if not wrong.size:
        return None
    return int(wrong[0]) if len(values) == num_steps else num_steps - 1
