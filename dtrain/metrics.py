"""Owns exact metrics over ranks: state is summed, results are computed from the sum.

Each rank updates Keras's metric objects with its own rows only. A metric's variables say how they add up
(`aggregation`, "sum" for all of Keras's own); `global_logs` adds them up and asks Keras for the results. A mean of
means never occurs.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from unittest.mock import patch

import keras
import numpy as np
import tensorflow as tf

from dtrain.collective import Collective
from dtrain.keras_internals import Mean
from dtrain.types import Array, Logs

RECORDED_ELEMENTS = 4096
"""Metric state of up to this many numbers is kept for every step; of more (large confusion matrices), for the last."""

Source = tuple[int, str]
"""Where a number in the logs comes from: which of the model's metrics, and its name among that one's results."""
SHOWN = -1
"""In place of a metric's number: the results of all metrics, as the model shows them."""


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
        self.records_steps = True
        self.take_up()
        self._names: dict[Any, list[str]] = {}
        self._results: dict[Any, Any] = {}

    def take_up(self) -> None:
        """Take up variables that are new: some metrics make theirs in their first update."""
        found = {id(variable): variable for metric in self._model.metrics for variable in metric.variables}
        self.variables[:] = found.values()  # in the same order, whoever has made theirs first
        self.records_steps = sum(int(np.prod(v.shape)) for v in self.variables) <= RECORDED_ELEMENTS

    def is_of_loss(self) -> list[bool]:
        """For each variable whether it is the loss's."""
        of_loss = [variable for metric in self._model.metrics if metric.name == "loss" for variable in metric.variables]
        return [any(variable is other for other in of_loss) for variable in self.variables]

    def read(self) -> list[tf.Tensor]:
        """The variables' values now; works while tracing."""
        return [tf.convert_to_tensor(variable.value) for variable in self.variables]

    def assign(self, values: Sequence[Any]) -> None:
        for variable, value in zip(self.variables, values, strict=True):
            variable.assign(value)

    @contextlib.contextmanager
    def recorded_results(self) -> Iterator[list[tuple[Any, Source]]]:
        """Collect the results that metrics give inside, eagerly or while tracing, and where they come from."""
        results: list[tuple[Any, Source]] = []

        def recorded(place: int, plain: Callable[[], Any]) -> Callable[[], Any]:
            def result() -> Any:
                found = plain()
                results.extend((value, (place, name)) for name, value in flat_logs({"": found}).items())
                return found

            return result

        with contextlib.ExitStack() as stack:
            for place, metric in enumerate(self._model.metrics):
                stack.enter_context(patch.object(metric, "result", recorded(place, metric.result)))
            shown = recorded(SHOWN, self._model.get_metrics_result)
            stack.enter_context(patch.object(self._model, "get_metrics_result", shown))
            yield results

    def updated(self, assigned: Sequence[Any]) -> dict[str, Source]:
        """The results, by Keras's names, of metrics that have a variable among those assigned; works while tracing."""
        found: dict[str, Source] = {}
        for place, metric in enumerate(self._model.metrics):
            if any(variable is other for variable in metric.variables for other in assigned):
                found.update((name or metric.name, (place, name)) for name in self._results_at(place))
        return found

    def global_logs(
        self,
        states: Sequence[Array],
        collective: Collective,
        name: str,
        wanted: Mapping[str, Source] | None = None,
    ) -> dict[str, Array]:
        """Turn states into logs of the whole job. Collective.

        Args:
            states: for each variable, its values on this rank after K steps, of shape (K, *variable.shape).
            collective: the ranks to add up over.
            name: of the collective operation.
            wanted: the results to give, by the names to give them; None: all, as the model shows them.

        Returns:
            For each result its K values, the same on all ranks. The variables keep their local values.
        """
        if not self.variables:
            return {}
        local = self.read()
        addends = [self._addend(i, s, collective) for i, s in enumerate(states)]
        # Of large states only the last is kept: the buffer is the same for any K, and so is the order of the sum.
        in_order = self.records_steps
        summed = sum_in_rank_order(addends, collective, name) if in_order else collective.all_reduce(addends, name)
        key = None if wanted is None else tuple(wanted.items())
        place = key, len(summed)  # some metrics make variables later
        if place not in self._results:  # traced once, for any number of steps
            specs = [tf.TensorSpec([None, *tensor.shape[1:]], tensor.dtype) for tensor in summed]
            results_of = functools.partial(self._results_of, wanted=key)
            self._results[place] = tf.function(results_of, input_signature=[specs], autograph=False)
        results = self._results[place](summed)
        self.assign(local)
        return {name: results[name].numpy() for name in self._names[key]}

    def _logs(self, wanted: Sequence[tuple[str, Source]] | None) -> dict[str, Any]:
        if wanted is None:
            return self._results_at(SHOWN)
        results = {place: self._results_at(place) for place in dict.fromkeys(place for _, (place, _) in wanted)}
        return {name: results[place][key] for name, (place, key) in wanted}

    def _results_at(self, place: int) -> dict[str, Any]:
        """By name, the results of a metric, or of all; one alone has no name."""
        result = self._model.get_metrics_result() if place == SHOWN else self._model.metrics[place].result()
        return flat_logs({"": result})

    def _addend(self, index: int, state: Array, collective: Collective) -> tf.Tensor:
        aggregation = self.variables[index].aggregation
        if aggregation == "mean":
            return tf.constant(state / np.asarray(collective.world_size, state.dtype))
        if aggregation == "only_first_replica" and collective.rank > 0:
            return tf.zeros_like(state)
        return tf.constant(state)

    def _results_of(self, states: Sequence[tf.Tensor], wanted: Any) -> dict[str, tf.Tensor]:
        def result_of(state: Sequence[tf.Tensor]) -> list[tf.Tensor]:
            self.assign(state)
            logs = self._logs(wanted)
            self._names[wanted] = list(logs)
            return [tf.cast(value, tf.float64) for value in logs.values()]

        one = tf.function(result_of, autograph=False)
        one.get_concrete_function([tf.TensorSpec(state.shape[1:], state.dtype) for state in states])
        names, num_steps = self._names[wanted], tf.shape(states[0])[0]  # how many there are, a loop has to know before
        arrays = [tf.TensorArray(tf.float64, size=num_steps) for _ in names]

        def body(step: tf.Tensor, arrays: list[tf.TensorArray]) -> tuple[tf.Tensor, list[tf.TensorArray]]:
            results = one([state[step] for state in states])
            return step + 1, [array.write(step, result) for array, result in zip(arrays, results, strict=True)]

        _, arrays = tf.while_loop(
            lambda step, _: step < num_steps, body, (tf.constant(0), arrays), parallel_iterations=1
        )
        return {name: array.stack() for name, array in zip(names, arrays, strict=True)}


