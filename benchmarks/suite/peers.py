"""Owns what dtrain is compared with, as it runs in a process of its own (processes.py): one object a rank.

All have THREADS threads, and the data in memory. What they time leaves out the start, building graphs, and the first
steps of a block.
"""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from benchmarks.suite.clock import EpochClock
from benchmarks.suite.work import MODEL_SEED, THREADS, WORKS, model_fn, share

CHECK_STEPS = 20
WARM_STEPS = 10


def use_threads() -> None:
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    tf.config.threading.set_inter_op_parallelism_threads(THREADS)


def peak_memory(pid: int) -> float:
    """GiB that a process has held at most."""
    (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) / 2**20


class PlainKeras:
    """Keras as it is, on a share of the rows: one of N independent processes, or the only one.

    Args:
        pass_steps: mini-batches that the data have, where it is not the work's number.
        deterministic: TensorFlow's operations are.
    """

    def __init__(self, rank: int, ranks: int, name: str, pass_steps: int = 0, deterministic: bool = False) -> None:
        use_threads()
        if deterministic:
            tf.config.experimental.enable_op_determinism()
        self.work = work = WORKS[name]
        self.batch_size = work.batch_size // ranks
        self.model = model_fn(work)
        self.x, self.y = share(work.data(pass_steps or work.steps), work.batch_size, rank, ranks)

    def check(self) -> list[Any]:
        """The weights after the steps that every contender is checked with."""
        x, y = self.work.data(CHECK_STEPS)
        self.model.fit(x, y, batch_size=self.work.batch_size, shuffle=False, verbose=0)
        weights: list[Any] = self.model.get_weights()
        return weights

    def block(self) -> float:
        """Seconds a step, of a fit's second epoch."""
        clock = EpochClock()
        self.model.fit(self.x, self.y, batch_size=self.batch_size, epochs=2, verbose=0, callbacks=[clock])
        return clock.seconds[-1] / self.work.steps

    def peak_memory(self) -> float:
        self.block()
        return peak_memory(os.getpid())

    def evaluate(self) -> Any:
        return self.model.evaluate(self.x, self.y, batch_size=self.batch_size, verbose=0)

    def predict(self) -> Any:
        return self.model.predict(self.x, batch_size=self.batch_size, verbose=0)

    def predict_and_forget(self) -> None:
        self.predict()


class HandWritten:
    """A training loop over Horovod as a careful user would write it: one traced function a step, data held by it.

    Args:
        reduction: "grouped", "flat" (one tensor made of all) or "single" (one all-reduce for each).
    """

    def __init__(self, rank: int, ranks: int, name: str, reduction: str) -> None:
        use_threads()
        self.work = work = WORKS[name]
        self.rank, self.ranks, self.reduction = rank, ranks, reduction
        self.model = model_fn(work)
        self.model.optimizer.build(self.model.trainable_variables)
        self.shuffled = np.random.default_rng(rank)

    def join(self, environment: dict[str, str]) -> None:
        import horovod.tensorflow as hvd

        os.environ.update(environment)
        hvd.init()

    def leave(self) -> None:
        """So that Horovod's thread, which looks for work a thousand times a second, disturbs nobody."""
        import horovod.tensorflow as hvd

        hvd.shutdown()

    def check(self, steps: int) -> list[Any]:
        self._hold(steps)
        for rows in np.arange(len(self.y)).reshape(steps, -1):
            self.step(tf.constant(rows))
        weights: list[Any] = self.model.get_weights()
        self._hold(self.work.steps)
        return weights

    def block(self) -> list[float]:
        """The seconds of each step."""
        order = self.shuffled.permutation(len(self.y)).reshape(self.work.steps, -1)
        for rows in order[:WARM_STEPS]:
            self.step(tf.constant(rows))
        stamps = [time.perf_counter()]
        for rows in order:
            self.step(tf.constant(rows))
            stamps.append(time.perf_counter())
        return np.diff(stamps).tolist()  # type: ignore[no-any-return]

    def _hold(self, steps: int) -> None:
        x, y = share(self.work.data(steps), self.work.batch_size, self.rank, self.ranks)
        self.x, self.y = tf.constant(x), tf.constant(y)
        self.step = tf.function(self._step)

    def _step(self, rows: tf.Tensor) -> tf.Tensor:
        x, y = tf.gather(self.x, rows), tf.gather(self.y, rows)
        variables = self.model.trainable_variables
        with tf.GradientTape() as tape:
            loss = self.model.loss(y, self.model(x, training=True))
        gradients = tape.gradient(loss, [variable.value for variable in variables])
        self.model.optimizer.apply(self._reduced(gradients), variables)
        return loss

    def _reduced(self, gradients: Sequence[tf.Tensor]) -> list[tf.Tensor]:
        import horovod.tensorflow as hvd

        if self.reduction == "grouped":
            reduced: list[tf.Tensor] = hvd.grouped_allreduce(gradients, name="gradients")
            return reduced
        if self.reduction == "single":
            return [hvd.allreduce(gradient, name=f"gradient{i}") for i, gradient in enumerate(gradients)]
        flat = tf.concat([tf.reshape(gradient, [-1]) for gradient in gradients], 0)
        parts = tf.split(
            hvd.allreduce(flat, name="gradients"), [gradient.shape.num_elements() for gradient in gradients]
        )
        return [tf.reshape(part, gradient.shape) for part, gradient in zip(parts, gradients, strict=True)]


