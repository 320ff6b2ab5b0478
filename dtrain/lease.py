"""Owns the lease of a run: one driver trains a run at a time; a second one is refused and told who does.

The lease is `lease.json` in the run's folder, which says who holds it. What it promises depends on the storage.

- Local disks, and network folders whose `flock` reaches all machines: exactly one holder. The kernel ends the lock with
  the process, however that ends, so a dead holder's lease is free at once. Child processes do not keep it.
- Object stores behind fsspec have no locks. The file has a random token and the time, and a thread renews it every
  10 s; one that is older than 60 s is free. Who takes it writes it, waits a moment, and reads back who wrote last. If a
  write took longer than that moment, or a holder was stopped for a minute, two believe for a while that they hold it:
  `check` tells the one whose token is gone. The machines' clocks must agree to within some seconds.

It guards against accidents, not against somebody who may write in the folder.
"""

import fcntl
import getpass
import json
import math
import os
import secrets
import socket
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from types import TracebackType

from dtrain.errors import CheckpointError, ConfigError, TakenOver
from dtrain.storage import Folder

LEASE = "lease.json"
RENEW_SECONDS = 10.0
EXPIRE_SECONDS = 60.0
SETTLE_SECONDS = 2.0
"""How long after writing it is read back who wrote last; longer than a small object takes to be written."""

_ANSWER_SECONDS = 1.0  # a holder writes who it is right after it has the lock
_LIMIT = 4096


class Lease(ABC):
    """A driver's right to train a run. A context manager; `acquire` makes one.

    with Lease.acquire(run.url) as lease:
        ...
        lease.check()
        store.commit(staging, manifest)
    """

    def __init__(self, folder: Folder, mine: "_Holder") -> None:
        self._folder = folder
        self._mine = mine
        self._is_held = True
        self._taken_over: TakenOver | None = None

    @classmethod
    def acquire(
        cls, folder_url: str, clock: Callable[[], float] = time.time, sleep: Callable[[float], object] = time.sleep
    ) -> "Lease":
        """Takes the lease of a run, also that of a dead holder.

        Args:
            folder_url: the run's folder, which exists: a local path or an fsspec URL.
            clock: seconds since 1970, the same on all machines. For object stores, as `sleep` is.
            sleep: waits for so many seconds.

        Raises:
            ConfigError: another driver holds it, which is named; or the folder cannot be written or locked.
        """
        folder = Folder(folder_url)
        try:
            return _LocalLease(folder) if folder.is_local else _ObjectLease(folder, clock, sleep)
        except OSError as error:
            raise ConfigError(
                f"{_run(folder)} cannot be locked for this driver alone: {error}; mend that, or give another "
                "storage_path"
            ) from error

    def check(self) -> None:
        """Confirms that the lease is still held; to be called before every commit.

        Raises:
            TakenOver: another driver has: nothing may be written.
            CheckpointError: that cannot be found out.
        """
        if not self._is_held or self._mine.pid != os.getpid():
            raise CheckpointError(
                f"{_run(self._folder)} is not held by this process (any more): acquire its lease first"
            )
        try:
            found = _read(self._folder)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder.url}/{LEASE} cannot be read: {error}; without it this driver cannot know that it alone "
                "writes checkpoints of this run"
            ) from error
        if found is None or found.token != self._mine.token:
            raise TakenOver(
                f"{_run(self._folder)} was taken over by {found or 'somebody who removed its lease'}: this driver "
                "writes no more checkpoints; train under another run_name"
            )

    def check_known(self) -> None:
        """Raises TakenOver where it is known by now that another driver has the lease; asks nobody."""
        if self._taken_over is not None:
            raise self._taken_over

    def release(self) -> None:
        """Gives the lease back. Nothing if that was done before, or it is another's by now."""
        if not self._is_held or self._mine.pid != os.getpid():
            return
        self._is_held = False
        with suppress(OSError):  # what is left is free by itself
            found = _read(self._folder)
            if found is not None and found.token == self._mine.token:
                self._folder.remove_file(LEASE)
        self._unlock()

    @abstractmethod
    def _unlock(self) -> None: ...

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


