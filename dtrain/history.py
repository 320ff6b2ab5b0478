"""Owns what `fit` returns."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Recovery:
    """A failure that a fit went on from.

    Attributes:
        time: when it was noticed: UTC, ISO 8601.
        rank: the worker's that was to blame.
        host: its host name.
        cause: what happened to it.
        seconds: until steps were trained again.
        steps_redone: steps that had been finished and were trained again.
        num_workers: how many went on.
    """

    time: str
    rank: int | None
    host: str | None
    cause: str
    seconds: float
    steps_redone: int
    num_workers: int


@dataclass(frozen=True)
class History:
    """What a fit came to; the first three as in `keras.callbacks.History`.

    Attributes:
        history: each metric's value at the end of each epoch.
        epoch: the epochs' numbers, from 0.
        params: `epochs`, `steps` and `verbose`.
        run_id: the MLflow run; None without tracking, or while MLflow cannot be reached.
        checkpoint: URL of the last committed checkpoint, if one was made.
        run_name: names the run in MLflow and its folder.
        url: the run's folder.
        open_command: what to type, or open, to look at the run in MLflow.
        recoveries: the failures that it went on from.
    """

    history: dict[str, list[float]]
    epoch: list[int]
    params: Mapping[str, Any] = field(default_factory=dict)
    run_id: str | None = None
    checkpoint: str | None = None
    run_name: str = ""
    url: str | None = None
    open_command: str | None = None
    recoveries: list[Recovery] = field(default_factory=list)

    def plot(self) -> "Figure":
        """The curves, as a matplotlib figure."""
        from dtrain.plots import training_curves

        return training_curves(self.history, self.epoch, title=self.run_name or None)
