"""Owns a run's journal: a file of JSON lines that training appends to and never waits beyond, and the thread that
sends it on.

The journal is the queue. One thread reads on from where the destination has got to, and sends: rare events as they
are, per-step series as the means over short intervals. While the destination is away the thread waits and tries
again. Lines are sent in order, and sending one twice must be harmless. Nothing here knows what the destination is.
"""

import contextlib
import json
import logging
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import numpy as np

from dtrain.types import Array

T = TypeVar("T")
Event = dict[str, Any]
Point = tuple[str, float, int, int]
"""A metric's name, its value, its time in milliseconds, its step."""
Verdict = Literal["retry", "skip", "gone", "deleted"]

POINTS_PER_BATCH = 1000
"""About as many points are sent at once."""
THINNED_INTERVAL_MS = 100
"""Per-step series are sent as means over intervals this long, unless every n-th step is asked for."""
UPLOAD_SECONDS = 600.0
"""How long drain() waits for an upload that has not failed."""
UPLOADS = ("artifact", "model", "finish")
"""Events that may take long to send."""

_logger = logging.getLogger("dtrain")


class Journal:
    """A file of JSON lines that is only ever appended to, by one thread, and read by another.

    Appending does not raise: while the disk is full the newest lines wait in memory. Numbers are written as Python's
    json does, so NaN and Infinity may stand for themselves.

    Args:
        path: the file; made, for the user alone, if it does not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        self._waiting: deque[bytes] = deque(maxlen=10_000)
        self._failing = False
        self.size = self._end_of_whole_lines()
        self._is_torn = True

    def _end_of_whole_lines(self) -> int:
        """A process that was killed while writing leaves half a line behind; the next append cuts it off."""
        end = os.fstat(self._fd).st_size
        while end > 0:
            start = max(0, end - 65_536)
            newline = os.pread(self._fd, end - start, start).rfind(b"\n")
            end = start + newline + 1
            if newline >= 0:
                break
        return end

    @property
    def waiting(self) -> bool:
        """Whether lines wait in memory, because the file cannot be written."""
        return bool(self._waiting)

    def append(self, *events: Event) -> None:
        """Writes events, a line each, without user info in URLs."""
        self._waiting.extend(
            mask(json.dumps(event, default=str, separators=(",", ":"))).encode() + b"\n" for event in events
        )
        data = b"".join(self._waiting)
        try:
            if self._is_torn:
                os.ftruncate(self._fd, self.size)
            self._is_torn = True  # until all of it is written
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError as error:
            if not self._failing:
                _logger.warning("cannot write %s (%s); the newest lines wait in memory", self.path, error)
            self._failing = True
            return
        self._failing = self._is_torn = False
        self.size += sum(map(len, self._waiting))
        self._waiting.clear()

    def sync(self) -> None:
        """Has the disk keep what is written, through a loss of power too; a disk that cannot is no error."""
        with contextlib.suppress(OSError):
            os.fsync(self._fd)
            folder = os.open(self.path.parent, os.O_RDONLY)  # The file's name stands in its folder.
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    def read(self, start: int = 0, end: int | None = None) -> Iterator[tuple[Event, int]]:
        """The events from the offset `start` to `end`, each with the offset behind it.

        A line that is none, as a loss of power may leave, is the event "unreadable".
        """
        end = self.size if end is None else end
        with open(self.path, "rb") as file:
            file.seek(start)
            for line in file:
                start += len(line)
                if start > end:
                    return
                yield _event(line), start


def _event(line: bytes) -> Event:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    return event if isinstance(event, dict) and "event" in event else {"event": "unreadable"}


# Per-step series ----------------------------------------------------------------------------------------------------


class Thinner:
    """Turns the journal's metrics into the points that are sent.

    A "steps" event has a value for every step: of these the mean over every tenth of a second is sent, at the last of
    its steps. An interval is a fixed piece of time, so where one event ends and the next begins makes no difference.
    A "metrics" event is sent whole; where it names a series, its values are exact, and end the interval. So does the
    event "finish".

    Args:
        every: send every n-th step's values instead.
    """

    def __init__(self, every: int | None) -> None:
        self._every = every
        self._keep(np.zeros(0, np.int64), np.zeros(0, np.int64), {})

    def feed(self, event: Event) -> list[Point]:
        """Takes an event and gives the points that are complete; the last interval stays open for more."""
        if event["event"] == "steps":
            return self._feed_steps(*_series(event))
        if event["event"] == "finish":
            return self.flush()
        if event["event"] != "metrics":
            return []
        exact = [(key, value, event["time"], event["step"]) for key, value in event["metrics"].items()]
        if not event["metrics"].keys() & self._series.keys():
            return exact
        return [
            point for point in self.flush() if point[3] != event["step"] or point[0] not in event["metrics"]
        ] + exact

    def flush(self) -> list[Point]:
        """Gives the point of what is still open, so that the last step is on record."""
        if len(self._steps) == 0:
            return []
        last = np.array([len(self._steps) - 1])
        points = _means(self._steps, self._times, self._series, last if self._every else np.array([0]), last)
        self._keep(self._steps[:0], self._times[:0], {key: values[:0] for key, values in self._series.items()})
        return points

    def _feed_steps(self, steps: Array, times: Array, series: dict[str, Array]) -> list[Point]:
        points = [] if series.keys() == self._series.keys() else self.flush()
        if len(self._steps):
            steps, times = np.concatenate([self._steps, steps]), np.concatenate([self._times, times])
            series = {key: np.concatenate([self._series[key], values]) for key, values in series.items()}
        if self._every:
            first = last = np.flatnonzero(steps[:-1] % self._every == 0)
            done = len(steps) - 1
        else:
            last = np.flatnonzero(np.diff(times // THINNED_INTERVAL_MS))
            first = np.append(0, last + 1)[: len(last)]
            done = int(last[-1]) + 1 if len(last) else 0
        points += _means(steps, times, series, first, last)
        self._keep(steps[done:], times[done:], {key: values[done:] for key, values in series.items()})
        return points

    def _keep(self, steps: Array, times: Array, series: dict[str, Array]) -> None:
        self._steps, self._times, self._series = steps, times, series


def _series(event: Event) -> tuple[Array, Array, dict[str, Array]]:
    """Steps, times and values of a "steps" event."""
    series = {key: np.asarray(values, np.float64) for key, values in event["metrics"].items()}
    length = min(map(len, series.values()))
    # The i-th of n steps ends when i of n parts of the time are over.
    times = np.rint(np.linspace(event["start"], event["end"], length + 1)[1:]).astype(np.int64)
    return event["first_step"] + np.arange(length), times, series


def _means(steps: Array, times: Array, series: Mapping[str, Array], first: Array, last: Array) -> list[Point]:
    """A point for each stretch of steps: the mean over it, at its last step and time."""
    return [
        (key, float(np.mean(values[i : j + 1])), int(times[j]), int(steps[j]))
        for key, values in series.items()
        for i, j in zip(first, last, strict=True)
    ]


# The thread that sends ----------------------------------------------------------------------------------------------


class Destination(Protocol):
    """Where a journal goes. What `send` and `send_points` raise is put before `verdict`."""

    name: str

    def session(self) -> contextlib.AbstractContextManager[None]:
        """Prepares the sending thread."""

    def send(self, event: Event) -> None: ...

    def send_points(self, points: Sequence[Point]) -> None: ...

    def verdict(self, error: Exception) -> Verdict:
        """Whether to try again, to leave it out, to send everything anew, or to wait for someone to restore it."""

    def forget(self) -> None:
        """What has been sent is gone."""

    def state(self) -> dict[str, Any]:
        """What a later process needs in order to go on."""

    def restore(self, state: Mapping[str, Any]) -> bool:
        """Takes over an earlier process's state; False if it belongs to another destination."""


