"""Owns exact metrics over ranks: state is summed, results are computed from the sum.

Each rank updates Keras's metric objects with its own rows only. A metric's variables say how they add up
(`aggregation`, "sum" for all of Keras's own); `global_logs` adds them up and asks Keras for the results. A mean of
means never occurs.
"""

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import keras
import numpy as np
import tensorflow as tf

from dtrain.collective import Collective
from dtrain.keras_internals import Mean
from dtrain.types import Array

RECORDED_ELEMENTS = 4096
"""Metric state of up to this many numbers is kept for every step; of more (large confusion matrices), for the last."""


@contextlib.contextmanager
def shared_means(share: tf.Tensor) -> Iterator[None]:
    """Inside, a Mean that is fed a scalar without a weight counts it by this rank's share instead of once.

    Keras counts such a scalar (the loss of one output, a metric function that returns a batch's mean) once a
    mini-batch, whatever its rows; the shares of all ranks add up to that once.
    """
    plain = Mean.update_state

    def update_state(self: Any, values: Any, sample_weight: Any = None) -> None:
        if sample_weight is None and tf.convert_to_tensor(values).shape.rank == 0:
            sample_weight = tf.cast(share, self.dtype)
        plain(self, values, sample_weight)

    with patch.object(Mean, "update_state", update_state):
        yield


def sum_in_rank_order(tensors: Sequence[tf.Tensor], collective: Collective, name: str) -> list[tf.Tensor]:
    """Sum over ranks to the same bits whatever else is in the buffer, so that segments may end anywhere. Collective.

    A ring adds a number's parts in an order that depends on its place in the buffer, which from 3 ranks on shows in the
    last bit. Here each rank's numbers travel in a row of their own, beside zeros, and are added up on arrival.
    """
    if collective.world_size <= 2:
        return collective.all_reduce(tensors, name)
    before, after = collective.rank, collective.world_size - 1 - collective.rank
    rows = [tf.pad(tensor[None], [[before, after]] + [[0, 0]] * tensor.shape.rank) for tensor in tensors]
    return [functools.reduce(tf.add, tf.unstack(every)) for every in collective.all_reduce(rows, name)]


class MetricState:
    """The metric variables of a model, as values that can be kept, added up over ranks and turned into logs."""

    def __init__(self, model: keras.Model) -> None:
        self._model = model
        self.variables: list[Any] = []
        for metric in model.metrics:
            for variable in metric.variables:
                if all(variable is not known for known in self.variables):
                    self.variables.append(variable)
        self.records_steps = sum(int(np.prod(v.shape)) for v in self.variables) <= RECORDED_ELEMENTS
        self._names: list[str] = []
        self._results = tf.function(self._results_of, autograph=False, reduce_retracing=True)

    def read(self) -> list[tf.Tensor]:
        """The variables' values now; works while tracing."""
        return [tf.convert_to_tensor(variable.value) for variable in self.variables]

    def assign(self, values: Sequence[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    def updated(self, assigned: Sequence[Any]) -> list[str]:
        """The names of results of metrics that have a variable among those assigned; works while tracing."""
        names: list[str] = []
        for metric in self._model.metrics:
            if any(variable is other for variable in metric.variables for other in assigned):
                names.extend(flat_logs({metric.name: metric.result()}))
        return names

    def global_logs(self, states: Sequence[Array], collective: Collective, name: str) -> dict[str, Array]:
        """Turn states into logs of the whole job. Collective.

        Args:
            states: for each variable, its values on this rank after K steps, of shape (K, *variable.shape).
            collective: the ranks to add up over.
            name: of the collective operation.

        Returns:
            For each metric its K values, the same on all ranks. The variables keep their local values.
        """
        if not self.variables:
            return {}
        local = self.read()
        addends = [self._addend(i, s, collective) for i, s in enumerate(states)]
        # Of large states only the last is kept: the buffer is the same for any K, and so is the order of the sum.
        in_order = self.records_steps
        summed = sum_in_rank_order(addends, collective, name) if in_order else collective.all_reduce(addends, name)
        results = self._results(summed)
        self.assign(local)
        return {key: results[key].numpy() for key in self._names}

    def _logs(self) -> dict[str, Any]:
        return flat_logs(self._model.get_metrics_result())

    def _addend(self, index: int, state: Array, collective: Collective) -> tf.Tensor:
        aggregation = self.variables[index].aggregation
        if aggregation == "mean":
            return tf.constant(state / np.asarray(collective.world_size, state.dtype))
        if aggregation == "only_first_replica" and collective.rank > 0:
            return tf.zeros_like(state)
        return tf.constant(state)

    def _results_of(self, states: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        def result_of(state: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
            self.assign(state)
            return {key: tf.cast(value, tf.float64) for key, value in self._logs().items()}

        keys = self._names = list(self._logs())  # a tf.function returns dicts in another order
        num_steps = tf.shape(states[0])[0]
        arrays = [tf.TensorArray(tf.float64, size=num_steps) for _ in keys]

        def body(step: tf.Tensor, arrays: list[tf.TensorArray]) -> tuple[tf.Tensor, list[tf.TensorArray]]:
            result = result_of([state[step] for state in states])
            return step + 1, [array.write(step, result[key]) for array, key in zip(arrays, keys, strict=True)]

        _, arrays = tf.while_loop(
            lambda step, _: step < num_steps, body, (tf.constant(0), arrays), parallel_iterations=1
        )
        return {key: array.stack() for key, array in zip(keys, arrays, strict=True)}


def flat_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Logs without nesting, in Keras's order: some metrics' results, and that of all compiled ones, are dicts."""
    flat: dict[str, Any] = {}
    for name, value in sorted(logs.items()):
        flat.update(flat_logs(value) if isinstance(value, Mapping) else {name: value})
    return flat
