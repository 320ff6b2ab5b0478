"""Owns the runs that are compared: plain Keras in one process, and a Replica on each rank. Loaded by the ranks alone.

Both return `Outcome`s: plain NumPy, in groups of named arrays.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any
from unittest.mock import patch

import keras
import numpy as np
import tensorflow as tf
from keras import layers

from dtrain import losses
from dtrain import model as models
from dtrain.collective import Collective, LocalCollective
from dtrain.data import sampler
from dtrain.data.source import ArraySource
from dtrain.errors import ConfigError
from dtrain.optimizer import reduce_gradients
from dtrain.rank_fit import RankFit
from dtrain.replica import Replica
from dtrain.types import Array, BatchPlan, FitPlan, Position, Segment, StepOptions
from exactness.cases import CORE, PARTS, PERMUTED_RUNS, UNEVEN, Run, Size
from exactness.features import FEATURES, ClipsItself, Data, Feature, UpdatesNothing, classes, custom

VALIDATION_ROWS, VALIDATION_BATCH = 37, 10
EVALUATE_BATCH, PREDICT_BATCH = 19, 7
SHUFFLE_SEED = (3, 1)

Arrays = dict[str, Array]


@dataclass(frozen=True)
class Outcome:
    """All that a run ended with.

    Attributes:
        weights: the model's, moving statistics included.
        optimizer: the optimizer's variables.
        history: what fit returned, and what evaluate on the training data returned.
        predictions: of all rows of the training data, or of this rank's part of them.
        digest: of everything that must have the same bits on all ranks.
    """

    weights: Arrays
    optimizer: Arrays
    history: Arrays
    predictions: Arrays
    digest: str


@dataclass(frozen=True)
class Reference:
    """Plain Keras: one run, and in float32 the same again, differing by what plain Keras rounds otherwise.

    Attributes:
        run: the one to compare with.
        again: with the rows inside each mini-batch permuted, and with each mini-batch computed in parts.
    """

    run: Outcome
    again: list[Outcome]


def plain(feature_name: str, dtype: str, sizes: Sequence[Size], shuffle: bool = False) -> dict[Size, Reference]:
    """Train with plain `keras.Model.fit` on arrays; with `shuffle`, in the order that dtrain's sampler gives."""
    feature = FEATURES[feature_name]
    references = {}
    model = _fresh_model(feature, dtype)
    initial = [variable.numpy() for variable in _all_variables(_built_model(feature, dtype, sizes[0]))]
    parts = PARTS if dtype == "float32" and feature_name in CORE else ()
    in_parts = [_compute_in_parts(_built_model(feature, dtype, sizes[0]), number) for number in parts]
    for size in sizes:
        train, validation = make_data(feature, size)
        if references:  # the model is built inside its first fit
            _assign(model, initial)
        orders = _orders(feature, size, shuffle)
        run = _plain_run(feature, size, model, train, validation, orders)
        again = []
        for number in range(PERMUTED_RUNS if dtype == "float32" else 0):
            random = np.random.default_rng([7, number])
            _assign(model, initial)
            shuffled = [_permute_inside_batches(order, size.batch, random) for order in orders]
            order = _permute_inside_batches(np.arange(VALIDATION_ROWS), VALIDATION_BATCH, random)
            again.append(_plain_run(feature, size, model, train, take(validation, order), shuffled, quick=True))
        for other in in_parts:
            _assign(other, initial)
            again.append(_plain_run(feature, size, other, train, validation, orders, quick=True))
        references[size] = Reference(run, again)
    return references


def one_rank(feature_name: str, dtype: str, runs: Sequence[Run]) -> dict[Run, Outcome]:
    """A Replica alone, without Horovod."""
    return distributed(LocalCollective(), feature_name, dtype, runs)


def distributed(collective: Collective, feature_name: str, dtype: str, runs: Sequence[Run]) -> dict[Run, Outcome]:
    """Train one Replica on each rank, one run after the other, each from the same initial state."""
    feature = FEATURES[feature_name]
    replica: Replica | None = None
    outcomes: dict[Run, Outcome] = {}
    initial: models.State = {}
    for run in runs:
        train, validation = make_data(feature, run.size)
        with _mistaken(run.wrong), _steps_per_call(run.steps_per_call):
            if replica is None or run.wrong == "rows apart":  # a mistake that is made while tracing
                replica = Replica(_fresh_model(feature, dtype), collective, StepOptions(**feature.options))
                replica.build(_source(feature, train).read(np.zeros(1, np.int64)))
                initial = initial or replica.read_state()
            replica.write_state(initial)
            outcomes[run] = _distributed_run(feature, run, replica, train, validation)
    return outcomes


