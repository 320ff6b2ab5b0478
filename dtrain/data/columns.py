"""Owns how the columns of a table become x, y and sample_weight, and how an Arrow column becomes an array."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

import numpy as np

from dtrain.data.source import ArraySource
from dtrain.errors import ConfigError, DataError
from dtrain.types import Array, Tree


@dataclass(frozen=True)
class Columns:
    """Which columns make up x, y and sample_weight.

    A name is a column as it is: (rows,) for numbers or text, (rows, k) where each row has k of them. A list of names is
    one matrix of these columns side by side, as from a pandas DataFrame. A dict, as for a model with named inputs or
    outputs, and a tuple, as for one with several, hold any of these.

    Attributes:
        x: of the inputs.
        y: of the targets.
        sample_weight: of the weights: one column for all outputs, or of the form of y.
        float_dtype: what floats become; see `ArraySource`.
    """

    x: Tree
    y: Tree
    sample_weight: Tree
    float_dtype: str | None

    def __post_init__(self) -> None:
        for path, spec in self._parts():
            _check(path, spec)
        if self.x is None:
            raise ConfigError("x=None must name columns: a name, a list of names, or a dict of them")

    @property
    def names(self) -> list[str]:
        """All of them, each once."""
        return list(dict.fromkeys(name for _, spec in self._parts() for name in _names(spec)))

    def check_known(self, known: Iterable[str], where: str) -> None:
        """Refuse columns that the data does not have.

        Raises:
            DataError: naming the column, and what there is.
        """
        there = list(known)
        for path, spec in self._parts():
            for name in _names(spec):
                if name not in there:
                    close = get_close_matches(name, there, 1)
                    hint = f"; did you mean {close[0]!r}?" if close else ""
                    raise DataError(f"{path}: {where} has no column {name!r}; it has {there}{hint}")

    def arrays(self, read: Callable[[str], Array]) -> ArraySource:
        """Put the columns together.

        Args:
            read: gives a column by its name.

        Raises:
            DataError: they do not go together, or cannot be trained on.
        """
        columns = {name: read(name) for name in self.names}
        parts = {path: _assembled(path, spec, columns) for path, spec in self._parts()}
        return ArraySource(parts["x"], parts.get("y"), parts.get("sample_weight"), float_dtype=self.float_dtype)

    def _parts(self) -> list[tuple[str, Tree]]:
        parts = {"x": self.x, "y": self.y, "sample_weight": self.sample_weight}
        return [(path, spec) for path, spec in parts.items() if spec is not None]


def from_arrow(name: str, column: Any) -> Array:
    """An Arrow column as an array: (rows,), or (rows, k, ...) of lists of one length or tensors. No copy if it can be.

    Raises:
        DataError: rows are missing, or of different lengths; or its type is none of numbers, bools, text and lists.
    """
    import pyarrow

    check_type(name, column.type)
    if isinstance(column, pyarrow.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if column.null_count:
        row = int(np.flatnonzero(column.is_null())[0])
        raise DataError(f"column {name!r} has {column.null_count} nulls, the first in row {row}: fill or drop them")
    kind = column.type
    if isinstance(kind, pyarrow.FixedShapeTensorType):
        return np.asarray(column.to_numpy_ndarray())
    if _is_list(kind):
        lengths = np.unique(column.value_lengths().to_numpy(zero_copy_only=False))
        if len(lengths) > 1:
            raise DataError(
                f"column {name!r} has rows of {lengths[0]} to {lengths[-1]} values: all must have the same number; pad"
                " them where the data is written"
            )
        values = from_arrow(name, column.flatten())
        return values.reshape(len(column), *map(int, lengths), *values.shape[1:])
    if pyarrow.types.is_dictionary(kind):
        column = column.dictionary_decode()
    return np.asarray(column.to_numpy(zero_copy_only=False))


def check_type(name: str, kind: Any) -> None:
    """Refuse Arrow types that hold no numbers, bools or text.

    Raises:
        DataError: with the fix.
    """
    import pyarrow
    from pyarrow import types

    if isinstance(kind, pyarrow.FixedShapeTensorType):
        return
    if _is_list(kind) or types.is_dictionary(kind):
        return check_type(name, kind.value_type)
    usable = (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    if not any(test(kind) for test in (*usable, types.is_binary, types.is_large_binary)):
        raise DataError(
            f"column {name!r} has type {kind}: it must hold numbers, bools or text, or lists of one length of them;"
            " convert it where the data is written (decimals to float64, times to seconds)"
        )


def _is_list(kind: Any) -> bool:
    from pyarrow import types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _names(spec: Tree) -> list[str]:
    if isinstance(spec, str):
        return [spec]
    return [name for part in (spec.values() if isinstance(spec, Mapping) else spec) for name in _names(part)]


def _check(path: str, spec: Tree) -> None:
    if isinstance(spec, (Mapping, tuple)):
        for key, part in spec.items() if isinstance(spec, Mapping) else enumerate(spec):
            _check(f"{path}[{key!r}]", part)
    is_list = isinstance(spec, list) and all(isinstance(name, str) for name in spec)
    if not (isinstance(spec, (str, Mapping, tuple)) or is_list) or not spec:
        raise ConfigError(
            f"{path}={spec!r} must name columns: a name, a list of names for one matrix of them, or a dict or a tuple"
            " of these for several arrays"
        )


def _assembled(path: str, spec: Tree, columns: Mapping[str, Array]) -> Tree:
    if isinstance(spec, str):
        return columns[spec]
    if isinstance(spec, Mapping):
        return {key: _assembled(f"{path}[{key!r}]", part, columns) for key, part in spec.items()}
    if isinstance(spec, tuple):
        return tuple(_assembled(f"{path}[{i}]", part, columns) for i, part in enumerate(spec))
    for name in spec:
        column = columns[name]
        if column.ndim > 2 or column.dtype.kind not in "biuf":
            shape = ", ".join(["rows", *map(str, column.shape[1:])])
            raise DataError(
                f"{path}: column {name!r} is {column.dtype} of shape ({shape})"
                f" and cannot be part of a matrix; give it an array of its own: {path}={{{name!r}: {name!r}, ...}}"
            )
    return np.column_stack([columns[name] for name in spec])
