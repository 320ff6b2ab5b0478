"""Owns the one seam where gradients are reduced over ranks.

While a training step is traced, the outermost optimizers of a model are patched:

- `scale_loss` multiplies the loss by this rank's share (its rows over the mini-batch's rows), so that the sum over
  ranks of the gradients is the gradient of the whole mini-batch's mean;
- `apply` sums the gradients over ranks and only then, under control dependencies of every collective, calls Keras's
  own `apply`. So clipping, decay, accumulation, averages and finite checks see reduced gradients, and nothing is
  updated unless every collective has returned.

Outside the trace an optimizer is plain Keras: what is saved knows nothing of dtrain.

A custom train_step that reads or clips gradients itself calls `reduce_gradients`, and `apply` then reduces no more.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import keras
import tensorflow as tf

from dtrain.accumulation import reduce_window, sums_locally
from dtrain.collective import Collective
from dtrain.errors import ConfigError
from dtrain.types import StepOptions
from dtrain.wire import buckets, in_order


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
        options: what the user wants of steps.
        reduced: how often gradients were reduced so far.
        unreduced: the gradients that `reduce_gradients` was given.
        by_user: the forms of gradients that `reduce_gradients` has returned and no `apply` has taken yet.
        scaled: for each optimizer, whether its `scale_loss` was called.
        is_applying: an optimizer whose gradients were reduced is at work; it may have others inside.
        assigned_early: what was assigned before gradients were reduced.
        graph: in which the step is traced.
        rows: of the mini-batch on this rank; None while tracing, where nobody knows.
    """

    collective: Collective
    share: tf.Tensor
    whole: bool
    statistics: list[Any] = field(default_factory=list)
    assigned: list[Any] = field(default_factory=list)
    options: StepOptions = field(default_factory=StepOptions)
    reduced: int = 0
    unreduced: list[Any] = field(default_factory=list)
    by_user: list[Any] = field(default_factory=list)
    scaled: list[bool] = field(default_factory=list)
    is_applying: bool = False
    assigned_early: list[Any] = field(default_factory=list)
    graph: Any = field(default_factory=tf.compat.v1.get_default_graph)
    rows: int | None = None

    @property
    def has_statistics(self) -> bool:
        """Whether statistics were assigned since they were taken last."""
        return any(v is other for v in self.statistics for other in self.assigned)

    def sum(
        self, gradients: Sequence[tf.Tensor], name: str, riders: Sequence[tf.Tensor] = ()
    ) -> tuple[list[tf.Tensor], list[tf.Tensor]]:
        """The sums over ranks of dense gradients, and of other tensors, which are known before and never shortened."""
        sums: list[Any] = [None] * len(gradients)
        compression, rode = self.options.compression, []
        if riders and (compression or not gradients):
            rode, riders = self.collective.all_reduce(riders, f"{name}-riders" if gradients else name), ()
        parts = buckets(gradients)
        in_order([[gradients[index] for index in part] for part in parts])
        for number, bucket in enumerate(parts):
            sent = [*(gradients[index] for index in bucket), *(riders if number == len(parts) - 1 else ())]
            found = self.collective.all_reduce(sent, f"{name}-{number}" if number else name, compression)
            for index, value in zip(bucket, found, strict=False):
                sums[index] = value
            rode += found[len(bucket) :]
        return sums, rode

    def across(self, operation: Callable[[tf.Tensor], tf.Tensor], tensor: tf.Tensor) -> tf.Tensor:
        """A collective operation of a forward pass, whose gradient is a sum over ranks.

        It is to be that of losses times the ranks' shares. Where a step of the user's own does not scale its loss,
        shares are taken of gradients only when they are complete; so they are put in here, and this rank's out again.
        """

        def backward_times(factor: Callable[[tf.Tensor], tf.Tensor], value: tf.Tensor) -> tf.Tensor:
            @tf.custom_gradient  # type: ignore[untyped-decorator]
            def same(value: tf.Tensor) -> Any:
                def grad(upstream: tf.Tensor) -> tf.Tensor:
                    if self.whole or any(self.scaled):
                        return upstream
                    wide = tf.float64 if upstream.dtype == tf.float64 else tf.float32
                    return tf.cast(tf.cast(upstream, wide) * factor(tf.cast(self.share, wide)), upstream.dtype)

                return tf.identity(value), grad

            return same(value)

        if not tensor.dtype.is_floating:
            return operation(tensor)
        return backward_times(tf.identity, operation(backward_times(tf.math.reciprocal, tensor)))

    def due_statistics(self) -> list[Any]:
        """The statistics that were assigned and not made equal since; none in a branch, which may not be taken."""
        if tf.compat.v1.get_default_graph() is not self.graph:
            return []
        return [v for v in self.statistics if any(v is other for other in self.assigned)]

    def note_assigned(self) -> None:
        """Gradients are about to be reduced: what was assigned so far was early."""
        self.assigned_early += [v for v in self.assigned if all(v is not other for other in self.assigned_early)]

    def make_equal(self, statistics: Sequence[Any], values: Sequence[tf.Tensor]) -> None:
        """Assign them; a later forward pass may assign them anew."""
        for variable, value in zip(statistics, values, strict=True):
            variable.assign(value)
        self.assigned[:] = [v for v in self.assigned if all(v is not other for other in statistics)]


