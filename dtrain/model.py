"""Owns a Keras model as a whole: made by the user's factory, checked, described, its state read and written.

The factory is the architecture: a model is never rebuilt from a file, only its values are.
"""

import contextlib
import hashlib
import io
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import redirect_stdout
from itertools import zip_longest
from typing import Any

import keras
import numpy as np

from dtrain.errors import CheckpointError, ConfigError
from dtrain.keras_internals import (
    DRAWS,
    build_from_batch,
    build_from_inputs,
    drawn_unordered,
    global_seed_generator,
    layers_of,
    schedule_of,
    seed_generators_of,
)
from dtrain.types import Array, ModelDescription, Tree

ModelFn = Callable[..., keras.Model]

_NOT_SETTINGS = ("name", "learning_rate", "build_config", "synchronized")
"""Of a configuration: Keras counts names within a process, rates change, and the Trainer may synchronize."""

State = dict[str, Array]
"""A model's and its optimizer's variables by name, in a fixed order."""


def make_model(model_fn: ModelFn, config: Mapping[str, Any] | None) -> keras.Model:
    """Call the factory and check what it returned.

    Raises:
        ConfigError: it returned None, something that is no keras.Model, or a model that is not compiled.
    """
    model = model_fn(config) if config is not None else model_fn()
    name = getattr(model_fn, "__qualname__", repr(model_fn))
    if model is None:
        raise ConfigError(f"model_fn={name} returned None; did you forget to return the model?")
    if not isinstance(model, keras.Model):
        raise ConfigError(f"model_fn={name} returned {type(model).__name__}; it must return a keras.Model")
    if not model.compiled:
        raise ConfigError(f"model_fn={name} returned a model that is not compiled; call model.compile(...) inside it")
    return model


def build_variables(model: keras.Model, batch: Tree) -> None:
    """Create the variables of model and optimizer from a batch of any size; targets may be missing.

    A model whose layers know their shapes needs no batch: None will do.
    """
    build_from_inputs(model, batch)


def build(model: keras.Model, batch: Tree) -> None:
    """Create those of loss and metrics as well, from a batch (x, y, sample_weight) of any size."""
    build_from_batch(model, batch)


def refuse_what_cannot_be_split(model: keras.Model) -> None:
    """Refuse a model that several workers cannot train as one would.

    Raises:
        ConfigError: it has a stateful recurrent layer, whose state belongs to the rows of one worker.
    """
    stateful = [layer.name for layer in layers_of(model) if getattr(layer, "stateful", False)]
    if stateful:
        raise ConfigError(
            f"layer {stateful[0]!r} is stateful: it carries the state of row i over to row i of the next mini-batch,"
            " which may be another worker's; use stateful=False, or num_workers=1"
        )


def label_rules(model: keras.Model) -> tuple[dict[str, int], dict[str, int]]:
    """Where targets are the numbers of classes: how many the output has, and the one that the loss passes over.

    Returns:
        Both by path, "y" or "y['name']" or "y[0]", as far as losses and output shapes tell; see
        `dtrain.data.checks.check_batch`.
    """
    classes: dict[str, int] = {}
    ignored: dict[str, int] = {}

    def visit(path: str, loss: Any, shape: Any) -> None:
        if isinstance(loss, Mapping) and isinstance(shape, Mapping):
            for key in loss.keys() & shape.keys():
                visit(f"{path}[{key!r}]", loss[key], shape[key])
        elif isinstance(loss, (list, tuple)) and isinstance(shape, list):
            for index, pair in enumerate(zip(loss, shape, strict=False)):
                visit(f"{path}[{index}]", *pair)
        elif _takes_class_numbers(loss) and isinstance(shape, tuple) and isinstance(shape[-1], int):
            classes[path] = shape[-1]
            if getattr(loss, "ignore_class", None) is not None:
                ignored[path] = loss.ignore_class

    shapes = getattr(model, "output_shape", None)
    if isinstance(model.loss, Mapping):
        shapes = dict(
            zip(
                getattr(model, "output_names", ()),
                [shapes] if isinstance(shapes, tuple) else shapes or (),
                strict=False,
            )
        )
    visit("y", model.loss, shapes)
    return classes, ignored


