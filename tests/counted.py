"""Local files that count what is read of them: `counted://` and a path."""

import pickle
import threading
from typing import Any

import fsspec
import numpy as np
from fsspec.implementations.local import LocalFileSystem

from dtrain.data.loader import Loader
from dtrain.types import BatchPlan

COUNTING = threading.Lock()


class CountedFiles(LocalFileSystem):  # type: ignore[misc]
    """Local files, and how many bytes were read of them."""

    protocol = "counted"
    read = 0

    def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        opened = open(path, mode)  # noqa: SIM115
        plain = opened.read

        def read(size: int = -1) -> bytes:
            data: bytes = plain(size)
            with COUNTING:
                CountedFiles.read += len(data)
            return data

        return _Proxy(opened, read)


class _Proxy:
    def __init__(self, opened: Any, read: Any) -> None:
        self._opened, self.read = opened, read

    def __getattr__(self, name: str) -> Any:
        return getattr(self._opened, name)

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self._opened.close()


fsspec.register_implementation("counted", CountedFiles, clobber=True)


def rows_and_bytes(source: Any, rank: int, world_size: int) -> tuple[list[int], int]:
    """The targets that a rank reads in an epoch of a shuffled pass, and how many bytes of counted files that takes."""
    own = pickle.loads(pickle.dumps(source))
    plan = BatchPlan(len(own), 64, shuffle=True, blocks=own.blocks)
    loader = Loader(own, plan, rank, world_size)
    own.read(np.zeros(1, np.int64))  # as a fit begins
    CountedFiles.read = 0
    chunks = loader.chunks(0, 0, loader.sampler.steps_in_epoch(0), 4)
    rows = [row for chunk in chunks for row in chunk.data[1].reshape(-1).tolist()]
    return rows, CountedFiles.read