def dropout_masks(collective: Collective) -> tuple[Array, Array]:
    """What a Dropout layer lets through in a model by itself, and then in a Replica's on this rank."""

    def make() -> keras.Model:
        return _fresh_model(Feature(only_dropout, classes), "float32")

    def only_dropout() -> keras.Model:
        model = keras.Sequential([keras.Input((64,)), layers.Dropout(0.5)])
        model.compile("sgd", "mse")
        return model

    ones = np.ones((1, 64), np.float32)
    plain = make()(ones, training=True).numpy() > 0
    replica = Replica(make(), collective)
    replica.build((ones, ones))
    return plain, replica.model(ones, training=True).numpy() > 0


def refusal_of_a_step_without_optimizer(collective: Collective) -> str:
    feature = Feature(partial(custom, UpdatesNothing), classes)
    replica = Replica(_fresh_model(feature, "float32"), collective)
    source = _source(feature, make_data(feature, UNEVEN)[0])
    try:
        replica.begin_fit(FitPlan(BatchPlan(UNEVEN.rows, UNEVEN.batch), 1), source)
        replica.run(Segment(Position(0, 0), 1))
    except ConfigError as error:
        return str(error)
    return "it was not refused"


def refusal_of_a_hidden_optimizer(collective: Collective) -> str:
    """Of a step whose second optimizer is an attribute of what the model holds, and not of the model."""

    class Holder:
        optimizer = keras.optimizers.SGD(0.1, name="hidden")

    class Hides(UpdatesNothing):
        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            kernel, *others = self.trainable_variables
            gradient, *rest = tape.gradient(loss, [kernel, *others])
            self.optimizer.apply_gradients(zip(rest, others, strict=True))
            Holder.optimizer.apply_gradients([(gradient, kernel)])
            return {"loss": loss}

    feature = Feature(partial(custom, Hides), classes)
    replica = Replica(_fresh_model(feature, "float32"), collective)
    try:
        replica.build(_source(feature, make_data(feature, UNEVEN)[0]).read(np.zeros(1, np.int64)))
    except ConfigError as error:
        return str(error)
    return "it was not refused"


def refusals_of_gradients_reduced_wrongly(collective: Collective) -> list[str]:
    """Of a step that applies what it gave to be reduced, and of one that accumulates what was reduced."""

    class AppliesItsOwn(ClipsItself):
        def train_step(self, data: Any) -> Any:
            x, y = data
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x=x, y=y, y_pred=self(x, training=True))
            gradients = tape.gradient(loss, self.trainable_variables)
            reduce_gradients(gradients)
            self.optimizer.apply(gradients, self.trainable_variables)
            return {"loss": loss}

    def accumulating() -> keras.Model:
        model = ClipsItself()
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(keras.optimizers.SGD(0.1, gradient_accumulation_steps=2), loss)
        return model

    found = []
    for make in (partial(custom, AppliesItsOwn), accumulating):
        feature = Feature(make, classes)
        replica = Replica(_fresh_model(feature, "float32"), collective)
        try:
            replica.build(_source(feature, make_data(feature, UNEVEN)[0]).read(np.zeros(1, np.int64)))
            found.append("it was not refused")
        except ConfigError as error:
            found.append(str(error))
    return found


def refusal_of_a_stateful_layer(collective: Collective) -> str:
    keras.backend.clear_session(free_memory=False)
    recurrent = layers.GRU(2, stateful=True, name="remembers")
    model = keras.Sequential([keras.Input((4, 3), batch_size=2), recurrent, layers.Dense(1)])
    model.compile("sgd", "mse")
    try:
        Replica(model, collective).build((np.zeros((2, 4, 3), np.float32), np.zeros((2, 1), np.float32)))
    except ConfigError as error:
        return str(error)
    return "it was not refused"


def make_data(feature: Feature, size: Size) -> tuple[Data, Data]:
    """The rows to train on and those to validate on."""
    return feature.data(np.random.default_rng(1), size.rows), feature.data(np.random.default_rng(2), VALIDATION_ROWS)


