"""Owns what users pass to the verbs: checked as far as it can be before anything starts, and turned into plans.

Every message names the argument, the value, the rule and the fix.
"""

import inspect
import logging
import math
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import cloudpickle

from dtrain.callback_state import Hooks, without_models
from dtrain.data.given import Deferred, Given, batch_plan, is_function, kind_of_batches
from dtrain.data.source import ArraySource, ClassWeights, DataSource, train_validation_split
from dtrain.data.stream import Batches, read_at_once
from dtrain.driver_tensorflow import import_tensorflow
from dtrain.errors import ConfigError, DataError
from dtrain.types import Batching, BatchPlan, FitPlan, Tree

log = logging.getLogger("dtrain")

READ_HERE_BYTES = 512 << 20
"""A tf.data.Dataset of at most so many bytes is read in the driver."""
PLACEMENT_STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")


@dataclass(frozen=True)
class FitArguments:
    """A fit as the user asked for it: the plan, and the data that it is of."""

    plan: FitPlan
    train: Given
    validation: Given | None


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
) -> tuple[tuple[int, int], dict[str, float]]:
    """The numbers of workers, at least and at most, and Ray's resources of each.

    Raises:
        ConfigError: one of them makes no sense.
    """
    is_elastic = isinstance(num_workers, (tuple, list)) and len(num_workers) == 2
    smallest, largest = num_workers if is_elastic else (num_workers, num_workers)
    for number in (smallest, largest):
        whole_number("num_workers", number, 1)
    if smallest > largest:
        raise ConfigError(f"num_workers={num_workers!r} must be one number of workers, or (at least, at most)")
    resources = {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {}), **(resources_per_worker or {})}
    for name, amount in resources.items():
        if not isinstance(amount, (int, float)) or isinstance(amount, bool) or not 0 <= amount < math.inf:
            raise ConfigError(f"resources_per_worker[{name!r}]={amount!r} must be a number, 0 or more")
    if use_gpu and resources["GPU"] < 1:
        raise ConfigError(f"resources_per_worker['GPU']={resources['GPU']!r} must be 1 or more with use_gpu=True")
    if placement_strategy not in PLACEMENT_STRATEGIES:
        raise ConfigError(f"placement_strategy={placement_strategy!r} must be one of {', '.join(PLACEMENT_STRATEGIES)}")
    if smallest < largest and placement_strategy.startswith("STRICT_"):
        raise ConfigError(
            f"placement_strategy={placement_strategy!r} cannot be kept with num_workers={num_workers!r}: workers that"
            " join later are placed one by one; use PACK or SPREAD"
        )
    return (smallest, largest), resources


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
                " place in the data; dtrain saves all of that itself: leave it out, keep Trainer(checkpoint=True,"
                ' run_name=...), and go on with fit(resume="auto")'
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


def data_of(
    x: Any,
    y: Tree = None,
    sample_weight: Tree = None,
    class_weight: Mapping[int, float] | None = None,
    *,
    name: str = "x",
) -> Given:
    """What goes to the workers for the user's `x`, `y` and weights. A small tf.data.Dataset is read here.

    Raises:
        ConfigError: it cannot travel.
        DataError: it is no data, or cannot be trained on, or must be made on the workers.
    """
    kind = kind_of_batches(x) or ("function" if is_function(x) else None)
    if kind is None:
        return source_of(x, y, sample_weight, class_weight, name=name)
    if kind == "generator":
        made_by = getattr(getattr(x, "gi_code", None), "co_name", "")
        call = f"pass {made_by} instead of {made_by}()" if made_by.isidentifier() else "pass a function that returns it"
        raise DataError(
            f"{name} is a {type(x).__name__}, which cannot travel to the workers; {call}, and each makes its own"
        )
    for other, value in (("y", y), ("sample_weight", sample_weight)):
        if value is not None:
            raise DataError(f"{other} must not be given when {name} is a {kind}, which brings its own")
    if class_weight is not None and kind not in ("function", "tf.data.Dataset", "PyDataset"):
        raise DataError(f"class_weight must not be given when {name} is a {kind}; let it bring sample weights instead")
    if kind == "tf.data.Dataset":
        return _read_here(x, class_weight, name)
    if kind == "function":
        _check_call(name, x)
    return Deferred(name, kind, pickled(name, x), class_weight)


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
        raise DataError(
            f"{name}=None: there is nothing to read; pass arrays, a dtrain.data source, or a function that returns data"
        )
    if kind_of_batches(x) or is_function(x):
        raise DataError(f"{name} is a {type(x).__module__}.{type(x).__name__}; one mini-batch must be arrays")
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
    check_replicas_every: int | None,
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
        if isinstance(x, DataSource) or kind_of_batches(x) or is_function(x):
            raise DataError(
                f"validation_split={validation_split!r} needs arrays; with a {_kind_of(x)} pass validation_data"
            )
        (x, y, sample_weight), validation_data = train_validation_split(x, y, sample_weight, validation_split)
    train = data_of(x, y, sample_weight, class_weight)
    if isinstance(train, Batches) and epochs > initial_epoch + 1 and _shuffles(x):
        log.warning(
            "x is a tf.data.Dataset that shuffles. It was read once, here, and brings this one order in every epoch; to"
            " have it shuffle anew pass a function that makes it: trainer.fit(make_dataset, ...)"
        )
    plan = plan_of(train, batch_size, steps_per_epoch, "steps_per_epoch", shuffle, seed)
    fit = FitPlan(
        plan,
        epochs,
        initial_epoch,
        validation_freq=validation_freq,
        record_steps=record_steps,
        check_replicas_every=check_replicas_every,
    )
    if validation_data is None:
        return FitArguments(fit, train, None)
    validation = _validation_of(validation_data)
    validation_plan = plan_of(
        validation,
        validation_batch_size,
        validation_steps,
        "validation_steps",
        in_any_order=True,
        usual_batch_size=plan.batch_size,
        size_name="validation_batch_size",
    )
    return FitArguments(replace(fit, validation=validation_plan), train, validation)


