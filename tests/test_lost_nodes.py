"""Claims about connections to machines that are gone: they are ended, and no others."""

import contextlib
import socket
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from dtrain.lost_nodes import HEAD, address_of_lost, let_go
from dtrain.types import WorkerInfo
from dtrain.worker_group import WorkerGroup


def test_connections_to_one_machine_are_ended_and_no_others() -> None:
    with contextlib.ExitStack() as stack:
        ends = {}
        for address in ("127.0.0.2", "127.0.0.3"):
            server = stack.enter_context(socket.create_server((address, 0)))
            client = stack.enter_context(socket.create_connection(server.getsockname()))
            ends[address] = client, stack.enter_context(server.accept()[0])
            client.settimeout(5)
        assert let_go("127.0.0.2") == 1
        lost, kept = (ends[address] for address in ends)
        assert lost[0].recv(1) == b""  # who waits is told
        kept[1].sendall(b"x")
        assert kept[0].recv(1) == b"x"


def node(name: str, address: str, alive: bool = True, **resources: float) -> dict[str, object]:
    return {"NodeID": name, "NodeManagerAddress": address, "Alive": alive, "Resources": resources}


DRIVER = node("driver", "10.0.0.9")


@pytest.mark.parametrize(
    ("nodes", "is_silent", "expected"),  # of rank 1, on node b; rank 2 on c has died, too
    [
        ([node("a", "10.0.0.1"), node("b", "10.0.0.2", alive=False)], False, "10.0.0.2"),
        ([node("a", "10.0.0.1"), node("b", "10.0.0.2")], False, None),  # the process died, and has said so
        ([node("a", "10.0.0.1"), node("b", "10.0.0.2")], True, "10.0.0.2"),
        ([node("a", "10.0.0.1"), node("b", "10.0.0.1", alive=False)], False, None),  # two nodes of one machine
        ([node("a", "10.0.0.1"), node("b", "10.0.0.9", alive=False)], False, None),  # the driver's machine
        ([node("a", "10.0.0.1"), node("b", "10.0.0.2", **{HEAD: 1.0})], True, None),
        ([node("a", "10.0.0.1"), node("b", "10.0.0.2", alive=False), node("c", "10.0.0.2")], False, "10.0.0.2"),
        ([node("a", "10.0.0.1")], False, None),
    ],
)
def test_whose_address_is_let_go(
    nodes: list[dict[str, object]], is_silent: bool, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray, "nodes", lambda: [DRIVER, *nodes])
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "driver"))
    workers = [WorkerInfo(rank, 1, "host", name) for rank, name in enumerate("abc")]
    assert address_of_lost(1, workers, {1, 2}, is_silent) == expected


def test_those_who_wait_for_a_lost_machine_are_told_to_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[int, str]] = []

    class Actor:
        def __init__(self, rank: int) -> None:
            self.let_go = self
            self.rank = rank

        def options(self, **_: str) -> Any:
            return self

        def remote(self, address: str) -> None:
            told.append((self.rank, address))

    group = SimpleNamespace(workers=("somewhere",), _actors=[Actor(rank) for rank in range(3)])
    monkeypatch.setattr("dtrain.worker_group.address_of_lost", lambda *_: "10.0.0.2")
    WorkerGroup._let_go(group, 1, {1}, [0, 2], False)  # type: ignore[arg-type]
    assert told == [(0, "10.0.0.2"), (2, "10.0.0.2")]