def take(data: Data, rows: Array) -> Data:
    taken: Data = keras.tree.map_structure(lambda leaf: None if leaf is None else leaf[rows], data)
    return taken


# --- plain Keras


def _plain_run(
    feature: Feature,
    size: Size,
    model: keras.Model,
    train: Data,
    validation: Data,
    orders: Sequence[Array],
    quick: bool = False,
) -> Outcome:
    """One fit for each order of the rows; there is more than one where every epoch has an order of its own.

    `quick` hands Keras the same mini-batches as a tf.data.Dataset, which starts sooner.
    """
    histories: list[dict[str, list[float]]] = []
    epochs = feature.epochs // len(orders)
    callbacks = feature.callbacks()
    for number, order in enumerate(orders):
        x, y, sample_weight = take(train, order)
        common = {
            "initial_epoch": number * epochs,
            "epochs": (number + 1) * epochs,
            "callbacks": callbacks,
            "verbose": 0,
        }
        if quick and feature.steps_per_epoch is None:
            batches = _batches(_source(feature, (x, y, sample_weight)), size.batch)
            validating = _batches(ArraySource(*validation), VALIDATION_BATCH)
            history = model.fit(batches, validation_data=validating, shuffle=False, **common)
        else:
            history = model.fit(
                x,
                y,
                sample_weight=sample_weight,
                class_weight=feature.class_weight,
                batch_size=size.batch,
                steps_per_epoch=feature.steps_per_epoch,
                shuffle=False,
                validation_data=validation if validation[2] is not None else validation[:2],
                validation_batch_size=VALIDATION_BATCH,
                **common,
            )
        histories.append(history.history)
    x, y, sample_weight = train
    if quick:
        found = model.evaluate(_batches(ArraySource(*train), EVALUATE_BATCH), return_dict=True, verbose=0)
        predictions = model.predict(_batches(ArraySource(x), PREDICT_BATCH), verbose=0)
    else:
        found = model.evaluate(
            x, y, sample_weight=sample_weight, batch_size=EVALUATE_BATCH, return_dict=True, verbose=0
        )
        predictions = model.predict(x, batch_size=PREDICT_BATCH, verbose=0)
    history = {key: [value for part in histories for value in part[key]] for key in histories[0]}
    return _outcome(model, history, found, predictions)


def _built_model(feature: Feature, dtype: str, size: Size) -> keras.Model:
    model = _fresh_model(feature, dtype)
    models.build(model, _source(feature, make_data(feature, size)[0]).read(np.zeros(1, np.int64)))
    return model


