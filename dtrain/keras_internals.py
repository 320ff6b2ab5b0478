"""Owns every private name of Keras that dtrain relies on, so that a new Keras version is checked in one place.

Only the attributes in which Keras's callbacks keep their state are named elsewhere: in callback_checkpoint.py, which
may not import Keras. tests/test_keras_internals.py says what each of them must do.
"""

import contextlib
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import keras
from keras.src.backend import compute_output_spec
from keras.src.backend.common.masking import get_keras_mask, set_keras_mask
from keras.src.backend.common.variables import Variable
from keras.src.backend.tensorflow import nn as backend_nn
from keras.src.backend.tensorflow import numpy as backend_numpy
from keras.src.losses import loss as loss_module
from keras.src.metrics.reduction_metrics import Mean
from keras.src.random import seed_generator as seed_module
from keras.src.trainers.data_adapters import get_data_adapter
from keras.src.trainers.data_adapters.data_adapter_utils import unpack_x_y_sample_weight
from keras.src.trainers.data_adapters.generator_data_adapter import GeneratorDataAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter
from keras.src.utils import is_default

from dtrain.data.source import leaves
from dtrain.errors import ConfigError, DataError
from dtrain.types import Shapes, Tree

DRAWS = 933199

__all__ = [
    "DRAWS",
    "KerasInput",
    "Mean",
    "Variable",
    "accumulators_of",
    "backend_nn",
    "backend_numpy",
    "build_from_batch",
    "build_from_inputs",
    "compiled_parts",
    "drawn_unordered",
    "get_keras_mask",
    "global_seed_generator",
    "has_call",
    "is_default",
    "is_update_step",
    "layers_of",
    "loss_module",
    "profiles",
    "recorded_assignments",
    "schedule_of",
    "seed_generators_of",
    "set_keras_mask",
    "set_steps_since_update",
    "state_variables_of",
    "steps_since_update",
    "unpack_x_y_sample_weight",
]


def build_from_batch(model: keras.Model, batch: Any) -> None:
    """Create the variables of model, loss, metrics and optimizer from one batch, without computing anything."""
    model._symbolic_build(data_batch=_symbolic(batch))


def build_from_inputs(model: keras.Model, batch: Any) -> None:
    """Create the variables of model and optimizer from a batch that may have no targets; None if layers have theirs.

    Raises:
        ConfigError: the model has no `call`, and parts that only a step of its own would build.
    """
    if not has_call(model):
        unbuilt = [layer.name for layer in layers_of(model) if layer is not model and not layer.built]
        if unbuilt:
            raise ConfigError(
                f"{type(model).__name__} has no call, and {unbuilt[0]!r} is not built: only train_step would show it"
                " what it computes on; build it in model_fn, by an Input or with build(shape)"
            )
        model.built = True
    if not all(layer.built for layer in layers_of(model)):
        x, _, _ = unpack_x_y_sample_weight(batch)
        compute_output_spec(model, _symbolic(x), training=False)
    if model.optimizer is not None and not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)


def has_call(model: keras.Model) -> bool:
    """Whether a model says what it computes; some have a train_step alone."""
    return type(model).call is not keras.Model.call


def _symbolic(batch: Any) -> Any:
    """Shapes and dtypes of a batch, as Keras names them; what NumPy calls text has one name there."""

    def of(leaf: Any) -> Any:
        is_text = getattr(leaf.dtype, "kind", "") in "USO"
        shape = (None, *leaf.shape[1:])  # with a number of rows, Keras may take it for one of columns
        return keras.KerasTensor(shape, "string" if is_text else keras.backend.standardize_dtype(leaf.dtype))

    return keras.tree.map_structure(lambda leaf: None if leaf is None else of(leaf), batch)


def layers_of(model: keras.Model) -> list[keras.Layer]:
    """The model and every layer inside it."""
    return list(model._flatten_layers())


