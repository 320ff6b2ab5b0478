"""Owns what is asked of the machine that a process runs on."""

import contextlib
from pathlib import Path


def cpu() -> str:
    """The CPU's model, which floating-point bits hang on."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "unknown"
