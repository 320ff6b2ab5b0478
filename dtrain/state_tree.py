"""Owns how a tree of Python values becomes JSON and arrays, and the same tree again, to the last bit.

JSON alone would turn tuples into lists and NumPy scalars into numbers, lose the order of keys where they are sorted,
and not hold what is no number there (NaN, infinities). Such a value becomes a dict of one key, which begins with "$".
"""

import math
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from dtrain.checkpoint import STORED_DTYPES
from dtrain.errors import CheckpointError, ConfigError
from dtrain.types import Array

_PLAIN = (type(None), bool, int, str)


def pack(tree: Any, where: str, arrays: dict[str, Array]) -> Any:
    """What stands for `tree` in strict JSON; copies of its arrays are added to `arrays`.

    Args:
        tree: None, bool, int, float, str, NumPy arrays and scalars, and lists, tuples and dicts of trees.
        where: what the tree is, for messages.
        arrays: those of other trees may be in it.

    Raises:
        ConfigError: there is anything else in it; the message says where.
    """
    if type(tree) in _PLAIN:
        return tree
    if type(tree) is float:
        return tree if math.isfinite(tree) else {"$float": struct.pack(">d", tree).hex()}
    if type(tree) in (list, tuple):
        items = [pack(item, f"{where}[{index}]", arrays) for index, item in enumerate(tree)]
        return items if type(tree) is list else {"$tuple": items}
    if type(tree) is dict:
        return _pack_dict(tree, where, arrays)
    if type(tree) is np.ndarray or isinstance(tree, np.generic):
        if tree.dtype.name not in STORED_DTYPES:
            raise ConfigError(f"{where} has dtype {tree.dtype}: it must be one of {', '.join(STORED_DTYPES)}")
        key = str(len(arrays))
        arrays[key] = np.array(tree)
        return {"$array" if type(tree) is np.ndarray else "$scalar": key}
    raise ConfigError(
        f"{where} is of type {type(tree).__name__}: it must be made of dicts with str keys, lists, tuples, str, int,"
        " float, bool, None and NumPy arrays of numbers; turn it into these in get_state, and back in set_state"
    )


def unpack(values: Any, arrays: Mapping[str, Array]) -> Any:
    """The tree that `pack` was given. Its arrays are copies and may be written to.

    Raises:
        CheckpointError: no tree was packed like this.
    """
    try:
        return _unpacked(values, arrays)
    except (KeyError, TypeError, ValueError, struct.error) as error:
        raise CheckpointError(f"the checkpoint holds a state that cannot be read ({error!r}): use another") from error


def _pack_dict(tree: dict[Any, Any], where: str, arrays: dict[str, Array]) -> Any:
    for key in tree:
        if type(key) is not str:
            raise ConfigError(f"{where} has the key {key!r} of type {type(key).__name__}: keys must be str")
    items = {key: pack(value, f"{where}[{key!r}]", arrays) for key, value in tree.items()}
    if list(items) == sorted(items) and not any(key.startswith("$") for key in items):
        return items
    return {"$dict": [[key, value] for key, value in items.items()]}


def _unpacked(values: Any, arrays: Mapping[str, Array]) -> Any:
    if isinstance(values, list):
        return [_unpacked(item, arrays) for item in values]
    if not isinstance(values, dict):
        return values
    content: Any
    mark, content = next(iter(values.items()), ("", None))
    match mark:
        case "$float":
            return struct.unpack(">d", bytes.fromhex(content))[0]
        case "$tuple":
            return tuple(_unpacked(item, arrays) for item in content)
        case "$array":
            return np.array(arrays[content])
        case "$scalar":
            return arrays[content][()]
        case "$dict":
            return {key: _unpacked(value, arrays) for key, value in content}
    return {key: _unpacked(value, arrays) for key, value in values.items()}
