"""What the terminal shows."""

import io
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dtrain import progress
from dtrain.errors import ConfigError
from dtrain.progress import ProgressBar, format_metric, format_seconds, format_step_time


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def screen(output: str) -> list[str]:
    """The lines that stay on a terminal: control sequences that erase lines are carried out."""
    lines, column_zero = [""], re.compile(r"\x1b\[\?25[lh]|\x1b\[[\d;]*m")
    for token in re.findall(r"\x1b\[[\d;?]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", column_zero.sub("", output)):
        if token == "\n":
            lines.append("")
        elif token == "\x1b[1A":
            lines.pop()
        elif token == "\x1b[2K":
            lines[-1] = ""
        elif token != "\r":
            lines[-1] += token
    return [line.rstrip() for line in lines if line.strip()]


def run(bar: ProgressBar, clock: Clock, epochs: int = 2) -> None:
    with bar:
        bar.status("starting 2 workers ...")
        for epoch in range(epochs):
            bar.begin_epoch(epoch)
            for step in (1, 50, 100):
                clock.now += 1.0
                bar.update(step, {"loss": 1.0 / step, "accuracy": 0.5}, 1234.5)
            bar.print("[bold]from rank 0[/bold] :smile:\n")
            bar.end_epoch(epoch, {"loss": 0.25, "accuracy": 0.75, "val_loss": 0.0001}, 3.0)


def make(
    verbose: Any, terminal: bool, clock: Clock, width: int = 100, **kwargs: Any
) -> tuple[ProgressBar, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, highlight=False)
    return ProgressBar(verbose, console=console, clock=clock, **{"epochs": 2, "steps_per_epoch": 100, **kwargs}), out


PLAIN = "Epoch {}/2 - 100/100 - 3s 30ms/step - loss: 0.2500 - accuracy: 0.7500 - val_loss: 1.0000e-04"


@pytest.mark.parametrize("verbose", ["auto", 1])
def test_a_pipe_gets_plain_lines(verbose: Any) -> None:
    clock = Clock()
    bar, out = make(verbose, False, clock)
    run(bar, clock)
    said = "[bold]from rank 0[/bold] :smile:"
    assert out.getvalue().splitlines() == ["starting 2 workers ...", said, PLAIN.format(1), said, PLAIN.format(2)]
    assert "\x1b" not in out.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_verbose_2_is_one_line_an_epoch(terminal: bool) -> None:
    clock = Clock()
    bar, out = make(2, terminal, clock)
    run(bar, clock)
    assert [line for line in out.getvalue().splitlines() if "rank 0" not in line] == [PLAIN.format(1), PLAIN.format(2)]


@pytest.mark.parametrize("terminal", [True, False])
def test_verbose_0_shows_only_what_the_user_prints(terminal: bool) -> None:
    clock = Clock()
    bar, out = make(0, terminal, clock)
    run(bar, clock)
    assert out.getvalue() == "[bold]from rank 0[/bold] :smile:\n" * 2


@pytest.mark.parametrize("verbose", ["auto", 1])
def test_a_terminal_keeps_a_line_for_every_epoch(verbose: Any) -> None:
    clock = Clock()
    bar, out = make(verbose, True, clock)
    run(bar, clock)
    kept = screen(out.getvalue())
    bars = "━" * 20
    line = "Epoch {}/2  100/100 {} 3s 30ms/step - loss: 0.2500 - accuracy: 0.7500 - val_loss: 1.0000e-04"
    text = re.sub(r" +", " ", " ".join(kept))
    for epoch in (1, 2):
        assert re.sub(r" +", " ", line.format(epoch, bars)) in text
    assert text.count("from rank 0") == 2
    assert "starting" not in text


def test_the_live_line_shows_step_metrics_speed_and_workers() -> None:
    clock = Clock()
    bar, _ = make(1, True, clock, width=200, workers=2)
    bar.begin_epoch(1)
    clock.now = 10.0
    bar.update(25, {"loss": 0.5}, 12345.6)
    shown = str(bar._render())
    bar.close()
    assert (
        shown == "Epoch 2/2   25/100 " + "━" * 20 + " 10s<30s 400ms/step - loss: 0.5000 - 12,346 samples/s - 2 workers"
    )


def test_a_resumed_epoch_counts_only_its_own_steps_for_the_time() -> None:
    clock = Clock()
    bar, _ = make(1, True, clock)
    bar.begin_epoch(0, step=50)
    clock.now = 10.0
    bar.update(60)
    assert "10s<40s 1s/step" in str(bar._render())
    bar.close()


def test_a_status_takes_the_place_of_the_bar_until_the_next_step() -> None:
    clock = Clock()
    bar, _ = make(1, True, clock)
    bar.begin_epoch(0)
    bar.status("replacing rank 1")
    assert bar._render() is bar._spinner
    bar.update(1)
    assert "1/100" in str(bar._render())
    bar.close()


