"""Owns how many epochs it takes to learn something, where mini-batches grow with the number of workers."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

import dtrain
from benchmarks.suite.work import THREADS

GOAL, AT_MOST = 0.97, 60
"""The accuracy on held-out digits that is to be reached, in so many epochs."""
ROWS, LEARNING_RATE = 16, 0.005
"""Of one worker: rows of a mini-batch, and the rate that goes with them; several workers reach theirs in an epoch."""
WORKERS = 1, 2, 4


def digits() -> tuple[Any, Any, Any, Any]:
    """1,400 digits of 8 by 8 and their labels to train on, and 397 to test with."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    x, y = (found.data[order] / 16).astype("float32"), found.target[order]
    return x[:1400], y[:1400], x[1400:], y[1400:]


def make_model(config: dict[str, Any]) -> Any:
    keras.utils.set_random_seed(config["seed"])
    layers = keras.layers
    model = keras.Sequential([keras.Input((64,)), layers.Dense(128, activation="relu"), layers.Dense(10)])
    sizes = {"batch_size": config["batch_size"], "base_batch_size": ROWS}
    rate = dtrain.WarmUp.linear_scaling(LEARNING_RATE, **sizes, steps=config["steps"])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(rate, momentum=0.9), loss, metrics=["accuracy"])
    return model


class Reached(keras.callbacks.Callback):  # type: ignore[misc]
    """Ends the fit when the goal is reached."""

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.model.stop_training = logs["val_accuracy"] >= GOAL


class Learner:
    """dtrain on so many workers, with the linear scaling rule. Each block has another seed, the same for all.

    Args:
        options: of `dtrain.Trainer`.
    """

    def __init__(self, workers: int, **options: Any) -> None:
        self.workers, self.options = workers, options
        self.data = digits()
        self.seed = 0

    def block(self) -> float:
        """Epochs until the goal is reached, between two epochs by the line through their accuracies."""
        self.seed += 1
        x, y, *held_out = self.data
        batch_size = ROWS * self.workers
        config = {"seed": self.seed, "batch_size": batch_size, "steps": len(x) // batch_size}
        options = {"threads_per_worker": THREADS, "tracking": False, "checkpoint": False, **self.options}
        with dtrain.Trainer(make_model, num_workers=self.workers, config=config, seed=self.seed, **options) as trainer:
            given = {"batch_size": batch_size, "validation_data": tuple(held_out), "validation_batch_size": 500}
            history = trainer.fit(x, y, **given, epochs=AT_MOST, verbose=0, callbacks=[Reached()])
        return epochs_to(GOAL, history.history["val_accuracy"])


def epochs_to(goal: float, accuracies: list[float]) -> float:
    """When a goal was reached, in epochs and parts of them.

    Raises:
        RuntimeError: it was not.
    """
    if accuracies[-1] < goal:
        raise RuntimeError(f"{goal:.0%} was not reached in {len(accuracies)} epochs")
    before = accuracies[-2] if len(accuracies) > 1 else 0.0
    return len(accuracies) - 1 + (goal - before) / (accuracies[-1] - before)


@contextmanager
def learners(ours: str) -> Iterator[Mapping[str, Any]]:
    """Those of each number of workers; `ours` is the one with the most."""
    yield {ours if workers == WORKERS[-1] else f"N={workers}": Learner(workers).block for workers in reversed(WORKERS)}


OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "exact": {},
    "fp16": {"compression": "fp16"},
    "bf16": {"compression": "bf16"},
    "sync_every=4": {"sync_every": 4},
    "sync_every=16": {"sync_every": 16},
}
"""What users may ask for that is not exact, by name."""


@contextmanager
def optional() -> Iterator[Mapping[str, Any]]:
    """Two workers with each option, and without."""
    yield {name: Learner(2, **options).block for name, options in OPTIONS.items()}
