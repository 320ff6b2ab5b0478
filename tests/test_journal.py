"""Claims about the journal: what is written is kept, what is kept is sent, whatever happens in between."""

import contextlib
import json
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dtrain.journal import Event, Journal, Point, Sender, Thinner, Verdict

DEADLINE = 60.0


def steps(first: int, values: Sequence[float], start: int = 0, milliseconds: float = 7.0, key: str = "loss") -> Event:
    """A "steps" event whose steps take a fixed time, from `start` on."""
    ends = [round(start + milliseconds * n) for n in (first, first + len(values))]
    return {
        "event": "steps", "first_step": first, "start": ends[0], "end": ends[1], "metrics": {key: list(values)}
    }  # fmt: skip


def metrics(step: int, time: int, **values: float) -> Event:
    return {"event": "metrics", "time": time, "step": step, "metrics": values}


FINISH: Event = {"event": "finish", "status": "FINISHED"}


class Store:
    """A destination in memory, which can be told to fail."""

    name = "the store"

    def __init__(self, uri: str = "memory") -> None:
        self.uri = uri
        self.points: list[Point] = []
        self.events: list[Event] = []
        self.says: Verdict | None = None
        self.refuses: Callable[[Any], bool] = lambda item: False
        self.thread: str | None = None

    @contextlib.contextmanager
    def session(self) -> Iterator[None]:
        self.thread = threading.current_thread().name
        yield

    def send(self, event: Event) -> None:
        self._may_fail(event)
        self.events.append(event)

    def send_points(self, points: Sequence[Point]) -> None:
        self._may_fail(points)
        self.points += points

    def _may_fail(self, item: Any) -> None:
        if self.says is not None and self.refuses(item):
            raise OSError("no")

    def verdict(self, error: Exception) -> Verdict:
        assert self.says is not None
        return self.says

    def forget(self) -> None:
        self.points, self.events, self.says = [], [], None

    def state(self) -> dict[str, Any]:
        return {"uri": self.uri}

    def restore(self, state: Mapping[str, Any]) -> bool:
        return bool(state["uri"] == self.uri)


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "journal.jsonl")


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + DEADLINE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def fed(thinner: Thinner, *events: Event) -> list[Point]:
    return [point for event in (*events, FINISH) for point in thinner.feed(event)]


# The file


def test_what_is_appended_is_read_again_from_any_line_on(journal: Journal) -> None:
    journal.append({"event": "text", "n": 1}, {"event": "text", "n": 2, "nan": float("nan")})
    [(_, first), (event, end)] = journal.read()
    assert (event["n"], end) == (2, journal.size)
    assert [event["n"] for event, _ in journal.read(first)] == [2]
    assert [event["n"] for event, _ in journal.read(0, first)] == [1]
    assert stat.S_IMODE(journal.path.stat().st_mode) == 0o600


def test_half_a_line_of_a_killed_process_is_cut_off(journal: Journal) -> None:
    journal.append({"event": "text", "n": 1})
    with journal.path.open("ab") as file:
        file.write(b'{"event":"text","n' + b"x" * 100_000)
    again = Journal(journal.path)
    again.append({"event": "text", "n": 2})
    assert [json.loads(line)["n"] for line in journal.path.read_text().splitlines()] == [1, 2]


def test_a_journal_of_a_process_that_was_killed_at_any_byte_is_gone_on_with(journal: Journal) -> None:
    whole: list[Event] = [{"event": "start"}, metrics(1, 1, loss=0.5), {"event": "text", "text": "{}\n\x00"}]
    journal.append(*whole)
    written = journal.path.read_bytes()
    for size in range(len(written) + 1):
        journal.path.write_bytes(written[:size])
        again = Journal(journal.path)
        kept = [event for event, _ in again.read()]
        assert kept == whole[: written[:size].count(b"\n")]
        assert journal.path.read_bytes() == written[:size]  # To read it, as `replay` does, changes nothing.
        again.append(FINISH)
        assert [event for event, _ in Journal(journal.path).read()] == [*kept, FINISH]


