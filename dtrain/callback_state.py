"""Owns how the user's callback objects travel: to the workers whole, and back as the values that they hold.

Keras is not imported here: the driver may have none.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import Any

import cloudpickle


@dataclass(frozen=True)
class Hooks:
    """The callbacks of a fit, an evaluate or a predict, and the `verbose` that they find in their `params`."""

    callbacks: Sequence[Any]
    verbose: int | str = 0


@contextlib.contextmanager
def without_models(callbacks: Sequence[Any]) -> Iterator[None]:
    """Inside, the callbacks do not hold the model of an earlier `keras.Model.fit`, which must not travel with them."""
    held = [(vars(callback), vars(callback)["_model"]) for callback in callbacks if "_model" in vars(callback)]
    for attributes, _ in held:
        attributes["_model"] = None
    try:
        yield
    finally:
        for attributes, model in held:
            attributes["_model"] = model


def export_state(callback: Any) -> dict[str, Any]:
    """The attributes of a callback that can travel back to the driver's object."""
    state = {}
    for name, value in vars(callback).items():
        if name == "_model":
            continue
        with contextlib.suppress(Exception):  # an open file, say: it stays where it is
            cloudpickle.dumps(value)
            state[name] = value
    return state


def import_state(callback: Any, state: Mapping[str, Any]) -> None:
    """Give the user's own object the attributes that its copy on rank 0 ended with.

    Lists, dicts and sets are filled in place, also those that a lambda closes over: the user may hold them, too.
    """
    attributes = vars(callback)
    for name, value in state.items():
        attributes[name] = _updated(attributes.get(name), value)


def _updated(old: Any, new: Any) -> Any:
    if isinstance(old, FunctionType) and isinstance(new, FunctionType):
        _update_function(old, new)
        return old
    return old if _fill(old, new) else new


def _fill(old: Any, new: Any) -> bool:
    """Fill a container with what another of its kind holds; whether it is one."""
    if old is new or type(old) is not type(new) or not isinstance(old, (list, dict, set)):
        return False
    if isinstance(old, list):
        old[:] = new
    else:
        old.clear()
        old.update(new)
    return True


def _update_function(old: FunctionType, new: FunctionType) -> None:
    """Give a function's variables the values that they have in its copy."""
    for cell, other in zip(old.__closure__ or (), new.__closure__ or (), strict=False):
        _update_cell(cell, other)
    for name in new.__code__.co_names:
        if new.__globals__ is not old.__globals__ and name in old.__globals__:
            _fill(old.__globals__[name], new.__globals__.get(name))


def _update_cell(cell: CellType, other: CellType) -> None:
    with contextlib.suppress(ValueError):  # an empty cell
        if not _fill(cell.cell_contents, other.cell_contents) and isinstance(other.cell_contents, (int, float, str)):
            cell.cell_contents = other.cell_contents