class Mirrored:
    """tf.distribute's MultiWorkerMirroredStrategy and `fit` of tf_keras, the only Keras that it works with."""

    def __init__(self, rank: int, ranks: int, name: str, ports: Sequence[int]) -> None:
        import tf_keras

        self.tf_keras = tf_keras
        os.environ["TF_CONFIG"] = json.dumps(
            {
                "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
                "task": {"type": "worker", "index": rank},
            }
        )
        use_threads()
        self.work, self.rank, self.ranks = WORKS[name], rank, ranks
        self.strategy = tf.distribute.MultiWorkerMirroredStrategy()
        with self.strategy.scope():
            tf_keras.utils.set_random_seed(MODEL_SEED)
            self.model = self.work.make_model(tf_keras)
        self.model.set_weights(model_fn(self.work).get_weights())
        self.steps = self.work.steps // 4  # they are long
        self.dataset = self._dataset(self.steps, repeats=True)

    def check(self, steps: int) -> list[Any]:
        self.model.fit(self._dataset(steps, repeats=False), steps_per_epoch=steps, verbose=0)
        weights: list[Any] = self.model.get_weights()
        return weights

    def block(self) -> float:
        """Seconds a step, of a fit's second epoch."""
        clock = self._clock()
        self.model.fit(self.dataset, steps_per_epoch=self.steps, epochs=2, verbose=0, callbacks=[clock])
        return clock.seconds[-1] / self.steps

    def _dataset(self, steps: int, repeats: bool) -> Any:
        """This rank's part of each mini-batch, cut beforehand: tf.data is slow at slicing single rows."""
        x, y = share(self.work.data(steps), self.work.batch_size, self.rank, self.ranks)
        parts = x.reshape(steps, -1, *x.shape[1:]), y.reshape(steps, -1)

        def own(context: Any) -> Any:
            dataset = tf.data.Dataset.from_tensor_slices(parts)
            return (dataset.repeat() if repeats else dataset).prefetch(2)

        return self.strategy.distribute_datasets_from_function(own)

    def _clock(self) -> Any:
        class Clock(self.tf_keras.callbacks.Callback):  # type: ignore[misc, name-defined]
            seconds = EpochClock().seconds
            on_epoch_begin = EpochClock.on_epoch_begin
            on_epoch_end = EpochClock.on_epoch_end

        return Clock()
