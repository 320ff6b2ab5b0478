"""Owns how blocks are put in turn and what ratios are made of them.

Of a contender's two blocks in a round the faster one counts: what disturbs a block only ever makes it longer.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

Rounds = Mapping[str, Sequence[tuple[float, float]]]
"""Of each contender, the two blocks that it did in each round."""


@dataclass(frozen=True)
class Spread:
    """A median, and the quartiles around it."""

    median: float
    low: float
    high: float


def in_turn(
    blocks: Mapping[str, Callable[[], float]], rounds: int, before: Callable[[], None]
) -> dict[str, list[tuple[float, float]]]:
    """So many rounds of A B C C B A, after one of A B C that is thrown away; each round begins with another one."""
    names = [*blocks]
    for name in names:
        blocks[name]()
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        before()
        order = names[shift:] + names[:shift]
        there = {name: blocks[name]() for name in order}
        back = {name: blocks[name]() for name in reversed(order)}
        for name in names:
            found[name].append((there[name], back[name]))
    return found


def spread(values: Sequence[float]) -> Spread:
    low, median, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return Spread(median, low, high)


def ratio(rounds: Rounds, above: str, below: str) -> Spread:
    """Of what two contenders took, round by round."""
    return spread([min(one) / min(other) for one, other in zip(rounds[above], rounds[below], strict=True)])


def ratio_of_all(rounds: Rounds, above: str, below: str) -> Spread:
    """Of what two contenders took in all blocks together: where each block is another piece of luck."""
    sums = [sum(sum(pair) for pair in rounds[name]) for name in (above, below)]
    return spread([sums[0] / sums[1]])


def ratio_to_sum(rounds: Rounds, above: str, below: Sequence[str], more: float) -> Spread:
    """Of what one took to what others took together, and `more` seconds."""
    sums = [more + sum(min(rounds[name][i]) for name in below) for i in range(len(rounds[above]))]
    return spread([min(one) / total for one, total in zip(rounds[above], sums, strict=True)])


def ratio_to_slower(rounds: Rounds, above: Sequence[str], below: str) -> Spread:
    """Of what the slower of some contenders took to what one took, round by round."""
    slowest = [max(min(rounds[name][i]) for name in above) for i in range(len(rounds[below]))]
    return spread([slow / min(one) for slow, one in zip(slowest, rounds[below], strict=True)])


def noise(rounds: Rounds, name: str) -> Spread:
    """The same against itself: its first block of a round to its second."""
    return spread([first / second for first, second in rounds[name]])


def seconds(rounds: Rounds, name: str) -> Spread:
    return spread([min(pair) for pair in rounds[name]])
