"""dtrain trains any compiled Keras 3 model on many machines as if they were one.

Importing it loads neither TensorFlow nor Ray nor MLflow.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain import data, errors, testing
    from dtrain.callbacks import on_every_rank
    from dtrain.config import CheckpointConfig, FailureConfig, MLflowConfig
    from dtrain.history import History, Recovery
    from dtrain.losses import whole_batch
    from dtrain.optimizer import reduce_gradients
    from dtrain.schedules import WarmUp
    from dtrain.trainer import Trainer

__version__ = "0.1.0"

_HOMES = {
    "Trainer": "dtrain.trainer",
    "History": "dtrain.history",
    "Recovery": "dtrain.history",
    "CheckpointConfig": "dtrain.config",
    "FailureConfig": "dtrain.config",
    "MLflowConfig": "dtrain.config",
    "WarmUp": "dtrain.schedules",
    "on_every_rank": "dtrain.callbacks",
    "reduce_gradients": "dtrain.optimizer",
    "whole_batch": "dtrain.losses",
}
_MODULES = ("data", "errors", "testing")

__all__ = [
    "CheckpointConfig",
    "FailureConfig",
    "History",
    "MLflowConfig",
    "Recovery",
    "Trainer",
    "WarmUp",
    "data",
    "errors",
    "on_every_rank",
    "reduce_gradients",
    "testing",
    "whole_batch",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"dtrain.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
