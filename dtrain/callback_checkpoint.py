"""Owns what of a fit's callbacks is in a checkpoint, so that a fit that goes on decides what it would have decided.

JSON values and arrays: nothing is pickled. What the state of Keras's callbacks is stands in a table; the user's offer
`get_state()` and `set_state(state)`. Keras is not imported here, since the driver may have none;
tests/test_keras_internals.py says what must be true of the names in the table.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dtrain.state_tree import pack, unpack
from dtrain.types import Array

KERAS_STATE: dict[str, tuple[str, ...]] = {
    "MonitorCallback": ("best",),
    "EarlyStopping": ("wait", "stopped_epoch", "best_epoch", "best_weights"),
    "ReduceLROnPlateau": ("wait", "cooldown_counter"),
    "ModelCheckpoint": ("_batches_seen_since_last_saving", "_last_batch_seen", "_current_epoch"),
    "OrbaxCheckpoint": ("_batches_seen_since_last_saving", "_last_batch_seen", "_total_batches_seen"),
    "SwapEMAWeights": ("_ema_weights_in_model",),
    "TensorBoard": (
        "_global_train_batch",
        "_global_test_batch",
        "_previous_epoch_iterations",
        "_epoch_start_time",
    ),
    "CSVLogger": ("keys", "append"),  # `append` is as the user has it again, once `prepare_resume` has done its work
    "History": ("history", "epoch"),
}
"""The attributes in which a class of Keras keeps its state, besides those of its bases. The others have none."""


@dataclass(frozen=True)
class CallbackState:
    """The state of a callback: plain values that travel and are stored.

    Attributes:
        kind: its class: "keras.callbacks.EarlyStopping"; a user's by name alone, so that it may move to another file.
        values: JSON values, packed by `dtrain.state_tree`.
        arrays: those that the values name.
    """

    kind: str
    values: Mapping[str, Any]
    arrays: Mapping[str, Array]


def save_states(callbacks: Sequence[Any]) -> list[CallbackState | None]:
    """The state of each callback; None where it has none to save. To be called where all of them run: on rank 0.

    Raises:
        ConfigError: what a `get_state` returned cannot be stored.
    """
    return [_state_of(callback, f"callbacks[{index}]") for index, callback in enumerate(callbacks)]


def matched(
    callbacks: Sequence[Any], states: Sequence[CallbackState | None]
) -> tuple[list[CallbackState | None], list[str]]:
    """The saved state of each callback, and what the user should know of those that do not fit together.

    A state belongs to the first callback of its class, and of its form, that has none yet: so callbacks may be added,
    left out and put into another order. None: the callback begins anew.
    """
    left = [state for state in states if state is not None]
    found: list[CallbackState | None] = []
    notes: list[str] = []
    for callback in callbacks:
        kind, parts = _kind(callback), _parts(callback)
        state = next((state for state in left if state.kind == kind and set(state.values) == parts), None)
        found.append(state)
        is_own = not _is_keras(type(callback))
        if state is not None:
            left = [other for other in left if other is not state]
            if is_own and "state" not in parts and not _is_keras(type(callback).__init__):
                notes.append(f"{kind} goes on as its Keras class does; for what it keeps itself it offers no get_state")
        elif parts:
            notes.append(f"{kind} begins anew: no state of it was saved")
        elif is_own:
            notes.append(f"{kind} begins anew: it offers no get_state and set_state")
    notes += [f"the state of a {state.kind} was saved, which is no callback of this fit" for state in left]
    return found, list(dict.fromkeys(notes))


def prepare_resume(callbacks: Sequence[Any], states: Sequence[CallbackState | None]) -> None:
    """Get files ready to be continued; on rank 0 alone, before `on_train_begin`.

    A CSVLogger will append, also if it was made to begin anew, and the rows that were written after `states`, as
    `matched` gives them, were saved are cut off its file: they will be written again. A file that is not there, or
    shorter, is left as it is.
    """
    for callback, state in zip(callbacks, states, strict=True):
        if state is not None and "CSVLogger" in _keras_classes(callback):
            if state.values.get("size") is not None:
                _cut(callback.filename, state.values["size"])
            callback.append = True


def restore_states(callbacks: Sequence[Any], states: Sequence[CallbackState | None]) -> None:
    """Give each callback that runs on this rank its state; after `on_train_begin`, which resets some.

    Args:
        callbacks: all of the user's.
        states: theirs, as `matched` gives them.

    Raises:
        CheckpointError: a state cannot be read.
    """
    for callback, state in zip(callbacks, states, strict=True):
        if state is not None and _runs_here(callback):
            _restore(callback, state)


# --- one callback


def _state_of(callback: Any, name: str) -> CallbackState | None:
    parts = _parts(callback)
    if not parts:
        return None
    name = f"{name}={type(callback).__name__}"
    values: dict[str, Any] = {}
    arrays: dict[str, Array] = {}
    if "attributes" in parts:
        held = vars(callback)
        values["attributes"] = {
            key: pack(without_tensors(held[key]), f"{name}.{key}", arrays)
            for key in _keras_attributes(callback)
            if key in held
        }
    if "has_direction" in parts:
        values["has_direction"] = callback.monitor_op is not None
    if "size" in parts:
        values["size"] = _size(callback.filename)
    if "state" in parts:
        values["state"] = pack(callback.get_state(), f"{name}.get_state()", arrays)
    return CallbackState(_kind(callback), values, arrays)


def _restore(callback: Any, state: CallbackState) -> None:
    saved = state.values.get("attributes", {})
    for key in _keras_attributes(callback):
        if key in saved:
            setattr(callback, key, unpack(saved[key], state.arrays))
    # Keras finds out what is better at the end of an epoch; ModelCheckpoint with a `save_freq` compares before that.
    if state.values.get("has_direction") and callback.monitor_op is None:
        callback._set_monitor_op()
    if "state" in state.values:
        callback.set_state(unpack(state.values["state"], state.arrays))


def _parts(callback: Any) -> set[str]:
    """What the values of a callback's state are made of."""
    parts = {"attributes"} if _keras_attributes(callback) else set()
    if "MonitorCallback" in _keras_classes(callback):
        parts.add("has_direction")
    if "CSVLogger" in _keras_classes(callback):
        parts.add("size")
    if _offers(callback):
        parts.add("state")
    return parts