def _takes_class_numbers(loss: Any) -> bool:
    function = keras.losses.sparse_categorical_crossentropy
    by_name = isinstance(loss, str) and loss == function.__name__
    return by_name or loss is function or isinstance(loss, keras.losses.SparseCategoricalCrossentropy)


def has_own_loss(model: keras.Model) -> bool:
    """Whether code that is not Keras's takes the loss of the targets; it may mask what is wrong in them."""
    steps = ("train_step", "compute_loss")
    if any(getattr(type(model), step) is not getattr(keras.Model, step) for step in steps):
        return True
    return not _is_keras_s(model.loss)


def targets_with_loss(model: keras.Model) -> set[str] | None:
    """The paths of targets that a loss is taken of, such as "y['kind']"; None: all, or nobody knows."""
    loss = model.loss
    if not isinstance(loss, (Mapping, list, tuple)):
        return None
    items = loss.items() if isinstance(loss, Mapping) else enumerate(loss)
    return {f"y[{key!r}]" for key, each in items if each is not None}


def _is_keras_s(loss: Any) -> bool:
    """Whether a loss, or all in a nested structure of them, is Keras's own; None is."""
    if isinstance(loss, (Mapping, list, tuple)):
        return all(map(_is_keras_s, loss.values() if isinstance(loss, Mapping) else loss))
    if loss is None:
        return True
    if isinstance(loss, str):
        try:
            loss = keras.losses.get(loss)
        except ValueError:  # known by a name of the user's
            return False
    parts = [loss, *([loss.fn] if hasattr(loss, "fn") else [])]
    return all(str(getattr(part, "__module__", "")).partition(".")[0] == "keras" for part in parts)


def describe(model: keras.Model) -> ModelDescription:
    """Describe a built model."""
    text = io.StringIO()
    with redirect_stdout(text):
        model.summary(print_fn=lambda line, **_: print(line), line_length=100)
    optimizer = model.optimizer
    return ModelDescription(
        name=model.name,
        summary=text.getvalue(),
        num_parameters=sum(int(np.prod(v.shape)) for v in model.weights),
        num_trainable=sum(int(np.prod(v.shape)) for v in model.trainable_variables),
        optimizer=type(optimizer).__name__ if optimizer is not None else "None",
        loss=_loss_name(model).strip('"'),
        # Keras keeps what was passed to compile in one metric of its own.
        metrics=tuple(part.name for metric in model.metrics for part in getattr(metric, "metrics", None) or [metric]),
        learning_rate=learning_rate(model),
        signature=_digest(_variables_in_words(model), _compiled_in_words(model), learning_rate(model)),
        # An optimizer's variables follow from its settings, and some are made by the first step alone.
        structure=_digest([f"{v.shape} {v.dtype}" for v in model.variables], _settings(model)),
        exceptions=_exceptions(model),
    )


