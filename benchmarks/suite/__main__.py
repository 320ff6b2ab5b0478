"""Runs the rows, prints one table, and writes it with all blocks to a JSON file, and a picture beside that."""

import argparse
import contextlib
import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.update(RAY_worker_niceness="0")  # Ray's is 15, which on a shared machine would be a handicap

import ray

from benchmarks.suite import measure, report
from benchmarks.suite.machine import wait_for_calm
from benchmarks.suite.rows import ROWS, Row

FOLDER = Path(__file__).parents[1]


def run(row: Row, rounds: int, patience: float) -> tuple[list[report.Line], measure.Rounds]:
    """A row's lines, and its blocks."""
    others: list[float] = []
    print(f"{row.name}: {row.title}", file=sys.stderr, flush=True)
    with row.start() as blocks:
        found = measure.in_turn(
            blocks, max(1, round(rounds * row.share)), lambda: others.append(wait_for_calm(patience))
        )
    lines = []
    for ratio in row.ratios:
        value = ratio.of(found)
        lines.append(
            report.Line(
                row=row.name,
                title=row.title,
                what=ratio.title,
                unit=row.unit,
                ours=measure.seconds(found, ratio.ours),
                peer=ratio.peer,
                peer_seconds=measure.seconds(found, ratio.peer),
                ratio=value,
                bar=ratio.bar,
                at_most=ratio.at_most,
                met=ratio.is_met(value.median),
                noise=measure.noise(found, ratio.ours),
                others=measure.spread(others),
            )
        )
        print("  " + " | ".join(report.cells(lines[-1])[1:]), file=sys.stderr, flush=True)
    return lines, found


@contextlib.contextmanager
def warm_ray() -> Iterator[None]:
    """A Ray of this row's own."""
    ray.init(
        address="local", num_cpus=8, namespace="dtrain", include_dashboard=False, log_to_driver=False,
        logging_level=logging.WARNING,
    )  # fmt: skip
    try:
        yield
    finally:
        ray.shutdown()


def main() -> None:
    names = [row.name for row in ROWS]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suite", description=__doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"default: all of {' '.join(names)}")
    parser.add_argument("--blocks", type=int, default=7, help="rounds of two blocks each (7)")
    parser.add_argument("--patience", type=float, default=5.0, help="seconds that a round waits for a calm machine (5)")
    parser.add_argument("--json", type=Path, default=FOLDER / "suite.json", help="where the figures go")
    options = parser.parse_args()
    if unknown := set(options.rows) - set(names):
        parser.error(f"no row {', '.join(sorted(unknown))}; there are {' '.join(names)}")
    started = time.time()
    lines: list[report.Line] = []
    blocks: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for row in ROWS:
        if options.rows and row.name not in options.rows:
            continue
        try:
            with warm_ray():
                new, blocks[row.name] = run(row, options.blocks, options.patience)
            lines += new
        except Exception as error:  # the other rows are worth having
            wrong[row.name] = f"{type(error).__name__}: {error}"
    report.show(lines, wrong)
    print(report.markdown(lines), file=sys.stderr)
    machine = {"cores": os.cpu_count(), "load": os.getloadavg(), "seconds": round(time.time() - started)}
    found = {**machine, "lines": report.as_json(lines), "blocks": blocks, "without_result": wrong}
    options.json.write_text(json.dumps(found, indent=1) + "\n")
    if lines:
        report.draw(lines, options.json.with_suffix(".png"))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
