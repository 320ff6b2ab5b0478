"""Owns who is rank what, and the small key-value server through which the ranks of one generation find each other.

`assign` is a pure function. `RendezvousServer` speaks the little HTTP that Horovod's C++ client speaks during
`hvd.init()`. That client sends no headers of its own and its parser splits its URL at the first "/", so the secret of
a generation rides in the path: whoever does not know it reads and writes nothing.

Promises: one address is bound and no other; only the keys of a rendezvous exist; nothing is read from disk, nothing
unpickled, no secret logged; `close()` leaves no thread and no port behind.
"""

import hmac
import ipaddress
import logging
import re
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Self

from dtrain.errors import ConfigError
from dtrain.types import Membership

log = logging.getLogger(__name__)

MAX_HEADER = 4096
MAX_BODY = 64 * 1024
"""Bytes. A rank puts 136 of them per peer, so this is enough for 480 ranks."""

_LONG_POLL = 5.0  # seconds; Horovod's own waiting asks every 10 ms
_SLOW_CLIENT = 5.0  # seconds that a request may take to arrive, or a reply to leave
_BACKLOG = 1024

# /SECRET:PORT/SCOPE/KEY, as Horovod's gloo_context.cc names scopes and Gloo's rendezvous/context.cc names keys.
_PATH = re.compile(
    r"/(?P<secret>[0-9a-f]{1,128}):\d{1,5}"
    r"/(?P<name>(?:global|local_[A-Za-z0-9._-]{1,255}|cross_\d{1,6})(?:_process_set_hash_[0-9a-f]{1,16})?"
    r"/(?P<address>\d{1,6}|rank_\d{1,6}))",
    re.ASCII,
)


def assign(node_ids: Sequence[str], generation: int) -> list[Membership]:
    """Gives each rank its place in the group.

    Args:
        node_ids: the node that each rank runs on, in rank order.
        generation: the number of the group.

    Returns:
        One `Membership` a rank. `local_rank` counts the ranks of a node in rank order; `cross_rank` counts, in the
        order of their first rank, the nodes that have a rank with that `local_rank`, so `cross_size` may differ
        between ranks where nodes hold different numbers of them.
    """
    sizes = Counter(node_ids)
    taken: Counter[str] = Counter()
    members = []
    for rank, node in enumerate(node_ids):
        local_rank = taken[node]
        taken[node] += 1
        peers = [other for other, size in sizes.items() if size > local_rank]
        members.append(
            Membership(
                rank=rank,
                world_size=len(node_ids),
                local_rank=local_rank,
                local_size=sizes[node],
                cross_rank=peers.index(node),
                cross_size=len(peers),
                generation=generation,
            )
        )
    return members


@dataclass(frozen=True)
class Scope:
    """One generation's place in the server.

    Attributes:
        address: for HOROVOD_GLOO_RENDEZVOUS_ADDR. It holds the secret, so it is not shown in `repr`.
        port: for HOROVOD_GLOO_RENDEZVOUS_PORT. The port that counts is in `address`; any number of a port will do.
    """

    address: str = field(repr=False)
    port: int
    secret: str = field(repr=False)


