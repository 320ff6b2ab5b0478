"""Owns the import of Keras in a worker: a third less CPU at the start of each process, by what nobody trains with."""

import gc
import importlib
import sys
from importlib.util import find_spec
from typing import Any

_HIDDEN = ("sklearn", "matplotlib")
"""What Keras imports for `keras.wrappers`, whose estimators no worker holds, and to plot galleries of images."""
_PLOTTING = {
    "plot_image_gallery": ("plt", "matplotlib.pyplot"),
    "plot_bounding_box_gallery": ("patches", "matplotlib.patches"),
}


class _Later:
    """A module that is imported when something of it is used."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._name), name)


def import_keras() -> None:
    """Import Keras, with TensorFlow, unless it is imported.

    Meanwhile some packages are hidden from it, which the user's code may import afterwards, and no garbage is looked
    for; what is there in the end is never looked at again (`gc.freeze`).
    """
    if "keras" in sys.modules:
        return
    hidden = [name for name in _HIDDEN if name not in sys.modules]
    sys.modules.update(dict.fromkeys(hidden))  # type: ignore[arg-type]
    gc.disable()
    try:
        importlib.import_module("keras")
    finally:
        gc.enable()
        for name in hidden:
            del sys.modules[name]
    gc.freeze()
    if "matplotlib" in hidden and find_spec("matplotlib") is not None:
        for module, (attribute, package) in _PLOTTING.items():
            setattr(importlib.import_module(f"keras.src.visualization.{module}"), attribute, _Later(package))