def compiled_parts(model: keras.Model) -> tuple[Any, ...]:
    """What `compile` makes anew each time it is called, and which variables of a built model are trained."""
    parts = (model.optimizer, model._compile_loss, model._compile_metrics)
    return *parts, *(variable.trainable for variable in model.variables)


def seed_generators_of(model: keras.Model) -> list[Any]:
    """The seed generators of a model's layers, in a fixed order."""
    found: list[Any] = []
    for layer in layers_of(model):
        found.extend(getattr(layer, "_seed_generators", ()))
    return found


def state_variables_of(model: keras.Model) -> list[Any]:
    """The variables that layers keep a state in, such as moving averages: no weights, be they frozen or not."""
    return [variable for layer in layers_of(model) for variable in layer._non_trainable_variables]


def global_seed_generator() -> Any:
    """The generator that layers and ops without one of their own draw from."""
    return seed_module.global_seed_generator()


def drawn_unordered(words: Sequence[int]) -> list[int]:
    """The state of the global generator after another number: as `SeedGenerator.next(ordered=False)` leaves it.

    Unlike with layers' generators, of which the second word counts and the first stays, both become others. They come
    around after fewer than `DRAWS` numbers.
    """
    return [(word + 1) * 5387 % DRAWS for word in words]


def accumulators_of(optimizer: keras.optimizers.Optimizer, variables: Any = None) -> list[Any]:
    """What a built optimizer with `gradient_accumulation_steps` adds gradients up in; None for a variable without one.

    Args:
        optimizer: it.
        variables: whose, in their order; None: all that it was built with.
    """
    if variables is None:
        return list(optimizer._accumulated_gradients)
    return [optimizer._accumulated_gradients[optimizer._get_variable_index(variable)] for variable in variables]


def schedule_of(optimizer: keras.optimizers.Optimizer) -> Any:
    """What computes an optimizer's learning rate from its iterations; None where it is a number."""
    rate = getattr(optimizer, "_learning_rate", None)
    return rate if isinstance(rate, keras.optimizers.schedules.LearningRateSchedule) else None


def is_update_step(optimizer: keras.optimizers.Optimizer) -> Any:
    """Whether the next `apply` of an optimizer that accumulates updates the weights: a scalar tensor of bool."""
    return (optimizer._iterations + 1) % optimizer.gradient_accumulation_steps == 0


def trained_by(optimizer: Any) -> list[Any]:
    """The variables that an optimizer, or one inside of it, was built for: also those that are frozen by now."""
    inner = getattr(optimizer, "inner_optimizer", None)
    return [*getattr(optimizer, "_trainable_variables", ()), *(trained_by(inner) if inner is not None else ())]


def steps_since_update(optimizer: keras.optimizers.Optimizer) -> int:
    """How many mini-batches an optimizer has accumulated the gradients of, and not applied."""
    return int(optimizer._iterations) % int(optimizer.gradient_accumulation_steps)


def set_steps_since_update(optimizer: keras.optimizers.Optimizer, steps: int) -> None:
    optimizer._iterations.assign_sub(steps_since_update(optimizer) - steps)


def profiles(board: keras.callbacks.TensorBoard) -> bool:
    """Whether a TensorBoard callback was made with a `profile_batch`."""
    return bool(board._should_trace)


@contextlib.contextmanager
def recorded_assignments() -> Iterator[list[Any]]:
    """Collect every Keras variable that is assigned inside, eagerly or while tracing, each once, in order."""
    assigned: list[Any] = []
    plain = Variable.assign

    def assign(self: Any, value: Any) -> Any:
        if not any(variable is self for variable in assigned):
            assigned.append(self)
        return plain(self, value)

    with patch.object(Variable, "assign", assign):
        yield assigned


