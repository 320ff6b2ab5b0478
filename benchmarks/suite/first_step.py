"""Owns the timing of first steps: scripts from their start to the end of the first step, and the start of a worker.

    python -m benchmarks.suite.first_step plain|dtrain

prints the time of day at the end of the first step. The suite runs it, with RAY_ADDRESS of a Ray that is warm.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

WORK, STEPS = "mlp", 20
ROOT = Path(__file__).parents[2]


class Script:
    """The seconds from the start of a script to the end of its first step; a contender."""

    def __init__(self, kind: str, address: str = "") -> None:
        self.kind, self.address = kind, address

    def check(self) -> list[Any]:
        """The model, data and code are those of the row of steps, which is checked."""
        return []

    def block(self) -> float:
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": "-1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        if self.address:
            environment["RAY_ADDRESS"] = self.address
        started = time.time()
        command = [sys.executable, "-m", "benchmarks.suite.first_step", self.kind]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        if done.returncode:
            raise RuntimeError(done.stderr)
        stamp = next(line for line in done.stdout.splitlines() if line.startswith("first step "))
        return float(stamp.split()[-1]) - started

    def close(self) -> None:
        pass


class WorkerStart:
    """The seconds that Ray needs to start an actor which then imports TensorFlow and Keras; a contender."""

    def check(self) -> list[Any]:
        return []

    def block(self) -> float:
        import ray

        started = time.time()
        actor = ray.remote(_Importer).options(num_cpus=1).remote()
        seconds = ray.get(actor.import_keras.remote()) - started
        ray.kill(actor)
        return float(seconds)

    def close(self) -> None:
        pass


class _Importer:
    def import_keras(self) -> float:
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
        import keras

        assert keras.backend.backend() == "tensorflow"
        return time.time()


def main(kind: str) -> None:
    from benchmarks.suite.work import THREADS, WORKS, model_fn

    work = WORKS[WORK]
    x, y = work.data(STEPS)
    if kind == "plain":
        import tensorflow as tf

        tf.config.threading.set_intra_op_parallelism_threads(THREADS)
        tf.config.threading.set_inter_op_parallelism_threads(THREADS)
        model_fn(work).fit(x, y, batch_size=work.batch_size, verbose=0, callbacks=[_first_step()])
    else:
        from functools import partial

        import dtrain

        with dtrain.Trainer(
            partial(model_fn, work), num_workers=2, threads_per_worker=THREADS, tracking=False, checkpoint=False
        ) as trainer:
            trainer.fit(x, y, batch_size=work.batch_size, verbose=0, callbacks=[_first_step()])


def _first_step() -> Any:
    """Made here: a script imports Keras when it needs it, and one of dtrain where it has a callback."""
    import keras

    class FirstStep(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            if batch == 0:
                print("first step", time.time(), flush=True)

    return FirstStep()


if __name__ == "__main__":
    main(sys.argv[1])
