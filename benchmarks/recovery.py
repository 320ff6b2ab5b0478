"""Measures how long a fit is held up by the death of one of its workers, in each way to go on.

    python benchmarks/recovery.py

Three workers train a small MLP; rank 2 is killed with SIGKILL in the middle. What is timed, from the kill on, by
clocks of this machine: until the driver has noticed it, and until rank 0 finishes a step again. The ways: a spare
takes the dead one's place, a new process does, the others go on without it; and, to compare with, the fit ends, and
the same command goes on from its newest checkpoint, where it redoes some steps, which other frameworks call elastic.

Prints a table, and writes it with all that was measured to a JSON file. Workers share this machine's cores, and the
start of a process, which is nearly all of two of the ways, is as slow as these are.
"""

import argparse
import contextlib
import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.update(RAY_worker_niceness="0")  # Ray's is 15, which on a shared machine would be a handicap
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import ray

import dtrain
from dtrain.errors import WorkerDied

WAYS: dict[str, dict[str, Any]] = {
    "a spare takes its place": {"spares": 1},
    "a new process takes its place": {},
    "the others go on without it": {"failure": dtrain.FailureConfig(on_loss="shrink")},
    "the command again, from a checkpoint": {"failure": dtrain.FailureConfig(max_failures=0)},
}
VICTIM, WARM_STEPS, SPARE_SECONDS = 2, 100, 20.0


class Stamps(keras.callbacks.Callback):
    """When rank 0 finished each step; in a file, since rank 0 may not live to tell."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        with open(self.file, "a") as file:
            file.write(f"{time.time()}\n")


def make_model() -> Any:
    import keras

    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((64,)), dense(64, "relu"), dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def stamps_in(file: Path) -> list[float]:
    return [float(line) for line in file.read_text().splitlines()] if file.exists() else []


@contextlib.contextmanager
def killed_in_the_middle(trainer: dtrain.Trainer, file: Path, has_spares: bool) -> Iterator[list[float]]:
    """Inside, the victim dies once some steps are trained, and a spare is ready; the list is when."""
    when: list[float] = []

    def kill() -> None:
        while len(stamps_in(file)) < WARM_STEPS:
            time.sleep(0.1)
        time.sleep(SPARE_SECONDS if has_spares else 0)
        when.append(time.time())
        os.kill(trainer.workers[VICTIM].pid, 9)

    thread = threading.Thread(target=kill, daemon=True)
    thread.start()
    yield when
    thread.join()


def measure(way: str, number: int, folder: Path, steps: int) -> dict[str, float]:
    """Seconds from the kill until it was noticed, and until the next step."""
    options, name = WAYS[way], f"{way} {number}".replace(" ", "-").replace(",", "")
    file = folder / f"{name}.txt"
    rows = np.random.default_rng(0).normal(size=(steps * 24, 64)).astype("float32")
    labels = np.random.default_rng(1).integers(10, size=len(rows))
    given: dict[str, Any] = {
        "num_workers": 3,
        "threads_per_worker": 1,
        "tracking": False,
        "run_name": name,
        "storage_path": folder,
        "checkpoint": dtrain.CheckpointConfig(every_steps=50, keep=2),
        **options,
    }

    def fit(trainer: dtrain.Trainer, resume: Any = False) -> Any:
        return trainer.fit(
            rows, labels, batch_size=24, epochs=1, verbose=0, callbacks=[Stamps(file)], shuffle=False, resume=resume
        )

    is_over = False
    with (
        dtrain.Trainer(make_model, **given) as trainer,
        killed_in_the_middle(trainer, file, "spares" in options) as when,
    ):
        try:
            history = fit(trainer)
            noticed = datetime.fromisoformat(history.recoveries[0].time).timestamp()
        except WorkerDied:
            noticed = time.time()
            is_over = True
    if is_over:
        with dtrain.Trainer(make_model, **given) as trainer:
            fit(trainer, resume="auto")
    (killed,) = when
    stamps = stamps_in(file)
    after = [stamp for stamp in stamps if stamp > killed]
    gaps = [(later - earlier, later) for earlier, later in zip([killed, *after], after, strict=False)]
    _, next_step = max(gaps)
    return {"noticed": noticed - killed, "next_step": next_step - killed}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="how often each way is measured")
    parser.add_argument("--steps", type=int, default=600, help="of each fit; a spare needs many to get ready in (600)")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"), help="where the figures go")
    arguments = parser.parse_args()
    ray.init(address="local", num_cpus=8, namespace="dtrain", log_to_driver=False)
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for way, measured in found.items():
                measured.append(measure(way, number, Path(folder), arguments.steps))
                print(f"{way}: {measured[-1]}", file=sys.stderr, flush=True)
    print(f"{'one of 3 workers is killed':<40}{'noticed':>10}{'next step':>12}")
    for way, measured in found.items():
        noticed, next_step = (statistics.median(one[key] for one in measured) for key in ("noticed", "next_step"))
        print(f"{way:<40}{noticed:>8.2f} s{next_step:>10.2f} s")
    arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
