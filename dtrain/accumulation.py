"""Owns the gradients that each rank adds up by itself (`gradient_accumulation_steps`), reduced once for each update.

What a rank has added up is lost with it. The weights have not changed since the last update, though, so the ranks of
another group train on the mini-batches since then once more, with the shares of now and the random numbers of then.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from dtrain.collective import Collective
from dtrain.keras_internals import accumulators_of, is_update_step, set_steps_since_update, steps_since_update
from dtrain.metrics import MetricState
from dtrain.model import draw_on, draws_between, named_variables, optimizers_of, seeds_of, value_of

if TYPE_CHECKING:
    from dtrain.optimizer import Reduction


def sums_locally(optimizer: keras.optimizers.Optimizer) -> bool:
    """Whether each rank accumulates its own gradients, which are reduced once for each update.

    Where the loss is scaled, every mini-batch's gradients are reduced: whether they are finite is known of the sum.
    """
    accumulates = getattr(optimizer, "gradient_accumulation_steps", None)
    return bool(accumulates) and optimizer.built and optimizer.loss_scale_factor is None


def reduce_window(optimizer: keras.optimizers.Optimizer, variables: Any) -> Callable[..., list[Any]]:
    """`dtrain.optimizer.reduce` for an optimizer that accumulates: when it updates, all that the ranks have.

    In the other steps gradients stay local. Keras adds a sparse one to a dense accumulator, so all are dense here.
    """

    def reduce_accumulated(grads: Sequence[Any], name: str, reduction: "Reduction") -> list[Any]:
        present = [index for index, grad in enumerate(grads) if grad is not None]
        own = [tf.convert_to_tensor(grads[index]) for index in present]
        every = accumulators_of(optimizer, variables)
        accumulators = [every[index] for index in present]

        def update() -> list[tf.Tensor]:
            totals = [accumulator.value + grad for accumulator, grad in zip(accumulators, own, strict=True)]
            reduced, _ = reduction.sum(totals, name)
            with tf.control_dependencies(reduced):
                for accumulator in accumulators:  # Keras adds them to what it is given
                    accumulator.assign(tf.zeros_like(accumulator.value))
            return reduced

        def keep() -> list[tf.Tensor]:
            reduction.collective.all_reduce([], name)  # a step all the same: there, too, planned faults strike
            return [tf.identity(grad) for grad in own]

        result = list(grads)
        reduced = tf.cond(is_update_step(optimizer), update, keep)
        for index, grad in zip(present, reduced, strict=True):
            result[index] = grad
        return result

    return reduce_accumulated


def local_accumulators(model: keras.Model) -> list[Any]:
    """The variables in which each rank adds up its own gradients."""
    every = [variable for each in filter(sums_locally, optimizers_of(model)) for variable in accumulators_of(each)]
    return [variable for variable in every if variable is not None]


def collect_accumulated(model: keras.Model, collective: Collective) -> None:
    """Move what the ranks have accumulated since the last update to rank 0. The sum stays the same. Collective."""
    accumulators = local_accumulators(model)
    if accumulators:
        values = [tf.convert_to_tensor(variable.value) for variable in accumulators]
        for variable, total in zip(accumulators, collective.all_reduce(values, "accumulated"), strict=True):
            variable.assign(total if collective.rank == 0 else tf.zeros_like(total))


def drop_accumulated(model: keras.Model) -> None:
    """Forget what this rank has accumulated since the last update."""
    for variable in local_accumulators(model):
        variable.assign(tf.zeros_like(variable.value))


def num_accumulated(model: keras.Model) -> int | None:
    """How many mini-batches were trained on since the last update, with weights as they are now; None: nobody knows.

    Several optimizers need not update together. Averages may have come into the weights' place since, or gone.
    """
    own = [optimizer for optimizer in optimizers_of(model) if sums_locally(optimizer)]
    if not own:
        return 0
    number = steps_since_update(own[0]) if own == [model.optimizer] else None
    return None if number and model.optimizer.use_ema else number


def accumulate_anew(
    model: keras.Model, metrics: MetricState, number: int, steps: Iterable[Callable[[], object]]
) -> None:
    """Let this rank have what it is to have accumulated since the last update; the model stays as it is. Collective.

    A mini-batch draws as many random numbers as another: so it is known where the generators were at the first.

    Args:
        model: between two mini-batches.
        metrics: its metric state.
        number: how many steps there were since the last update: `num_accumulated`.
        steps: they; each trains on its mini-batch when called.
    """
    accumulators = local_accumulators(model)
    others = [v for v in named_variables(model).values() if all(v is not known for known in accumulators)]
    kept = [(variable, value_of(variable)) for variable in (*others, *metrics.variables)] if number else []
    seeds = seeds_of(model)
    drop_accumulated(model)
    try:
        for index, step in zip(range(number), steps, strict=True):
            if index == 0:
                set_steps_since_update(model.optimizer, 0)
                step()
                draws = draws_between(seeds, seeds_of(model))
                draw_on(model, seeds, [-number * drawn for drawn in draws])
                drop_accumulated(model)
                set_steps_since_update(model.optimizer, 0)
            step()
    finally:
        for variable, value in kept:
            variable.assign(value)
