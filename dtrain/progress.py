"""Owns what the terminal shows while a job runs, and with it rich: one bar for the whole job, in Keras's spirit.

On a terminal one live line, with a line kept for every epoch; in a pipe or a log file plain lines without control
characters. Showing never fails a training: when the terminal goes away, the bar goes silent.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from dtrain.errors import ConfigError

BAR_WIDTH = 20
SECONDS_BETWEEN_LINES = 10.0
"""A long epoch gets a plain line this often, so that a log shows that the job lives."""


class ProgressBar:
    """Shows how far a job is.

    Args:
        verbose: as in Keras. 0: nothing. 1: a bar. 2: a line an epoch. "auto": 1. Where there is no terminal, 1 is
            a line an epoch and one every ten seconds.
        epochs: epochs of the job.
        steps_per_epoch: None: unknown.
        workers: shown beside the bar.
        console: where to; None: standard output.
        task: "fit" counts epochs, "evaluate" and "predict" have one pass.
        clock: seconds, for tests.
    """

    _logs: dict[str, float]
    _samples_per_second: float | None
    _seconds: float | None  # That the epoch took, once it is known.
    _message: str | None

    def __init__(
        self,
        verbose: int | str = "auto",
        epochs: int = 1,
        steps_per_epoch: int | None = None,
        workers: int = 1,
        console: Console | None = None,
        task: Literal["fit", "evaluate", "predict"] = "fit",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if verbose not in (0, 1, 2, "auto"):
            raise ConfigError(f"verbose={verbose!r} must be 0 (silent), 1 (bar), 2 (a line an epoch) or 'auto'")
        self.workers = workers
        self._epochs, self._steps, self._task, self._clock = epochs, steps_per_epoch, task, clock
        self._console = console or Console(highlight=False)
        self._ascii = self._console.options.ascii_only
        live = verbose in (1, "auto") and self._console.is_terminal and not self._console.is_dumb_terminal
        self._silent = verbose == 0
        self._chatty = verbose != 2 and not live  # Plain lines in the middle of an epoch, and for what is going on.
        self._spinner = Spinner("line" if self._ascii else "dots")
        self._in_epoch = False
        self._begin(0, 0)
        self._live = Live(get_renderable=self._render, console=self._console, transient=True) if live else None

    def status(self, message: str) -> None:
        """Shows what is going on until the next step: a spinner in place of the bar, or a plain line."""
        if self._chatty and message != self._message:
            self._line(message)
        self._message = message
        self._refresh()

    def expect(self, steps_per_epoch: int | None) -> None:
        """Says how many steps an epoch has, once the data are open; None: unknown."""
        self._steps = steps_per_epoch

    def begin_epoch(self, epoch: int, step: int = 0) -> None:
        """Starts the bar of an epoch, counted from 0; `step` is where a resumed epoch goes on."""
        self._begin(epoch, step)
        self._in_epoch = True
        self._refresh()

    def update(
        self, step: int, logs: Mapping[str, float] | None = None, samples_per_second: float | None = None
    ) -> None:
        """Shows that `step` steps of the epoch are done, and the metrics so far."""
        self._step, self._message = step, None
        if logs:
            self._logs = dict(logs)
        self._samples_per_second = samples_per_second
        if self._chatty and self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(self._plain(done=False))
        self._refresh()

    def end_epoch(self, epoch: int, logs: Mapping[str, float] | None = None, seconds: float | None = None) -> None:
        """Keeps a line of the finished epoch, with its metrics, those of the validation included."""
        self._epoch, self._message = epoch, None
        self._step = self._steps or self._step
        self._logs = dict(logs or {})
        self._seconds = self._elapsed() if seconds is None else seconds
        self._in_epoch = False
        self._keep_line(done=True)
        self._refresh()

    def note(self, text: str) -> None:
        """Keeps a line of the job's own above the bar."""
        if not self._silent:
            self._line(text)

    def print(self, text: str) -> None:
        """Prints what the user's code printed, as it is, above the bar; silence does not extend to that."""
        if not self._silent:
            self._line(text.removesuffix("\n"))
        else:
            with self._shown():
                self._console.print(Text(self._encodable(text.removesuffix("\n"))), soft_wrap=True)

    def close(self) -> None:
        """Takes the bar away; the line of an epoch that did not end is kept."""
        if self._in_epoch and self._live is not None and self._live.is_started:
            self._in_epoch = False
            self._keep_line(done=False)
        self._message = None
        with self._shown():
            if self._live is not None:
                self._live.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _begin(self, epoch: int, step: int) -> None:
        self._epoch, self._step, self._first_step = epoch, step, step
        self._logs = {}
        self._samples_per_second = self._seconds = None
        self._began = self._last_line = self._clock()
        self._message = None

    # What is shown

    def _render(self) -> RenderableType:
        """The live line: called by rich several times a second, from a thread of its own."""
        if self._message is not None:
            self._spinner.update(text=Text(self._encodable(self._message), no_wrap=True, overflow="crop"))
            return self._spinner
        if not self._in_epoch:
            return Text("")
        line = self._with_bar(done=False)
        line.no_wrap, line.overflow = True, "crop"
        return line

    def _with_bar(self, done: bool) -> Text:
        name, count, *rest = self._parts(done)
        line = Text(f"{name}  " if name else "")
        line.append(count, "bold")
        if self._steps:
            full = min(BAR_WIDTH, BAR_WIDTH * self._step // self._steps)
            line.append(" " + ("=" if self._ascii else "━") * full, "green")
            line.append(("." if self._ascii else "━") * (BAR_WIDTH - full), "bright_black")
        line.append(" " + " - ".join(rest))
        return line

    def _plain(self, done: bool) -> str:
        return " - ".join(filter(None, self._parts(done)))

    def _parts(self, done: bool) -> list[str]:
        """The pieces of a line: epoch, steps, times, metrics, speed."""
        name = f"Epoch {self._epoch + 1}/{self._epochs}" if self._task == "fit" else ""
        width = len(str(self._steps or ""))
        parts = [name, f"{self._step:{width}d}/{self._steps or 'Unknown'}", self._times(done)]
        parts += [f"{key}: {format_metric(value)}" for key, value in self._logs.items()]
        if not done and self._samples_per_second:
            parts.append(f"{self._samples_per_second:,.0f} samples/s")
            parts.append(f"{self.workers} worker{'s' if self.workers != 1 else ''}")
        return [self._encodable(part) for part in parts]

    def _times(self, done: bool) -> str:
        """Time taken, time to go, and time a step."""
        elapsed, steps = self._elapsed(), self._step - self._first_step
        text = format_seconds(elapsed)
        if steps <= 0:
            return text
        if not done and self._steps:
            text += f"<{format_seconds(elapsed / steps * max(0, self._steps - self._step))}"
        return f"{text} {format_step_time(elapsed / steps)}"

    def _elapsed(self) -> float:
        return self._clock() - self._began if self._seconds is None else self._seconds

    # How it gets to the terminal

    def _keep_line(self, done: bool) -> None:
        if self._live is not None:
            self._line(self._with_bar(done))
        else:
            self._line(self._plain(done))

    def _line(self, text: str | Text) -> None:
        self._last_line = self._clock()
        if self._silent:
            return
        with self._shown():
            if self._live is not None and self._live.is_started:
                self._live.refresh()  # Or rich draws the line of before below this one.
            # soft_wrap: rich neither breaks nor crops the line; that is left to the terminal.
            self._console.print(Text(self._encodable(text)) if isinstance(text, str) else text, soft_wrap=True)

    def _refresh(self) -> None:
        """rich draws by itself; the bar only has to be there. It comes with the first thing to show."""
        if self._live is not None and not self._live.is_started and not self._silent:
            with self._shown():
                self._live.start()

    @contextlib.contextmanager
    def _shown(self) -> Iterator[None]:
        """A terminal that has gone away (closed file, broken pipe) is no reason to stop a training."""
        try:
            yield
        except (OSError, ValueError, SystemExit):  # rich ends the process on a broken pipe.
            live, self._live = self._live, None
            self._silent, self._chatty = True, False
            if live is not None:
                with contextlib.suppress(OSError, ValueError, SystemExit):
                    live.stop()

    def _encodable(self, text: str) -> str:
        encoding = self._console.encoding
        with contextlib.suppress(LookupError):
            return text.encode(encoding, "replace").decode(encoding)
        return text


def format_metric(value: float) -> str:
    """A metric as Keras's bar writes it: four digits after the point, or scientific when it is small."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return str(value)
    return f"{number:.4f}" if abs(number) > 1e-3 or not math.isfinite(number) else f"{number:.4e}"


def format_seconds(seconds: float) -> str:
    """A time as Keras's bar writes it: 7s, 1:05, 2:00:01."""
    whole = max(0, round(seconds))
    if whole > 3600:
        return f"{whole // 3600}:{whole % 3600 // 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}" if whole > 60 else f"{whole}s"


def format_step_time(seconds: float) -> str:
    """The time of a step: 2s/step, 12ms/step, 800us/step."""
    if seconds >= 1 or seconds == 0:
        return f"{seconds:.0f}s/step"
    return f"{seconds * 1e3:.0f}ms/step" if seconds >= 1e-3 else f"{seconds * 1e6:.0f}us/step"
