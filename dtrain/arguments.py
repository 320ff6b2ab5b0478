"""Owns what users pass to the verbs: checked as far as it can be before anything starts, and turned into plans.

Every message names the argument, the value, the rule and the fix.
"""

import inspect
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle

from dtrain.callback_state import Hooks, without_models
from dtrain.data.sampler import Sampler, default_batch_size
from dtrain.data.source import ArraySource, Blocked, ClassWeights, DataSource, train_validation_split
from dtrain.errors import ConfigError, DataError
from dtrain.types import BatchPlan, FitPlan, Tree

PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class FitArguments:
    """A fit as the user asked for it: the plan, and the data that it is of."""

    plan: FitPlan
    train: DataSource
    validation: DataSource | None


def whole_number(name: str, value: Any, at_least: int) -> int:
    """Check a whole number.

    Raises:
        ConfigError: it is none, or smaller.
    """
    try:
        number = int(value)
        is_whole = number == value and not isinstance(value, bool)
    except (TypeError, ValueError, OverflowError):
        is_whole, number = False, 0
    if not is_whole or number < at_least:
        raise ConfigError(f"{name}={value!r} must be a whole number, {at_least} or more")
    return number


def pickled_model_fn(model_fn: Any, config: Mapping[str, Any] | None) -> bytes:
    """The factory and its config, as they travel to the workers.

    Raises:
        ConfigError: it is not callable, takes other arguments, or does not pickle.
    """
    if not callable(model_fn):
        raise ConfigError(
            f"model_fn={_short(model_fn)} must be a function that makes and compiles a model, not a"
            f" {type(model_fn).__name__}; put what makes it into a function and pass that"
        )
    arguments = () if config is None else (config,)
    try:
        inspect.signature(model_fn).bind(*arguments)
    except TypeError as error:
        form = "model_fn()" if config is None else "model_fn(config)"
        raise ConfigError(
            f"model_fn={_short(model_fn)} is called as {form}, which does not fit its arguments ({error});"
            " settings go into config={...}"
        ) from None
    except ValueError:
        pass  # a callable without a signature, written in C
    pickled("config", config)
    return pickled("model_fn", model_fn, (model_fn, config))


def pickled(name: str, value: Any, with_value: Any = None) -> bytes:
    """A value as it travels to the workers: by cloudpickle, so that what is defined in a script travels whole.

    Args:
        name: of the argument.
        value: the argument.
        with_value: what is pickled, if it is more than that.

    Raises:
        ConfigError: it cannot be pickled; the message names the variable that it drags along.
    """
    try:
        data: bytes = cloudpickle.dumps(value if with_value is None else with_value)
        return data
    except Exception as error:
        culprit = _unpicklable_variable(value)
        what = f": its variable {culprit!r} cannot be pickled" if culprit else ""
        raise ConfigError(
            f"{name}={_short(value)} cannot travel to the workers{what} ({error}); build it inside the function"
        ) from error


def check_resources(
    num_workers: Any, use_gpu: bool, resources_per_worker: Mapping[str, float] | None, placement_strategy: str
) -> tuple[int, dict[str, float]]:
    """The number of workers, and Ray's resources of each.

    Raises:
        ConfigError: one of them makes no sense.
    """
    if isinstance(num_workers, (tuple, list)):
        raise ConfigError(f"num_workers={num_workers!r}: elastic groups are not there yet; give one number of workers")
    number = whole_number("num_workers", num_workers, 1)
    resources = {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {}), **(resources_per_worker or {})}
    for name, amount in resources.items():
        if not isinstance(amount, (int, float)) or isinstance(amount, bool) or not 0 <= amount < math.inf:
            raise ConfigError(f"resources_per_worker[{name!r}]={amount!r} must be a number, 0 or more")
    if use_gpu and resources["GPU"] < 1:
        raise ConfigError(f"resources_per_worker['GPU']={resources['GPU']!r} must be 1 or more with use_gpu=True")
    if placement_strategy not in PLACEMENT_STRATEGIES:
        raise ConfigError(f"placement_strategy={placement_strategy!r} must be one of {', '.join(PLACEMENT_STRATEGIES)}")
    return number, resources


