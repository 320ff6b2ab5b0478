"""Owns noticing that a fit no longer gets on, and which rank keeps the others waiting.

A heartbeat is something finished: a call of steps, a chunk read, a hook, a mini-batch evaluated. That a process runs is
none, nor that it answers. Whose heart stops is decided by a pure function of what was heard.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dtrain.types import BETWEEN_SEGMENTS, Beat

BLINK_SECONDS = 5.0
"""Who has not looked for so long knows nothing, and begins anew."""
EXCUSED_SECONDS = 20.0
"""Who waits for one that died is to blame so long after the timeout: Horovod gives up before."""
PATIENT_STEPS = 10.0
"""A step may take so many times as long as the newest ones did, however short the timeout."""


@dataclass(frozen=True)
class Heard:
    """What is known of a rank.

    Attributes:
        beat: what it said last; None: it has never answered.
        answered: when, in seconds.
        changed: when its number of beats had changed.
    """

    beat: Beat | None
    answered: float
    changed: float


def who_hangs(heard: Mapping[int, Heard], now: float, timeout: float, one_died: bool = False) -> dict[int, str]:
    """The ranks that are to blame, and what for.

    All that do not answer are to blame. Else none has got on for so long, and it is one that does not wait for the
    others; where all of them wait it is the one that has done the least, unless one does it for the first time: that
    may be building the graph of a large model. Where all have nothing to do, or one is getting ready to join, it is the
    driver that takes its time. Where `one_died` all may wait for that one: its process may live on, on a node that is
    lost to the driver, until Horovod gives up.
    """
    silent = {rank: now - last.answered for rank, last in heard.items() if now - last.answered > timeout}
    if silent:
        return {rank: f"the process has not answered for {seconds:.0f} s" for rank, seconds in silent.items()}
    if not heard or now - max(last.changed for last in heard.values()) <= timeout:
        return {}
    beats = {rank: last.beat for rank, last in heard.items() if last.beat is not None}
    busy = {rank: beat for rank, beat in beats.items() if not beat.waits}
    is_ready = all(beat.beats > 0 for beat in beats.values())
    is_asked = any(beat.doing != BETWEEN_SEGMENTS for beat in beats.values())
    if not is_ready or not is_asked or (not busy and (one_died or any(beat.is_new for beat in beats.values()))):
        return {}
    rank = min(busy or beats, key=lambda rank: (beats[rank].beats, rank))
    return {rank: f"no step was finished for {now - heard[rank].changed:.0f} s; it was in {beats[rank].doing}"}


class Heartbeat:
    """Listens to the ranks of a fit.

    Args:
        ask: returns what ranks have said since the last time, None of one that is dead; does not wait.
        timeout: seconds; infinite: nothing is a hang.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        ask: Callable[[], Sequence[tuple[int, Beat | None]]],
        timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._ask = ask
        self._timeout = timeout
        self._clock = clock
        self._heard: dict[int, Heard] = {}
        self._died: dict[int, float] = {}  # when
        self._pace = 0.0
        self._looked = clock()

    def begin(self, ranks: Sequence[int]) -> None:
        """All of them are well now."""
        now = self._looked = self._clock()
        self._heard = {rank: Heard(None, now, now) for rank in ranks}
        self._died = {}

    def took(self, seconds: float) -> None:
        """What is done in one go, a step where nothing else is known, took so long."""
        self._pace = seconds

    def look(self) -> dict[int, str]:
        """The ranks that hang; see `who_hangs`."""
        if math.isinf(self._timeout):
            return {}
        now = self._clock()
        if now - self._looked > BLINK_SECONDS:
            self._heard = {rank: Heard(None, now, now) for rank in self._heard}
        self._looked = now
        for rank, beat in self._ask():
            if beat is None:  # dead is another matter
                self._heard.pop(rank, None)
                self._died.setdefault(rank, now)
                continue
            self._died.pop(rank, None)
            before = self._heard.get(rank)
            is_same = before is not None and before.beat is not None and before.beat.beats == beat.beats
            changed = before.changed if before is not None and is_same else now
            self._heard[rank] = Heard(beat, now, changed)
        timeout = max(self._timeout, PATIENT_STEPS * self._pace)
        one_died = any(now - died <= timeout + EXCUSED_SECONDS for died in self._died.values())
        return who_hangs(self._heard, now, timeout, one_died)