_CURRENT: ContextVar[Reduction | None] = ContextVar("dtrain_reduction", default=None)


@contextlib.contextmanager
def reduced_gradients(optimizers: Sequence[keras.optimizers.Optimizer], reduction: Reduction) -> Iterator[None]:
    """Inside, `scale_loss` and `apply` of these optimizers work on the whole mini-batch. All ranks trace the same."""
    token = _CURRENT.set(reduction)
    reduction.scaled = [False] * len(optimizers)
    try:
        with contextlib.ExitStack() as stack:
            for index, optimizer in enumerate(optimizers):
                stack.enter_context(_patched(optimizer, index, reduction))
            stack.enter_context(_others_refused(reduction))
            stack.enter_context(_sums_as_means(reduction))
            yield
    finally:
        _CURRENT.reset(token)


@contextlib.contextmanager
def _patched(optimizer: keras.optimizers.Optimizer, index: int, reduction: Reduction) -> Iterator[None]:
    plain_scale_loss, plain_apply = optimizer.scale_loss, optimizer.apply

    def scale_loss(loss: Any) -> Any:
        reduction.scaled[index] = True
        loss = plain_scale_loss(loss)
        # Of a loss with reduction="none" the gradient is a sum over rows, which no share is to be taken of.
        is_mean = reduction.whole or not loss.shape.rank
        return loss * tf.cast(reduction.share, loss.dtype) if is_mean else loss

    def apply(grads: Any, trainable_variables: Any = None) -> Any:
        grads, trainable_variables = list(grads), None if trainable_variables is None else list(trainable_variables)
        if not optimizer.built and trainable_variables is not None:
            with tf.init_scope():  # its slots must not depend on the gradients, as they would below
                optimizer.build(trainable_variables)
        _refuse_overwriting(trainable_variables)
        if _was_reduced(grads, reduction):
            if sums_locally(optimizer):
                raise ConfigError(
                    "dtrain.reduce_gradients does not go with gradient_accumulation_steps, which reduces once for each"
                    " update; leave one of them out"
                )
            if any(reduction.scaled) and not reduction.scaled[index]:
                raise ConfigError(
                    f"dtrain.reduce_gradients: optimizer {optimizer.name!r} has not called scale_loss, and another one"
                    " has; call it for all of them, or for none"
                )
        else:
            # A custom train_step may never call scale_loss; the gradients then carry no share yet.
            shared = grads if reduction.scaled[index] else [_times(grad, reduction.share) for grad in grads]
            reduction.note_assigned()
            reduce_them = reduce_window(optimizer, trainable_variables) if sums_locally(optimizer) else reduce
            reduction.reduced += 1
            grads = reduce_them(shared, f"gradients{index}.{reduction.reduced}", reduction)
        dependencies = [part for grad in grads for part in _tensors_of(grad)]
        with tf.control_dependencies(dependencies), patch.object(reduction, "is_applying", True):
            return plain_apply(grads, trainable_variables)

    with patch.object(optimizer, "scale_loss", scale_loss), patch.object(optimizer, "apply", apply):
        yield


