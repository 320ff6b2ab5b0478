"""Owns reading TFRecord files by rows: where records are, by their framing, and blocks of some of them in a row."""

import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.blocks import BlockSource
from dtrain.data.columns import Columns
from dtrain.data.files import Paths, find_files, open_file
from dtrain.data.source import ArraySource, floatx
from dtrain.errors import ConfigError, DataError
from dtrain.types import Tree

FRAME = 16
"""Bytes around a record: its length (8, little-endian) and a checksum of that (4); behind it one of the record (4)."""
SMALLEST_BLOCK, LARGEST_BLOCK = 64 << 10, 16 << 20
"""A block has about a 256th of the bytes, within these bounds."""

Decode = Callable[[dict[str, Any]], Mapping[str, Any]]


def tfrecord(
    path: Paths,
    features: Mapping[str, Any],
    *,
    x: Tree,
    y: Tree = None,
    sample_weight: Tree = None,
    decode: Decode | None = None,
    float_dtype: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    lanes: int = 32,
) -> BlockSource:
    """TFRecord files of `tf.train.Example`s as one data set, which may be larger than memory.

    Where the records are stands nowhere in the files: now each record's length is read, one after the other. On a local
    disk that is about a second for a million records; on an object store it takes as long as reading the files.

    Each worker reads its own part of the blocks of records: see `BlockSource` for the order of rows, and for the memory
    that it takes. A block has about a 256th of all bytes, and at most 16 MB before it is decoded.

    Args:
        path: a file, a folder, a glob, or a list of these; paths or URLs that all nodes can read. Not compressed.
        features: what `tf.io.parse_example` takes: names and `tf.io.FixedLenFeature`s.
        x: the features of the inputs: a name, a list of names for a matrix, or a dict of these; as the columns of
            `dtrain.data.parquet`.
        y: the features of the targets, likewise.
        sample_weight: the feature of the weights, or one for each output.
        decode: called with the parsed tensors of a block by name, (rows, ...) each, and gives those that `x`, `y` and
            `sample_weight` name. For images, say; it runs on the CPU of each worker.
        float_dtype: what floats become; None: Keras's `floatx`, as for arrays.
        storage_options: fsspec's, for the file system; they travel to the workers.
        lanes: see `BlockSource`.

    Raises:
        ConfigError: the features or the file system make no sense.
        DataError: files are missing, or no TFRecord files.

    Example:
        >>> features = {"image": tf.io.FixedLenFeature([784], tf.float32), "label": tf.io.FixedLenFeature([], tf.int64)}
        >>> digits = dtrain.data.tfrecord("digits/*.tfrecord", features, x="image", y="label")
    """
    columns = Columns(x, y, sample_weight, float_dtype or floatx())
    if decode is None:
        columns.check_known(features, "features")
        for name in columns.names:
            if type(features[name]).__name__ != "FixedLenFeature":
                raise ConfigError(
                    f"features[{name!r}]={features[name]!r:.80} must be a tf.io.FixedLenFeature, so that every row has"
                    " one shape; or pass decode=, which makes that of it"
                )
    system, paths = find_files(path, (".tfrecord", ".tfrecords", ".tfrec"), storage_options)
    with ThreadPoolExecutor(16) as pool:
        sizes = list(pool.map(lambda file: _record_sizes(system, file), paths))
    total = int(sum(own.sum() for own in sizes))
    if not total:
        raise DataError(f"path={path!r}: the {len(paths)} files have no records; check how they were written")
    block_bytes = min(max(total // 256, SMALLEST_BLOCK), LARGEST_BLOCK)
    spans = [span for file, own in zip(paths, sizes, strict=True) for span in _spans(file, own, block_bytes)]
    load = _Records(system, spans, columns, dict(features), decode)
    return BlockSource(load, [span.rows for span in spans], lanes=lanes)


@dataclass(frozen=True)
class _Span:
    """Consecutive records of a file."""

    path: str
    start: int
    size: int
    rows: int


@dataclass
class _Records:
    """Reads and parses a block of records by its number."""

    system: Any
    spans: list[_Span]
    columns: Columns
    features: dict[str, Any]
    decode: Decode | None

    def __call__(self, block: int) -> ArraySource:
        import tensorflow as tf

        span = self.spans[block]
        where = f"records at bytes {span.start} to {span.start + span.size} of {span.path!r}"
        try:
            with open_file(self.system, span.path) as file:
                file.seek(span.start)
                data = file.read(span.size)
        except OSError as error:
            raise DataError(
                f"{span.path!r} cannot be read here ({error}): every node must be able to read it"
            ) from error
        records = _payloads(data)
        if len(records) != span.rows:
            raise DataError(f"{where} are not those that were there when the source was made: files must not change")
        with tf.device("CPU:0"):
            try:
                tensors = tf.io.parse_example(tf.constant(records), self.features)
            except tf.errors.InvalidArgumentError as error:
                raise DataError(f"{where} do not fit features={list(self.features)}: {error.message}") from error
            if self.decode is not None:
                tensors = self.decode(tensors)
                self.columns.check_known(tensors, "what decode returns")
            try:
                return self.columns.arrays(lambda name: np.asarray(tensors[name]))
            except DataError as error:
                raise DataError(f"{where}: {error}") from error


def _record_sizes(system: Any, path: str) -> npt.NDArray[np.int64]:
    """Bytes of each record with its frame; its payload is not looked at."""
    sizes: list[int] = []
    try:
        end, offset = system.size(path), 0
        with system.open(path, "rb") as file:
            while offset < end:
                file.seek(offset)
                header = file.read(12)
                if header[:3] == b"\x1f\x8b\x08" and offset == 0:
                    raise DataError(f"path={path!r} is compressed: rows cannot be found in it; write it uncompressed")
                size = int.from_bytes(header[:8], "little") + FRAME
                if len(header) < 12 or offset + size > end:
                    raise DataError(
                        f"path={path!r} is no TFRecord file, or cut short: record {len(sizes)} would end beyond the"
                        f" {end} bytes of the file"
                    )
                sizes.append(size)
                offset += size
    except OSError as error:
        raise DataError(f"path={path!r} cannot be read: {error}") from error
    return np.array(sizes, np.int64)


def _spans(path: str, sizes: npt.NDArray[np.int64], block_bytes: int) -> list[_Span]:
    ends = np.cumsum(sizes)
    parts = np.split(np.arange(len(sizes)), np.flatnonzero(np.diff((ends - sizes) // block_bytes)) + 1)
    return [_Span(path, int(ends[p[0]] - sizes[p[0]]), int(sizes[p].sum()), len(p)) for p in parts if len(p)]


def _payloads(data: bytes) -> list[bytes]:
    records, offset = [], 0
    while offset + FRAME <= len(data):
        (size,) = struct.unpack_from("<Q", data, offset)
        records.append(data[offset + 12 : offset + 12 + size])
        offset += size + FRAME
    return records if offset == len(data) else []