class RendezvousServer:
    """A key-value server for `hvd.init()`, on one address and an ephemeral port.

    Example:
        ```python
        with RendezvousServer() as server:
            scope = server.new_scope()
            environment = {
                "HOROVOD_GLOO_RENDEZVOUS_ADDR": scope.address,
                "HOROVOD_GLOO_RENDEZVOUS_PORT": str(scope.port),
            }
        ```

    Args:
        host: the IPv4 address to bind; that of the interface the workers use, or loopback where all are on one node.

    Raises:
        ConfigError: `host` is not one IPv4 address of this machine.
    """

    def __init__(self, host: str = "127.0.0.1") -> None:
        try:
            if ipaddress.IPv4Address(host).is_unspecified:
                raise ValueError("it means every interface")
            self._listener = socket.create_server((host, 0), backlog=_BACKLOG)
        except (OSError, ValueError) as error:
            raise ConfigError(f"host={host!r} must be one IPv4 address of this machine: {error}") from error
        self.host = host
        self.port: int = self._listener.getsockname()[1]
        self._changed = threading.Condition()  # guards the four below
        self._scopes: dict[str, dict[str, bytes]] = {}
        self._serving: dict[socket.socket, threading.Thread] = {}
        self._closed = False
        self._acceptor = threading.Thread(target=self._accept, name="dtrain-rendezvous", daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def new_scope(self) -> Scope:
        """Opens an empty scope with a secret of its own. Those opened before stay valid until they are dropped."""
        secret = secrets.token_hex(32)
        with self._changed:
            if self._closed:
                raise RuntimeError("the rendezvous server is closed")
            self._scopes[secret] = {}
        return Scope(address=f"{self.host}:{self.port}/{secret}", port=self.port, secret=secret)

    def drop(self, scope: Scope) -> None:
        """Invalidates a scope: whoever still waits in it, or asks for it later, gets 404."""
        with self._changed:
            self._scopes.pop(scope.secret, None)
            self._changed.notify_all()

    def close(self) -> None:
        """Drops every scope, ends every connection and thread, and frees the port. Closing twice is fine."""
        with self._changed:
            self._closed = True
            self._scopes.clear()
            self._changed.notify_all()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes accept(), which close() does not
        self._acceptor.join()
        self._listener.close()
        with self._changed:
            serving = list(self._serving.items())
        for connection, thread in serving:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            thread.join()

    def _accept(self) -> None:
        while not self._closed:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._closed:  # out of file descriptors, say
                    log.debug("rendezvous: accept failed: %s", error)
                    time.sleep(0.05)
                continue
            thread = threading.Thread(target=self._serve, args=(connection,), name="dtrain-rendezvous", daemon=True)
            with self._changed:  # so that the thread cannot take itself off the list before it is on it
                try:
                    thread.start()
                    self._serving[connection] = thread
                except RuntimeError as error:  # out of threads
                    log.debug("rendezvous: %s", error)
                    connection.close()

    def _serve(self, connection: socket.socket) -> None:
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            status, content = self._reply(connection)
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Length: {len(content)}\r\n"
            connection.settimeout(_SLOW_CLIENT)
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + content)
        except OSError as error:
            log.debug("rendezvous: a client went away or was too slow: %s", error)
        finally:
            with self._changed:
                connection.close()
                del self._serving[connection]

    def _reply(self, connection: socket.socket) -> tuple[HTTPStatus, bytes]:
        try:
            return self._answer(*_read_request(connection))
        except _Refused as refused:
            return refused.status, b""

    def _answer(self, method: str, path: str, body: bytes) -> tuple[HTTPStatus, bytes]:
        if method not in ("GET", "PUT", "DELETE"):
            raise _Refused(HTTPStatus.METHOD_NOT_ALLOWED)
        match = _PATH.fullmatch(path)
        if match is None:
            raise _Refused(HTTPStatus.NOT_FOUND)
        secret, name = match["secret"], match["name"]
        with self._changed:
            if method == "GET":
                # A rank waits for the others' addresses; their host names it takes or leaves.
                if match["address"].isdigit():
                    self._changed.wait_for(
                        lambda: (values := self._values(secret)) is None or name in values, timeout=_LONG_POLL
                    )
                value = (self._values(secret) or {}).get(name)
                return (HTTPStatus.NOT_FOUND, b"") if value is None else (HTTPStatus.OK, value)
            values = self._values(secret)
            if values is None:
                raise _Refused(HTTPStatus.NOT_FOUND)
            if method == "PUT":
                values[name] = body
                self._changed.notify_all()
            return HTTPStatus.OK, b""  # DELETE says that a rank has finished; the scope ends when it is dropped

    def _values(self, secret: str) -> dict[str, bytes] | None:
        found = None
        for known, values in self._scopes.items():
            if hmac.compare_digest(known, secret):
                found = values
        return found


class _Refused(Exception):
    def __init__(self, status: HTTPStatus) -> None:
        self.status = status


def _read_request(connection: socket.socket) -> tuple[str, str, bytes]:
    """Reads one request: its method, path and body, all of it within the time and the sizes allowed."""
    deadline = time.monotonic() + _SLOW_CLIENT
    received = b""

    def receive() -> bytes:
        connection.settimeout(max(deadline - time.monotonic(), 0.001))
        part = connection.recv(65536)
        if not part:
            raise ConnectionError("the client hung up")
        return part

    while b"\r\n\r\n" not in received[: MAX_HEADER + 4]:
        if len(received) > MAX_HEADER:
            raise _Refused(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        received += receive()
    head, body = received.split(b"\r\n\r\n", 1)
    request_line, *fields = head.decode("latin-1").split("\r\n")
    try:
        method, path, _version = request_line.split(" ")
        lengths = {value.strip() for name, _, value in (f.partition(":") for f in fields) if name == "Content-Length"}
        (length,) = lengths or {"0"}
        size = int(length) if re.fullmatch(r"[0-9]{1,9}", length) else -1
    except ValueError:
        raise _Refused(HTTPStatus.BAD_REQUEST) from None
    if size < 0:
        raise _Refused(HTTPStatus.BAD_REQUEST)
    if size > MAX_BODY:
        raise _Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE)
    while len(body) < size:
        body += receive()
    return method, path, body[:size]