@contextlib.contextmanager
def _sums_as_means(reduction: Reduction) -> Iterator[None]:
    """Inside, the gradient of a loss of each row, which is a sum over rows, is one that a share may be taken of.

    Where the loss was scaled it is known of which kind it is; a step of the user's own may not do that.
    """
    plain = tf.GradientTape.gradient

    def gradient(self: Any, target: Any, sources: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain(self, target, sources, *args, **kwargs)
        parts = [part for part in tf.nest.flatten(target) if isinstance(part, tf.Tensor)]
        are_rows = {bool(part.shape.rank) and part.shape[0] == reduction.rows for part in parts}
        of_weights = any(isinstance(source, (keras.Variable, tf.Variable)) for source in tf.nest.flatten(sources))
        if True not in are_rows or not of_weights or reduction.whole or any(reduction.scaled):
            return found
        if len(are_rows) > 1:
            raise ConfigError(
                "train_step differentiates losses of each row and means of them together, of which a worker's share is"
                " not the same; take the mean, or the sum, of each first"
            )
        times = [_times(grad, 1 / reduction.share) for grad in tf.nest.flatten(found)]
        return tf.nest.pack_sequence_as(found, times)

    with patch.object(tf.GradientTape, "gradient", gradient):
        yield


@contextlib.contextmanager
def _others_refused(reduction: Reduction) -> Iterator[None]:
    """Inside, an optimizer that is not patched, nor part of one that is, refuses to apply its gradients."""
    plain = keras.optimizers.Optimizer.apply

    def apply(self: Any, grads: Any, trainable_variables: Any = None) -> Any:
        if not reduction.is_applying:
            raise ConfigError(
                f"train_step applied gradients with optimizer {self.name!r}, which the model does not hold: they would"
                " not be summed over the workers; make it an attribute of the model or of a layer, or put it into a"
                " list or dict that is one"
            )
        return plain(self, grads, trainable_variables)

    with patch.object(keras.optimizers.Optimizer, "apply", apply):
        yield


def reduce_gradients(grads: Sequence[Any]) -> list[Any]:
    """Make gradients of this worker's rows those of the whole mini-batch, inside a custom `train_step`.

    For a step that reads or clips its gradients before it hands them to `optimizer.apply`, which then takes them as
    they are. Without dtrain, in plain Keras, the gradients come back unchanged: the same model trains in both. All
    workers must call it alike.

    Args:
        grads: of a loss that is a mean over rows, or of `optimizer.scale_loss` of it; None where there is none.

    Returns:
        The gradients of the whole mini-batch's loss, the same on all workers.

    Example:
        >>> gradients = dtrain.reduce_gradients(tape.gradient(loss, self.trainable_variables))
        >>> gradients, norm = tf.clip_by_global_norm(gradients, 1.0)
        >>> self.optimizer.apply(gradients, self.trainable_variables)
    """
    reduction = _CURRENT.get()
    if reduction is None:
        return list(grads)
    shared = list(grads) if any(reduction.scaled) else [_times(grad, reduction.share) for grad in grads]
    reduction.reduced += 1
    reduction.note_assigned()
    reduced = reduce(shared, f"gradients.{reduction.reduced}", reduction)
    reduction.unreduced += grads
    reduction.by_user.append(_form(reduced))
    return reduced


def _was_reduced(grads: Sequence[Any], reduction: Reduction) -> bool:
    """Whether these come from `reduce_gradients`, perhaps clipped since."""
    if not reduction.by_user:
        return False
    if any(grad is given for grad in grads if grad is not None for given in reduction.unreduced):
        raise ConfigError(
            "optimizer.apply was given gradients that dtrain.reduce_gradients had been given before; give it what"
            " reduce_gradients returned"
        )
    form = _form(grads)
    if form not in reduction.by_user:
        raise ConfigError(
            f"optimizer.apply was given {len(grads)} gradients, but dtrain.reduce_gradients had reduced others; reduce"
            " all of an optimizer's gradients in one call, or none of the step's"
        )
    reduction.by_user.remove(form)
    return True


def _form(grads: Sequence[Any]) -> list[Any]:
    return [None if grad is None else (str(grad.dtype), str(grad.shape)) for grad in grads]


def reduce(grads: Sequence[Any], name: str, reduction: Reduction) -> list[Any]:
    """Sum gradients over ranks; moving statistics ride along and are assigned their mean weighted by rows."""
    if reduction.options.sparse_as_dense:
        grads = [tf.convert_to_tensor(grad) if isinstance(grad, tf.IndexedSlices) else grad for grad in grads]
    statistics = reduction.due_statistics()
    riders = [_times(tf.convert_to_tensor(variable.value), reduction.share) for variable in statistics]
    dense = [index for index, grad in enumerate(grads) if isinstance(grad, tf.Tensor)]
    sums, means = reduction.sum([grads[index] for index in dense], name, riders)
    result = list(grads)
    for index, tensor in zip(dense, sums, strict=True):
        result[index] = tensor
    for index, grad in enumerate(grads):
        if isinstance(grad, tf.IndexedSlices):
            result[index] = _gather(grad, f"{name}.sparse{index}", reduction)
    reduction.make_equal(statistics, means)
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
