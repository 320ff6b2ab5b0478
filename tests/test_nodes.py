"""Claims about clusters of several nodes, of which some die and some come while a fit goes on.

Each node has a raylet of its own, all of them on this machine, and room for one worker. The test is who looks after the
cluster; a process of its own is who trains on it.
"""

import multiprocessing
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from followed import Followed, train

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
        """End its raylet, which is what makes a machine a node; its worker's process ends by itself then."""
        (node,) = [node for node in self._cluster.worker_nodes if node.node_id == node_id]
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()  # or the worker takes it for alive

    def close(self) -> None:
        self._cluster.shutdown()


class Driver(Followed):
    """A process that trains on them."""

    def __init__(self, nodes: Nodes, folder: Path, num_workers: Any, wanted: list[int]) -> None:
        arguments = nodes.address, str(folder), num_workers, wanted
        options = {"hang_timeout": HANG_TIMEOUT}
        self._process = multiprocessing.get_context("spawn").Process(target=train, args=arguments, kwargs=options)
        super().__init__(folder, 240.0, lambda: self._process.exitcode)
        self._process.start()

    def close(self) -> None:
        if self._process.is_alive():
            self._process.kill()


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    """Two of them."""
    cluster = Nodes(2)
    yield cluster
    cluster.close()


@pytest.fixture
def two_workers(nodes: Nodes, tmp_path: Path) -> Iterator[Driver]:
    """A driver whose two workers are training."""
    driver = Driver(nodes, tmp_path, 2, [2])
    try:
        driver.wait_for_sizes(2)
        yield driver
    finally:
        driver.close()


@pytest.mark.timeout(600)
def test_a_worker_whose_node_dies_is_replaced_on_another_node(nodes: Nodes, two_workers: Driver) -> None:
    before = two_workers.workers()
    nodes.add()
    nodes.kill(before[1][0])
    first, second = two_workers.wait_for_another(1, before)
    assert first == before[0] and second[0] not in {node for node, _ in before}
    found = two_workers.end()
    assert found["steps"] == list(range(10 * found["epochs"])) and set(found["redone"]) == {0}
    assert found["off"] < 1e-10


@pytest.mark.timeout(600)
def test_a_process_that_hangs_on_another_node_is_ended_there(two_workers: Driver) -> None:
    before = two_workers.workers()
    node, pid = before[1]
    os.kill(pid, signal.SIGSTOP)
    _, second = two_workers.wait_for_another(1, before)
    assert second[0] == node and not psutil.pid_exists(pid)
    found = two_workers.end()
    assert "has not answered" in found["causes"][0]
    assert set(found["redone"]) == {0} and found["off"] < 1e-10


@pytest.mark.timeout(600)
def test_a_group_follows_its_cluster_up_and_down_and_up(nodes: Nodes, tmp_path: Path) -> None:
    """Where ranks were not at one place when one died, another leaves, and joins again: down may go by 1."""
    driver = Driver(nodes, tmp_path, (1, 3), [2, 3])
    try:
        driver.wait_for_sizes(2)
        nodes.add()
        driver.wait_for_sizes(2, 3)
        nodes.kill(driver.workers()[1][0])
        driver.wait_until(lambda: driver.sizes()[-1] < 3, "down")
        driver.wait_for_sizes(2)
        nodes.add()
        driver.wait_for_sizes(3)
        found = driver.end()
    finally:
        driver.close()
    assert found["steps"] == list(range(10 * found["epochs"])) and set(found["redone"]) == {0}
    assert found["off"] < 1e-10
