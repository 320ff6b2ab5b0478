"""Owns training in which ranks go on by themselves for some steps, and are made equal then: local SGD.

Between two averages a rank is plain Keras on its own rows, so nothing is exact over ranks but what metrics count.
"""

import keras
import tensorflow as tf

from dtrain.collective import Collective
from dtrain.errors import ConfigError
from dtrain.keras_internals import layers_of
from dtrain.model import named_variables, optimizers_of


def check_local(model: keras.Model, sync_every: int) -> None:
    """Refuse what several steps by each worker itself would change silently.

    Raises:
        ConfigError: it has such a thing.
    """
    if any(getattr(optimizer, "gradient_accumulation_steps", None) for optimizer in optimizers_of(model)):
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
    if model.steps_per_execution not in (1, sync_every):
        raise ConfigError(
            f"sync_every={sync_every} makes executions of as many steps, but model_fn compiles with"
            f" steps_per_execution={model.steps_per_execution}; leave one out"
        )


def average(model: keras.Model, collective: Collective, share: tf.Tensor) -> None:
    """Make replicas equal: the mean over ranks, weighted by rows, of weights, moving statistics and slots. Collective.

    What is no float is made rank 0's, as are an optimizer's single numbers: a mean of equal learning rates would round.
    Random numbers stay each rank's own.

    Args:
        share: scalar: this rank's rows over the rows of the mini-batch.
    """
    averaged: list[keras.Variable] = []
    led: list[keras.Variable] = []
    for name, variable in named_variables(model).items():
        group = name.split("/")[0]
        if group in ("seeds", "random"):
            continue
        is_mean = tf.as_dtype(variable.dtype).is_floating and (group == "model" or len(variable.shape) > 0)
        (averaged if is_mean else led).append(variable)
    parts = [variable.value * tf.cast(share, variable.value.dtype) for variable in averaged]
    means = collective.all_reduce(parts, "average")
    leaders = [collective.all_gather(variable.value[None], f"average.{i}")[0] for i, variable in enumerate(led)]
    with tf.control_dependencies([*means, *leaders]):
        for variable, value in zip([*averaged, *led], [*means, *leaders], strict=True):
            variable.assign(value)
