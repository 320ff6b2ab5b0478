"""What the comparisons share: each plain run is made once, in whichever process is free, and each Replica's once."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranks import Ranks

from exactness import table
from exactness.cases import Run, Size, runs_of, sizes_of

ROWS = pytest.StashKey[list[table.Row]]()
NO_CHANNELS_FIRST = "Conv2DCustomBackpropFilterOp only supports NHWC"
"""What TensorFlow says on CPUs where it leaves oneDNN off by itself: those without AVX-512 VNNI or the like."""


class Lab:
    """Makes runs when first asked for them, and keeps them.

    Args:
        ranks: the processes.
        wanted: what will be asked for of what can run in one process ("plain" or "one rank", feature and dtype): all of
            it is made at once, as many at a time as there are processes.
    """

    def __init__(self, ranks: Ranks, wanted: list[tuple[str, str, str]]) -> None:
        self.ranks = ranks
        self._wanted = wanted
        self._alone: dict[tuple[str, str, str], Any] = {}
        self._together: dict[tuple[int, str, str], list[Any]] = {}
        self._others: dict[Any, Any] = {}

    def plain(self, feature: str, dtype: str) -> Any:
        """For each size a `Reference`."""
        return self._made_alone("plain", feature, dtype)

    def distributed(self, world_size: int, feature: str, dtype: str) -> list[Any]:
        """For each rank, by `Run`, an `Outcome`."""
        if world_size == 1:
            return [self._made_alone("one rank", feature, dtype)]
        key = (world_size, feature, dtype)
        if key not in self._together:
            self._together[key] = self.run(world_size, feature, dtype, runs_of(feature, world_size))
        return self._together[key]

    def run(self, world_size: int, feature: str, dtype: str, runs: Sequence[Run]) -> list[Any]:
        """The same for runs of one's own, which are not kept."""
        return self.ranks.run(world_size, _distributed, feature, dtype, runs)

    def plain_at(self, feature: str, dtype: str, sizes: Sequence[Size], shuffle: bool = False) -> Any:
        """For sizes of one's own a `Reference`; with `shuffle`, in the order that dtrain's sampler gives."""
        key = (feature, dtype, *sizes, shuffle)
        if key not in self._others:
            (self._others[key],) = self.ranks.map(_plain_at, [(feature, dtype, sizes, shuffle)])
        return self._others[key]

    def _made_alone(self, kind: str, feature: str, dtype: str) -> Any:
        if (kind, feature, dtype) not in self._alone:
            missing = [run for run in dict.fromkeys([*self._wanted, (kind, feature, dtype)]) if run not in self._alone]
            self._alone.update(zip(missing, self.ranks.map(_alone, missing), strict=True))
        made = self._alone[kind, feature, dtype]
        if isinstance(made, str):
            if kind == "plain" and NO_CHANNELS_FIRST in made:
                pytest.skip(
                    "plain Keras cannot train channels first on this CPU with oneDNN off: TF_ENABLE_ONEDNN_OPTS=1"
                )
            raise AssertionError(made)
        return made


@pytest.fixture(scope="module")
def lab(ranks: Ranks, request: pytest.FixtureRequest) -> Lab:
    items = [item for item in request.session.items if item.path == request.path]
    calls = [item.callspec.params for item in items if hasattr(item, "callspec")]
    wanted: list[tuple[str, str, str]] = []
    for call in calls:
        if {"feature", "dtype"} <= set(call):
            wanted.append(("plain", call["feature"], call["dtype"]))
            if "world_size" not in call:
                wanted.append(("one rank", call["feature"], call["dtype"]))
    return Lab(ranks, list(dict.fromkeys(wanted)))


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> list[table.Row]:
    """The table's; a test adds what it measured."""
    return request.config.stash.setdefault(ROWS, [])


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("exactness")
    group.addoption("--exactness-table", metavar="FILE", help="write the table of differences in short, as Markdown")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    rows = config.stash.get(ROWS, [])
    if not rows:
        return
    terminalreporter.section("largest differences from plain Keras")
    terminalreporter.write_line(table.full(rows))
    if not config.getoption("--full"):
        terminalreporter.write_line("left out: most features but at one N, and in float32; --full compares them, too")
    path = config.getoption("--exactness-table", default=None)
    if path:
        Path(path).write_text(table.short(rows))
        terminalreporter.write_line(f"in short: {path}")


def _distributed(collective: Any, feature: str, dtype: str, runs: Any) -> Any:
    from exactness.runs import distributed

    return distributed(collective, feature, dtype, runs)


def _plain_at(task: tuple[str, str, Sequence[Size], bool]) -> Any:
    from exactness.runs import plain

    return plain(*task)


def _alone(task: tuple[str, str, str]) -> Any:
    """What one process made, or a traceback: one feature's failure is not another's."""
    import traceback

    from exactness.runs import one_rank, plain

    kind, feature, dtype = task
    make = partial(plain, sizes=sizes_of(feature)) if kind == "plain" else partial(one_rank, runs=runs_of(feature, 1))
    try:
        return make(feature, dtype)
    except Exception:
        return traceback.format_exc()