def test_what_a_loss_of_power_left_of_a_line_does_not_stop_the_rest(journal: Journal) -> None:
    journal.append({"event": "start"})
    with journal.path.open("ab") as file:
        file.write(b"\x00" * 100 + b'5}\n7\n{"no": 1}\n')
    again = Journal(journal.path)
    again.append(metrics(1, 1, loss=1.0))
    again.sync()
    store = Store()
    assert Sender(again, store).drain(DEADLINE)
    assert store.events[0] == {"event": "start"} and store.points == [("loss", 1.0, 1, 1)]


def test_user_names_and_passwords_in_urls_are_not_written(journal: Journal) -> None:
    journal.append({"event": "text", "text": "see s3://key:CANARY@bucket/runs"})
    assert "s3://***@bucket/runs" in journal.path.read_text()


def test_a_full_disk_does_not_stop_training(
    journal: Journal, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    journal.append({"event": "text", "n": 1})
    write = os.write

    def full(fd: int, data: bytes) -> int:
        write(fd, data[:5])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    journal.append({"event": "text", "n": 2})
    journal.append({"event": "text", "n": 3})
    assert journal.waiting
    monkeypatch.setattr(os, "write", write)
    journal.append({"event": "text", "n": 4})
    assert [event["n"] for event, _ in journal.read()] == [1, 2, 3, 4]
    assert not journal.waiting
    assert len([r for r in caplog.records if "wait in memory" in r.message]) == 1


# Per-step series


def test_means_do_not_depend_on_where_segments_end() -> None:
    values = np.random.default_rng(0).normal(size=1000)

    def thinned(cuts: list[int]) -> list[Point]:
        parts = np.split(np.arange(1000), cuts)
        return fed(Thinner(None), *(steps(int(part[0]), values[part].tolist(), 5000) for part in parts))

    whole = thinned([])
    assert thinned([1, 2, 333, 334, 900]) == whole
    assert whole[-1][3] == 999
    assert 68 <= len(whole) <= 72  # Seven seconds, ten points a second.
    at = [step for _, _, _, step in whole]
    assert [value for _, value, _, _ in whole] == [
        pytest.approx(values[i + 1 : j + 1].mean()) for i, j in zip([-1, *at], at, strict=False)
    ]


@pytest.mark.parametrize("length", [1, 7, 70, 1030])
def test_every_nth_step_and_the_last_whatever_the_segments(length: int) -> None:
    events = [steps(i, list(range(i, min(i + length, 1030)))) for i in range(0, 1030, length)]
    got = fed(Thinner(100), *events)
    assert [step for _, _, _, step in got] == [*range(0, 1001, 100), 1029]
    assert [value for _, value, _, _ in got] == [float(step) for _, _, _, step in got]


@pytest.mark.parametrize("every", [None, 1, 3, 10])
def test_an_epochs_last_point_is_the_epochs_own(every: int | None) -> None:
    events: list[Event] = []
    for epoch in range(3):
        events.append(steps(epoch * 20, np.linspace(1, 0.5, 20).tolist()))
        last = epoch * 20 + 19
        events.append(metrics(last, 7 * (last + 1), loss=0.25, val_loss=0.75))
    got = fed(Thinner(every), *events)
    loss = {step: value for key, value, _, step in got if key == "loss"}
    at = [step for key, _, _, step in got if key == "loss"]
    assert at == sorted(set(at))
    assert [loss[step] for step in (19, 39, 59)] == [0.25] * 3
    assert [step for key, _, _, step in got if key == "val_loss"] == [19, 39, 59]
    # No mean is taken over two epochs: each begins at 1.
    assert every is not None or all(max(loss[s] for s in at if 20 * e <= s < 20 * e + 18) > 0.8 for e in range(3))


def test_a_metric_that_comes_later_starts_a_series_of_its_own() -> None:
    later = steps(10, [2.0] * 10)
    later["metrics"]["auc"] = [0.5] * 10
    got = fed(Thinner(None), steps(0, [1.0] * 10), later)
    assert {value for key, value, _, step in got if key == "loss" and step < 10} == {1.0}
    assert {step for key, _, _, step in got if key == "auc"} <= set(range(10, 20))


# The thread that sends


def test_events_arrive_in_order_and_points_before_what_follows_them(journal: Journal) -> None:
    store = Store()
    sender = Sender(journal, store)
    journal.append({"event": "start"}, steps(0, [1.0] * 40), metrics(40, 300, val=2.0), {"event": "text"}, FINISH)
    assert sender.drain(DEADLINE) and sender.done
    assert [event["event"] for event in store.events] == ["start", "text", "finish"]
    assert [step for key, _, _, step in store.points if key == "loss"][-1] == 39
    assert store.thread == "dtrain-sender"


def test_many_points_go_in_batches_and_none_is_lost(journal: Journal) -> None:
    store = Store()
    journal.append(*(metrics(n, n, loss=float(n)) for n in range(3500)))
    assert Sender(journal, store).drain(DEADLINE)
    assert [step for _, _, _, step in store.points] == list(range(3500))


def test_what_fails_is_sent_again_and_said_once(journal: Journal, caplog: pytest.LogCaptureFixture) -> None:
    store = Store()
    store.says, store.refuses = "retry", lambda item: True
    sender = Sender(journal, store)
    sender.start()
    journal.append({"event": "start"}, metrics(1, 1, loss=1.0))
    sender.wake()
    wait_for(lambda: sender.failures >= 2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    store.says = None
    assert sender.drain(DEADLINE)
    assert (store.events, store.points) == ([{"event": "start"}], [("loss", 1.0, 1, 1)])
    assert "answers again" in caplog.text


def test_what_is_refused_for_good_is_left_out_and_the_rest_arrives(journal: Journal) -> None:
    store = Store()
    store.says, store.refuses = "skip", lambda item: isinstance(item, dict) and item["event"] == "artifact"
    journal.append({"event": "start"}, metrics(1, 1, loss=1.0), {"event": "artifact"}, metrics(2, 2, loss=2.0), FINISH)
    assert Sender(journal, store).drain(DEADLINE)
    assert [event["event"] for event in store.events] == ["start", "finish"]
    assert [step for _, _, _, step in store.points] == [1, 2]


def test_a_destination_that_lost_the_run_gets_all_of_it_anew(journal: Journal) -> None:
    store = Store()
    store.refuses = lambda item: isinstance(item, dict) and item["event"] == "text"
    store.says = "gone"  # Until it forgets.
    journal.append({"event": "start"}, steps(0, [1.0] * 50), {"event": "text"}, FINISH)
    assert Sender(journal, store).drain(DEADLINE)
    assert [event["event"] for event in store.events] == ["start", "text", "finish"]
    assert [step for _, _, _, step in store.points] == sorted({step for _, _, _, step in store.points})


def test_a_drain_gives_up_on_a_destination_that_does_not_answer(journal: Journal) -> None:
    store = Store()
    store.says, store.refuses = "retry", lambda item: True
    journal.append({"event": "start"})
    sender = Sender(journal, store)
    assert not sender.drain(0.1)
    assert not sender.done


@pytest.mark.parametrize("every", [None, 10])
def test_a_restart_goes_on_where_the_last_process_was(journal: Journal, every: int | None) -> None:
    values = np.random.default_rng(1).normal(size=100).tolist()
    whole = Store()
    once = Journal(journal.path.with_name("once.jsonl"))
    once.append({"event": "start"}, steps(0, values), FINISH)
    Sender(once, whole, every).drain(DEADLINE)

    first, second = Store(), Store()
    journal.append({"event": "start"}, steps(0, values[:33]))
    assert Sender(journal, first, every).drain(DEADLINE)
    again = Journal(journal.path)
    again.append(steps(33, values[33:]), FINISH)
    assert Sender(again, second, every).drain(DEADLINE)
    assert [event["event"] for event in second.events] == ["finish"]
    assert first.points + second.points == whole.points


def test_another_destination_gets_the_whole_journal(journal: Journal) -> None:
    journal.append({"event": "start"}, metrics(1, 1, loss=1.0), FINISH)
    assert Sender(journal, Store("here")).drain(DEADLINE)
    elsewhere = Store("there")
    assert Sender(Journal(journal.path), elsewhere).drain(DEADLINE)
    assert len(elsewhere.events) == 2 and len(elsewhere.points) == 1