def test_a_long_epoch_gets_a_plain_line_now_and_then() -> None:
    clock = Clock()
    bar, out = make("auto", False, clock)
    bar.begin_epoch(0)
    for step in range(1, 31):
        clock.now += 1.0
        bar.update(step, {"loss": 0.5}, 100.0)
    bar.close()
    assert out.getvalue().splitlines() == [
        f"Epoch 1/2 -  {step}/100 - {step}s<{format_seconds(100 - step)} 1s/step - loss: 0.5000 - 100 samples/s"
        " - 1 worker"
        for step in (10, 20, 30)
    ]


@pytest.mark.parametrize("task", ["evaluate", "predict"])
def test_evaluate_and_predict_have_no_epochs(task: Any) -> None:
    clock = Clock()
    bar, out = make(2, False, clock, task=task, epochs=1)
    with bar:
        bar.begin_epoch(0)
        bar.end_epoch(0, {"loss": 0.5} if task == "evaluate" else None, 1.0)
    assert out.getvalue() == "100/100 - 1s 10ms/step" + (" - loss: 0.5000\n" if task == "evaluate" else "\n")


def test_unknown_length_is_said_to_be_unknown() -> None:
    clock = Clock()
    bar, out = make("auto", False, clock, steps_per_epoch=None)
    bar.begin_epoch(0)
    bar.update(7, {"loss": float("nan")})
    bar.end_epoch(0, {"loss": float("nan")}, 1.0)
    assert out.getvalue() == "Epoch 1/2 - 7/Unknown - 1s 143ms/step - loss: nan\n"


def test_an_error_keeps_the_line_of_the_epoch_and_frees_the_terminal() -> None:
    clock = Clock()
    bar, out = make(1, True, clock)
    with pytest.raises(RuntimeError), bar:
        bar.begin_epoch(0)
        bar.update(50, {"loss": 0.5})
        raise RuntimeError
    assert "50/100" in screen(out.getvalue())[-1]
    assert out.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[?25h" in out.getvalue()  # The cursor is back.
    bar.close()


@pytest.mark.parametrize("terminal", [True, False])
@pytest.mark.parametrize("width", [1, 5, 20])
def test_a_narrow_terminal_is_no_error(width: int, terminal: bool) -> None:
    clock = Clock()
    bar, out = make("auto", terminal, clock, width=width)
    run(bar, clock)
    assert out.getvalue()


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize("terminal", [True, False])
def test_an_odd_encoding_is_no_error(encoding: str, terminal: bool) -> None:
    raw = io.BytesIO()
    console = Console(file=io.TextIOWrapper(raw, encoding), force_terminal=terminal, width=100)
    bar = ProgressBar(1, 1, 10, console=console)
    with bar:
        bar.status("starting … 2 workers")
        bar.begin_epoch(0)
        bar.update(5, {"Verlust ä": 0.5})
        bar.print("naïve ☃ \ud800")
        bar.end_epoch(0, {"Verlust ä": 0.5})
    console.file.flush()
    text = raw.getvalue().decode(encoding)
    assert "Verlust" in text and "na" in text


def test_a_closed_output_is_no_error() -> None:
    for terminal in (True, False):
        clock = Clock()
        bar, out = make(1, terminal, clock)
        bar.begin_epoch(0)
        out.close()
        run(bar, clock)


def test_a_closed_pipe_does_not_end_the_process() -> None:
    code = """
import sys
from dtrain.progress import ProgressBar
with ProgressBar("auto", 300, 10) as bar:
    for epoch in range(300):
        bar.begin_epoch(epoch)
        bar.end_epoch(epoch, {"loss": 0.5})
sys.stderr.write("trained")
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        cwd=Path(progress.__file__).parents[1],
    )  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert b"trained" in process.stderr.read()
    process.wait(60)


def test_standard_output_under_capture(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    run(ProgressBar("auto", 2, 100, clock=clock), clock)
    assert PLAIN.format(2) in capsys.readouterr().out


def test_an_unknown_verbose_is_an_error() -> None:
    with pytest.raises(ConfigError, match="verbose=3"):
        ProgressBar(3)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5000"),
        (0.001, "1.0000e-03"),
        (0.0, "0.0000e+00"),
        (-2.0, "-2.0000"),
        (float("nan"), "nan"),
        (1e9, "1000000000.0000"),
    ],
)
def test_metrics_look_as_in_keras(value: float, text: str) -> None:
    assert format_metric(value) == text


def test_times_look_as_in_keras() -> None:
    assert [format_seconds(s) for s in (0.2, 7, 60, 65, 3600, 7201)] == ["0s", "7s", "60s", "1:05", "60:00", "2:00:01"]
    assert [format_step_time(s) for s in (0, 2, 0.0123, 0.0008)] == ["0s/step", "2s/step", "12ms/step", "800us/step"]
