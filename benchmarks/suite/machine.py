"""Owns what else the machine does: on a shared one, a round had better wait until others rest."""

import time
from pathlib import Path

CALM = 0.1
"""Others may use so much of all cores."""
LOOK_SECONDS = 0.5


def wait_for_calm(patience: float) -> float:
    """Wait at most so many seconds for others to rest; the suite does nothing meanwhile. What they use of all cores."""
    deadline = time.monotonic() + patience
    while (busy := _busy()) > CALM and time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
    return busy


def _busy() -> float:
    used, total = _jiffies()
    time.sleep(LOOK_SECONDS)
    used_after, total_after = _jiffies()
    return (used_after - used) / max(1, total_after - total)


def _jiffies() -> tuple[int, int]:
    """Of all cores since the machine started: in use, and in all."""
    user, nice, system, idle, waiting, *others = map(int, Path("/proc/stat").read_text().splitlines()[0].split()[1:9])
    used = user + nice + system + sum(others)
    return used, used + idle + waiting
