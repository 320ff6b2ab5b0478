"""Owns folders on a local disk or behind fsspec: what differs between the two.

What is kept in them, and under which names, is decided elsewhere.
"""

import functools
import os
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Concatenate, ParamSpec, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dtrain.errors import ConfigError

Given = ParamSpec("Given")
Result = TypeVar("Result")


def _raises_os_errors(
    method: "Callable[Concatenate[Folder, Given], Result]",
) -> "Callable[Concatenate[Folder, Given], Result]":
    """File systems behind fsspec raise their clients' errors as well, of HTTP and of the network: OSErrors here."""

    @functools.wraps(method)
    def wrapper(folder: "Folder", /, *args: Given.args, **kwargs: Given.kwargs) -> Result:
        try:
            return method(folder, *args, **kwargs)
        except OSError:
            raise
        except Exception as error:
            if folder.is_local:
                raise
            raise OSError(f"{folder.url}: {type(error).__name__}: {error}") from error

    return wrapper


@dataclass(frozen=True)
class Entry:
    """What a folder lists: `kind` is file, directory or other (links, devices)."""

    kind: str
    size: int


class Folder:
    """A folder on a local disk or behind fsspec: what differs between the two is in here. Raises OSError.

    Names never come from outside unchecked, and no glob is expanded.
    """

    def __init__(self, url: str) -> None:
        try:
            self._fs, path = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"{url!r} cannot be used as storage: {error}. Use a local path, or install the package it names"
            ) from error
        self.path = str(path).rstrip("/") or "/"
        self.is_local = isinstance(self._fs, LocalFileSystem)

    @property
    def url(self) -> str:
        """A plain path for a local disk."""
        return self.path if self.is_local else str(self._fs.unstrip_protocol(self.path))

    def __truediv__(self, name: str) -> "Folder":
        child = copy(self)
        child.path = f"{self.path.rstrip('/')}/{name}"
        return child

    @_raises_os_errors
    def entries(self) -> dict[str, Entry]:
        """What is in it, links not followed; nothing if it is missing."""
        try:
            if self.is_local:
                with os.scandir(self.path) as found:
                    return {item.name: _local_entry(item) for item in found}
            self._fs.invalidate_cache(self.path)
            items = self._fs.ls(self.path, detail=True)
        except FileNotFoundError:
            return {}
        named = ((item["name"].rstrip("/").rpartition("/")[2], item) for item in items)
        # An object store may list the folder itself, as an empty object.
        return {
            name: Entry(item["type"], item["size"] or 0) for name, item in named if name and item["name"] != self.path
        }

    @_raises_os_errors
    def has(self, name: str) -> bool:
        """Whether there is a plain file of that name."""
        if self.is_local:
            with suppress(FileNotFoundError):
                return stat.S_ISREG(os.lstat(f"{self.path}/{name}").st_mode)
            return False
        self._fs.invalidate_cache(self.path)
        return bool(self._fs.isfile(f"{self.path}/{name}"))

    @_raises_os_errors
    def read(self, name: str, limit: int = -1) -> bytes:
        """The first `limit` bytes of a file; -1: all."""
        if not self.is_local:
            self._fs.invalidate_cache(self.path)  # others may have written it since the folder was listed
        with open(f"{self.path}/{name}", "rb") if self.is_local else self._fs.open(f"{self.path}/{name}", "rb") as file:
            return bytes(file.read(limit))

    @_raises_os_errors
    def make(self) -> None:
        """Makes it, for its owner alone, and the folders above it."""
        if not self.is_local:
            self._fs.makedirs(self.path, exist_ok=True)
            return
        _make_folder(self.path, 0o700)

    @_raises_os_errors
    def write(self, name: str, *parts: bytes | memoryview) -> None:
        """Writes a file, part after part, and, on a local disk, waits until it is there. The folder must exist."""
        if not self.is_local:
            # At once: a file that is opened and closed would, if the writing fails, be kept as far as it got.
            self._fs.pipe_file(f"{self.path}/{name}", parts[0] if len(parts) == 1 else b"".join(parts))
            return
        with open(f"{self.path}/{name}", "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())

    def replace(self, name: str, data: bytes) -> None:
        """Writes a file that others see as it was or as it is now, never in between."""
        if not self.is_local:
            self.write(name, data)  # an object appears when it is complete
            return
        self.write(f"{name}.tmp", data)
        os.replace(f"{self.path}/{name}.tmp", f"{self.path}/{name}")
        _sync_folder(self.path)

    def move(self, target: "Folder") -> None:
        """Renames it, on a local disk; the target must not exist."""
        _sync_folder(self.path)
        os.rename(self.path, target.path)
        _sync_folder(os.path.dirname(target.path))

    @_raises_os_errors
    def remove_file(self, name: str) -> None:
        """Removes a file, if it is there."""
        with suppress(FileNotFoundError):
            os.remove(f"{self.path}/{name}") if self.is_local else self._fs.rm_file(f"{self.path}/{name}")

    @_raises_os_errors
    def remove(self) -> None:
        """Removes it with all that is in it, if it is there."""
        if self.is_local:
            with suppress(FileNotFoundError):
                shutil.rmtree(self.path)
            return
        # File by file: fsspec's rm expands globs.
        for path in self._fs.find(self.path):
            self._fs.rm_file(path)
        with suppress(OSError, NotImplementedError):  # object stores have no folders, and some no word for them
            self._fs.rmdir(self.path)


def _local_entry(item: "os.DirEntry[str]") -> Entry:
    info = item.stat(follow_symlinks=False)
    kind = "file" if stat.S_ISREG(info.st_mode) else "directory" if stat.S_ISDIR(info.st_mode) else "other"
    return Entry(kind, info.st_size)


def _make_folder(path: str, mode: int = 0o777) -> None:
    """Makes a folder and those above it, each on the disk before it is used. FileExistsError if it is there."""
    parent = os.path.dirname(path)
    if not os.path.isdir(parent):
        with suppress(FileExistsError):
            _make_folder(parent)
    os.mkdir(path, mode)
    try:
        _sync_folder(parent)
    except OSError:
        os.rmdir(path)
        raise


def _sync_folder(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