def _validation_of(validation_data: Any) -> Given:
    parts = validation_data if isinstance(validation_data, (tuple, list)) else (validation_data,)
    if not 1 <= len(parts) <= 3:
        raise DataError(f"validation_data has {len(parts)} parts; it must be (x, y) or (x, y, sample_weight)")
    x, y, sample_weight = (*parts, None, None)[:3]
    return data_of(x, y, sample_weight, name="validation_data")


def plan_of(
    data: Given,
    batch_size: int | None,
    steps: int | None,
    steps_name: str,
    shuffle: bool | str = False,
    seed: tuple[int, ...] = (0,),
    *,
    in_any_order: bool = False,
    usual_batch_size: int | None = None,
    size_name: str = "batch_size",
) -> BatchPlan | Batching:
    """How one pass or epoch over `data` is cut into mini-batches: a plan where the number of rows is known here.

    Args:
        data: the data set.
        batch_size: rows in a mini-batch of the whole job; None: `usual_batch_size`, else Keras's default.
        steps: mini-batches, where fewer are asked for than there are.
        steps_name: what the user calls them.
        shuffle: as in `fit`.
        seed: of the shuffling.
        in_any_order: a whole pass may take the rows in the order in which each worker reads fewest blocks.
        usual_batch_size: see `batch_size`.
        size_name: what the user calls `batch_size`.

    Raises:
        ConfigError: a number makes no sense, or the data bring batches of their own.
    """
    if steps is not None:
        steps = whole_number(steps_name, steps, 1)
    if batch_size is not None:
        if isinstance(data, Batches) or (isinstance(data, Deferred) and data.kind != "function"):
            raise ConfigError(
                f"{size_name}={batch_size!r} must not be given where {data.name} brings batches of its own: what it"
                " brings is the mini-batch of the whole job"
            )
        batch_size = whole_number(size_name, batch_size, 1)
    if shuffle not in (True, False, "batch"):
        raise ConfigError(f"shuffle={shuffle!r} must be True, False or 'batch'")
    batching = Batching(batch_size, steps, shuffle, seed, usual_batch_size, in_any_order)
    return batch_plan(data, batching) if isinstance(data, DataSource) else batching


def _read_here(dataset: Any, class_weight: Mapping[int, float] | None, name: str) -> Batches:
    """Read a tf.data.Dataset into memory."""
    import_tensorflow()
    from dtrain.keras_internals import KerasInput

    is_endless = int(dataset.cardinality()) == _INFINITE
    source = KerasInput(dataset, class_weight=class_weight)
    batches = None if is_endless else read_at_once(source, READ_HERE_BYTES, name)
    if batches is None:
        size = "has no end" if is_endless else f"has more than {READ_HERE_BYTES >> 20} MB"
        raise DataError(
            f"{name} is a tf.data.Dataset that {size}, too large to be read here and sent to the workers; pass a"
            " function that makes it, and each worker reads its own:\n\n"
            "    def make_dataset():\n        return tf.data. ...\n\n    trainer.fit(make_dataset, ...)"
        )
    if not batches.content:
        raise DataError(f"{name} has no batches; check what it was made from")
    return batches


def _shuffles(dataset: Any) -> bool:
    """Whether a tf.data.Dataset has another order in each pass, as far as the names of what it is made of tell."""
    shuffles = "Shuffle" in type(dataset).__name__ and getattr(dataset, "_reshuffle_each_iteration", True) is not False
    return shuffles or any(map(_shuffles, dataset._inputs()))


_INFINITE = -1
"""What a tf.data.Dataset without end says its cardinality is."""


def _check_call(name: str, function: Callable[..., Any]) -> None:
    try:
        inspect.signature(function).bind()
    except TypeError as error:
        raise ConfigError(
            f"{name}={_short(function)} is called without arguments, which does not fit ({error}); close over what it"
            " needs, or use functools.partial"
        ) from None
    except ValueError:
        pass  # a callable without a signature, written in C


def _kind_of(x: Any) -> str:
    return "data source" if isinstance(x, DataSource) else kind_of_batches(x) or "function"


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
