"""Owns faults that tests plan: which rank meets what, and when, to the step. `dtrain.testing` is their public face.

Nothing of it is at work unless a plan is. A plan travels to a worker when that starts; so a process that takes a dead
one's place does not meet what ended that one, but what was planned for the rank's next life.
"""

import os
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Literal, Self

Phase = Literal[
    "start",
    "form",
    "broadcast",
    "data",
    "step",
    "again",
    "callback",
    "answer",
    "checkpoint",
    "evaluate",
    "predict",
    "shutdown",
]
"""Where a fault strikes: while the model is made, the group forms, others waiting for this rank, rank 0's state is
spread, a step's data are read, a step is trained (its forward pass is done, its gradients are not summed yet), a step
that has summed gradients is about to sum others, an epoch's last hook is due, a segment is finished and about to be
told, a checkpoint is written, a mini-batch is evaluated, predicted, and when a fit ends."""


class PlannedError(Exception):
    """What `raise_in` raises, as the user's own code might."""


@dataclass(frozen=True)
class Fault:
    """One fault.

    Attributes:
        kind: what happens: the process is killed or stopped, it raises, it sleeps, or gradients become NaN.
        rank: whose.
        phase: in which phase.
        number: of the step in the fit ("data", "step", "again"), of the epoch ("callback"), of the mini-batch
            ("evaluate", "predict"); of the other phases how often they came before. All count from 0.
        seconds: to sleep.
        life: how many processes had this rank before the one that is meant.
    """

    kind: Literal["kill", "stop", "raise", "delay", "nan"]
    rank: int
    phase: Phase
    number: int
    seconds: float = 0.0
    life: int = 0


class FaultPlan:
    """Inside `with`, the workers that start meet these faults, each once."""

    current: ClassVar["FaultPlan | None"] = None

    def __init__(self, *faults: Fault) -> None:
        self._faults = faults
        self._lives: Counter[int] = Counter()

    def __enter__(self) -> Self:
        FaultPlan.current = self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        FaultPlan.current = None

    def of_next_life(self, rank: int) -> tuple[Fault, ...]:
        """What a process that starts as this rank meets."""
        life = self._lives[rank]
        self._lives[rank] += 1
        return tuple(fault for fault in self._faults if fault.rank == rank and fault.life == life)


class Strikes:
    """Makes a worker's faults happen.

    Args:
        faults: its.
    """

    def __init__(self, faults: Sequence[Fault] = ()) -> None:
        self._faults = list(faults)
        self._times: Counter[str] = Counter()
        self._step = 0

    def __bool__(self) -> bool:
        """Whether any is left to happen."""
        return bool(self._faults)

    def __call__(self, phase: Phase, number: int | None = None, count: int = 1) -> None:
        """Called where a phase begins, of `count` steps. `number` None: how often it was called so far.

        Raises:
            PlannedError: so it was planned.
        """
        first = self._times[phase] if number is None else number
        for each in range(first, first + count):
            self._strike(phase, each)
        self._times[phase] += 1

    def call_begins(self, step: int) -> None:
        """A call into TensorFlow begins with this step of the fit."""
        self._step = step

    def in_step(self) -> float:
        """Called in each step of a call, when its gradients are about to be summed: what to multiply them with."""
        is_nan = self._strike("step", self._step)
        self._step += 1
        return float("nan") if is_nan else 1.0

    def again_in_step(self) -> float:
        """Called where a step that has summed gradients is about to sum others."""
        self._strike("again", self._step - 1)
        return 1.0

    def _strike(self, phase: Phase, number: int) -> bool:
        due = [fault for fault in self._faults if (fault.phase, fault.number) == (phase, number)]
        self._faults = [fault for fault in self._faults if fault not in due]
        for fault in due:
            if fault.kind == "delay":
                time.sleep(fault.seconds)
            elif fault.kind == "raise":
                raise PlannedError(f"planned for rank {fault.rank} in {phase} {number}")
            elif fault.kind != "nan":
                os.kill(os.getpid(), signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
        return any(fault.kind == "nan" for fault in due)
