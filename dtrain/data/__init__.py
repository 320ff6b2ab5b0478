"""Data sets that many workers read as one: `arrays` and `npz`; each worker reads only its own rows."""

from dtrain.data.source import ArraySource, DataSource, npz

arrays = ArraySource

__all__ = ["ArraySource", "DataSource", "arrays", "npz"]
