"""Owns that nobody waits for a machine that is gone.

Where a process dies, its machine ends its connections, and whoever waits for it learns that within moments. Where the
machine itself is gone, or a cable is, nothing is heard any more, and a connection counts as good for a minute or more.
"""

import contextlib
import os
import socket
from collections.abc import Collection, Sequence

import psutil
import ray

from dtrain.types import WorkerInfo

HEAD = "node:__internal_head__"
"""What Ray calls a resource of its head's node."""


def address_of_lost(rank: int, workers: Sequence[WorkerInfo], dead: Collection[int], is_silent: bool) -> str | None:
    """The address of a dead rank's machine, where nobody should be connected to it any more; None: somebody may.

    That is where Ray has lost its node, or the process is silent, and where neither a rank that lives, nor this driver,
    nor Ray's head is on that machine.

    Args:
        rank: that died.
        workers: where the ranks run.
        dead: those that do no longer.
        is_silent: it was ended since it did not answer, and nobody has confirmed that.
    """
    nodes = {node["NodeID"]: node for node in ray.nodes()}
    node = nodes.get(workers[rank].node_id)
    if node is None or HEAD in node["Resources"] or (node["Alive"] and not is_silent):
        return None
    address: str = node["NodeManagerAddress"]
    others = {worker.node_id for worker in workers if worker.rank not in dead}
    others.add(ray.get_runtime_context().get_node_id())
    in_use = {nodes[other]["NodeManagerAddress"] for other in others if other in nodes}
    return None if address in in_use else address


def let_go(address: str) -> int:
    """End this process's connections to a machine; how many there were."""
    number = 0
    for connection in psutil.Process().net_connections("tcp4"):
        if connection.raddr and connection.raddr.ip == address and connection.fd >= 0:
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as copy:
                copy.shutdown(socket.SHUT_RDWR)
                number += 1
    return number
