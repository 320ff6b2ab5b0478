"""Owns what a training step that a lost peer ends half-way may have changed by then, and how it is put back.

Weights, slots and counters change only when the step's reduction has returned (optimizer.py), so they are those of
whole steps at any moment. What a forward pass changes before that is copied in the graph when a step begins: random
seeds, metrics, moving statistics. Of a step with several reductions everything is copied, since the first update may
be in place when the last one fails.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dtrain.keras_internals import global_seed_generator, seed_generators_of, state_variables_of
from dtrain.metrics import MetricState
from dtrain.model import optimizers_of
from dtrain.types import Array


class Undo:
    """Copies of what a step may change too early, taken at its start.

    Args:
        model: built.
        metrics: its metric state.
    """

    def __init__(self, model: keras.Model, metrics: MetricState) -> None:
        self._model = model
        self._metrics = metrics
        self._copies: list[tuple[Any, tf.Variable]] = []
        self._finished = tf.Variable(0, dtype=tf.int64, trainable=False)
        self._num_taken = tf.Variable(0, dtype=tf.int64, trainable=False)
        self.covers_all = False
        self.assigned_early: list[Any] = []
        """Other variables that a forward pass was seen to assign."""

    def prepare(self) -> bool:
        """Make room for the copies that are needed by now; whether there was any to make.

        Before a step is traced, since variables cannot be made within; and after it, when more is known of it.
        """
        before = len(self._copies)
        generators = [*seed_generators_of(self._model), global_seed_generator()]
        self._cover([*(generator.state for generator in generators), *self._metrics.variables])
        self._cover(state_variables_of(self._model))
        self._cover(self.assigned_early)
        if self.covers_all:
            self._cover(self._model.variables)
            self._cover(variable for optimizer in optimizers_of(self._model) for variable in optimizer.variables)
        return len(self._copies) > before

    def begin_step(self, finished: Any) -> tf.Operation:
        """Take the copies; what this returns must have run before anything of the step does.

        Args:
            finished: how many steps of the call are finished: int, or a scalar tensor.
        """
        taken = [copy.assign(tf.convert_to_tensor(variable.value)) for variable, copy in self._copies]
        number = self._num_taken.assign(len(taken))  # a step that was traced before takes fewer
        return tf.group(*taken, number, self._finished.assign(tf.cast(finished, tf.int64)))

    @property
    def variables(self) -> list[tf.Variable]:
        """Its own."""
        return [self._finished, self._num_taken, *(copy for _, copy in self._copies)]

    @property
    def copies(self) -> list[tuple[Any, tf.Variable]]:
        """What is covered, and the copies taken last."""
        return list(self._copies)

    def restore(self) -> int:
        """Put everything back to the start of the step that failed. How many steps of the call were finished."""
        for variable, copy in self._copies[: int(self._num_taken.numpy())]:
            variable.assign(copy.numpy())
        return int(self._finished.numpy())

    def _cover(self, variables: Iterable[Any]) -> None:
        for variable in variables:
            if all(variable is not known for known, _ in self._copies):
                self._copies.append((variable, tf.Variable(tf.convert_to_tensor(variable.value), trainable=False)))


class Skips:
    """Steps that are put back whole, since a number that they assigned is none: NaN or infinite.

    All ranks find the same, since all that is looked at is equal on them. Variables that were not finite before the
    step are not looked at: some are made so.

    Args:
        undo: whose copies are put back; of everything.
        metrics: whose loss tells on which rank it began.
    """

    def __init__(self, undo: Undo, metrics: MetricState) -> None:
        self._undo = undo
        self._metrics = metrics
        self._codes = tf.Variable(tf.zeros([0], tf.int32), shape=[None], trainable=False)

    @property
    def variables(self) -> list[tf.Variable]:
        """Its own."""
        return [self._codes]

    def begin(self, num_steps: Any) -> None:
        """Of a call."""
        self._codes.assign(tf.zeros([num_steps], tf.int32))

    def settle(self, step: Any) -> None:
        """Look at what a step has assigned; works while tracing."""
        own = [
            variable
            for variable, is_loss in zip(self._metrics.variables, self._metrics.is_of_loss(), strict=True)
            if is_loss
        ]
        others = [
            (variable, copy)
            for variable, copy in self._undo.copies
            if copy.dtype.is_floating and all(variable is not known for known in self._metrics.variables)
        ]
        finite = tf.reduce_all([_is_as_finite(variable, copy) for variable, copy in others])
        is_own = ~tf.reduce_all([tf.reduce_all(tf.math.is_finite(variable.value)) for variable in own] or [True])
        code = tf.where(finite, 0, 1 + tf.cast(is_own, tf.int32))
        tf.raw_ops.ResourceScatterUpdate(resource=self._codes.handle, indices=step, updates=code)
        for variable, copy in self._undo.copies:
            variable.assign(tf.where(finite, variable.value, copy))

    def read(self) -> dict[int, bool]:
        """The steps of the call that were put back, and whether this rank's own part of the loss was not finite."""
        return {step: int(code) == 2 for step, code in enumerate(self._codes.numpy()) if code}


def _is_as_finite(variable: Any, before: tf.Variable) -> tf.Tensor:
    return tf.reduce_all(tf.math.is_finite(variable.value) | ~tf.math.is_finite(before))


class Records:
    """What is kept of each step of a call, in variables: so it is there when the call fails.

    Args:
        states: dtype and shape of each metric variable.
        num_logs: how many numbers of its own a step returns.
    """

    def __init__(self, states: Sequence[tuple[tf.DType, tf.TensorShape]], num_logs: int) -> None:
        self._states = [_growing(dtype, shape) for dtype, shape in states]
        self._logs = [_growing(tf.float64, tf.TensorShape([])) for _ in range(num_logs)]

    @property
    def variables(self) -> list[tf.Variable]:
        """Its own."""
        return [*self._states, *self._logs]

    def clear(self, num_states: Any, num_logs: Any) -> None:
        """Make room for so many of each."""
        for variables, slots in ((self._states, num_states), (self._logs, num_logs)):
            for variable in variables:
                shape = tf.concat([[slots], tf.constant(variable.shape[1:].as_list(), tf.int32)], 0)
                variable.assign(tf.zeros(shape, variable.dtype))

    def write(self, state_slot: Any, states: Sequence[tf.Tensor], log_slot: Any, logs: Sequence[tf.Tensor]) -> None:
        for slot, variables, values in ((state_slot, self._states, states), (log_slot, self._logs, logs)):
            for variable, value in zip(variables, values, strict=True):
                tf.raw_ops.ResourceScatterUpdate(resource=variable.handle, indices=slot, updates=value)

    def read(self) -> list[tf.Tensor]:
        """The states, and then the logs."""
        return [variable.read_value() for variable in (*self._states, *self._logs)]

    def first(self, num_states: int, num_logs: int) -> list[Array]:
        """The same of the first steps alone, after a call that has failed."""
        parts = ((self._states, num_states), (self._logs, num_logs))
        return [np.array(variable.numpy()[:slots]) for variables, slots in parts for variable in variables]


def _growing(dtype: tf.DType, shape: tf.TensorShape) -> tf.Variable:
    return tf.Variable(tf.zeros([0, *shape], dtype), shape=[None, *shape], trainable=False)
