"""Claims about rendezvous.py: who is rank what, what the server lets through, and that Horovod starts through it."""

import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dtrain import rendezvous
from dtrain.errors import ConfigError
from dtrain.rendezvous import MAX_BODY, MAX_HEADER, RendezvousServer, Scope, assign


@pytest.fixture
def server() -> Iterator[RendezvousServer]:
    with RendezvousServer() as server:
        yield server


def exchange(server: RendezvousServer, data: bytes) -> bytes:
    """Sends bytes and returns all that comes back."""
    with socket.create_connection((server.host, server.port), timeout=10) as connection:
        connection.sendall(data)
        reply = b""
        while part := connection.recv(65536):
            reply += part
        return reply


def ask(server: RendezvousServer, scope: Scope | str, method: str, name: str, body: bytes = b"") -> tuple[int, bytes]:
    """One request as Horovod's client writes it: its status and body."""
    secret = scope if isinstance(scope, str) else scope.secret
    head = f"{method} /{secret}:7/{name} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n\r\n"
    head_back, body_back = exchange(server, head.encode() + body).split(b"\r\n\r\n", 1)
    return int(head_back.split()[1]), body_back


# --- assign -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "expected"),  # (local_rank, local_size, cross_rank, cross_size) of each rank
    [
        ("", []),
        ("a", [(0, 1, 0, 1)]),
        ("aa", [(0, 2, 0, 1), (1, 2, 0, 1)]),
        ("ab", [(0, 1, 0, 2), (0, 1, 1, 2)]),
        ("aabb", [(0, 2, 0, 2), (1, 2, 0, 2), (0, 2, 1, 2), (1, 2, 1, 2)]),
        ("abab", [(0, 2, 0, 2), (0, 2, 1, 2), (1, 2, 0, 2), (1, 2, 1, 2)]),
        ("aab", [(0, 2, 0, 2), (1, 2, 0, 1), (0, 1, 1, 2)]),
        ("abb", [(0, 1, 0, 2), (0, 2, 1, 2), (1, 2, 0, 1)]),  # only b has a second rank: it is number 0 there
        ("abbcc", [(0, 1, 0, 3), (0, 2, 1, 3), (1, 2, 0, 2), (0, 2, 2, 3), (1, 2, 1, 2)]),
    ],
)
def test_places_of_ranks_on_nodes(nodes: str, expected: list[tuple[int, int, int, int]]) -> None:
    members = assign(list(nodes), generation=4)
    assert [(m.local_rank, m.local_size, m.cross_rank, m.cross_size) for m in members] == expected
    assert [(m.rank, m.world_size, m.generation) for m in members] == [(r, len(nodes), 4) for r in range(len(nodes))]


# --- what the server lets through -------------------------------------------------------------------------------------

KNOWN = [
    "global/0",
    "global/rank_0",
    "local_node-1.example/12",
    "cross_3/rank_2",
    "global_process_set_hash_1f9/1",
    "local_10.0.0.1_process_set_hash_a/0",
]
UNKNOWN = [
    "global",
    "global/",
    "global/x",
    "global/rank_",
    "global/-1",
    "global/0/0",
    "global/0?x=1",
    "other/0",
    "local_/0",
    "local_a%2Fb/0",
    "cross_a/0",
    "../../etc/passwd",
    "global/../0",
    "rank_and_size/a:0",
]


@pytest.mark.parametrize("name", KNOWN)
def test_known_keys_are_kept_within_their_scope(server: RendezvousServer, name: str) -> None:
    scope, other = server.new_scope(), server.new_scope()
    assert ask(server, scope, "PUT", name, b"\x00\r\n\r\nvalue") == (200, b"")
    assert ask(server, scope, "GET", name) == (200, b"\x00\r\n\r\nvalue")
    server.drop(other)
    assert ask(server, other, "GET", name) == (404, b"")


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE"])
def test_unknown_keys_are_refused(server: RendezvousServer, method: str, name: str) -> None:
    assert ask(server, server.new_scope(), method, name) == (404, b"")


