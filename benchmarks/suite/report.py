"""Owns what comes out: the table, the JSON beside it and the picture."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.suite.measure import Spread

MET, MISSED, TEXT, GRID = "#1f5fa8", "#d9730d", "#444444", "#e4e4e4"
COLUMNS = ("work", "dtrain", "peer", "ratio", "quartiles", "bar", "met", "noise", "others")


@dataclass(frozen=True)
class Line:
    """One ratio of a row.

    Attributes:
        row: the row's name and title.
        unit: what the seconds are for.
        ours: seconds of dtrain.
        peer: who it is compared with, and the seconds of it.
        ratio: the median of the rounds, with its quartiles.
        noise: dtrain against itself.
        others: what share of the cores other processes used, when a round began.
    """

    row: str
    title: str
    what: str
    unit: str
    ours: Spread
    peer: str
    peer_seconds: Spread
    ratio: Spread
    bar: float
    at_most: bool
    met: bool
    noise: Spread
    others: Spread


def cells(line: Line) -> tuple[str, ...]:
    """A line's texts, in the order of COLUMNS."""
    in_words = f"{{:.3g}} {line.unit}".format if line.unit in ("epochs", "GiB") else _time
    return (
        f"{line.title}: {line.what}",
        in_words(line.ours.median),
        f"{line.peer} {in_words(line.peer_seconds.median)}",
        f"{line.ratio.median:.2f}",
        f"{line.ratio.low:.2f} to {line.ratio.high:.2f}",
        f"{'≤' if line.at_most else '≥'} {line.bar:g}",
        "yes" if line.met else "no",
        f"{line.noise.low:.2f} to {line.noise.high:.2f}",
        f"{line.others.median:.0%}",
    )


def show(lines: Sequence[Line], wrong: Mapping[str, str]) -> None:
    """The table, on the terminal."""
    from rich.console import Console
    from rich.table import Table

    table = Table(*COLUMNS, box=None, pad_edge=False)
    for line in lines:
        table.add_row(*cells(line), style=None if line.met else "yellow")
    console = Console(width=None if Console().is_terminal else 200)
    console.print(table)
    for row, why in wrong.items():
        console.print(f"{row}: no result: {why}", style="red")


def markdown(lines: Sequence[Line]) -> str:
    """The table, for docs/performance.md."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *(cells(line) for line in lines)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def as_json(lines: Sequence[Line]) -> list[dict[str, Any]]:
    return [asdict(line) for line in lines]


def draw(lines: Sequence[Line], path: Path) -> None:
    """Each ratio as its margin over the bar: to the right of 1 the bar is met."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 0.32 * len(lines) + 1.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(reversed(lines)):
        margins = [_margin(line, value) for value in (line.ratio.median, line.ratio.low, line.ratio.high)]
        ends = [[max(0.0, margins[0] - min(margins))], [max(0.0, max(margins) - margins[0])]]
        axes.barh(place, margins[0], color=MET if line.met else MISSED, height=0.55)
        axes.errorbar(margins[0], place, xerr=ends, color=TEXT, linewidth=1.0, capsize=2)
        sign = "≤" if line.at_most else "≥"
        label = f"{line.ratio.median:.3g} ({sign} {line.bar:g})"
        axes.text(max(margins) + 0.06, place, label, va="center", color=TEXT, fontsize=8)
    axes.set_ylim(-0.6, len(lines) - 0.4)
    axes.axvline(1.0, color=TEXT, linewidth=1.0)
    axes.set_yticks(range(len(lines)), [f"{line.row}: {line.what}" for line in reversed(lines)], fontsize=8)
    axes.set_xlabel("how many times better than the bar asks", fontsize=9, color=TEXT)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=TEXT, length=0)
    figure.savefig(path)


def _margin(line: Line, value: float) -> float:
    return line.bar / value if line.at_most else value / line.bar


def _time(seconds: float) -> str:
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if seconds * factor >= 1 or unit == "µs":
            return f"{seconds * factor:.3g} {unit}"
    raise AssertionError
