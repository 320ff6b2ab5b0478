"""Plain processes that play the ranks: real Horovod, no Ray. One set serves a whole test session.

`Ranks.run(world_size, function, *args)` calls `function(collective, *args)` on that many of them at once, each with a
group of its own making, and returns what each returned. A group is formed anew for every world size, in place.
`Ranks.map(function, items)` calls `function(item)` for each item, in whichever process is free, without a group.
"""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection, wait
from typing import Any

import cloudpickle

from dtrain.rendezvous import RendezvousServer, assign

DEADLINE = 300.0
"""Seconds that a call may take before the test fails."""
GRACE = 15.0
"""Seconds that the other ranks get to answer once one has raised; they may wait for it in a collective for ever."""


class Ranks:
    """Up to `size` processes; started when first asked for, and anew after a group that did not answer."""

    def __init__(self, size: int = 3) -> None:
        self._size = size
        self._connections: list[Connection] = []
        self._processes: list[Any] = []
        self._server: RendezvousServer | None = None
        self._world_size = 0

    def run(self, world_size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returned, in rank order.

        Raises:
            AssertionError: a rank raised; the message has every traceback.
            TimeoutError: a rank did not answer.
        """
        self._start()
        if world_size != self._world_size:
            self._form(world_size)
        self._send(world_size, ("call", cloudpickle.dumps((function, args))))
        return self._receive(world_size)

    def map(self, function: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
        """What `function` returned for each item, in their order.

        Raises:
            AssertionError: one raised.
            TimeoutError: one took longer than the deadline.
        """
        self._start()
        waiting = list(enumerate(items))
        results: list[Any] = [None] * len(waiting)
        errors: list[str] = []
        busy: dict[Connection, int] = {}
        free = list(self._connections)
        while waiting or busy:
            while waiting and free:
                index, item = waiting.pop(0)
                connection = free.pop()
                connection.send(("apply", cloudpickle.dumps((function, (item,)))))
                busy[connection] = index
            ready = wait(list(busy), DEADLINE)
            if not ready:
                self._kill()
                raise TimeoutError(f"no answer within {DEADLINE} s")
            for connection in ready:
                outcome, payload = connection.recv()
                index = busy.pop(connection)
                free.append(connection)
                if outcome == "error":
                    errors.append(payload)
                else:
                    results[index] = cloudpickle.loads(payload)
        if errors:
            raise AssertionError("\n".join(errors))
        return results

    def rest(self) -> None:
        """Part the group: Horovod's threads look for work a thousand times a second."""
        if self._world_size > 1:
            self._form(1)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(10)
        self._kill()
        if self._server is not None:
            self._server.close()
            self._server = None

    def _start(self) -> None:
        if self._processes:
            return
        if self._server is None:
            self._server = RendezvousServer()
        context = multiprocessing.get_context("spawn")
        for _ in range(self._size):
            here, there = context.Pipe()
            process = context.Process(target=_main, args=(there,), daemon=True)
            process.start()
            there.close()
            self._connections.append(here)
            self._processes.append(process)

    def _kill(self) -> None:
        for process in self._processes:
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections:
            connection.close()
        self._processes, self._connections, self._world_size = [], [], 0

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
        replies: dict[int, Any] = {}
        deadline = time.monotonic() + DEADLINE
        failed = False
        while len(replies) < count:
            waiting = {self._connections[rank]: rank for rank in range(count) if rank not in replies}
            ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                replies[waiting[connection]] = connection.recv()
                if replies[waiting[connection]][0] == "error" and not failed:
                    failed = True
                    deadline = min(deadline, time.monotonic() + GRACE)
        silent = [rank for rank in range(count) if rank not in replies]
        errors = [f"rank {rank}:\n{reply[1]}" for rank, reply in sorted(replies.items()) if reply[0] == "error"]
        if silent:
            self._kill()
            errors.append(f"ranks {silent} did not answer")
        if errors:
            self._world_size = 0  # the group may be out of step: form another one
            raise (AssertionError if failed else TimeoutError)("\n".join(errors))
        return [cloudpickle.loads(replies[rank][1]) for rank in range(count)]


def _main(connection: Connection) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
    from dtrain.slim_keras import import_keras

    import_keras()
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
                    collective = HorovodCollective(membership)
                    collective.join(membership, rendezvous, "lo")
            else:
                function, args = cloudpickle.loads(payload)
                _in_default_precision()
                reply = function(collective, *args) if kind == "call" else function(*args)
            connection.send(("ok", cloudpickle.dumps(reply)))
        except Exception:
            connection.send(("error", traceback.format_exc()))


def _in_default_precision() -> None:
    """What a test has set in Keras is not for the next one."""
    import keras

    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")
