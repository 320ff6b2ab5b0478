"""Owns the import of Keras in a worker, whose process starts with a fifth less CPU without what nobody trains with."""

import importlib
import sys


def import_keras() -> None:
    """Import Keras, with TensorFlow, unless it is imported.

    scikit-learn is hidden from it meanwhile, which `keras.wrappers` alone uses, for estimators that no worker holds.
    The user's code may import it afterwards.
    """
    is_hidden = not {"keras", "sklearn"} & set(sys.modules)
    if is_hidden:
        sys.modules["sklearn"] = None  # type: ignore[assignment]
    try:
        importlib.import_module("keras")
    finally:
        if is_hidden:
            del sys.modules["sklearn"]
