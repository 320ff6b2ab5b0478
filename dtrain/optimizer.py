"""Owns the one seam where gradients are reduced over ranks.

While a training step is traced, the outermost optimizers of a model are patched:

- `scale_loss` multiplies the loss by this rank's share (its rows over the mini-batch's rows), so that the sum over
  ranks of the gradients is the gradient of the whole mini-batch's mean;
- `apply` sums the gradients over ranks and only then, under control dependencies of every collective, calls Keras's
  own `apply`. So clipping, decay, accumulation, averages and finite checks see reduced gradients, and nothing is
  updated unless every collective has returned.

Outside the trace an optimizer is plain Keras: what is saved knows nothing of dtrain.
"""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import keras
import tensorflow as tf

from dtrain.collective import Collective
from dtrain.errors import ConfigError
from dtrain.keras_internals import layers_of


@dataclass
class Reduction:
    """How one traced step reduces.

    Attributes:
        collective: the group.
        share: scalar tensor: this rank's rows over the rows of the mini-batch; when `whole`, 1 on rank 0, else 0.
            It is fed in, never a constant: TensorFlow would fold what is multiplied by 0.
        whole: every rank has the whole mini-batch (it has fewer rows than there are ranks).
        statistics: variables that a forward pass may assign (moving averages).
        assigned: the variables that the step has assigned so far. Statistics among them are made equal over ranks, as
            means weighted by rows, in the same buffer as the gradients.
        reduced: how often gradients were reduced so far.
    """

    collective: Collective
    share: tf.Tensor
    whole: bool
    statistics: list[Any] = field(default_factory=list)
    assigned: list[Any] = field(default_factory=list)
    reduced: int = 0

    def take_statistics(self) -> list[Any]:
        """The statistics assigned since the last call."""
        taken = [v for v in self.statistics if any(v is other for other in self.assigned)]
        self.statistics = [v for v in self.statistics if all(v is not other for other in taken)]
        return taken


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The outermost optimizers that a model holds as attributes, its compiled one first."""
    found: list[keras.optimizers.Optimizer] = []
    for layer in layers_of(model):
        for value in vars(layer).values():
            for item in value if isinstance(value, (list, tuple)) else [value]:
                if isinstance(item, keras.optimizers.Optimizer) and all(item is not known for known in found):
                    found.append(item)
    inner = [getattr(optimizer, "inner_optimizer", None) for optimizer in found]
    return [optimizer for optimizer in found if all(optimizer is not other for other in inner)]


@contextlib.contextmanager
def reduced_gradients(optimizers: Sequence[keras.optimizers.Optimizer], reduction: Reduction) -> Iterator[None]:
    """Inside, `scale_loss` and `apply` of these optimizers work on the whole mini-batch. All ranks trace the same."""
    with contextlib.ExitStack() as stack:
        for index, optimizer in enumerate(optimizers):
            stack.enter_context(_patched(optimizer, f"gradients{index}", reduction))
        yield


@contextlib.contextmanager
def _patched(optimizer: keras.optimizers.Optimizer, name: str, reduction: Reduction) -> Iterator[None]:
    plain_scale_loss, plain_apply = optimizer.scale_loss, optimizer.apply
    scaled = False

    def scale_loss(loss: Any) -> Any:
        nonlocal scaled
        scaled = True
        return plain_scale_loss(loss) * tf.cast(reduction.share, loss.dtype)

    def apply(grads: Any, trainable_variables: Any = None) -> Any:
        call_name = name if reduction.reduced == 0 else f"{name}.{reduction.reduced}"
        # A custom train_step may never call scale_loss; the gradients then carry no share yet.
        shared = list(grads) if scaled else [_times(grad, reduction.share) for grad in grads]
        _refuse_overwriting(trainable_variables)
        gradients = reduce(shared, call_name, reduction)
        reduction.reduced += 1
        dependencies = [part for grad in gradients for part in _tensors_of(grad)]
        with tf.control_dependencies(dependencies):
            return plain_apply(gradients, trainable_variables)

    with patch.object(optimizer, "scale_loss", scale_loss), patch.object(optimizer, "apply", apply):
        yield


def reduce(grads: Sequence[Any], name: str, reduction: Reduction) -> list[Any]:
    """Sum gradients over ranks; moving statistics ride along and are assigned their mean weighted by rows."""
    statistics = reduction.take_statistics()
    riders = [_times(tf.convert_to_tensor(variable.value), reduction.share) for variable in statistics]
    dense = [index for index, grad in enumerate(grads) if isinstance(grad, tf.Tensor)]
    sent = [grads[index] for index in dense] + riders
    received = reduction.collective.all_reduce(sent, name) if sent else []
    result = list(grads)
    for index, tensor in zip(dense, received, strict=False):
        result[index] = tensor
    for index, grad in enumerate(grads):
        if isinstance(grad, tf.IndexedSlices):
            result[index] = _gather(grad, f"{name}.sparse{index}", reduction)
    for variable, tensor in zip(statistics, received[len(dense) :], strict=True):
        variable.assign(tensor)
    return result


def _gather(grad: tf.IndexedSlices, name: str, reduction: Reduction) -> tf.IndexedSlices:
    """All ranks' rows, unmerged, as one process would have them; making them dense would change Adam and clipping."""
    gathered = reduction.collective.all_gather_slices(grad, name)
    if not reduction.whole:
        return gathered
    rows = tf.shape(grad.values)[0]  # every rank sent the whole mini-batch: keep rank 0's, which counts
    return tf.IndexedSlices(gathered.values[:rows], gathered.indices[:rows], dense_shape=grad.dense_shape)


def _times(value: Any, factor: tf.Tensor) -> Any:
    if value is None:
        return None
    if isinstance(value, tf.IndexedSlices):
        scaled = value.values * tf.cast(factor, value.values.dtype)
        return tf.IndexedSlices(scaled, value.indices, dense_shape=value.dense_shape)
    return value * tf.cast(factor, value.dtype)


def _tensors_of(grad: Any) -> list[tf.Tensor]:
    if grad is None:
        return []
    return [grad.values, grad.indices] if isinstance(grad, tf.IndexedSlices) else [grad]


def _refuse_overwriting(variables: Any) -> None:
    for variable in variables or ():
        if getattr(variable, "overwrite_with_gradient", False):
            raise ConfigError(
                f"variable {variable.path!r} is overwritten with its gradient (fp8 scaling), which has no sum over"
                " workers; use another dtype policy, or num_workers=1"
            )