class Sender:
    """Sends a journal's lines, in order; remembers beside the journal, in `<journal>.position`, how far it got.

    Args:
        journal: what to send.
        destination: where to.
        every: of the per-step series, as in Thinner.
    """

    def __init__(self, journal: Journal, destination: Destination, every: int | None = None) -> None:
        self.destination = destination
        self.failures = 0
        """Attempts in a row that failed."""
        self._journal = journal
        self._every = every
        self._position = Path(f"{journal.path}.position")
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = self._draining = False
        self._progress = time.monotonic()
        self._sent = self._read = 0
        self._rewind(self._load())

    @property
    def done(self) -> bool:
        """Whether everything in the file has been sent."""
        return self._sent >= self._journal.size

    def start(self) -> None:
        """Starts the thread; a second call does nothing."""
        if self._thread is None:
            # A daemon: a request that hangs must not keep the process from ending.
            self._thread = threading.Thread(target=self._work, name="dtrain-sender", daemon=True)
            self._thread.start()

    def wake(self) -> None:
        """Tells the thread that there is more to send."""
        with self._changed:
            self._changed.notify_all()

    def stop(self) -> None:
        """Tells the thread to end, whatever is left; does not wait for it."""
        self._stopping = True
        self.wake()

    def drain(self, seconds: float) -> bool:
        """Waits until all is sent, as long as it gets on, then stops the thread. False if something is left."""
        self.start()
        with self._changed:
            self._draining = True
            self._progress = started = time.monotonic()
            self._changed.notify_all()
            while not self.done:
                patience = UPLOAD_SECONDS if self._is_uploading() and not self.failures else seconds
                left = min(self._progress + patience, started + UPLOAD_SECONDS) - time.monotonic()
                if left <= 0:
                    break
                self._changed.wait(min(1.0, left))
        self.stop()
        if self.done and self._thread is not None:
            self._thread.join(seconds)
        return self.done

    def _work(self) -> None:
        with self.destination.session():
            while self._wait(lambda: self._stopping or not self.done):
                try:
                    self._send_next()
                except Exception as error:
                    self._failed(error)
                else:
                    self._succeeded()

    def _wait(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Waits for a condition; False if the thread is to end."""
        with self._changed:
            self._changed.wait_for(condition, seconds)
            return not self._stopping

    def _send_next(self) -> None:
        """Sends one event, or a batch of points."""
        if not self._todo:
            self._gather()
        item, end = self._todo[0]
        if isinstance(item, list):
            self.destination.send_points(item)
        else:
            self.destination.send(item)
        self._advance(end)

    def _gather(self) -> None:
        """Reads on: points, as many as make a batch, then the event that is not a metric if one comes first."""
        points: list[Point] = []
        for event, behind in self._journal.read(self._read):
            points += self._thinner.feed(event)
            before, self._read = self._read, behind
            if event["event"] not in ("steps", "metrics"):
                self._todo += [(points, before)] if points else []
                self._todo.append((event, behind))
                return
            if len(points) >= POINTS_PER_BATCH:
                break
        self._todo.append((points, self._read))

    def _advance(self, end: int) -> None:
        self._todo.popleft()
        self._sent = end
        self._save()

    def _rewind(self, sent: int) -> None:
        """Goes on behind the offset `sent`: reads what is before it, so that open intervals are as they were."""
        self._thinner = Thinner(self._every)
        self._todo: deque[tuple[list[Point] | Event, int]] = deque()
        self._read = 0
        for event, behind in self._journal.read(0, sent):
            self._thinner.feed(event)
            self._read = behind
        self._sent = self._read

    def _is_uploading(self) -> bool:
        item = self._todo[0][0] if self._todo else []
        return isinstance(item, dict) and item["event"] in UPLOADS

    def _succeeded(self) -> None:
        with self._changed:
            if self.failures:
                _logger.warning("%s answers again; what it missed is being sent", self.destination.name)
            self.failures = 0
            self._progress = time.monotonic()
            self._changed.notify_all()

    def _failed(self, error: Exception) -> None:
        name, verdict = self.destination.name, self.destination.verdict(error)
        if verdict == "skip" and self._todo:
            _logger.warning("%s refused a part of the run, which stays in the journal only: %s", name, brief(error))
            self._advance(self._todo[0][1])
            return self._succeeded()
        if verdict == "gone":
            _logger.warning("%s no longer has the run; it is made again from the journal", name)
            self.destination.forget()
            self._rewind(0)
        elif self.failures == 0:
            reason = "the run was deleted; it can be restored" if verdict == "deleted" else brief(error)
            _logger.warning(
                "%s cannot be written (%s); training goes on, %s keeps everything and is sent when it can be",
                name, reason, self._journal.path,
            )  # fmt: skip
        self.failures += 1
        was_draining = self._draining
        self._wait(
            lambda: self._stopping or self._draining != was_draining,
            min(0.25 * 2.0 ** min(self.failures, 10), 1.0 if was_draining else 30.0),
        )

    def _load(self) -> int:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            state = json.loads(self._position.read_text())
            # Another destination knows nothing of this run: all of the journal is sent there.
            if 0 <= int(state["offset"]) <= self._journal.size and self.destination.restore(state):
                return int(state["offset"])
        return 0

    def _save(self) -> None:
        temporary = Path(f"{self._position}.new")
        with contextlib.suppress(OSError):  # Without it more is sent again, which is harmless.
            with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
                json.dump({**self.destination.state(), "offset": self._sent}, file)
            os.replace(temporary, self._position)


def mask(text: str) -> str:
    """Hides user names and passwords in the URLs of a text."""
    return re.sub(r"(?<=://)[^/?#\s'\"]+@", "***@", text)


def brief(error: Exception) -> str:
    """An error in one line, without secrets."""
    lines = str(error).strip().splitlines() or [""]
    return mask(f"{type(error).__name__}: {lines[0]}")[:300]