class _LocalLease(Lease):
    """The lock is what counts; the file says who holds it. It is removed by its holder only, with the lock in hand."""

    def __init__(self, folder: Folder) -> None:
        path = f"{folder.path}/{LEASE}"
        try:
            self._descriptor: int | None = _open_locked(path)
        except BlockingIOError:
            raise _refusal(folder, _ask(folder)) from None
        _LOCKED.add(self)
        super().__init__(folder, _Holder.here(time.time()))
        try:
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, self._mine.encode(), 0)
        except BaseException:
            self.close()
            raise

    def _unlock(self) -> None:
        assert self._descriptor is not None
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)  # closing is not enough while a process is being started
        self.close()

    def close(self) -> None:
        """Closes the file in this process, which ends the lock if no other process has it open."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


class _ObjectLease(Lease):
    """The token is what counts."""

    def __init__(self, folder: Folder, clock: Callable[[], float], sleep: Callable[[float], object]) -> None:
        self._clock = clock
        self._turn = threading.Lock()  # the thread must not write after the release
        self._released = threading.Event()
        found = _read(folder)
        if found is not None and clock() - found.renewed <= EXPIRE_SECONDS:
            raise _refusal(folder, found, clock() - found.renewed)
        super().__init__(folder, _Holder.here(clock()))
        try:
            self._write()
            sleep(SETTLE_SECONDS)
            found = _read(folder)
            if found is None or found.token != self._mine.token:
                raise _refusal(folder, found)
        except BaseException:
            self.release()
            raise
        threading.Thread(target=self._keep, name="dtrain-lease", daemon=True).start()

    def check(self) -> None:
        with self._turn:
            super().check()
            try:
                self._write()  # so that it does not expire before the commit is done
            except OSError as error:
                raise CheckpointError(
                    f"{self._folder.url}/{LEASE} cannot be renewed: {error}; mend its storage"
                ) from error

    def release(self) -> None:
        with self._turn:
            super().release()

    def _write(self) -> None:
        self._folder.replace(LEASE, replace(self._mine, renewed=self._clock()).encode())

    def _keep(self) -> None:
        while not self._released.wait(RENEW_SECONDS) and self._taken_over is None:
            # What is wrong now may be mended in time; else the check before the next commit tells it.
            with suppress(Exception):
                try:
                    self.check()
                except TakenOver as error:
                    self._taken_over = error

    def _unlock(self) -> None:
        self._released.set()


@dataclass(frozen=True)
class _Holder:
    """Who holds a lease; `renewed` is in seconds since 1970."""

    token: str
    pid: int
    host: str
    user: str
    since: str
    renewed: float

    @classmethod
    def here(cls, now: float) -> "_Holder":
        """This process, with a new token."""
        try:
            user = getpass.getuser()
        except (KeyError, OSError):  # as in containers that know no names
            user = str(os.getuid())
        since = datetime.fromtimestamp(now, UTC).isoformat(timespec="seconds")
        return cls(secrets.token_hex(16), os.getpid(), socket.gethostname(), user, since, now)

    @classmethod
    def decode(cls, data: bytes) -> "_Holder | None":
        """None for what no holder has written."""
        try:
            holder = cls(**json.loads(data))
            texts = (holder.token, holder.host, holder.user, holder.since)
            is_whole = all(isinstance(text, str) and text.isprintable() for text in texts)
            return holder if is_whole and type(holder.pid) is int and math.isfinite(holder.renewed) else None
        except (ValueError, TypeError, OverflowError, RecursionError):
            return None

    def encode(self) -> bytes:
        return json.dumps(asdict(self), indent=1).encode()

    def __str__(self) -> str:
        here = ", this very process," if (self.pid, self.host) == (os.getpid(), socket.gethostname()) else ""
        return f"process {self.pid}{here} of user {self.user!r} on host {self.host!r} (since {self.since})"


_LOCKED: "weakref.WeakSet[_LocalLease]" = weakref.WeakSet()


def _close_in_child() -> None:
    """A forked child shares the parent's lock, and would keep it after the parent's death."""
    for lease in list(_LOCKED):
        lease.close()


os.register_at_fork(after_in_child=_close_in_child)


def _open_locked(path: str) -> int:
    """A descriptor of the file, made if it is missing, with its lock. BlockingIOError if another has the lock."""
    while True:
        # Python opens with close-on-exec: programs that are started do not share the lock.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # a holder removed it after it was opened here


def _ask(folder: Folder) -> _Holder | None:
    """Who has the lock, if that is said soon."""
    deadline = time.monotonic() + _ANSWER_SECONDS
    while True:
        holder = None
        with suppress(OSError):
            holder = _read(folder)
        if holder is not None or time.monotonic() > deadline:
            return holder
        time.sleep(0.01)


def _read(folder: Folder) -> _Holder | None:
    try:
        return _Holder.decode(folder.read(LEASE, _LIMIT))
    except FileNotFoundError:
        return None


def _refusal(folder: Folder, holder: _Holder | None, age: float | None = None) -> ConfigError:
    fix = "end that one, or give another run_name"
    if age is not None:
        fix = (
            f"it was heard of {age:.0f} s ago; end it, or if it is dead try again in {EXPIRE_SECONDS - age:.0f} s or "
            f"remove {folder.url}/{LEASE}, or give another run_name"
        )
    return ConfigError(f"{_run(folder)} is being trained by {holder or 'another process'}: {fix}")


def _run(folder: Folder) -> str:
    storage, _, name = folder.url.rpartition("/")
    return f"run_name={name!r} in {storage!r}"