def optimizers_of(model: keras.Model) -> list[keras.optimizers.Optimizer]:
    """The outermost optimizers that a model and its layers hold, its compiled one first.

    They are attributes, or stand in lists, tuples and dicts that are, however deep.
    """
    found: list[keras.optimizers.Optimizer] = []
    seen: set[int] = set()

    def visit(value: Any) -> None:
        if isinstance(value, keras.optimizers.Optimizer):
            if all(value is not known for known in found):
                found.append(value)
        elif isinstance(value, (Mapping, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            for item in value.values() if isinstance(value, Mapping) else value:
                visit(item)

    visit(model.optimizer)
    for layer in layers_of(model):
        visit(vars(layer))
    inner = [getattr(optimizer, "inner_optimizer", None) for optimizer in found]
    return [optimizer for optimizer in found if all(optimizer is not other for other in inner)]


def learning_rate(model: keras.Model) -> float | None:
    """The compiled optimizer's learning rate now; None where there is not one of them."""
    rate = getattr(model.optimizer, "learning_rate", None)  # a MultiOptimizer has none
    return None if rate is None else float(np.asarray(rate))


def constant_rate(model: keras.Model) -> float | None:
    """The learning rate now, where no schedule computes it."""
    return None if schedule_of(model.optimizer) is not None else learning_rate(model)


def check_state(model: keras.Model, state: Mapping[str, Array]) -> None:
    """Refuse a state that `write_state` would refuse.

    Raises:
        CheckpointError: it is of another model.
    """
    _places(model, state)


def named_variables(model: keras.Model) -> dict[str, Any]:
    """Every variable that training changes, metrics left out, by a name that is unique and the same everywhere.

    Names are "<group>/<place>/<path>", in alphabetical order; the groups are "model", "optimizer" (the compiled one),
    "optimizer1" and so on (those that a model with a train_step of its own holds besides, once they are built), "seeds"
    (random layers' numbers) and "random" (the process's own).
    """
    seeds = [generator.state for generator in seed_generators_of(model)]
    own = [variable for variable in model.variables if all(variable is not seed for seed in seeds)]
    groups: dict[str, Sequence[Any]] = {"model": own, "random": [global_seed_generator().state], "seeds": seeds}
    for number, optimizer in enumerate(optimizers_of(model)):
        if optimizer.built:
            groups[_optimizer_group(number)] = optimizer.variables
    named = {
        f"{group}/{index:06d}/{variable.path}": variable
        for group, variables in groups.items()
        for index, variable in enumerate(variables)
    }
    return dict(sorted(named.items()))


def _optimizer_group(number: int) -> str:
    return f"optimizer{number or ''}"


def read_state(model: keras.Model) -> State:
    return {name: value_of(variable) for name, variable in named_variables(model).items()}


def value_of(variable: keras.Variable) -> Array:
    """A copy of a variable's value; `numpy` of Keras's makes three, one after the other."""
    return np.asarray(variable.value.numpy())


def write_state(model: keras.Model, state: Mapping[str, Array]) -> State:
    """Assign a state that `read_state` gave for the same architecture; groups that it lacks are left alone.

    Variables are told by group and place, checked by shape and dtype: Keras numbers layers within a process, so paths
    may differ.

    Returns:
        What could not be assigned yet: of optimizers that only a train_step of the model's own will build.

    Raises:
        CheckpointError: the state is of another model; nothing was assigned.
    """
    places, waiting = _places(model, state)
    for variable, value in places:
        variable.assign(value)
    return waiting


def _places(model: keras.Model, state: Mapping[str, Array]) -> tuple[list[tuple[Any, Array]], State]:
    """Each variable with its value, and what is to wait for variables that are not built yet."""
    unbuilt = {_optimizer_group(number) for number, o in enumerate(optimizers_of(model)) if not o.built}
    waiting, state = pick(state, unbuilt), leave_out(state, unbuilt)
    groups = {_group(name) for name in state}
    variables = {name: v for name, v in named_variables(model).items() if _group(name) in groups}
    for here, there in zip_longest(variables.items(), sorted(state.items())):
        if here is None or there is None or _form(*here) != _form(*there):
            raise CheckpointError(
                f"the state is of another model or optimizer: it has {_in_words(there)} where this model has"
                f" {_in_words(here)}"
            )
    values = (value for _, value in sorted(state.items()))
    return list(zip(variables.values(), values, strict=True)), waiting


def _form(name: str, value: Any) -> tuple[Any, ...]:
    """What a variable's place, and a value of it, must have in common."""
    return name.split("/")[:2], tuple(value.shape), str(value.dtype)


def _in_words(item: tuple[str, Any] | None) -> str:
    return "nothing more" if item is None else f"{item[0]} {tuple(item[1].shape)} {item[1].dtype}"


def pick(state: Mapping[str, Array], groups: Collection[str]) -> State:
    """The part of a state that is in these groups."""
    return {name: value for name, value in state.items() if _group(name) in groups}


def leave_out(state: Mapping[str, Array], groups: Collection[str]) -> State:
    """The part of a state that is not in these groups."""
    return {name: value for name, value in state.items() if _group(name) not in groups}


def _group(name: str) -> str:
    return name.split("/")[0]


def spread_seeds(model: keras.Model, rank: int) -> None:
    """Give each rank random numbers of its own: the first word of every seed moves by a rank's offset.

    Rank 0 keeps plain Keras's. With -rank a rank has rank 0's again.
    """
    for variable in seed_states_of(model):
        base, counter = variable.numpy()
        offset = (rank * 0x9E3779B9) % 2**32  # the golden ratio's bits: far apart for neighbouring ranks
        variable.assign(np.array([(int(base) + offset) % 2**32, int(counter)], np.uint32))


def seeds_of(model: keras.Model) -> list[list[int]]:
    """The two words of each random number generator, that of Keras's global one the last."""
    return [[int(word) for word in value_of(state)] for state in seed_states_of(model)]


def draws_between(before: Sequence[Sequence[int]], now: Sequence[Sequence[int]]) -> list[int]:
    """How many numbers each generator has given from one state to another, as `seeds_of` has them."""
    draws = [new[1] - old[1] for old, new in zip(before[:-1], now[:-1], strict=True)]
    words, last = list(before[-1]), 0
    while words != list(now[-1]) and last < DRAWS:
        words, last = drawn_unordered(words), last + 1
    return [*draws, last % DRAWS]


def draw_on(model: keras.Model, before: Sequence[Sequence[int]], draws: Sequence[int]) -> None:
    """Bring each generator to where it is once it has given so many numbers more than it had `before`; or fewer."""
    counted = [[base, counter + more] for (base, counter), more in zip(before[:-1], draws[:-1], strict=True)]
    words = list(before[-1])
    for _ in range(draws[-1] % (DRAWS - 1)):  # they come around after so many, DRAWS being prime
        words = drawn_unordered(words)
    for state, seed in zip(seed_states_of(model), [*counted, words], strict=True):
        state.assign(np.array(seed, np.int64))


def seed_states_of(model: keras.Model) -> list[Any]:
    """The states of all random number generators, that of Keras's global one the last."""
    return [generator.state for generator in [*seed_generators_of(model), global_seed_generator()]]


def _loss_name(model: keras.Model) -> str:
    return json.dumps(_names_in(model.loss))


def _names_in(tree: Any) -> Any:
    """The same structure with names for the losses in it."""
    if isinstance(tree, Mapping):
        return {str(key): _names_in(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_names_in(value) for value in tree]
    if tree is None or isinstance(tree, str):
        return tree
    return str(getattr(tree, "name", None) or getattr(tree, "__name__", tree))


def _digest(*parts: Any) -> str:
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _variables_in_words(model: keras.Model) -> list[str]:
    return [f"{v.shape} {v.dtype} {v.trainable}" for v in named_variables(model).values()]


def _compiled_in_words(model: keras.Model) -> dict[str, Any]:
    return {"optimizer": type(model.optimizer).__name__, "loss": _loss_name(model)}


def _settings(model: keras.Model) -> list[Any]:
    """How layers, optimizers and losses are set, as their `get_config` tells, but for names and learning rates."""
    parts = [layer for layer in layers_of(model) if not isinstance(layer, keras.Model)]
    found = [[type(part).__name__, _plain(_config_of(part.get_config))] for part in (*parts, *optimizers_of(model))]
    compiled = _config_of(model.get_compile_config)
    return [*found, *(_plain(compiled.get(key)) for key in ("loss", "loss_weights"))]


def _config_of(get_config: Callable[[], Any]) -> Mapping[str, Any]:
    with contextlib.suppress(Exception):  # of a part of the user's own that has none
        return get_config() or {}
    return {}


def _plain(value: Any) -> Any:
    """Of a configuration, what JSON has words for: other objects may show where they lie in memory."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items() if key not in _NOT_SETTINGS}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if isinstance(value, (str, int, float, bool)) else None


def _exceptions(model: keras.Model) -> tuple[str, ...]:
    layers = [layer for layer in layers_of(model) if layer is not model]
    found: list[str] = []
    normalizing = [x for x in layers if isinstance(x, keras.layers.BatchNormalization)]
    local = [layer.name for layer in normalizing if layer.trainable and not layer.synchronized]
    if local:
        found.append(
            f"BatchNormalization uses each worker's own rows for its statistics ({', '.join(local[:3])});"
            " sync_batch_norm=True makes it exact"
        )
    random = [x.name for x in layers if getattr(x, "_seed_generators", None)]
    if random:
        found.append(f"random layers draw different numbers on each worker ({', '.join(random[:3])})")
    if has_own_loss(model) and not getattr(model.loss, "dtrain_whole_batch", False):
        found.append(
            "a loss of your own is exact where it is a mean over rows, which dtrain.testing.check_shardable tells;"
            " dtrain.whole_batch makes one exact that mixes rows"
        )
    return tuple(found)
