"""Owns the configuration that users write down: frozen, keyword-only, checked when made."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

from dtrain.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MLflowConfig:
    """Where and what MLflow records.

    Attributes:
        tracking_uri: MLflow's tracking URI; None: MLFLOW_TRACKING_URI, else sqlite:///mlflow.db.
        experiment_name: None: MLFLOW_EXPERIMENT_NAME or MLFLOW_EXPERIMENT_ID, else "dtrain".
        tags: more tags for the run.
        log_model: log the trained model, with its signature.
        log_every: log every n-th step's metrics; None: about ten points a second.
    """

    tracking_uri: str | None = None
    experiment_name: str | None = None
    tags: Mapping[str, str] | None = None
    log_model: bool = True
    log_every: int | None = None

    def __post_init__(self) -> None:
        if self.log_every is not None and (not isinstance(self.log_every, int) or self.log_every < 1):
            raise ConfigError(f"log_every={self.log_every!r} must be a whole number of steps, 1 or more, or None")


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When checkpoints are made and which are kept.

    Attributes:
        every_epochs: after every n-th epoch; None: not by epochs. One is always made at the end.
        every_steps: after every n-th mini-batch of the run, in the middle of an epoch too; None: not by steps.
        keep: how many of the newest are kept.
        monitor: a metric whose best checkpoint is kept besides; None: newest only.
        mode: whether the monitored metric is best when small ("min") or large ("max"); "auto" goes by its name.
    """

    every_epochs: int | None = 1
    every_steps: int | None = None
    keep: int = 3
    monitor: str | None = None
    mode: Literal["auto", "min", "max"] = "auto"

    def __post_init__(self) -> None:
        for name, value in (("every_epochs", self.every_epochs), ("every_steps", self.every_steps)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ConfigError(f"{name}={value!r} must be a whole number, 1 or more, or None")
        if not isinstance(self.keep, int) or isinstance(self.keep, bool) or self.keep < 1:
            raise ConfigError(f"keep={self.keep!r} must be 1 or more, and whole: the newest checkpoint is always kept")
        if self.monitor is not None and not isinstance(self.monitor, str):
            raise ConfigError(f"monitor={self.monitor!r} must be the name of a metric, such as 'val_loss', or None")
        if self.mode not in ("auto", "min", "max"):
            raise ConfigError(f"mode={self.mode!r} must be 'auto', 'min' or 'max'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FailureConfig:
    """What a fit survives.

    Attributes:
        max_failures: how many deaths of workers in a row, without a newly finished step between them. Where no worker
            is left, a fit goes on from its newest checkpoint. What the user's code raises ends a fit at once.
        on_loss: "replace": new processes take the dead ones' places, with the same bits in the end as if nothing had
            happened; "shrink": the others go on at once without them, on the same mini-batches, as close as sums in
            another order are.
        on_nan: "stop": where the loss becomes NaN or infinite the fit ends with `dtrain.errors.NotFinite`, which names
            step and worker; the weights are those of the newest checkpoint. Looked at once a segment, which costs no
            step anything; a callback that stops the training comes first. "skip": a step that makes a weight NaN or
            infinite is left out on all workers, as if its mini-batch had not been there, and named; it costs each step
            a copy of weights and optimizer. "ignore": it trains on, as Keras does.
        hang_timeout: seconds without anything finished (a step, a callback, a mini-batch validated) after which the
            worker that keeps the others waiting counts as dead. A callback that takes longer needs more; None: a
            worker may take as long as it likes.
        check_replicas_every: after about so many steps, between two segments, a checksum of weights and optimizer is
            compared over the workers; where they differ the fit ends with `dtrain.errors.ReplicasDiffer`, which names
            the worker. None: never.
    """

    max_failures: int = 3
    on_loss: Literal["replace", "shrink"] = "replace"
    on_nan: Literal["stop", "skip", "ignore"] = "stop"
    hang_timeout: float | None = 60.0
    check_replicas_every: int | None = 1000

    def __post_init__(self) -> None:
        if not isinstance(self.max_failures, int) or isinstance(self.max_failures, bool) or self.max_failures < 0:
            raise ConfigError(f"max_failures={self.max_failures!r} must be a whole number, 0 or more")
        if self.on_loss not in ("replace", "shrink"):
            raise ConfigError(f"on_loss={self.on_loss!r} must be 'replace' or 'shrink'")
        if self.on_nan not in ("stop", "skip", "ignore"):
            raise ConfigError(f"on_nan={self.on_nan!r} must be 'stop', 'skip' or 'ignore'")
        every = self.check_replicas_every
        if every is not None and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ConfigError(f"check_replicas_every={every!r} must be a whole number of steps, 1 or more, or None")
        timeout = self.hang_timeout
        is_number = isinstance(timeout, (int, float)) and not isinstance(timeout, bool)
        if timeout is not None and not (is_number and 0 < timeout < math.inf):
            raise ConfigError(f"hang_timeout={timeout!r} must be a number of seconds above 0, or None")
