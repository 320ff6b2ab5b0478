"""Owns what users pass as data that cannot be read by rows as it is: how it is told apart, travels, and is made.

A function, a PyDataset or a torch DataLoader travels pickled and is made anew on each worker, where it turns out to be
rows (a DataSource) or batches. Reading batches is stream.py's. Nothing here imports what the data come from.
"""

import types
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle

from dtrain.data.sampler import Sampler, default_batch_size
from dtrain.data.source import ArraySource, Blocked, ClassWeights, DataSource
from dtrain.data.stream import Batches
from dtrain.errors import ConfigError, DataError
from dtrain.types import Batching, BatchPlan

_KINDS = (
    ("tf.data.Dataset", ("DatasetV2",), "tensorflow."),
    ("PyDataset", ("PyDataset",), "keras."),
    ("torch DataLoader", ("DataLoader",), "torch."),
    ("grain data set", ("MapDataset", "IterDataset", "DataLoader"), "grain."),
)


def kind_of_batches(x: Any) -> str | None:
    """What `x` is if it brings batches, such as "tf.data.Dataset" or "generator"; None: it does not."""
    for kind, names, module in _KINDS:
        if any(parent.__name__ in names and f"{parent.__module__}.".startswith(module) for parent in type(x).__mro__):
            return kind
    return "generator" if hasattr(x, "__next__") else None


def is_function(x: Any) -> bool:
    """Whether `x` is to be called to get the data."""
    return callable(x) and not hasattr(x, "__array__") and not isinstance(x, DataSource) and kind_of_batches(x) is None


@dataclass(frozen=True)
class Deferred:
    """Data that each worker makes for itself.

    Attributes:
        name: of the argument that they were passed as.
        kind: "function", or what kind of object brings batches.
        pickled: the function or the object, by cloudpickle.
        class_weight: weights by class number, applied where the data are made.
    """

    name: str
    kind: str
    pickled: bytes
    class_weight: Mapping[int, float] | None = None

    def make(self) -> Any:
        """Make the data anew: a DataSource, or an object that brings batches (see `kind_of_batches`).

        Whatever the user's function raises goes through as it is.

        Raises:
            ConfigError: it needs a module that is not there.
            DataError: the function returned something that is no data.
        """
        made = unpickled(self.name, self.pickled)
        if self.kind != "function":
            return made
        made = made()
        if isinstance(made, types.GeneratorType) or kind_of_batches(made) not in (None, "generator"):
            return made
        if hasattr(made, "__next__"):
            return (batch for batch in made)  # Keras takes generators, but no other iterator
        return self._source_of(made)

    def _source_of(self, made: Any) -> DataSource:
        if made is None:
            raise DataError(f"the function passed as {self.name} returned None; did you forget to return the data?")
        if is_function(made):
            raise DataError(f"the function passed as {self.name} returned a function; it must return the data")
        parts = made if isinstance(made, tuple) else (made,)
        if not 1 <= len(parts) <= 3:
            raise DataError(
                f"the function passed as {self.name} returned a tuple of {len(parts)}; it must be x, (x, y) or"
                " (x, y, sample_weight)"
            )
        x, y, sample_weight = (*parts, None, None)[:3]
        kind = "dtrain.data source" if isinstance(x, DataSource) else kind_of_batches(x)
        if kind and len(parts) > 1:
            raise DataError(
                f"the function passed as {self.name} returned a {kind} and y or sample_weight beside it; a {kind}"
                " brings its own"
            )
        if not isinstance(x, DataSource):
            return ArraySource(x, y, sample_weight, class_weight=self.class_weight)
        if len(x) == 0:
            raise DataError(f"the function passed as {self.name} returned a source without rows")
        return x if self.class_weight is None else ClassWeights(x, self.class_weight)


Given = DataSource | Deferred | Batches
"""Data as they go from the driver to the ranks."""


def unpickled(name: str, data: bytes) -> Any:
    """What the driver pickled: the user's own code, by whoever may run code here anyway.

    Raises:
        ConfigError: it needs a module that is not there.
    """
    try:
        return cloudpickle.loads(data)
    except ImportError as error:
        raise ConfigError(
            f"{name} needs a module that the workers cannot import ({error}); install it on every node, or send your"
            ' code along with runtime_env={"working_dir": "."}'
        ) from error


def batch_plan(source: DataSource, batching: Batching) -> BatchPlan:
    """The plan for the rows of `source`, with Keras's defaults.

    Raises:
        ConfigError: a number makes no sense.
    """
    size = batching.batch_size
    if size is None:
        size = batching.usual_batch_size or default_batch_size(len(source), batching.steps)
    plan = BatchPlan(len(source), int(size), batching.steps, batching.shuffle, batching.seed)
    whole_in_any_order = batching.in_any_order and batching.steps is None
    if isinstance(source, Blocked) and (batching.shuffle in (True, 1) or whole_in_any_order):
        plan = replace(plan, blocks=source.blocks, lanes=source.lanes)
    Sampler(plan)  # checks it
    return plan