def check_platform() -> None:
    """Refuse what dtrain does not run on.

    Raises:
        ConfigError: another platform, another Python, or another Keras backend.
    """
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise ConfigError(f"dtrain runs on Linux on x86-64, not on {sys.platform} on {platform.machine()}")
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise ConfigError(
            f"KERAS_BACKEND={backend!r}: dtrain trains with the TensorFlow backend; unset it, or set"
            " KERAS_BACKEND=tensorflow"
        )


def callback_list(callbacks: Any) -> list[Any]:
    """The user's callbacks as a flat list. Keras's ProgbarLogger is left out: the job has one progress bar.

    Raises:
        ConfigError: one is no Keras callback, cannot travel to the workers, or cannot work there.
    """
    found = list(_flat(callbacks))
    for index, callback in enumerate(found):
        if not hasattr(callback, "on_epoch_end"):
            raise ConfigError(f"callbacks[{index}]={_short(callback)} must be a keras.callbacks.Callback")
        if _is_keras(callback, "BackupAndRestore"):
            raise ConfigError(
                f"callbacks[{index}]={type(callback).__name__} starts a fit in the middle, from a backup without the"
                " place in the data; dtrain saves all of that itself: leave it out, keep Trainer(checkpoint=True), and"
                " go on from a checkpoint with Trainer.restore"
            )
    found = [callback for callback in found if not _is_keras(callback, "ProgbarLogger", subclasses=False)]
    for index, callback in enumerate(found):
        with without_models([callback]):
            pickled(f"callbacks[{index}]", callback)
    return found


def pickled_hooks(callbacks: Sequence[Any], verbose: int | str) -> bytes:
    """Callbacks that `callback_list` gave, as they travel to the workers."""
    with without_models(callbacks):
        return pickled("callbacks", Hooks(list(callbacks), verbose))


def _flat(callbacks: Any) -> Iterator[Any]:
    """Callbacks as Keras takes them: one, nested lists of them, a CallbackList, or None."""
    if isinstance(callbacks, (list, tuple)):
        for item in callbacks:
            yield from _flat(item)
    elif callbacks is not None and _is_keras(callbacks, "CallbackList"):
        yield from callbacks.callbacks
    elif callbacks is not None:
        yield callbacks


def _is_keras(value: Any, name: str, subclasses: bool = True) -> bool:
    """Whether a value is of Keras's class `name`; Keras itself, which the driver may not have, is not needed for it."""
    classes = type(value).__mro__ if subclasses else (type(value),)
    return any(kind.__name__ == name and kind.__module__.split(".")[0] == "keras" for kind in classes)


def source_of(
    x: Any,
    y: Tree = None,
    sample_weight: Tree = None,
    class_weight: Mapping[int, float] | None = None,
    *,
    name: str = "x",
) -> DataSource:
    """The data set that the user's `x`, `y` and weights are.

    Raises:
        DataError: it is of no kind that can be read by rows, or cannot be trained on.
    """
    if isinstance(x, DataSource):
        for other, value in (("y", y), ("sample_weight", sample_weight)):
            if value is not None:
                raise DataError(f"{other} must not be given when {name} is a data source, which brings its own")
        if len(x) == 0:
            raise DataError(f"{name} has no rows; check what it was made from")
        return x if class_weight is None else ClassWeights(x, class_weight)
    if x is None:
        raise DataError(f"{name}=None: there is nothing to read; pass arrays or a dtrain.data source")
    if callable(x) or hasattr(x, "__next__") or type(x).__module__.startswith(("tensorflow", "keras", "torch")):
        raise DataError(
            f"{name} is a {type(x).__module__}.{type(x).__name__}, which cannot be read by rows yet;"
            " pass NumPy arrays (or dicts and lists of them), or a dtrain.data source"
        )
    return ArraySource(x, y, sample_weight, class_weight=class_weight)


