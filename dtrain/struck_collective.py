"""Owns where planned faults strike in what ranks exchange (see faults.py)."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from dtrain.faults import Strikes
from dtrain.types import Compression


class StruckCollective:
    """A collective in which faults strike; otherwise what it goes round."""

    def __init__(self, collective: Any, strikes: Strikes) -> None:
        self._collective = collective
        self._strikes = strikes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collective, name)

    def all_reduce(self, tensors: Sequence[Any], name: str, compression: Compression | None = None) -> list[Any]:
        if name == "average" or (name.startswith("gradients") and "-" not in name):  # once for all the buckets
            is_first = name in ("gradients0.1", "gradients.1", "average")
            strike = self._strikes.in_step if is_first else self._strikes.again_in_step
            factor = tf.py_function(strike, [], tf.float64)
            factor.set_shape([])
            tensors = [tensor * tf.cast(factor, tensor.dtype) for tensor in tensors]
        reduced: list[Any] = self._collective.all_reduce(tensors, name, compression)
        return reduced

    def broadcast(self, arrays: Sequence[Any], name: str, root: int = 0) -> list[Any]:
        if name == "state":
            self._strikes("broadcast")
        received: list[Any] = self._collective.broadcast(arrays, name, root)
        return received
