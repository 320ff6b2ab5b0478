"""Data sets that many workers read as one: each worker reads only its own rows."""

from dtrain.data.blocks import BlockSource
from dtrain.data.parquet_files import parquet
from dtrain.data.ray_blocks import ray_dataset
from dtrain.data.source import ArraySource, DataSource, npz
from dtrain.data.tf_records import tfrecord

arrays = ArraySource

__all__ = ["ArraySource", "BlockSource", "DataSource", "arrays", "npz", "parquet", "ray_dataset", "tfrecord"]