def fit_arguments(
    x: Any,
    y: Tree,
    *,
    batch_size: int | None,
    epochs: int,
    initial_epoch: int,
    validation_split: float,
    validation_data: Any,
    shuffle: bool | str,
    class_weight: Mapping[int, float] | None,
    sample_weight: Tree,
    steps_per_epoch: int | None,
    validation_steps: int | None,
    validation_batch_size: int | None,
    validation_freq: int | Sequence[int],
    seed: tuple[int, ...],
    record_steps: bool,
) -> FitArguments:
    """Check the arguments of `fit` and turn them into a plan and sources.

    Raises:
        ConfigError: a number makes no sense, or two arguments contradict each other.
        DataError: the data cannot be trained on.
    """
    epochs = whole_number("epochs", epochs, 0)
    initial_epoch = whole_number("initial_epoch", initial_epoch, 0)
    if not isinstance(validation_freq, Sequence):
        validation_freq = whole_number("validation_freq", validation_freq, 1)
    if validation_split and validation_data is None:
        if isinstance(x, DataSource):
            raise DataError(
                f"validation_split={validation_split!r} needs arrays; with a data source pass validation_data"
            )
        (x, y, sample_weight), validation_data = train_validation_split(x, y, sample_weight, validation_split)
    train = source_of(x, y, sample_weight, class_weight)
    plan = batch_plan(train, batch_size, steps_per_epoch, "steps_per_epoch", shuffle, seed)
    validation, validation_plan = None, None
    if validation_data is not None:
        parts = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
        if not 1 <= len(parts) <= 3:
            raise DataError(f"validation_data has {len(parts)} parts; it must be (x, y) or (x, y, sample_weight)")
        val_x, val_y, val_weight = (*parts, None, None)[:3]
        validation = source_of(val_x, val_y, val_weight, name="validation_data")
        size = validation_batch_size if validation_batch_size is not None else plan.batch_size
        validation_plan = batch_plan(validation, size, validation_steps, "validation_steps", in_any_order=True)
    return FitArguments(
        FitPlan(
            train=plan,
            epochs=epochs,
            initial_epoch=initial_epoch,
            validation=validation_plan,
            validation_freq=validation_freq,
            record_steps=record_steps,
        ),
        train,
        validation,
    )


def batch_plan(
    source: DataSource,
    batch_size: int | None,
    steps: int | None,
    steps_name: str,
    shuffle: bool | str = False,
    seed: tuple[int, ...] = (0,),
    in_any_order: bool = False,
) -> BatchPlan:
    """The plan of one pass or epoch over `source`, with Keras's defaults.

    Args:
        source: the data set.
        batch_size: rows in a mini-batch of the whole job; None: Keras's default.
        steps: mini-batches, where fewer are asked for than there are.
        steps_name: what the user calls them.
        shuffle: as in `fit`.
        seed: of the shuffling.
        in_any_order: a whole pass may take the rows in the order in which each worker reads fewest blocks.

    Raises:
        ConfigError: a number makes no sense.
    """
    if steps is not None:
        whole_number(steps_name, steps, 1)
    if batch_size is None:
        batch_size = default_batch_size(len(source), steps)
    whole_number("batch_size", batch_size, 1)
    plan = BatchPlan(len(source), int(batch_size), steps, shuffle, seed)
    if isinstance(source, Blocked) and (shuffle in (True, 1) or (in_any_order and steps is None)):
        plan = replace(plan, blocks=source.blocks, lanes=source.lanes)
    Sampler(plan)  # checks the rest
    return plan


def _short(value: Any) -> str:
    text = getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _unpicklable_variable(function: Callable[..., Any]) -> str | None:
    """The name of a variable that a function closes over, or a global that it uses, which does not pickle."""
    try:
        variables = inspect.getclosurevars(function)
    except TypeError:
        return None
    for name, value in {**variables.globals, **variables.nonlocals}.items():
        try:
            cloudpickle.dumps(value)
        except Exception:
            return name
    return None
