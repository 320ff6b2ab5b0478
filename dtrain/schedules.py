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

    For mini-batches k times as large, Goyal et al., "Accurate, Large Minibatch SGD: Training ImageNet in 1 Hour" (2017,
    arXiv:1706.02677), multiply the learning rate by k and rise to it over the first five epochs:
    `learning_rate = base * batch_size / base_batch_size`.

    Args:
        target: what it rises to: a number, or a schedule, which then starts where the warm-up ends.
        steps: updates until then, 1 or more.
        initial: what it starts from.

    Raises:
        ConfigError: `steps` is less than 1.

    Example:
        >>> rate = dtrain.WarmUp(0.1 * batch_size / 256, steps=5 * steps_per_epoch, initial=0.1)
        >>> optimizer = keras.optimizers.SGD(rate, momentum=0.9)

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
