"""Plain processes that play the ranks: real Horovod, no Ray. One set serves a whole test session.

`Ranks.run(world_size, function, *args)` calls `function(collective, *args)` on that many of them at once, each with a
group of its own making, and returns what each returned. A group is formed anew for every world size, in place.
"""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import cloudpickle

from dtrain.rendezvous import RendezvousServer, assign

DEADLINE = 300.0
"""Seconds that a call may take before the test fails."""


class Ranks:
    """Up to `size` processes; started when first asked for."""

    def __init__(self, size: int = 3) -> None:
        self._size = size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._server: RendezvousServer | None = None
        self._world_size = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        self._start()
        if world_size != self._world_size:
            self._form(world_size)
        self._send(world_size, ("call", cloudpickle.dumps((function, args))))
        return self._receive(world_size)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
        if self._server is not None:
            self._server.close()

    def _start(self) -> None:
        if self._processes:
            return
        self._server = RendezvousServer()
        context = multiprocessing.get_context("spawn")
        for _ in range(self._size):
            here, there = context.Pipe()
            process = context.Process(target=_main, args=(there,), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def _form(self, world_size: int) -> None:
        assert self._server is not None
        self._send(self._size, ("leave", None))
        self._receive(self._size)
        scope = self._server.new_scope()
        for rank, membership in enumerate(assign(["node"] * world_size, 0)):
            self._connections[rank].send(("join", (membership, scope.address)))
        self._receive(world_size)
        self._world_size = world_size

    def _send(self, count: int, message: Any) -> None:
        for connection in self._connections[:count]:
            connection.send(message)

    def _receive(self, count: int) -> list[Any]:
        replies = []
        for rank, connection in enumerate(self._connections[:count]):
            if not connection.poll(DEADLINE):
                raise TimeoutError(f"rank {rank} did not answer within {DEADLINE} s")
            replies.append(connection.recv())
        errors = [f"rank {rank}:\n{reply[1]}" for rank, reply in enumerate(replies) if reply[0] == "error"]
        if errors:
            self._world_size = 0  # the group may be out of step: form another one
            raise AssertionError("\n".join(errors))
        return [cloudpickle.loads(reply[1]) for reply in replies]


def _main(connection: Connection) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    from dtrain.collective import Collective, HorovodCollective, LocalCollective
    from dtrain.setup import set_up_tensorflow
    from dtrain.types import WorkerSettings

    set_up_tensorflow(WorkerSettings("test", 0, True, False, 1, 1))
    collective: Collective = LocalCollective()
    while True:
        try:
            kind, payload = connection.recv()
        except (EOFError, OSError):
            return
        try:
            reply: Any = None
            if kind == "leave":
                collective.close()
                collective = LocalCollective()
            elif kind == "join":
                membership, rendezvous = payload
                if membership.world_size > 1:
                    collective = HorovodCollective(membership, rendezvous, "lo")
            else:
                function, args = cloudpickle.loads(payload)
                reply = function(collective, *args)
            connection.send(("ok", cloudpickle.dumps(reply)))
        except Exception:
            connection.send(("error", traceback.format_exc()))
