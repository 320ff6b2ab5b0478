"""Owns reading a Ray dataset by rows: a block is one of Ray's, read in place from the object store."""

from dataclasses import dataclass
from typing import Any

from dtrain.data.blocks import BlockSource
from dtrain.data.columns import Columns, from_arrow
from dtrain.data.source import ArraySource, floatx
from dtrain.errors import DataError
from dtrain.types import Array, Tree


def ray_dataset(
    dataset: Any,
    *,
    x: Tree,
    y: Tree = None,
    sample_weight: Tree = None,
    float_dtype: str | None = None,
    lanes: int = 32,
) -> BlockSource:
    """A `ray.data.Dataset` as a data set. It is computed now, into Ray's object store, which spills to disk.

    Each worker reads its own part of the blocks: see `BlockSource`. Numbers of the right dtype are used where they lie
    in the store; a list of columns, other floats, and blocks of another node are copied. It lives as long as the
    `ray.init` that made it.

    Args:
        dataset: of a Ray that this process is connected to.
        x: the columns of the inputs, as in `dtrain.data.parquet`.
        y: the columns of the targets.
        sample_weight: the column of the weights, or one for each output.
        float_dtype: what floats become; None: Keras's `floatx`, as for arrays.
        lanes: see `BlockSource`.

    Raises:
        ConfigError: the columns make no sense.
        DataError: it is no Ray dataset, a column is missing, or there are no rows.

    Example:
        >>> images = ray.data.read_images("s3://data/images").map(with_label)
        >>> trainer.fit(dtrain.data.ray_dataset(images, x="image", y="label"))
    """
    import ray

    if not hasattr(dataset, "materialize"):
        raise DataError(f"dataset={dataset!r:.60} must be a ray.data.Dataset, not a {type(dataset).__name__}")
    columns = Columns(x, y, sample_weight, float_dtype or floatx())
    computed = dataset.materialize()
    schema = computed.schema()
    columns.check_known(schema.names if schema is not None else (), "the dataset")
    blocks = computed.to_arrow_refs()
    # Where the blocks are, and without waiting for a CPU: workers may hold them all.
    count = ray.remote(num_cpus=0)(_num_rows)
    return BlockSource(_RayBlocks(blocks, columns), ray.get([count.remote(block) for block in blocks]), lanes=lanes)


@dataclass
class _RayBlocks:
    """Gets a block by its number."""

    blocks: list[Any]
    columns: Columns

    def __call__(self, block: int) -> ArraySource:
        import ray

        table = ray.get(self.blocks[block])
        try:
            return self.columns.arrays(lambda name: _array(name, table))
        except DataError as error:
            raise DataError(f"block {block} of the dataset: {error}") from error


def _num_rows(table: Any) -> int:
    return int(table.num_rows)


def _array(name: str, table: Any) -> Array:
    from ray.data.block import BlockAccessor
    from ray.data.extensions import ArrowTensorTypeV2  # type: ignore[attr-defined, unused-ignore]

    if isinstance(table.schema.field(name).type, ArrowTensorTypeV2):
        array: Array = BlockAccessor.for_block(table).to_numpy([name])[name]
        return array
    return from_arrow(name, table.column(name))
