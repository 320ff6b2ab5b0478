"""Owns a driver that trains on a cluster that somebody else disturbs: it tells how it goes, and what came of it."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cloudpickle
import models
import numpy as np
import sizes
from models import blobs, make_exact_model
from sizes import Sizes, sizes_in

import dtrain

for module in (models, sizes):  # the workers do not have the tests' folder on their path
    cloudpickle.register_pickle_by_value(module)

SIZES, WORKERS, ENOUGH, FOUND = "sizes.txt", "workers.json", "enough", "found.json"


def train(address: str, folder: str, num_workers: Any, wanted: list[int], **failure: Any) -> None:
    """Train until the group has had the wanted sizes and is told that it is enough; then as long in one process.

    Args:
        address: Ray's.
        folder: to work in, and to tell what is going on.
        num_workers: of the Trainer.
        wanted: sizes that the group is to have had in the end, one after the other.
        failure: of its FailureConfig.
    """
    import ray

    ray.init(address=address, namespace="dtrain", log_to_driver=False, logging_level="ERROR")
    while ray.cluster_resources().get("CPU", 0) < wanted[0]:  # until all that are to be there have come
        time.sleep(0.2)
    here = Path(folder)
    os.chdir(here)
    x, y = blobs(80)
    data: dict[str, Any] = {"x": x, "y": y, "batch_size": 8, "verbose": 0}
    tracking = dtrain.MLflowConfig(tracking_uri=f"sqlite:///{here}/mlflow.db", log_model=False)
    options: dict[str, Any] = {"threads_per_worker": 1, "checkpoint": False}
    with dtrain.Trainer(
        make_exact_model,
        num_workers=num_workers,
        run_name=here.name,
        tracking=tracking,
        failure=dtrain.FailureConfig(**failure),
        **options,
    ) as trainer:
        threading.Thread(target=_tell, args=(trainer, here / WORKERS), daemon=True).start()
        history = trainer.fit(**data, epochs=9999, callbacks=[Sizes(here / SIZES, wanted, here / ENOUGH)])
        weights = trainer.get_weights()
    events = [json.loads(line) for line in Path(history.url, "journal.jsonl").read_text().splitlines()]
    with dtrain.Trainer(make_exact_model, tracking=False, **options) as trainer:
        trainer.fit(**data, epochs=len(history.epoch))
        control = trainer.get_weights()
    found = {
        "steps": [
            e["first_step"] + i for e in events if e["event"] == "steps" for i in range(len(e["metrics"]["loss"]))
        ],
        "epochs": len(history.epoch),
        "off": max(float(np.abs(ours - theirs).max()) for ours, theirs in zip(weights, control, strict=True)),
        "redone": [recovery.steps_redone for recovery in history.recoveries],
        "causes": [recovery.cause for recovery in history.recoveries],
    }
    (here / FOUND).write_text(json.dumps(found))


def _tell(trainer: dtrain.Trainer, file: Path) -> None:
    while True:
        found = [(worker.node_id, worker.pid) for worker in trainer.workers]
        new = file.with_suffix(".new")
        new.write_text(json.dumps(found))
        new.rename(file)
        time.sleep(0.1)


class Followed:
    """What a driver tells of itself.

    Args:
        folder: where it works.
        patience: seconds after which what has not happened counts as never.
        code: its exit code; None: it is at work.
    """

    def __init__(self, folder: Path, patience: float, code: Callable[[], int | None]) -> None:
        self._folder, self._patience, self.code = folder, patience, code

    def workers(self) -> list[tuple[str, int]]:
        """Node and process of each that is there, in rank order; fewer than ranks while one is replaced."""
        return [(node, pid) for node, pid in json.loads((self._folder / WORKERS).read_text())]

    def steps(self) -> int:
        """That rank 0 has done."""
        file = self._folder / SIZES
        return len(file.read_text().split()) if file.exists() else 0

    def sizes(self) -> list[int]:
        return sizes_in(self._folder / SIZES)

    def wait_until(self, is_so: Any, what: str) -> None:
        """Until a function of this one returns something true."""
        deadline = time.monotonic() + self._patience
        while not is_so():
            assert self.code() is None, f"{what}: the driver has ended"
            assert time.monotonic() < deadline, f"{what}: not within {self._patience:g} s, sizes {self.sizes()}"
            time.sleep(0.05)

    def wait_for_steps(self, number: int) -> None:
        self.wait_until(lambda: self.steps() >= number, f"{number} steps")

    def wait_for_sizes(self, *wanted: int) -> None:
        """Until they are the last ones; it may have begun with another."""
        self.wait_until(lambda: self.sizes()[-len(wanted) :] == list(wanted), f"sizes {wanted}")

    def wait_for_another(self, rank: int, before: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Until there are as many workers again, and a rank is another process."""

        def is_another() -> bool:
            now = self.workers()
            return len(now) == len(before) and now[rank] != before[rank]

        self.wait_until(is_another, f"another rank {rank}")
        return self.workers()

    def end(self) -> dict[str, Any]:
        """What it has found once it ends, which it may now."""
        (self._folder / ENOUGH).touch()
        deadline = time.monotonic() + self._patience
        while self.code() is None:
            assert time.monotonic() < deadline, "the driver does not end"
            time.sleep(0.05)
        assert self.code() == 0
        found: dict[str, Any] = json.loads((self._folder / FOUND).read_text())
        return found
