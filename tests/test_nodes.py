"""Claims about clusters of several nodes, of which some die and some come while a fit goes on.

Each node has a raylet of its own, all of them on this machine, and room for one worker. The test is who looks after the
cluster; a process of its own is who trains on it.
"""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import models
import numpy as np
import psutil
import pytest
import sizes
from models import blobs, make_exact_model
from sizes import Sizes, sizes_in

import dtrain

for module in (models, sizes):  # the workers do not have the tests' folder on their path
    cloudpickle.register_pickle_by_value(module)

DEADLINE = 240.0
HANG_TIMEOUT = 15.0
SMALL = {"object_store_memory": 100 << 20, "include_dashboard": False}


class Nodes:
    """A cluster of nodes with one CPU each, and a head that has none."""

    def __init__(self, number: int) -> None:
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **SMALL})
        self.address: str = self._cluster.address
        for _ in range(number):
            self.add()

    def add(self) -> None:
        self._cluster.add_node(num_cpus=1, **SMALL)

    def kill(self, node_id: str) -> None:
        """End its raylet, which is what makes a machine a node."""
        (node,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        os.kill(node.all_processes["raylet"][0].process.pid, signal.SIGKILL)

    def close(self) -> None:
        self._cluster.shutdown()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two of them."""
    cluster = Nodes(2)
    yield cluster
    cluster.close()


def train(address: str, folder: str, num_workers: Any, wanted: list[int], run_name: str) -> None:
    """A driver: trains until the group has had the wanted sizes, and then as long again in one process."""
    import threading

    import ray

    ray.init(address=address, namespace="dtrain", log_to_driver=False, logging_level="ERROR")
    here = Path(folder)
    os.chdir(here)
    x, y = blobs(80)
    data: dict[str, Any] = {"x": x, "y": y, "batch_size": 8, "verbose": 0}
    tracking = dtrain.MLflowConfig(tracking_uri=f"sqlite:///{here}/mlflow.db", log_model=False)
    failure = dtrain.FailureConfig(hang_timeout=HANG_TIMEOUT)
    options: dict[str, Any] = {"threads_per_worker": 1, "checkpoint": False, "failure": failure}
    with dtrain.Trainer(
        make_exact_model, num_workers=num_workers, run_name=run_name, tracking=tracking, **options
    ) as trainer:

        def tell() -> None:
            while True:
                found = [(worker.node_id, worker.pid) for worker in trainer.workers]
                (here / "workers.json.tmp").write_text(json.dumps(found))
                (here / "workers.json.tmp").rename(here / "workers.json")
                time.sleep(0.1)

        threading.Thread(target=tell, daemon=True).start()
        history = trainer.fit(**data, epochs=999, callbacks=[Sizes(here / "sizes.txt", wanted, here / "enough")])
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
    (here / "found.json").write_text(json.dumps(found))


class Driver:
    """A process that trains.

    Args:
        nodes: on which.
        folder: where it works.
        num_workers: of its Trainer.
        wanted: sizes that its group is to have, one after the other, before it ends.
    """

    def __init__(self, nodes: Nodes, folder: Path, num_workers: Any, wanted: list[int]) -> None:
        self.folder = folder
        arguments = nodes.address, str(folder), num_workers, wanted, folder.name
        self._process = multiprocessing.get_context("spawn").Process(target=train, args=arguments)
        self._process.start()

    def workers(self) -> list[tuple[str, int]]:
        """Node and process of each, in rank order."""
        return [(node, pid) for node, pid in json.loads((self.folder / "workers.json").read_text())]

    def wait_for_another(self, rank: int, before: tuple[str, int]) -> tuple[str, int]:
        """Until a rank is another process."""
        deadline = time.monotonic() + DEADLINE
        while (now := self.workers()[rank]) == before:
            assert self._process.is_alive(), "the driver has ended"
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return now

    def wait_for(self, *sizes: int) -> None:
        """Until the group has had these sizes."""
        deadline = time.monotonic() + DEADLINE
        while sizes_in(self.folder / "sizes.txt")[-len(sizes) :] != list(sizes):  # it may have begun with one
            assert self._process.is_alive(), "the driver has ended"
            assert time.monotonic() < deadline, f"sizes {sizes_in(self.folder / 'sizes.txt')} instead of {sizes}"
            time.sleep(0.05)

    def end(self) -> dict[str, Any]:
        """What it has found once it ends, which it may now."""
        (self.folder / "enough").touch()
        self._process.join(DEADLINE)
        assert self._process.exitcode == 0
        found: dict[str, Any] = json.loads((self.folder / "found.json").read_text())
        return found

    def close(self) -> None:
        if self._process.is_alive():
            self._process.kill()


@pytest.mark.timeout(600)
def test_a_worker_whose_node_dies_is_replaced_on_another_node(nodes: Nodes, tmp_path: Path) -> None:
    driver = Driver(nodes, tmp_path, 2, [2])
    try:
        driver.wait_for(2)
        first, second = driver.workers()
        nodes.add()
        nodes.kill(second[0])
        node, _ = driver.wait_for_another(1, second)
        assert node not in (first[0], second[0]) and driver.workers()[0] == first
        found = driver.end()
    finally:
        driver.close()
    assert found["steps"] == list(range(10 * found["epochs"])) and found["redone"] == [0]
    assert found["off"] < 1e-10


@pytest.mark.timeout(600)
def test_a_process_that_hangs_on_another_node_is_ended_there(nodes: Nodes, tmp_path: Path) -> None:
    driver = Driver(nodes, tmp_path, 2, [2])
    try:
        driver.wait_for(2)
        _, second = driver.workers()
        os.kill(second[1], signal.SIGSTOP)
        node, _ = driver.wait_for_another(1, second)
        assert node == second[0]
        found = driver.end()
    finally:
        driver.close()
    assert not psutil.pid_exists(second[1])
    assert "has not answered" in found["causes"][0]
    assert found["redone"] == [0] and found["off"] < 1e-10


@pytest.mark.timeout(600)
def test_a_group_follows_its_cluster_up_and_down_and_up(nodes: Nodes, tmp_path: Path) -> None:
    driver = Driver(nodes, tmp_path, (1, 3), [2, 3, 2, 3])
    try:
        driver.wait_for(2)
        nodes.add()
        driver.wait_for(2, 3)
        nodes.kill(driver.workers()[1][0])
        driver.wait_for(2, 3, 2)
        nodes.add()
        driver.wait_for(2, 3, 2, 3)
        found = driver.end()
    finally:
        driver.close()
    assert found["steps"] == list(range(10 * found["epochs"])) and found["redone"] == [0]
    assert found["off"] < 1e-10
