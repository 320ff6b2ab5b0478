"""Measures what checkpoints cost a training that goes on meanwhile, and what `deterministic=True` costs.

    python benchmarks/checkpoint_cost.py

A model of 100 MB with Adam, so 300 MB of state, trains on 2 workers in blocks of steps: without a checkpoint, with one
in the middle of the block that is written beside the training, and with the same file written at the block's end while
all wait. A block is so long that the blocking one costs a tenth of it. Then a small MLP and a small CNN, each with
deterministic=True and False. What is compared runs in turn, in the same processes; of each round the ratio is taken,
and of these the median.

Timed on rank 0 from the first step of a block to the last. Prints a table, and writes it with all that was measured to
a JSON file. Everything runs on this machine: with fewer cores than workers and writers, they take each other's.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.update(RAY_worker_niceness="0")  # Ray's is 15, which on a shared machine would be a handicap
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import ray

import dtrain
from dtrain.checkpoint import MODEL_FILE, CheckpointStore
from dtrain.checkpointer import Checkpointer
from dtrain.model import read_state

BLOCKING_SHARE = 0.1
"""Checkpoints are made as often as would cost so much if the workers waited for them."""


class Clock(keras.callbacks.Callback):
    """The seconds from an epoch's first step to its last; runs on rank 0."""

    seconds = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.seconds -= time.perf_counter()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.seconds += time.perf_counter()


def make_wide(config: Mapping[str, Any]) -> Any:
    """One matrix that is nearly all of the model."""
    import keras

    width = config["width"]
    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((16,)), dense(width, "relu"), dense(width, "relu"), dense(1)])
    model.compile("adam", "mse")
    return model


