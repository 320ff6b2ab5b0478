"""Owns the room in the cluster that a group of workers has reserved, or has asked for."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from dtrain.cluster import who_is_using
from dtrain.interrupts import Interrupts

EXTRA_SECONDS = 5.0
"""How long a start waits for the room of workers that it can do without."""


@dataclass(frozen=True)
class Room:
    """A process's place in the cluster, reserved or asked for.

    Attributes:
        placement: the placement group.
        bundle: which of its bundles.
    """

    placement: PlacementGroup
    bundle: int


class Rooms:
    """All of a group's.

    Args:
        run_name: names the placement groups: `dtrain:<run>`, and `dtrain:<run>:extra<k>` for each room more.
        resources: Ray's resources of each room.
        strategy: Ray's placement strategy.
        interrupts: ends a wait.
    """

    def __init__(self, run_name: str, resources: Mapping[str, float], strategy: str, interrupts: Interrupts) -> None:
        self.rooms: list[Room] = []
        self._run_name = run_name
        self._resources = resources
        self._strategy = strategy
        self._interrupts = interrupts
        self._placements: list[PlacementGroup] = []

    def reserve(self, num_workers: int, spares: int, extra: int, status: Callable[[str], None]) -> list[Room]:
        """Ask for the rooms of so many workers, spares, and workers more; wait for all but the last.

        Returns:
            The rooms of the workers to begin with, those more that are there within moments among them.
        """
        name = f"dtrain:{self._run_name}"
        first = self._ask(num_workers + spares, name)
        started = time.monotonic()
        while not first.wait(timeout_seconds=2):
            self._interrupts.check()
            waited = time.monotonic() - started
            status(f"waiting {waited:.0f} s for {num_workers} workers' room, held by {who_is_using()}")
        # Not before: Ray gives small rooms first, and these would take what the group waits for.
        others = [self._ask(1, f"{name}:extra{number}") for number in range(extra)]
        self.rooms = [Room(first, bundle) for bundle in range(num_workers + spares)]
        self.rooms += [Room(other, 0) for other in others]
        deadline = time.monotonic() + EXTRA_SECONDS
        there = [Room(other, 0) for other in others if other.wait(max(0.0, deadline - time.monotonic()))]
        return [*self.rooms[:num_workers], *there]

    def _ask(self, number: int, name: str) -> PlacementGroup:
        with self._interrupts.graceful():  # one that is made and not known would keep its room
            self._placements.append(placement_group([dict(self._resources)] * number, self._strategy, name=name))
        return self._placements[-1]

    def give_back(self) -> None:
        """What is reserved, and what was asked for."""
        placements, self._placements = self._placements, []
        self.rooms = []
        for placement in placements:
            remove_placement_group(placement)