@pytest.mark.parametrize("method", ["HEAD", "POST", "OPTIONS", "PATCH", "TRACE", "CONNECT", "get"])
def test_other_methods_are_refused(server: RendezvousServer, method: str) -> None:
    scope = server.new_scope()
    ask(server, scope, "PUT", "global/0", b"value")
    assert ask(server, scope, method, "global/0") == (405, b"")


def test_a_wrong_secret_reads_and_writes_nothing(server: RendezvousServer) -> None:
    scope = server.new_scope()
    ask(server, scope, "PUT", "global/rank_0", b"value")
    for wrong in ("0" * 64, scope.secret[:-1], scope.secret + "0", scope.secret.upper(), ""):
        assert ask(server, wrong, "GET", "global/rank_0") == (404, b"")
        assert ask(server, wrong, "PUT", "global/rank_0", b"forged") == (404, b"")
    assert ask(server, scope, "GET", "global/rank_0") == (200, b"value")


def test_secrets_are_long_new_each_time_and_not_shown(server: RendezvousServer) -> None:
    scopes = [server.new_scope() for _ in range(3)]
    assert len({scope.secret for scope in scopes}) == 3
    assert all(re.fullmatch("[0-9a-f]{64}", scope.secret) for scope in scopes)
    assert all(scope.secret not in repr(scope) for scope in scopes)
    assert scopes[0].address == f"127.0.0.1:{server.port}/{scopes[0].secret}"


