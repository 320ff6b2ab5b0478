"""One Trainer's workers for many models: starting processes is what costs, and users would start them anew.

`use` gives the workers of a Trainer another factory, as if a new Trainer had been made; `fresh` makes a factory that
gives the same model, with the same names and weights, in every process and however often it is called.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

import dtrain
from dtrain import arguments
from dtrain.weights import Weights


def fresh(factory: Callable[[], Any]) -> Callable[[], Any]:
    """A factory with Keras's counters and seeds reset."""

    def make() -> Any:
        import keras

        keras.backend.clear_session()
        keras.utils.set_random_seed(7)
        return factory()

    make.__wrapped__ = factory  # type: ignore[attr-defined]
    return make


def small() -> Any:
    import keras

    model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model


def new_trainer(num_workers: int) -> dtrain.Trainer:
    """Workers for `use`."""
    return dtrain.Trainer(fresh(small), num_workers=num_workers, threads_per_worker=1, checkpoint=False, tracking=False)


def use(trainer: dtrain.Trainer, model_fn: Callable[[], Any]) -> dtrain.Trainer:
    """The same workers with a new model each."""
    pickled = arguments.pickled_model_fn(model_fn, None)
    trainer.model_fn, trainer._pickled_model_fn = model_fn, pickled
    trainer._weights = Weights(model_fn, None)
    group = trainer._group
    if group is not None and group.closed:  # by a test that failed on purpose: its weights are of no use here
        trainer._group = None
    elif group is not None:
        group.description, group.has_loss = None, False
        group.call("make_model", pickled)
    return trainer


def differences(ours: Any, theirs: Any, tolerance: float) -> list[str]:
    """Where two nested values differ: in structure, in names, their order, or by more than the tolerance (0: at all).

    The tolerance is absolute for numbers up to 1, relative for larger ones.
    """
    if isinstance(theirs, Mapping):
        if list(ours) != list(theirs):
            return [f"keys {list(ours)} are not {list(theirs)}"]
        return [f"[{key!r}]{text}" for key in theirs for text in differences(ours[key], theirs[key], tolerance)]
    if isinstance(theirs, (list, tuple)):
        if not isinstance(ours, (list, tuple)) or len(ours) != len(theirs):
            return [f" {ours} is not {theirs}"]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [f"[{i}]{text}" for i, (one, other) in pairs for text in differences(one, other, tolerance)]
    if theirs is None or isinstance(theirs, (str, bool)):
        return [] if ours == theirs else [f" {ours!r} is not {theirs!r}"]
    one, other = np.asarray(ours), np.asarray(theirs)
    if one.shape != other.shape:
        return [f" has shape {one.shape}, not {other.shape}"]
    if np.array_equal(one, other) or (one.dtype.kind == "f" and np.array_equal(one, other, equal_nan=True)):
        return []
    if one.dtype.kind not in "fiub":
        return [f" {one} is not {other}"]
    off = float(np.max(np.abs(one.astype(float) - other) / np.maximum(1.0, np.abs(other.astype(float)))))
    return [] if off <= tolerance else [f" is off by {off:.1e}"]
