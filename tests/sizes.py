"""Owns a callback that tells how large its group is, for tests in which that changes."""

import time
from pathlib import Path
from typing import Any

import keras


class Sizes(keras.callbacks.Callback):
    """Writes down how large the group is in each step, and stops after the epoch in which it has been as it should.

    Args:
        file: to write to.
        wanted: the sizes that it is to have had last.
        enough: a file that must be there, too; None: none need be.
    """

    def __init__(self, file: Path, wanted: list[int], enough: Path | None = None) -> None:
        super().__init__()
        self.file, self.wanted, self.enough = file, wanted, enough

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        import horovod.tensorflow as hvd

        with self.file.open("a") as file:
            file.write(f"{hvd.size() if hvd.is_initialized() else 1}\n")
        time.sleep(0.02)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        is_enough = self.enough is None or self.enough.exists()
        self.model.stop_training = is_enough and sizes_in(self.file)[-len(self.wanted) :] == self.wanted


def sizes_in(file: Path) -> list[int]:
    """Each that is followed by another, and the last; those of three steps at least."""
    sizes = file.read_text().split() if file.exists() else []
    found: list[int] = []
    for index, size in enumerate(sizes):
        if sizes[index : index + 3] == [size] * 3 and found[-1:] != [int(size)]:
            found.append(int(size))
    return found