def test_secrets_are_not_logged(server: RendezvousServer, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    scope = server.new_scope()
    ask(server, scope, "PUT", "global/0", b"value")
    ask(server, scope, "HEAD", "global/0")
    ask(server, scope, "GET", "nothing")
    assert scope.secret not in caplog.text


def test_delete_is_allowed_and_deletes_nothing(server: RendezvousServer) -> None:
    scope = server.new_scope()
    ask(server, scope, "PUT", "global/0", b"value")
    assert ask(server, scope, "DELETE", "global/0") == (200, b"")
    assert ask(server, scope, "GET", "global/0") == (200, b"value")


def test_sizes_are_capped(server: RendezvousServer) -> None:
    scope = server.new_scope()
    assert ask(server, scope, "PUT", "global/0", b"x" * MAX_BODY) == (200, b"")
    path = f"/{scope.secret}:7/global/1"
    too_long = f"PUT {path} HTTP/1.1\r\nContent-Length: {MAX_BODY + 1}\r\n\r\n"
    assert exchange(server, too_long.encode()).startswith(b"HTTP/1.1 413 ")
    assert exchange(server, b"GET / HTTP/1.1\r\nX: " + b"x" * (MAX_HEADER - 18)).startswith(b"HTTP/1.1 431 ")
    for length in ("-1", "1e3", "", "9" * 12, "1\r\nContent-Length: 2"):
        reply = exchange(server, f"PUT {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n".encode())
        assert reply.startswith(b"HTTP/1.1 400 ")
    assert exchange(server, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert set(server._scopes[scope.secret]) == {"global/0"}


def test_slow_clients_are_cut_off_in_bounded_time(server: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_SLOW_CLIENT", 0.3)
    begin = time.monotonic()
    with socket.create_connection((server.host, server.port), timeout=5) as connection:
        for _ in range(100):  # a byte now and then does not keep the connection
            try:
                connection.sendall(b"G")
                time.sleep(0.02)
            except OSError:
                break
    assert time.monotonic() - begin < 2


# --- waiting ----------------------------------------------------------------------------------------------------------


def test_asking_for_an_address_waits_until_it_is_there(server: RendezvousServer) -> None:
    scope = server.new_scope()
    waiting = in_thread(lambda: ask(server, scope, "GET", "global/1"))
    eventually(lambda: len(server._serving) == 1)
    ask(server, scope, "PUT", "global/1", b"address")
    assert waiting() == (200, b"address")


def test_waiting_ends(server: RendezvousServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "_LONG_POLL", 0.1)
    assert ask(server, server.new_scope(), "GET", "global/1") == (404, b"")


def test_host_names_are_answered_at_once(server: RendezvousServer) -> None:
    begin = time.monotonic()
    assert ask(server, server.new_scope(), "GET", "global/rank_1") == (404, b"")
    assert time.monotonic() - begin < 1


def test_dropping_a_scope_wakes_those_who_wait_in_it(server: RendezvousServer) -> None:
    scope = server.new_scope()
    waiting = in_thread(lambda: ask(server, scope, "GET", "global/1"))
    eventually(lambda: len(server._serving) == 1)
    begin = time.monotonic()
    server.drop(scope)
    assert waiting() == (404, b"")
    assert time.monotonic() - begin < 1
    assert ask(server, scope, "PUT", "global/0", b"late") == (404, b"")


# --- the port and the threads -----------------------------------------------------------------------------------------


def test_listens_on_the_one_address_only(server: RendezvousServer) -> None:
    assert [c.laddr for c in listeners() if c.laddr.port == server.port] == [("127.0.0.1", server.port)]


@pytest.mark.parametrize("host", ["0.0.0.0", "", "localhost", "::", "192.0.2.255.1", "203.0.113.9"])
def test_anything_but_one_address_of_this_machine_is_refused(host: str) -> None:
    with pytest.raises(ConfigError, match="host="):
        RendezvousServer(host)


def test_close_leaves_no_thread_and_no_port() -> None:
    threads = set(threading.enumerate())
    server = RendezvousServer()
    scope = server.new_scope()
    waiting = in_thread(lambda: exchange(server, f"GET /{scope.secret}:7/global/1 HTTP/1.1\r\n\r\n".encode()))
    with socket.create_connection((server.host, server.port)):  # says nothing
        eventually(lambda: len(server._serving) == 2)
        begin = time.monotonic()
        server.close()
        assert time.monotonic() - begin < 1
    waiting()
    assert set(threading.enumerate()) == threads
    assert not [c for c in listeners() if c.laddr.port == server.port]
    server.close()
    with pytest.raises(RuntimeError, match="closed"):
        server.new_scope()


# --- real Horovod -----------------------------------------------------------------------------------------------------

RANK = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import horovod.tensorflow as hvd
rank, size, *addresses = sys.argv[1:]
for address in addresses:
    os.environ["HOROVOD_GLOO_RENDEZVOUS_ADDR"] = address
    hvd.init()
    assert (hvd.rank(), hvd.size()) == (int(rank), int(size))
    total = hvd.allreduce(np.float32(hvd.rank() + 1), op=hvd.Sum, name="total")
    assert float(total) == sum(range(1, hvd.size() + 1)), total
    hvd.shutdown()
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("size", "generations"), [(2, 2), (3, 1)])
def test_horovod_starts_through_it_in_every_generation(size: int, generations: int, tmp_path: Path) -> None:
    with RendezvousServer() as server:
        scopes = [server.new_scope() for _ in range(generations)]
        ranks = [start_rank(tmp_path, m.rank, size, scopes) for m in assign(["node"] * size, 0)]
        outputs = [rank.communicate(timeout=100)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [0] * size, "\n".join(outputs)
        for scope in scopes:
            names = set(server._scopes[scope.secret])
            assert {f"global/{rank}" for rank in range(size)} <= names
            assert {f"local_node/rank_{rank}" for rank in range(size)} <= names


def start_rank(folder: Path, rank: int, size: int, scopes: list[Scope]) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": str(rank),
        "HOROVOD_LOCAL_SIZE": str(size),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_HOSTNAME": "node",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "0",
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", RANK, str(rank), str(size), *(scope.address for scope in scopes)]
    return subprocess.Popen(
        command, env=environment, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def listeners() -> list[Any]:
    return [c for c in psutil.Process().net_connections("tcp") if c.status == psutil.CONN_LISTEN]


def in_thread(call: Callable[[], Any]) -> Callable[[], Any]:
    """Starts a call in a thread; what is returned waits for the thread to end and gives the result."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(call()))
    thread.start()

    def result() -> Any:
        thread.join(timeout=10)
        assert results, "the call did not end, or raised"
        return results[0]

    return result


def eventually(condition: Callable[[], bool], within: float = 5.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "the condition was not met in time"
        time.sleep(0.005)