def _kind(callback: Any) -> str:
    own = type(callback)
    return f"keras.callbacks.{own.__name__}" if _is_keras(own) else own.__qualname__


def _offers(callback: Any) -> bool:
    return all(callable(getattr(callback, name, None)) for name in ("get_state", "set_state"))


def _is_keras(thing: Any) -> bool:
    """A class, or a function."""
    return str(thing.__module__).split(".")[0] == "keras"


def _keras_classes(callback: Any) -> list[str]:
    return [kind.__name__ for kind in type(callback).__mro__ if _is_keras(kind)]


def _keras_attributes(callback: Any) -> list[str]:
    return [key for kind in _keras_classes(callback) for key in KERAS_STATE.get(kind, ())]


def _runs_here(callback: Any) -> bool:
    """Whether Keras gave it a model. One with a `set_model` of its own may keep it elsewhere."""
    given = getattr(type(callback), "set_model", None)
    return given is None or not _is_keras(given) or callback._model is not None


def without_tensors(value: Any) -> Any:
    """Metrics may be tensors where a callback of the user's put them into the logs."""
    if isinstance(value, list):
        return [without_tensors(item) for item in value]
    if isinstance(value, dict):
        return {key: without_tensors(item) for key, item in value.items()}
    if hasattr(value, "__array__") and not isinstance(value, (np.ndarray, np.generic)):
        return np.asarray(value)[()]
    return value


# --- files


def _size(filename: str) -> int | None:
    """None for what is not on a local disk."""
    with contextlib.suppress(OSError):
        return os.path.getsize(filename)
    return None


def _cut(filename: str, size: int) -> None:
    """Cut a file to a size at which a line of it ends; any other file is not the one that was written."""
    with contextlib.suppress(FileNotFoundError), open(filename, "r+b") as file:
        file.seek(max(size - 1, 0))
        if size == 0 or file.read(1) == b"\n":
            file.truncate(size)
