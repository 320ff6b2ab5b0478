"""Claims about what the driver shows and says, and how a signal ends a fit, on workers that are only played."""

import signal
from pathlib import Path
from typing import Any

import played
import pytest

from dtrain import cluster
from dtrain.checkpoint import CheckpointStore, Manifest, read_manifest
from dtrain.checkpointer import Saving
from dtrain.config import CheckpointConfig
from dtrain.controller import Controller, FitRecord
from dtrain.fit_state import SavedFit
from dtrain.interrupts import Interrupts
from dtrain.tracking import NullTracker
from dtrain.types import BatchPlan, FitPlan, Position, Progress


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

    def begin_epoch(self, epoch: int, step: int = 0) -> None: ...

    def update(self, step: int, logs: Any, samples_per_second: float | None = None) -> None:
        self.steps.append(step)

    def end_epoch(self, epoch: int, logs: Any, seconds: float | None = None) -> None: ...

    def expect(self, steps_per_epoch: int | None) -> None: ...

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


PLAN = FitPlan(BatchPlan(2, 1), epochs=2)


@pytest.fixture
def no_object_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "put", lambda value: value)


@pytest.mark.usefixtures("no_object_store")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("moment", ["end_fit", "snapshot", "write_snapshot"])
def test_a_signal_while_a_fit_ends_does_not_cost_its_last_epoch(
    moment: str, number: signal.Signals, tmp_path: Path
) -> None:
    past = []

    def interrupt(method: str) -> None:
        past.append(method)
        if method == moment and "end_fit" in past:
            signal.raise_signal(number)

    store, interrupts, record = CheckpointStore(str(tmp_path)), Interrupts(), FitRecord()
    saving = Saving(store, CheckpointConfig(), Manifest(step=0, position=Position(0, 0), world_size=1, seed=0))
    group: Any = played.Workers(interrupts, interrupt)
    with pytest.raises(KeyboardInterrupt), interrupts:
        Controller(group, NullTracker(), Shown(), interrupts).fit(PLAN, 2, b"", saving, record)
        pytest.fail("nobody hears of the signal before the fit is said to be finished")
    newest = store.latest()
    assert newest is not None and newest == record.checkpoint
    manifest = read_manifest(newest.url)
    assert (manifest.position, manifest.extra) == (Position(2, 0), {"finished": True})


@pytest.mark.usefixtures("no_object_store")
@pytest.mark.parametrize(
    ("rate", "told"),
    [
        (0.25, ["the learning rate is 0.25, as in the checkpoint; model_fn's is 0.5"]),
        (played.RATE, []),
        (None, []),  # of a schedule
    ],
)
def test_another_learning_rate_than_the_factorys_is_told_where_a_fit_goes_on(
    rate: float | None, told: list[str]
) -> None:
    for saved in (SavedFit(Position(1, 0), 2, {}, (), [], {}, {}), None):
        group: Any = played.Workers()
        group.learning_rate, shown = rate, Shown()
        Controller(group, NullTracker(), shown).fit(PLAN, 2, b"", None, FitRecord(), saved)
        assert shown.lines == (told if saved is not None else [])
