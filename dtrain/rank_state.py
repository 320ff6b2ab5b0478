"""Owns what a rank alone has between two steps, and a checkpoint therefore holds for every rank.

These are the metrics' partial sums, the gradients that it has accumulated and not yet applied, and the states of
random generators: Keras's, which callbacks that run on rank 0 alone may draw from, and Python's and NumPy's, which the
user's code may. Put back on as many ranks, all of it is as it was; on another number of ranks, what adds up is rank
0's, and the generators are left as the seed made them.
"""

import random
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from dtrain.accumulation import local_accumulators
from dtrain.collective import Collective
from dtrain.data.source import content_of
from dtrain.errors import CheckpointError
from dtrain.fit_state import ACCUMULATED, place_of
from dtrain.metrics import MetricState
from dtrain.model import named_variables, seed_states_of, value_of
from dtrain.types import Array

Own = Mapping[str, Array]

TWISTER_WORDS = 624
"""The state of a Mersenne Twister, and where in it a generator stands at most."""
METRIC, SEED = "metric/", "seed/"
"""What a rank's metric variables and its random generators' states are called in its file: this, and a number."""


def read_own(model: keras.Model, metrics: MetricState) -> dict[str, Array]:
    """Copies of it, by name."""
    return read_sums_and_seeds(model, metrics) | _read(_accumulators(model))


def read_sums_and_seeds(model: keras.Model, metrics: MetricState) -> dict[str, Array]:
    """The same without gradients, which may be as large as the model."""
    return _read(_sums_and_seeds(model, metrics)) | _generators()


def write_own(
    model: keras.Model, metrics: MetricState, every: Sequence[Own], collective: Collective, needed: tuple[str, ...]
) -> None:
    """Put back what the ranks had. Every rank calls it; none waits for another.

    Args:
        model: built.
        metrics: its metrics.
        every: what each rank had, in rank order.
        collective: of the ranks that there are now.
        needed: the kinds, METRIC or ACCUMULATED, that must be what they were. Of another, nothing is put back then.

    Raises:
        CheckpointError: it is of another model or of other metrics; nothing was changed.
    """
    check_own(model, metrics, every, needed)
    rank = collective.rank
    same_ranks = len(every) == collective.world_size
    for name, variable in (_sums_and_seeds(model, metrics) | _accumulators(model)).items():
        values = [own[name] for own in every if _is_of(variable, own.get(name))]
        if len(values) < len(every) or (name.startswith(SEED) and not same_ranks):
            continue
        aggregation = variable.aggregation if name.startswith(METRIC) else "sum"
        variable.assign(values[rank] if same_ranks else _joined(values, aggregation, rank))
    if same_ranks:
        _seed(every[rank])


def add_own(metrics: MetricState, every: Sequence[Own]) -> list[Array]:
    """Add what ranks that are no more had of the metrics' sums to this rank's; what was added, variable by variable."""
    added = []
    for index, variable in enumerate(metrics.variables):
        values = [own[f"{METRIC}{index:06d}"] for own in every] if variable.aggregation == "sum" else []
        added.append(
            np.sum(values, axis=0, dtype=variable.dtype) if values else np.zeros(variable.shape, variable.dtype)
        )
        variable.assign_add(added[-1])
    return added


def checksum_of_shared(model: keras.Model) -> int:
    """Of all else, which is equal on the ranks: weights, moving statistics and the optimizers' variables.

    Integers are left out: layers may count their own rows.
    """
    accumulated = local_accumulators(model)
    checksum = 0
    for name, variable in named_variables(model).items():
        is_each_ones = name.startswith(("seeds/", "random/")) or any(variable is other for other in accumulated)
        if not is_each_ones and "float" in str(variable.dtype):
            checksum = zlib.crc32(content_of(value_of(variable)), checksum)
    return checksum


