"""Owns finding what the user named: `MODULE:NAME`, and that it travels to the workers.

What comes from the user's own files travels by value, since the workers may not have them. What the user's code raises
is shown from its own first line on.
"""

import contextlib
import importlib
import importlib.util
import operator
import os
import re
import sys
import sysconfig
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from dtrain.errors import ConfigError, DtrainError


def find_function(argument: str, value: str) -> Any:
    """What `MODULE:NAME` names. What comes from files of the user's travels to the workers with what uses it.

    Args:
        argument: what the user passed it as, for messages.
        value: MODULE is a module that can be imported from here, or a path to a .py file.

    Raises:
        ConfigError: there is no such module, file or name.
        DtrainError: the module raised; with the traceback.
    """
    place, _, name = value.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"{argument}={value!r} must be MODULE:NAME, a module or a .py file and a function in it, such as"
            " my_model.py:make_model"
        )
    is_file = place.endswith(".py") or os.sep in place
    module = _import_file(argument, value, Path(place)) if is_file else _import_module(argument, value, place)
    try:
        found = operator.attrgetter(name)(module)
    except AttributeError:
        own = [key for key, item in vars(module).items() if getattr(item, "__module__", None) == module.__name__]
        raise ConfigError(
            f"{argument}={value!r}: {place} has no {name!r}; it must be a function in it, which has"
            f" {', '.join(own[:9]) or 'none'}"
        ) from None
    if not callable(found):
        raise ConfigError(f"{argument}={value!r} is of type {type(found).__name__}; it must be a function")
    return found


@contextlib.contextmanager
def users_code(argument: str, value: str) -> Iterator[None]:
    """Show what the user's own code raises with its traceback, from its first line on."""
    try:
        yield
    except (DtrainError, KeyboardInterrupt):
        raise
    except BaseException as error:
        report = traceback.TracebackException.from_exception(error)
        frames = [frame for frame in report.stack if not _leads_there(frame.filename)]
        report.stack = traceback.StackSummary.from_list(frames)
        raise DtrainError(f"{''.join(report.format())}\n{argument}={value!r} raised {type(error).__name__}") from error


def _import_module(argument: str, value: str, name: str) -> ModuleType:
    here = os.getcwd()
    if "" not in sys.path and here not in sys.path:
        sys.path.insert(0, here)  # as `python -m` has it
    with users_code(argument, value), _travelling(Path(here)):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise  # it is there, and what it imports is not
            raise ConfigError(
                f"{argument}={value!r}: there is no module {error.name!r} on the path or in {here}; it must be an"
                " importable module, or a path to a .py file"
            ) from None


def _import_file(argument: str, value: str, path: Path) -> ModuleType:
    if path.suffix != ".py":
        raise ConfigError(f"{argument}={value!r}: a path must lead to a .py file; add .py, or name a module: a.b:NAME")
    if not path.is_file():
        raise ConfigError(f"{argument}={value!r}: there is no file {path} (seen from {os.getcwd()}); check the path")
    path = path.resolve()
    name = re.sub(r"\W", "_", path.stem)
    loaded = sys.modules.get(name)
    if loaded is not None:
        if getattr(loaded, "__file__", None) == str(path):
            return loaded
        name = f"{name}_py"  # a file called keras.py is not Keras
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))  # what lies beside it can be imported
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with users_code(argument, value), _travelling(path.parent):
        sys.modules[name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
    return module


@contextlib.contextmanager
def _travelling(folder: Path) -> Iterator[None]:
    """Send what is imported from `folder` to the workers by value: they may not have the files."""
    import cloudpickle

    before = set(sys.modules)
    yield
    installed = [Path(sysconfig.get_path(kind)) for kind in ("stdlib", "purelib", "platlib")]
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if not file or name.split(".")[0] == "dtrain" or not Path(file).is_relative_to(folder):
            continue
        if not any(Path(file).is_relative_to(place) for place in installed):
            cloudpickle.register_pickle_by_value(sys.modules[name])


def _leads_there(filename: str) -> bool:
    path = Path(filename)
    return path.parent == Path(__file__).parent or filename.startswith("<frozen importlib") or "importlib" in path.parts
