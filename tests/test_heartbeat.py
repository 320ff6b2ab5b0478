"""Claims about who is said to hang, by the table."""

import pytest

from dtrain.heartbeat import BLINK_SECONDS, EXCUSED_SECONDS, Heard, Heartbeat, who_hangs
from dtrain.types import BETWEEN_SEGMENTS, IN_STEP, Beat

TIMEOUT = 60.0


def step(beats: int, is_new: bool = False) -> Beat:
    return Beat(beats, IN_STEP, True, is_new)


RESTS = Beat(9, BETWEEN_SEGMENTS, True, False)


def busy(doing: str, beats: int = 9) -> Beat:
    return Beat(beats, doing, False, False)


@pytest.mark.parametrize(
    ("heard", "expected"),
    [
        ([], {}),
        ([Heard(None, 0, 0), Heard(None, 0, 0)], {0: "not answered for 100 s", 1: "not answered for 100 s"}),
        ([Heard(step(9), 99, 50), Heard(step(9), 99, 50)], {}),
        ([Heard(step(9), 99, 0), Heard(step(9), 99, 41)], {}),  # one gets on
        ([Heard(step(9), 99, 0), Heard(busy("reading data"), 99, 0)], {1: "in reading data"}),
        ([Heard(busy("callbacks"), 99, 10), Heard(step(9), 99, 0)], {0: "for 90 s; it was in callbacks"}),
        ([Heard(step(9), 99, 0), Heard(step(8), 99, 0)], {1: "in a step"}),
        ([Heard(step(9), 99, 0), Heard(step(8, is_new=True), 99, 0)], {}),  # it may be tracing
        ([Heard(RESTS, 99, 0), Heard(busy("callbacks"), 99, 0)], {1: "callbacks"}),
        ([Heard(RESTS, 99, 0), Heard(RESTS, 99, 0)], {}),  # a checkpoint is being written, say
        ([Heard(RESTS, 99, 0), Heard(busy("the beginning", 0), 99, 0)], {}),  # that is to join
        ([Heard(step(9), 99, 99), Heard(step(9), 30, 30)], {1: "not answered for 70 s"}),
        ([Heard(step(9), 99, 99), Heard(None, 30, 30)], {1: "not answered for 70 s"}),
    ],
)
def test_who_is_to_blame(heard: list[Heard], expected: dict[int, str]) -> None:
    found = who_hangs(dict(enumerate(heard)), 100.0, TIMEOUT)
    assert found.keys() == expected.keys()
    assert all(words in found[rank] for rank, words in expected.items())


def test_those_who_wait_for_one_that_died_are_not_to_blame() -> None:
    waits = {0: Heard(step(9), 99, 0), 2: Heard(step(9), 99, 0)}
    assert who_hangs(waits, 100.0, TIMEOUT, one_died=True) == {}
    assert who_hangs({**waits, 2: Heard(busy("callbacks"), 99, 0)}, 100.0, TIMEOUT, one_died=True).keys() == {2}
    answers = iter([[(0, step(9)), (1, step(9))], [(0, step(9)), (1, None)]])
    clock = Talk()
    heartbeat = Heartbeat(lambda: next(answers, [(0, step(9))]), 5.0, clock.clock)
    heartbeat.begin([0, 1])
    while not heartbeat.look():
        clock.now += 1
    assert clock.now == pytest.approx(5 + EXCUSED_SECONDS, abs=3)  # Horovod should have given up long ago


def test_a_rank_that_answers_again_has_not_died() -> None:
    answers = iter([[(0, step(9)), (1, None)]])
    clock = Talk()
    heartbeat = Heartbeat(lambda: next(answers, [(0, step(9)), (1, step(9))]), 5.0, clock.clock)
    heartbeat.begin([0, 1])
    while not heartbeat.look():
        clock.now += 1
    assert clock.now <= 9


class Talk:
    """Two ranks of which the second says the same for ever, and a clock."""

    def __init__(self) -> None:
        self.now, self.beats = 0.0, 1

    def clock(self) -> float:
        return self.now

    def ask(self) -> list[tuple[int, Beat]]:
        return [(0, step(self.beats)), (1, busy("callbacks"))]


def seconds_until_found(heartbeat: Heartbeat, talk: Talk, pause: float) -> float:
    while not heartbeat.look():
        talk.now += pause
        assert talk.now < 10_000
    return talk.now


def test_a_rank_is_found_after_the_timeout_and_a_slow_step_or_driver_makes_it_longer() -> None:
    talk = Talk()
    heartbeat = Heartbeat(talk.ask, 5.0, talk.clock)
    heartbeat.begin([0, 1])
    assert 5 < seconds_until_found(heartbeat, talk, 1.0) <= 7
    talk = Talk()
    heartbeat = Heartbeat(talk.ask, 5.0, talk.clock)
    heartbeat.begin([0, 1])
    heartbeat.took(9.0)  # a newcomer may have built its graph in it
    heartbeat.took(3.0)
    assert 30 < seconds_until_found(heartbeat, talk, 1.0) <= 32
    talk = Talk()
    heartbeat = Heartbeat(talk.ask, 5.0, talk.clock)
    heartbeat.begin([0, 1])
    for _ in range(9):  # whoever does not look cannot know
        talk.now += 2 * BLINK_SECONDS
        assert heartbeat.look() == {}
    assert Heartbeat(talk.ask, float("inf"), talk.clock).look() == {}