def make_mlp() -> Any:
    import keras

    dense = keras.layers.Dense
    model = keras.Sequential([keras.Input((784,)), dense(512, "relu"), dense(512, "relu"), dense(10)])
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def make_cnn() -> Any:
    import keras
    from keras import layers

    model = keras.Sequential(
        [
            keras.Input((28, 28, 1)),
            layers.Conv2D(16, 3, activation="relu"),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, activation="relu"),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )
    model.compile("adam", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def seconds_per_step(trainer: dtrain.Trainer, x: Any, y: Any, batch_size: int, hooks: Sequence[Any] = ()) -> float:
    """Of one epoch with its hooks; what it leaves on the disk is removed."""
    clock = Clock()
    history = trainer.fit(x, y, batch_size=batch_size, verbose=0, callbacks=[*hooks, clock])
    if history.url:
        shutil.rmtree(history.url)
    return clock.seconds / (len(x) // batch_size)


class Checkpoints:
    """Blocks of steps, each with one checkpoint in its middle or none."""

    MODES = ("none", "beside the training", "blocking")

    def __init__(self, megabytes: int, workers: int) -> None:
        self.trainer = dtrain.Trainer(
            make_wide,
            config={"width": round((megabytes * 1e6 / 4) ** 0.5)},
            num_workers=workers,
            threads_per_worker=1,
            tracking=False,
            checkpoint=False,
        )
        self.batch_size = 8 * workers

    def block(self, mode: str, steps: int) -> float:
        """Seconds a step."""
        rows = np.random.default_rng(0).normal(size=(steps * self.batch_size, 17)).astype("float32")
        saving = dtrain.CheckpointConfig(every_epochs=None, every_steps=steps // 2 + 1, keep=1)
        self.trainer.checkpoint = saving if mode == "beside the training" else None
        hooks = [SavesAndWaits()] if mode == "blocking" else []
        with patch.object(Checkpointer, "begin", lambda self, step: False):  # none where the run begins
            return seconds_per_step(self.trainer, rows[:, :16], rows[:, 16:], self.batch_size, hooks)

    def measure(self, blocks: int) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Seconds a step by mode, and what was found out first."""
        first = 11
        self.block("none", 3)
        self.block("blocking", 3)
        rounds = [(self.block("none", first), self.block("blocking", first)) for _ in range(5)]
        step = min(none for none, _ in rounds)
        cost = max(0.01, statistics.median(blocking - none for none, blocking in rounds) * first)
        steps = max(first, round(cost / (BLOCKING_SHARE * step)))
        print(f"a step takes {step:.3f} s, a blocking checkpoint {cost:.2f} s: one every {steps} steps", flush=True)
        found = in_turn({mode: lambda mode=mode: self.block(mode, steps) for mode in self.MODES}, blocks)
        return found, {"seconds_per_step": step, "seconds_per_blocking_checkpoint": cost, "steps_per_checkpoint": steps}


class SavesAndWaits(keras.callbacks.Callback):  # type: ignore[misc]
    """Writes the same files at the end of an epoch, on rank 0, while everybody waits."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        with tempfile.TemporaryDirectory(prefix="dtrain-cost-") as folder:
            CheckpointStore(folder).stage(0).write_tensors(MODEL_FILE, read_state(self.model))


def measure_determinism(make_model: Any, shape: tuple[int, ...], steps: int, workers: int, blocks: int) -> Any:
    """Seconds a step with deterministic=True and False."""
    batch_size = 32 * workers
    generator = np.random.default_rng(0)
    x = generator.normal(size=(steps * batch_size, *shape)).astype("float32")
    y = generator.integers(10, size=len(x))
    with contextlib.ExitStack() as stack:
        trainers = {
            name: stack.enter_context(
                dtrain.Trainer(
                    make_model,
                    num_workers=workers,
                    threads_per_worker=1,
                    deterministic=deterministic,
                    tracking=False,
                    checkpoint=False,
                )
            )
            for name, deterministic in (("False", False), ("True", True))
        }
        for trainer in trainers.values():
            seconds_per_step(trainer, x, y, batch_size)
        return in_turn(
            {name: lambda t=trainer: seconds_per_step(t, x, y, batch_size) for name, trainer in trainers.items()},
            blocks,
        )


def in_turn(measures: Mapping[str, Any], rounds: int) -> dict[str, list[float]]:
    """Each measure once a round, beginning with another one each time."""
    names = [*measures]
    found: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        for i in range(len(names)):
            name = names[(number + i) % len(names)]
            found[name].append(measures[name]())
    return found


def row_of(what: str, found: Mapping[str, list[float]], name: str, base: str) -> dict[str, Any]:
    ratios = [ours / theirs for ours, theirs in zip(found[name], found[base], strict=True)]
    return {
        "what": what,
        "milliseconds": statistics.median(found[name]) * 1e3,
        "base_milliseconds": statistics.median(found[base]) * 1e3,
        "ratio": statistics.median(ratios),
        "quartiles": statistics.quantiles(ratios, method="inclusive")[::2],
        "ratios": sorted(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="What checkpoints, and deterministic=True, cost.")
    parser.add_argument("--megabytes", type=int, default=100, help="of weights; the state is three times that (100)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--blocks", type=int, default=15, help="rounds of each comparison (15)")
    parser.add_argument("--only", choices=("checkpoints", "deterministic"), help="default: both")
    parser.add_argument("--json", type=Path, default=Path(__file__).with_suffix(".json"))
    options = parser.parse_args()
    target = options.json.absolute()
    folder = tempfile.mkdtemp(prefix="dtrain-cost-")
    os.chdir(folder)
    ray.init(
        address="local", num_cpus=8, namespace="dtrain", include_dashboard=False, log_to_driver=False,
        logging_level="WARNING",
    )  # fmt: skip
    rows: list[dict[str, Any]] = []
    report: dict[str, Any] = {"megabytes": options.megabytes, "workers": options.workers, "cores": os.cpu_count()}
    try:
        if options.only != "deterministic":
            checkpoints = Checkpoints(options.megabytes, options.workers)
            with checkpoints.trainer:
                found, report["checkpoints"] = checkpoints.measure(options.blocks)
                report["cpu"] = checkpoints.trainer.machine().get("cpu")
            rows += [row_of(f"checkpoints, {mode}", found, mode, "none") for mode in checkpoints.MODES[1:]]
        if options.only != "checkpoints":
            for what, make_model, shape, steps in (
                ("MLP", make_mlp, (784,), 150),
                ("CNN", make_cnn, (28, 28, 1), 40),
            ):
                found = measure_determinism(make_model, shape, steps, options.workers, options.blocks)
                rows.append(row_of(f"deterministic=True, {what}", found, "True", "False"))
    finally:
        ray.shutdown()
        os.chdir("/")
        shutil.rmtree(folder)
    report |= {"rows": rows, "load": os.getloadavg()[0]}
    print("| | ms a step | without | ratio | middle half |\n| --- | --- | --- | --- | --- |")
    for row in rows:
        low, high = row["quartiles"]
        print(
            f"| {row['what']} | {row['milliseconds']:.2f} | {row['base_milliseconds']:.2f} | {row['ratio']:.3f}"
            f" | {low:.3f} to {high:.3f} |"
        )
    target.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
