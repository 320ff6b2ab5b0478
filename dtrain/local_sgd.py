"""Owns training in which ranks go on by themselves for some steps, and are made equal then: local SGD.

Between two averages a rank is plain Keras on its own rows, so nothing is exact over ranks but what metrics count.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from dtrain.collective import Collective
from dtrain.errors import ConfigError
from dtrain.keras_internals import layers_of, trained_by
from dtrain.losses import mixes_rows
from dtrain.model import named_variables, optimizers_of


def check_local(model: keras.Model, sync_every: int) -> None:
    """Refuse what is about whole mini-batches, which no worker sees while it trains by itself.

    Raises:
        ConfigError: it has such a thing.
    """
    optimizers = optimizers_of(model)
    optimizers += [optimizer.inner_optimizer for optimizer in optimizers if hasattr(optimizer, "inner_optimizer")]
    if any(getattr(optimizer, "gradient_accumulation_steps", None) for optimizer in optimizers):
        raise ConfigError(
            f"sync_every={sync_every} does not go with gradient_accumulation_steps, which sums gradients over workers"
            " less often, too; leave one out"
        )
    synchronized = [layer.name for layer in layers_of(model) if getattr(layer, "synchronized", False)]
    if synchronized:
        raise ConfigError(
            f"sync_every={sync_every} does not go with the statistics of whole mini-batches that layer"
            f" {synchronized[0]!r} takes (synchronized=True); leave one out"
        )
    losses = [keras.losses.get(loss) for loss in keras.tree.flatten(model.loss)]
    sums = [loss for loss in losses if isinstance(loss, keras.losses.Loss) and loss.reduction in ("sum", "none", None)]
    mixing = [*sums, *filter(mixes_rows, losses)]
    if mixing:
        raise ConfigError(
            f"sync_every={sync_every} does not go with loss {getattr(mixing[0], 'name', mixing[0])!r}, which is no mean"
            " over rows: each worker would train on that of its own; leave one out"
        )
    if model.steps_per_execution not in (1, sync_every):
        raise ConfigError(
            f"sync_every={sync_every} makes executions of as many steps, but model_fn compiles with"
            f" steps_per_execution={model.steps_per_execution}; leave one out"
        )


def average(model: keras.Model, collective: Collective, share: tf.Tensor, assigned: Sequence[keras.Variable]) -> None:
    """Make replicas equal: the mean over ranks, weighted by rows, of weights, moving statistics and slots. Collective.

    What is no float is made rank 0's, as are an optimizer's single numbers: a mean of equal learning rates would round.
    So would one of weights that nothing trains: they are left alone. Random numbers stay each rank's own.

    Args:
        share: scalar: this rank's rows over the rows of the mini-batch.
        assigned: what steps assign besides weights and optimizers.
    """
    trained = [variable for optimizer in optimizers_of(model) for variable in trained_by(optimizer)]
    changed = [*model.trainable_variables, *trained, *assigned]
    own = [v for name, v in named_variables(model).items() if name.startswith("model/") and _is_in(v, changed)]
    of_optimizers = [variable for optimizer in optimizers_of(model) for variable in optimizer.variables]
    scalars = tuple(v.path.replace("/", "_") + "_" for v in changed if len(v.shape) == 0)  # as their slots begin
    slots = [v for v in of_optimizers if len(v.shape) > 0 or v.path.split("/")[-1].startswith(scalars)]
    averaged = [variable for variable in (*own, *slots) if tf.as_dtype(variable.dtype).is_floating]
    led = [variable for variable in (*own, *of_optimizers) if not _is_in(variable, averaged)]
    means = collective.all_reduce([_part(variable.value, share) for variable in averaged], "average")
    leaders = [collective.all_gather(variable.value[None], f"average.{i}")[0] for i, variable in enumerate(led)]
    with tf.control_dependencies([*means, *leaders]):
        for variable, value in zip([*averaged, *led], [*means, *leaders], strict=True):
            variable.assign(tf.cast(value, variable.dtype))


def _part(value: tf.Tensor, share: tf.Tensor) -> tf.Tensor:
    """Of a mean; of floats of 16 bits it has 32, or what a window changes would be rounded away."""
    wide = tf.float32 if value.dtype.size < 4 else value.dtype
    return tf.cast(value, wide) * tf.cast(share, wide)


def _is_in(variable: keras.Variable, others: Sequence[keras.Variable]) -> bool:
    return any(variable is other for other in others)