def last_of(logs: Mapping[str, Array]) -> Logs:
    """The logs after the last step; of a metric that is an array (an F1Score by class), the array, as in Keras."""
    return {key: float(values[-1]) if values.ndim == 1 else values[-1] for key, values in logs.items()}


def flat_logs(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Logs without nesting, in Keras's order: some metrics' results, and that of all compiled ones, are dicts."""
    flat: dict[str, Any] = {}
    for name, value in sorted(logs.items()):
        flat.update(flat_logs(value) if isinstance(value, Mapping) else {name: value})
    return flat


def places_in(logs: Mapping[str, Any], outer: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """For each name that `flat_logs` gives the names that lead to it: Keras sorts by the first of them."""
    places: dict[str, tuple[str, ...]] = {}
    for name, value in sorted(logs.items()):
        here = (*outer, name)
        places.update(places_in(value, here) if isinstance(value, Mapping) else {name: here})
    return places


def nested_logs(flat: Mapping[str, Any], places: Mapping[str, tuple[str, ...]]) -> dict[str, Any]:
    """Logs as deep as they were before `flat_logs`; those without a place are on top."""
    logs: dict[str, Any] = {}
    for name, value in flat.items():
        *outer, last = places.get(name, (name,))
        inside = logs
        for key in outer:
            inside = inside.setdefault(key, {})
        inside[last] = value
    return logs