class KerasInput:
    """What Keras takes as data in batches, read as Keras reads it: by its own adapter (a `dtrain.data.stream.Input`).

    Args:
        data: a tf.data.Dataset, keras.utils.PyDataset, generator, torch DataLoader or grain data set.
        make: makes it anew; None: it cannot be, and is only read once.
        class_weight: weights by class number, turned into sample weights.
        order: for a PyDataset whose batches are shuffled: the order of the batches, by the number of the pass and how
            many there are.

    Raises:
        DataError: Keras does not take it.
    """

    def __init__(
        self,
        data: Any,
        make: Callable[[], Any] | None = None,
        class_weight: Mapping[int, float] | None = None,
        order: Callable[[int, int], Any] | None = None,
    ) -> None:
        self._make = make
        self._class_weight = class_weight
        self._order = order
        self._take(data)

    @property
    def num_batches(self) -> int | None:
        number: int | None = self._adapter.num_batches
        return number

    def open(self) -> None:
        assert self._make is not None
        self._take(self._make())

    def begin_pass(self, number: int) -> None:
        if isinstance(self._adapter, GeneratorDataAdapter) and number > 0:
            self.open()
        if isinstance(self._data, _Reordered) and self._order is not None:
            self._data.order = self._order(number, self._data.num_batches)

    def batches(self) -> Iterable[Tree]:
        found: Iterable[Tree] = self._adapter.get_numpy_iterator()
        return found

    def shapes(self) -> Shapes:
        """As Keras finds them: a tf.data.Dataset declares them, of others it compares the first two batches."""
        return self._shapes

    def end_pass(self) -> None:
        # Keras makes one more iterator then and throws it away; what is shuffled anew for each iterator feels that.
        if isinstance(self._adapter, TFDatasetAdapter):
            iter(self._adapter.get_tf_dataset())

    def on_epoch_begin(self) -> None:
        self._adapter.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._adapter.on_epoch_end()

    def _take(self, data: Any) -> None:
        if isinstance(data, keras.utils.PyDataset) and self._order is not None and data.num_batches is not None:
            data = _Reordered(data)
        if any(type(spec).__name__ == "RaggedTensorSpec" for spec in keras.tree.flatten(_spec_of(data))):
            raise DataError("ragged tensors cannot be cut by rows here; pad them: dataset.padded_batch(32)")
        self._data = data
        try:
            self._adapter = get_data_adapter(data, class_weight=self._class_weight)
        except ValueError as error:
            if _was_raised_by_keras(error):
                raise DataError(str(error)) from error
            raise
        self._shapes = self._find_shapes()

    def _find_shapes(self) -> Shapes:
        """Whenever the data are made anew: to look at batches may draw random numbers, as it does in Keras."""
        try:
            spec = self._adapter.get_tf_dataset().element_spec
        except (TypeError, ValueError):  # of what is no batch; who reads it says so with its place
            return {}
        parts = spec if isinstance(spec, (tuple, list)) else (spec,)
        found = ((path, getattr(leaf, "shape", None)) for path, leaf in leaves(parts))
        return {path: tuple(shape[1:]) for path, shape in found if shape is not None and shape.rank}


def _spec_of(data: Any) -> Any:
    return getattr(data, "element_spec", None)


def _was_raised_by_keras(error: Exception) -> bool:
    """Whether Keras itself raised it, and not what it called."""
    *_, last = traceback.walk_tb(error.__traceback__)
    return Path(keras.__file__).parent in Path(last[0].f_code.co_filename).parents


class _Reordered(keras.utils.PyDataset):  # type: ignore[misc]
    """A PyDataset with its batches in another order: Keras's own shuffling draws from a generator of the process."""

    def __init__(self, dataset: Any) -> None:
        super().__init__(dataset.workers, dataset.use_multiprocessing, dataset.max_queue_size)
        self._dataset = dataset
        self.order = range(dataset.num_batches)

    @property
    def num_batches(self) -> int:
        number: int = self._dataset.num_batches
        return number

    def __getitem__(self, index: int) -> Any:
        return self._dataset[self.order[index]]

    def on_epoch_begin(self) -> None:
        self._dataset.on_epoch_begin()

    def on_epoch_end(self) -> None:
        self._dataset.on_epoch_end()
