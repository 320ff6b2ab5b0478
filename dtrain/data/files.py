"""Owns where data files are and how they are opened: paths, globs, folders and URLs, through fsspec."""

from collections.abc import Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import fsspec

from dtrain.errors import ConfigError, DataError

Paths = str | PathLike[str] | Sequence[str | PathLike[str]]
"""A file, a folder or a glob, as a path or a URL, or several of them."""


def find_files(
    path: Paths, suffixes: Sequence[str], storage_options: Mapping[str, Any] | None
) -> tuple[Any, list[str]]:
    """The file system, and the files on it: those of a list in its order, those of a glob or a folder by name.

    Args:
        path: where to look.
        suffixes: what the names of files in a folder end with.
        storage_options: of the file system.

    Raises:
        ConfigError: there is no such file system, or its package is missing.
        DataError: there is no such file.
    """
    given = [path] if isinstance(path, (str, PathLike)) else list(path)
    if not given:
        raise DataError("path=[] names no file; give at least one")
    system, found = None, []
    for url in [fspath(item) for item in given]:
        try:
            one, place = fsspec.core.url_to_fs(url, **(storage_options or {}))
        except (ImportError, ValueError) as error:
            raise ConfigError(f"path={url!r}: its file system cannot be used ({error})") from error
        if system is not None and one != system:
            raise DataError(f"path={url!r} is on another file system than {fspath(given[0])!r}; make two sources of it")
        system = one
        found += _files_at(system, url, place, suffixes)
    return system, found


def open_file(system: Any, path: str) -> Any:
    """A file, to be read in few large pieces: nothing is read ahead of what is asked for."""
    return system.open(path, "rb", cache_type="none")


def open_url(url: str, storage_options: Mapping[str, Any] | None) -> Any:
    """A file on any file system, to be read as a whole."""
    return fsspec.open(url, "rb", **(storage_options or {})).open()


def _files_at(system: Any, url: str, place: str, suffixes: Sequence[str]) -> list[str]:
    if system.isfile(place):  # a name may look like a glob
        return [place]
    if system.isdir(place):
        inside = system.find(place)
        files = sorted(name for name in inside if name.endswith(tuple(suffixes)))
        if not files:
            raise DataError(f"path={url!r} is a folder with {len(inside)} files, none of which ends in {suffixes[0]!r}")
        return files
    files = sorted(name for name in system.glob(place) if system.isfile(name))
    if not files:
        raise DataError(f"path={url!r}: there is no such file, and as a pattern it fits none; check the path")
    return files
