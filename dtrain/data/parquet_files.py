"""Owns reading Parquet files by rows: a block is a row group, read when it is needed, and of it the columns needed."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from dtrain.data.blocks import BlockSource
from dtrain.data.columns import Columns, check_type, from_arrow
from dtrain.data.files import Paths, find_files, open_file
from dtrain.data.source import floatx
from dtrain.errors import DataError
from dtrain.types import Tree


def parquet(
    path: Paths,
    *,
    x: Tree,
    y: Tree = None,
    sample_weight: Tree = None,
    float_dtype: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
    lanes: int = 32,
) -> BlockSource:
    """Parquet files as one data set, which may be larger than memory. Now, only the ends of the files are read.

    Each worker reads its own part of the row groups: see `BlockSource` for the order of rows, and for the memory that
    it takes. That goes by the size of a row group with the columns used, so write row groups of some megabytes to some
    tens of megabytes, and some hundreds of them or more.

    Args:
        path: a file, a folder, a glob, or a list of these; paths or URLs that all nodes can read (file, memory, s3, gs
            and whatever fsspec knows, with the package that it asks for).
        x: the columns of the inputs. "image" is the column as it is, (rows,) or (rows, k) where each row is a list of
            k; ["age", "height"] is one matrix of these columns side by side, as from a pandas DataFrame; and {"a":
            "age", "b": ["height", "weight"]} an array for each input of a model with named inputs. Text is for an
            array of its own.
        y: the columns of the targets, likewise.
        sample_weight: the column of the weights, or one for each output.
        float_dtype: what floats become; None: Keras's `floatx`, as for arrays.
        storage_options: fsspec's, for the file system; they travel to the workers.
        lanes: see `BlockSource`.

    Raises:
        ConfigError: the columns or the file system make no sense.
        DataError: files or columns are missing, or hold what cannot be trained on.

    Example:
        >>> flights = dtrain.data.parquet("s3://data/flights/*.parquet", x=["distance", "hour"], y="delay")
    """
    import pyarrow
    from pyarrow import parquet as pq

    columns = Columns(x, y, sample_weight, float_dtype or floatx())
    system, paths = find_files(path, (".parquet", ".pq"), storage_options)

    def footer(file: str) -> tuple[list[int], Any]:
        try:
            with open_file(system, file) as opened:
                reader = pq.ParquetFile(opened)
                groups = [reader.metadata.row_group(i).num_rows for i in range(reader.num_row_groups)]
                return groups, reader.schema_arrow
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"path={file!r} cannot be read as a Parquet file: {error}") from error

    with ThreadPoolExecutor(16) as pool:
        footers = list(pool.map(footer, paths))
    for file, (_, schema) in zip(paths, footers, strict=True):
        _check_schema(columns, file, schema, paths[0], footers[0][1])
    groups = [
        (file, group, rows)
        for file, (sizes, _) in zip(paths, footers, strict=True)
        for group, rows in enumerate(sizes)
        if rows
    ]
    if not groups:
        raise DataError(f"path={path!r}: the {len(paths)} files have no rows; check how they were written")
    load = _RowGroups(system, [group[:2] for group in groups], columns)
    return BlockSource(load, [rows for _, _, rows in groups], lanes=lanes)


@dataclass
class _RowGroups:
    """Reads a row group by its number. The ends of files that were read are kept, but do not travel."""

    system: Any
    groups: list[tuple[str, int]]
    columns: Columns
    footers: dict[str, Any] = field(default_factory=dict)

    def __call__(self, block: int) -> Any:
        import pyarrow
        from pyarrow import parquet as pq

        path, group = self.groups[block]
        try:
            with open_file(self.system, path) as opened:
                reader = pq.ParquetFile(opened, metadata=self.footers.get(path), pre_buffer=True)
                self.footers[path] = reader.metadata
                # One thread: the cores are TensorFlow's.
                table = reader.read_row_group(group, columns=self.columns.names, use_threads=False)
        except (OSError, pyarrow.ArrowException) as error:
            raise DataError(f"{path!r} cannot be read here ({error}): every node must be able to read it") from error
        try:
            return self.columns.arrays(lambda name: from_arrow(name, table.column(name)))
        except DataError as error:
            raise DataError(f"row group {group} of {path!r}: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "footers": {}}


def _check_schema(columns: Columns, path: str, schema: Any, first_path: str, first: Any) -> None:
    columns.check_known(schema.names, repr(path))
    for name in columns.names:
        kind = schema.field(name).type
        check_type(name, kind)
        if kind != first.field(name).type:
            raise DataError(
                f"column {name!r} has type {kind} in {path!r}, but {first.field(name).type} in {first_path!r}: write"
                " all files with one schema"
            )