def check_own(model: keras.Model, metrics: MetricState, every: Sequence[Own], needed: tuple[str, ...]) -> None:
    """Refuse what `write_own` would refuse.

    Raises:
        CheckpointError: it is of another model or of other metrics, or holds what is no state of a generator.
    """
    every_variable = _sums_and_seeds(model, metrics) | _accumulators(model)
    variables = {name: variable for name, variable in every_variable.items() if name.startswith(needed)}
    for own in every:
        for name in sorted(variables.keys() | {name for name in own if name.startswith(needed)}):
            known, saved = variables.get(name), own.get(name)
            if known is None or not _is_of(known, saved):
                raise CheckpointError(
                    f"the checkpoint is of another model: it has {_form(saved)} for {name}, this model has"
                    f" {_form(known)}. In the middle of an epoch the metrics and gradient_accumulation_steps must be"
                    " what they were"
                )
        _check_generators(own)


def _is_of(variable: Any, value: Array | None) -> bool:
    return value is not None and tuple(variable.shape) == value.shape and variable.dtype == value.dtype.name


def _read(variables: Mapping[str, Any]) -> dict[str, Array]:
    return {name: value_of(variable) for name, variable in variables.items()}


def _sums_and_seeds(model: keras.Model, metrics: MetricState) -> dict[str, Any]:
    found = {f"{METRIC}{index:06d}": variable for index, variable in enumerate(metrics.variables)}
    found.update((f"{SEED}{index:06d}", variable) for index, variable in enumerate(seed_states_of(model)))
    return found


def _accumulators(model: keras.Model) -> dict[str, Any]:
    places = {id(variable): place_of(name) for name, variable in named_variables(model).items()}
    return {f"{ACCUMULATED}{places[id(variable)]}": variable for variable in local_accumulators(model)}


def _joined(values: Sequence[Array], aggregation: str, rank: int) -> Array:
    """What a rank of another number of ranks begins with, so that together they have what was saved."""
    if aggregation == "mean":
        return np.asarray(np.mean(values, axis=0), values[0].dtype)
    total = values[0] if aggregation == "only_first_replica" else np.sum(values, axis=0, dtype=values[0].dtype)
    return total if rank == 0 else np.zeros_like(values[0])


def _generators() -> dict[str, Array]:
    """Python's and NumPy's global generators, both Mersenne Twisters, as arrays."""
    version, words, gauss = random.getstate()
    _, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "random/python": np.array([version, *words], np.uint32),
        "random/python_gauss": np.array([] if gauss is None else [gauss], np.float64),
        "random/numpy": np.array([*keys, position, has_gauss], np.uint32),
        "random/numpy_gauss": np.array([cached], np.float64),
    }


def _check_generators(own: Own) -> None:
    """NumPy takes any position for one within its 624 words, and reads there."""
    forms = {name: (value.dtype, value.ndim) for name, value in _generators().items()}
    sizes = {"random/python": (TWISTER_WORDS + 2,), "random/python_gauss": (0, 1)}
    sizes |= {"random/numpy": (TWISTER_WORDS + 2,), "random/numpy_gauss": (1,)}
    is_whole = all(
        name in own and (own[name].dtype, own[name].ndim) == form and own[name].size in sizes[name]
        for name, form in forms.items()
    )
    if not is_whole or max(own["random/python"][-1], own["random/numpy"][-2]) > TWISTER_WORDS:
        raise CheckpointError("the checkpoint is of no fit: its random/python or random/numpy is no generator's state")


def _seed(own: Own) -> None:
    version, *words = map(int, own["random/python"])
    gauss = own["random/python_gauss"]
    random.setstate((version, tuple(words), float(gauss[0]) if gauss.size else None))
    *keys, position, has_gauss = own["random/numpy"]
    cached = float(own["random/numpy_gauss"][0])
    np.random.set_state(("MT19937", np.array(keys, np.uint32), int(position), int(has_gauss), cached))


def _form(value: Any) -> str:
    return "nothing" if value is None else f"{tuple(value.shape)} {value.dtype}"
