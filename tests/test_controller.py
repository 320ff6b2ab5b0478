"""Claims about what the bar is told of the workers' progress, on a group that only plays it."""

from typing import Any

from dtrain.controller import Controller
from dtrain.tracking import NullTracker
from dtrain.types import BatchPlan, Progress


class Polled:
    """A group whose evaluate is polled as often as there are answers."""

    def __init__(self, answers: list[Progress | None]) -> None:
        self.answers = answers

    def progress(self, timeout: float) -> Progress | None:
        return self.answers.pop(0) if self.answers else Progress("idle")

    def call(self, task: str, *args: Any, watch: Any) -> list[dict[str, float]]:
        while self.answers:
            watch(False)
        return [{}]


class Shown:
    """A display that notes what it is told."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.lines: list[str] = []

    def begin_epoch(self, epoch: int) -> None: ...

    def update(self, step: int, logs: Any, samples_per_second: float | None = None) -> None:
        self.steps.append(step)

    def end_epoch(self, epoch: int, logs: Any, seconds: float | None = None) -> None: ...

    def status(self, message: str) -> None: ...

    def print(self, text: str) -> None:
        self.lines.append(text)


def test_the_bar_shows_its_own_task_and_epoch_alone_and_every_line() -> None:
    answers = [
        Progress("train", 0, 7, printed=("a",)),
        Progress("evaluate", 0, 1),
        None,
        Progress("predict", 0, 3, printed=("b", "c")),
        Progress("evaluate", 1, 9),
        Progress("evaluate", 0, 2),
    ]
    shown = Shown()
    group: Any = Polled(answers)
    Controller(group, NullTracker(), shown).run_pass("evaluate", BatchPlan(1, 1), b"")
    assert shown.steps == [1, 2] and shown.lines == ["a", "b", "c"]
