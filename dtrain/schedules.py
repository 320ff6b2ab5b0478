"""Owns the learning-rate schedules that Keras lacks: a warm-up in front of any other.

Large mini-batches, which many workers invite, want a larger learning rate and a gentle start. Keras has that where
nothing follows (`PolynomialDecay(initial, steps, target)` rises as well) and before a cosine (`CosineDecay` with
`warmup_target` and `warmup_steps`).
"""

from typing import Any

import keras
from keras import ops

from dtrain.errors import ConfigError


@keras.saving.register_keras_serializable("dtrain")
class WarmUp(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A learning rate that rises in a straight line for `steps` updates, and then stays, or follows another schedule.

    `WarmUp.linear_scaling` is the one for mini-batches that are larger than those a learning rate was found for.

    Args:
        target: what it rises to: a number, or a schedule, which then starts where the warm-up ends.
        steps: updates until then, 1 or more.
        initial: what it starts from.

    Raises:
        ConfigError: `steps` is less than 1.

    Example:
        >>> decay = keras.optimizers.schedules.CosineDecay(1e-3, decay_steps=10_000)
        >>> optimizer = keras.optimizers.AdamW(dtrain.WarmUp(decay, steps=500))

    A .keras file of such an optimizer loads where `dtrain.WarmUp` was named before: the name registers it with Keras.
    """

    def __init__(
        self,
        target: float | keras.optimizers.schedules.LearningRateSchedule,
        steps: int,
        initial: float = 0.0,
    ) -> None:
        if steps < 1:
            raise ConfigError(f"steps={steps!r} must be 1 or more; without a warm-up pass the target itself")
        self.target = target
        self.steps = steps
        self.initial = initial

    @classmethod
    def linear_scaling(
        cls, learning_rate: float, batch_size: int, base_batch_size: int, steps: int, then: Any = None
    ) -> "WarmUp":
        """The linear scaling rule: mini-batches k times as large, k times the learning rate, reached gently.

        Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour" (2017, arXiv:1706.02677), 2.1 and
        2.2, rise from the learning rate of the small mini-batches over the first five epochs. It is a rule for SGD.

        Args:
            learning_rate: that goes with mini-batches of `base_batch_size` rows.
            batch_size: rows of a mini-batch, over all workers: what `fit` is given.
            base_batch_size: see there.
            steps: updates until the whole rate is reached: in the paper `5 * steps_per_epoch`.
            then: called with the whole rate, makes the schedule that follows; None: it stays.

        Raises:
            ConfigError: a size or `steps` is less than 1.

        Example:
            >>> rate = dtrain.WarmUp.linear_scaling(0.1, batch_size=2048, base_batch_size=256, steps=5 * 625)
            >>> optimizer = keras.optimizers.SGD(rate, momentum=0.9)
        """
        for name, size in (("batch_size", batch_size), ("base_batch_size", base_batch_size)):
            if size < 1:
                raise ConfigError(f"{name}={size!r} must be 1 or more")
        scaled = learning_rate * batch_size / base_batch_size
        return cls(then(scaled) if then is not None else scaled, steps, initial=learning_rate)

    def __call__(self, step: Any) -> Any:
        """The learning rate of update `step`, counted from 0."""
        step = ops.cast(step, keras.config.floatx())
        start = self._target_at(ops.zeros_like(step))
        rising = self.initial + (start - self.initial) * step / self.steps
        after = self._target_at(ops.maximum(step - self.steps, 0))  # a schedule may not know steps before its first
        return ops.where(step < self.steps, rising, after)

    def get_config(self) -> dict[str, Any]:
        """As every Keras schedule's."""
        target = keras.saving.serialize_keras_object(self.target) if callable(self.target) else self.target
        return {"target": target, "steps": self.steps, "initial": self.initial}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "WarmUp":
        """The schedule that `get_config` describes."""
        target = config["target"]
        if isinstance(target, dict):
            target = keras.saving.deserialize_keras_object(target)
        return cls(**{**config, "target": target})

    def _target_at(self, step: Any) -> Any:
        return self.target(step) if callable(self.target) else ops.full_like(step, self.target)