def _compute_in_parts(model: keras.Model, parts: int) -> keras.Model:
    """Make a model compute the rows that it is given in so many calls, as even as can be; the last may have no rows.

    There is still one loss, one gradient and one optimizer, all of them Keras's. The model must end in a softmax.
    """
    call = model.call

    def call_in_parts(inputs: Any, **options: Any) -> Any:
        rows = tf.shape(inputs)[0]
        sizes = [(rows + parts - 1 - part) // parts for part in range(parts)]
        outputs = [call(part, **options) for part in tf.split(inputs, sizes, num=parts)]
        whole = tf.concat(outputs, axis=0)
        # Without them Keras computes the loss by another formula, from probabilities that it clips.
        whole._keras_logits = tf.concat([output._keras_logits for output in outputs], axis=0)
        return whole

    model.call = call_in_parts
    return model


def _assign(model: keras.Model, values: Sequence[Array]) -> None:
    for variable, value in zip(_all_variables(model), values, strict=True):
        variable.assign(value)


def _all_variables(model: keras.Model) -> list[Any]:
    return [*model.variables, *model.optimizer.variables]


def _orders(feature: Feature, size: Size, shuffle: bool) -> list[Array]:
    if not shuffle:
        return [np.arange(size.rows)]
    plan = sampler.Sampler(_batch_plan(feature, size, shuffle))
    return [np.concatenate(list(plan.batches(epoch, 0, plan.steps_in_epoch(epoch)))) for epoch in range(feature.epochs)]


def _permute_inside_batches(order: Array, batch: int, random: np.random.Generator) -> Array:
    return np.concatenate([random.permutation(order[start : start + batch]) for start in range(0, len(order), batch)])


# --- a Replica


def _distributed_run(feature: Feature, run: Run, replica: Replica, train: Data, validation: Data) -> Outcome:
    train_plan = _batch_plan(feature, run.size, run.shuffle)
    plan = FitPlan(train_plan, feature.epochs, validation=BatchPlan(VALIDATION_ROWS, VALIDATION_BATCH))
    replica.begin_fit(plan, _source(feature, train), ArraySource(*validation), feature.callbacks())
    epochs = sampler.Sampler(train_plan)
    position, stop, step_logs = Position(0, 0), False, []
    while position.epoch < feature.epochs and not stop:
        left = epochs.steps_in_epoch(position.epoch) - position.step
        result = replica.run(Segment(position, min(left, run.segment or left)))
        position, stop = result.position, result.stop
        step_logs.append(result.step_logs)
    history = replica.end_fit()
    steps = {key: np.concatenate([logs[key] for logs in step_logs]) for key in step_logs[0]}
    rows = ArraySource(*train)
    found = replica.evaluate(BatchPlan(run.size.rows, EVALUATE_BATCH), rows)
    predictions = replica.predict(BatchPlan(run.size.rows, PREDICT_BATCH), rows).outputs
    replica.read_state()
    return _outcome(replica.model, history, found, predictions, steps)


def _source(feature: Feature, data: Data) -> ArraySource:
    return ArraySource(*data, class_weight=feature.class_weight)


def _batch_plan(feature: Feature, size: Size, shuffle: bool) -> BatchPlan:
    return BatchPlan(size.rows, size.batch, feature.steps_per_epoch, shuffle=shuffle, seed=SHUFFLE_SEED)


def _batches(source: ArraySource, batch: int) -> tf.data.Dataset:
    arrays = source.arrays
    return tf.data.Dataset.from_tensor_slices(arrays if len(arrays) > 1 else arrays[0]).batch(batch)


@contextlib.contextmanager
def _mistaken(wrong: str | None) -> Iterator[None]:
    """Inside, the ranks make the mistake (see `Run.wrong`)."""

    def shard(num_rows: int, world_size: int, rank: int) -> sampler.Shard:
        right = sampler.shard(num_rows, world_size, rank)
        if wrong == "1/N":
            return replace(right, share=1 / world_size)
        if wrong == "counted N times" and right.whole:
            return replace(right, share=1.0, whole=False)
        return right

    def mixes_rows(loss: Any) -> bool:
        return wrong != "rows apart" and plain(loss)

    plain = losses.mixes_rows
    with patch("dtrain.data.loader.shard", shard), patch.object(losses, "mixes_rows", mixes_rows):
        yield


@contextlib.contextmanager
def _steps_per_call(number: int | None) -> Iterator[None]:
    if number is None:
        yield
        return
    with patch.object(RankFit, "_steps_per_call", lambda self: number):
        yield


# --- both


def _fresh_model(feature: Feature, dtype: str) -> keras.Model:
    keras.backend.clear_session(free_memory=False)  # to collect garbage every time takes longer than to train
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)
    keras.utils.set_random_seed(11)
    return feature.model()


def _outcome(
    model: keras.Model, history: Any, found: dict[str, float], predictions: Any, steps: Arrays | None = None
) -> Outcome:
    weights = {f"{i} {v.name}": v.numpy() for i, v in enumerate(model.weights)}
    optimizer = _numbered(model.optimizer.variables)
    # What is accumulated between updates is each rank's own; rank 0 has all of it once the state was read.
    equal = [v for v in model.optimizer.variables if "gradient_accumulator" not in v.path]
    same = {**weights, **_numbered(equal), **{f"step {key}": values for key, values in (steps or {}).items()}}
    for key, value in found.items():
        same[f"evaluate {key}"] = np.asarray(value)
    history = {key: np.asarray(values, np.float64) for key, values in history.items()}
    history.update({f"evaluate {key}": np.asarray(value, np.float64) for key, value in found.items()})
    flat = keras.tree.flatten(predictions)
    return Outcome(weights, optimizer, history, _numbered(flat), _digest(same))


def _numbered(values: Sequence[Any]) -> Arrays:
    return {str(index): np.asarray(keras.ops.convert_to_numpy(value)) for index, value in enumerate(values)}


def _digest(arrays: Arrays) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
