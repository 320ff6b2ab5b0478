"""Claims about processes that wait to take a dead one's place."""

import os
import signal
import sys
import time
from typing import Any

import pytest
import ray

import dtrain
from dtrain.interrupts import Interrupts
from dtrain.spares import Spares
from dtrain.types import Failure

ray.cloudpickle.register_pickle_by_value(
    sys.modules[__name__]
)  # its processes do not have the tests' folder on their path


class Waits:
    """In place of a Worker."""

    def __init__(self, number: int) -> None:
        self._number = number

    def setup(self, settings: Any) -> Failure | None:
        time.sleep(settings.get(self._number, 0))
        return Failure("no TensorFlow here", "") if self._number == settings.get("fails") else None

    def where(self) -> int:
        return os.getpid()


@pytest.fixture
def spares(local_ray: None) -> Any:
    actor_class = ray.remote(num_cpus=0)(Waits)
    made = Spares(lambda number, room: actor_class.remote(number), Interrupts())
    yield made
    made.close()


def test_who_is_dead_or_could_not_get_ready_is_passed_over(spares: Any) -> None:
    spares.start([3, 4, 5], {"fails": 0})
    os.kill(ray.get(spares._waiting[1].actor.where.remote()), signal.SIGKILL)
    spare, pid = spares.take()
    assert spare.room == 5 and pid == ray.get(spare.actor.where.remote())
    assert spares.take() is None and not spares.rooms


def test_who_is_ready_comes_first(spares: Any) -> None:
    spares.start([0, 1], {0: 3})
    ray.wait([spares._waiting[1].ready])
    assert [spares.take()[0].room for _ in range(2)] == [1, 0]


def test_spares_of_one_worker_are_refused() -> None:
    with pytest.raises(dtrain.errors.ConfigError, match=r"spares=1 needs num_workers=2 or more"):
        dtrain.Trainer(lambda: None, spares=1)
