"""Claims about data that come in batches: the same maths as plain Keras, and inputs that differ end with an error."""

import functools
import re
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import cloudpickle
import keras
import models
import numpy as np
import pytest
import tensorflow as tf
from models import blobs, make_classifier, make_two_headed
from ranks import Ranks
from warm import fresh, use

import dtrain
from dtrain import arguments
from dtrain.collective import LocalCollective
from dtrain.data.given import Deferred
from dtrain.data.loader import Loader
from dtrain.data.source import ArraySource
from dtrain.data.stream import StreamLoader
from dtrain.errors import ConfigError, DataError, DtrainError, LostPeer, WorkerError
from dtrain.feeds import open_feed
from dtrain.trainer import _in_order
from dtrain.types import Batching, BatchPlan, FitPlan, Position, Segment

for module in (models, sys.modules[__name__]):  # the workers do not have the tests' folder on their path
    cloudpickle.register_pickle_by_value(module)

QUIET: dict[str, Any] = {"checkpoint": False, "tracking": False}

ROWS, BATCH = 53, 8
"""Seven mini-batches: the last has 5 rows, uneven at N=2 and N=3."""


def arrays(rows: int = ROWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, 5))
    return x, np.argmax(x[:, :3], axis=1)


def batches(rows: int = ROWS, size: int = BATCH) -> list[tuple[np.ndarray, ...]]:
    x, y = arrays(rows)
    weight = np.linspace(0.5, 2.0, rows)
    return [(x[i : i + size], y[i : i + size], weight[i : i + size]) for i in range(0, rows, size)]


# Ways to bring the same batches


def dataset() -> Any:
    x, y = arrays()
    return tf.data.Dataset.from_tensor_slices((x, y)).shuffle(ROWS, seed=3).batch(BATCH)


def of_unknown_length() -> Any:
    return dataset().filter(lambda x, y: True)


def endless() -> Any:
    return dataset().repeat()


def generator() -> Any:
    yield from batches()


def endless_generator() -> Any:
    while True:
        yield from batches()


class Reversing(keras.utils.PyDataset):  # type: ignore[misc]
    """Reverses its batches in each epoch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.batches = batches()

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]

    def on_epoch_end(self) -> None:
        self.batches.reverse()


def pydataset() -> Any:
    return Reversing()


def threaded_pydataset() -> Any:
    return Reversing(workers=2)


def in_lines_of_different_length() -> Any:
    """Sizes 1, 2, 11: fewer rows than ranks, and never two alike."""
    ends = [1, 3, 14, 15, 30, ROWS]
    x, y = arrays()
    for start, end in zip([0, *ends], ends, strict=False):
        yield x[start:end], y[start:end]


@dataclass(frozen=True)
class Fit:
    """A fit to compare: what brings the data, and how."""

    make: Callable[[], Any]
    plain: Callable[[], Any] | None = None  # what plain Keras is given instead
    steps: int | None = None
    epochs: int = 3
    class_weight: dict[int, float] | None = None
    validation: Callable[[], Any] | None = None
    validation_steps: int | None = None
    segment: int = 1000


def generator_dataset() -> Any:
    """The generator as Keras reads it anew in every epoch."""
    spec = tuple(tf.TensorSpec([None, *part.shape[1:]], part.dtype) for part in batches()[0])
    return tf.data.Dataset.from_generator(generator, output_signature=spec)


def lines_dataset() -> Any:
    spec = (tf.TensorSpec([None, 5], tf.float64), tf.TensorSpec([None], tf.int64))
    return tf.data.Dataset.from_generator(in_lines_of_different_length, output_signature=spec)


# --- the same maths


F = TypeVar("F", bound=Callable[..., Any])


def in_float64(function: F) -> F:
    """Run a function in float64."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        keras.config.set_floatx("float64")
        keras.config.set_dtype_policy("float64")
        try:
            return function(*args, **kwargs)
        finally:
            keras.config.set_floatx("float32")
            keras.config.set_dtype_policy("float32")

    return wrapper  # type: ignore[return-value]


def fresh_model() -> keras.Model:
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    model = keras.Sequential([keras.layers.Dense(8, activation="tanh"), keras.layers.Dense(3, activation="softmax")])
    model.compile(
        keras.optimizers.SGD(0.1, momentum=0.9), "sparse_categorical_crossentropy", weighted_metrics=["accuracy"]
    )
    return model


def plain_fits(collective: Any, fits: dict[str, Fit]) -> dict[str, Any]:
    """What plain Keras ends with: weights and history, evaluation, predictions."""
    return {name: plain_fit(fit) for name, fit in fits.items()}


@in_float64
def plain_fit(fit: Fit) -> Any:
    model = fresh_model()
    history = model.fit(
        (fit.plain or fit.make)(),
        epochs=fit.epochs,
        steps_per_epoch=fit.steps,
        class_weight=fit.class_weight,
        validation_data=fit.validation() if fit.validation else None,
        validation_steps=fit.validation_steps,
        shuffle=False,
        verbose=0,
    )
    return model.get_weights(), history.history


def deferred(make: Callable[[], Any], class_weight: Any = None, name: str = "x") -> Deferred:
    return Deferred(name, "function", cloudpickle.dumps(make), class_weight)


def our_fits(collective: Any, fits: dict[str, Fit]) -> dict[str, Any]:
    return {name: our_fit(collective, fit) for name, fit in fits.items()}


@in_float64
def our_fit(collective: Any, fit: Fit, shuffle: bool = False) -> Any:
    from dtrain.replica import Replica

    replica = Replica(fresh_model(), collective)
    validation = Batching(steps=fit.validation_steps) if fit.validation else None
    plan = FitPlan(Batching(None, fit.steps, shuffle, (1, 2)), fit.epochs, validation=validation)
    replica.begin_fit(
        plan,
        deferred(fit.make, fit.class_weight),
        deferred(fit.validation, name="validation_data") if fit.validation else None,
    )
    position = Position(0, 0)
    while position.epoch < fit.epochs:
        position = replica.run(Segment(position, fit.segment)).position
    history = replica.end_fit()
    return replica.model.get_weights(), history


def difference(one: Any, other: Any) -> float:
    (weights, history), (other_weights, other_history) = one, other
    assert sorted(history) == sorted(other_history)
    pairs = [*zip(weights, other_weights, strict=True), *((history[key], other_history[key]) for key in history)]
    return max(float(np.max(np.abs(np.subtract(a, b)))) for a, b in pairs)


FITS = {
    "dataset": Fit(dataset),
    "dataset of unknown length": Fit(of_unknown_length),
    "steps go on over epochs": Fit(dataset, steps=3, epochs=4),
    "steps of an endless dataset, in segments": Fit(endless, steps=5, segment=2),
    "steps of an unknown length": Fit(of_unknown_length, steps=4, epochs=4),
    "more steps than there are": Fit(dataset, steps=9),
    "generator": Fit(generator, generator_dataset),
    "endless generator": Fit(endless_generator, steps=4),
    "PyDataset with hooks": Fit(pydataset),
    "PyDataset with threads": Fit(threaded_pydataset),
    "class_weight": Fit(dataset, class_weight={0: 2.0, 2: 0.5}),
    "validation": Fit(dataset, validation=of_unknown_length),
    "validation_steps": Fit(dataset, validation=endless, validation_steps=3),
    "sizes that differ": Fit(in_lines_of_different_length, lines_dataset, segment=2),
}


@pytest.fixture(scope="module")
def ended(ranks: Ranks) -> dict[int, list[dict[str, Any]]]:
    """By world size, 0 for plain Keras, what each rank ended with."""
    return {0: ranks.run(1, plain_fits, FITS), **{size: ranks.run(size, our_fits, FITS) for size in (1, 2, 3)}}


@pytest.mark.parametrize("name", FITS)
def test_n_ranks_end_where_plain_keras_does(ended: Any, name: str) -> None:
    (plain,) = ended[0]
    for world_size in (1, 2, 3):
        for rank in ended[world_size]:
            assert difference(rank[name], plain[name]) < 1e-10, world_size


def padded() -> Any:
    """Sentences of 1 to 6 words, the short ones first: each mini-batch is as long as its longest."""
    lengths = np.sort(np.random.default_rng(4).integers(1, 7, ROWS))
    words = tf.data.Dataset.from_generator(
        lambda: (np.arange(1, length + 1) for length in lengths), output_signature=tf.TensorSpec([None], tf.int64)
    )
    labelled = tf.data.Dataset.zip(words, tf.data.Dataset.from_tensor_slices(lengths % 3))
    return labelled.padded_batch(BATCH, ([None], []))


class Counted(keras.layers.Layer):  # type: ignore[misc]
    """Counts how often it is traced."""

    supports_masking = True
    calls = 0

    def call(self, inputs: Any) -> Any:
        Counted.calls += 1
        return inputs


def model_of_sentences() -> keras.Model:
    keras.backend.clear_session(free_memory=False)
    keras.utils.set_random_seed(11)
    layers = [keras.layers.Embedding(8, 4, mask_zero=True), Counted(), keras.layers.GRU(5), keras.layers.Dense(3)]
    model = keras.Sequential(layers)
    model.compile(keras.optimizers.SGD(0.5), keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


@in_float64
def plain_fit_of_sentences(collective: Any) -> Any:
    model = model_of_sentences()
    history = model.fit(padded(), epochs=2, shuffle=False, verbose=0)
    return model.get_weights(), history.history


@in_float64
def our_fit_of_sentences(collective: Any) -> Any:
    from dtrain.replica import Replica

    replica = Replica(model_of_sentences(), collective)
    replica.begin_fit(FitPlan(Batching(), 2), deferred(padded))
    Counted.calls = 0
    position = Position(0, 0)
    while position.epoch < 2:
        position = replica.run(Segment(position, 1000)).position
    traces = Counted.calls
    return (replica.model.get_weights(), replica.end_fit()), traces


def test_mini_batches_of_many_lengths_are_traced_once(ranks: Ranks) -> None:
    assert len({x.shape[1] for x, _ in padded().as_numpy_iterator()}) > 2
    (plain,) = ranks.run(1, plain_fit_of_sentences)
    for world_size in (1, 2, 3):
        for found, traces in ranks.run(world_size, our_fit_of_sentences):
            assert difference(found, plain) < 1e-10, world_size
            assert traces == 1, world_size


def test_the_comparison_sees_another_order(ended: Any) -> None:
    (plain,) = ended[0]
    assert difference(plain["PyDataset with hooks"], plain["generator"]) > 1e-3


def test_a_shuffled_pydataset_has_one_order_for_any_n(ranks: Ranks, ended: Any) -> None:
    fit = Fit(pydataset)
    alone, *together = [ranks.run(size, our_fit, fit, True)[0] for size in (1, 3)]
    assert all(difference(other, alone) < 1e-10 for other in together)
    assert difference(alone, ended[1][0]["PyDataset with hooks"]) > 1e-3


def local_feed(make: Callable[[], Any], **batching: Any) -> Any:
    return open_feed(deferred(make), Batching(**batching), LocalCollective())


def rows_of(chunks: Any) -> list[float]:
    """What tells the rows: the first number of each."""
    return [value for chunk in chunks for value in chunk.data[0].numpy()[..., 0].ravel().tolist()]


def test_shuffling_permutes_the_batches_of_a_pydataset_by_seed_and_pass() -> None:
    def orders(seed: int) -> list[list[float]]:
        feed = local_feed(pydataset, shuffle=True, seed=(seed,))
        found = [rows_of(feed.chunks(epoch, 0, 7, 3)) for epoch in range(3)]
        feed.close()
        return found

    first = orders(1)
    assert first == orders(1) and first != orders(2)
    assert len({tuple(order) for order in first}) == 3
    assert all(sorted(order) == sorted(first[0]) for order in first)


@pytest.mark.parametrize(
    ("make", "batching"),
    [
        (dataset, {}),
        (of_unknown_length, {}),
        (generator, {}),
        (dataset, {"steps": 2}),
        (of_unknown_length, {"steps": 2}),
        (pydataset, {"shuffle": True}),
        (pydataset, {"steps": 2, "shuffle": True}),
        (threaded_pydataset, {}),
    ],
)
def test_a_feed_that_starts_anew_goes_on_with_the_same_batches(make: Any, batching: dict[str, Any]) -> None:
    through = local_feed(make, **batching)
    through.first()
    for epoch in range(2):
        rows_of(through.chunks(epoch, 0, batching.get("steps", 100), 2))
    rows_of(through.chunks(2, 0, 1, 2))
    expected = rows_of(through.chunks(2, 1, 1, 2))
    anew = local_feed(make, **batching)
    assert expected and rows_of(anew.chunks(2, 1, 1, 2)) == expected
    assert rows_of(through.chunks(2, 1, 1, 2)) == expected  # and so does one that was further on
    through.close()
    anew.close()


def test_nothing_is_read_past_the_end_of_an_epoch_of_known_length() -> None:
    read = []

    def counted() -> Any:
        for number in range(100):
            read.append(number)
            yield (np.full((2, 5), float(number)),)

    feed = StreamLoader(InMemory(counted), 0, 1, list, steps=4)
    assert len(list(feed.chunks(0, 0, 4, 3))) == 2
    feed.close()
    assert read == [0, 1, 2, 3]


class InMemory:
    """The least that can be read as an input."""

    num_batches = None

    def __init__(self, batches: Callable[[], Any]) -> None:
        self.batches = batches

    def open(self) -> None: ...

    def begin_pass(self, number: int) -> None: ...

    def shapes(self) -> Any:
        return {}

    def end_pass(self) -> None: ...

    def on_epoch_begin(self) -> None: ...

    def on_epoch_end(self) -> None: ...


def test_an_epoch_that_would_be_empty_starts_a_new_pass(ranks: Ranks) -> None:
    """Seven steps are all there are, but nobody knows it."""
    feed = local_feed(of_unknown_length, steps=7)
    passes = [rows_of(feed.chunks(epoch, 0, 7, 2)) for epoch in range(2)]
    assert [len(rows) for rows in passes] == [ROWS, ROWS]
    feed.close()


class Told:
    """Six batches a pass; each tells its pass and how often the hooks were called before that began."""

    moved = 0
    """Another number makes it bring others."""

    def __init__(self, num_batches: int | None) -> None:
        self.num_batches = num_batches
        self.open()

    def open(self) -> None:
        self.passes = self.begun = self.ended = self.whole = 0

    def shapes(self) -> Any:
        return {}

    def begin_pass(self, number: int) -> None:
        assert number == self.passes

    def batches(self) -> Any:
        told = (self.passes, self.begun, self.ended, self.whole)
        self.passes += 1
        return iter([(np.array([[*told, index + self.moved]]),) for index in range(6)])

    def end_pass(self) -> None:
        self.whole += 1

    def on_epoch_begin(self) -> None:
        self.begun += 1

    def on_epoch_end(self) -> None:
        self.ended += 1


def told(feed: StreamLoader, start: Position, epochs: int) -> dict[tuple[int, int], list[Any]]:
    """By position, the batches from there to the end of the last epoch."""
    found = {}
    position = start
    while position.epoch < epochs:
        for chunk in feed.chunks(position.epoch, position.step, 1, 1):
            found[position.epoch, chunk.first_step] = chunk.data[0].tolist()
        assert feed._position is not None
        position = feed._position
    return found


@pytest.mark.parametrize("length", [6, None])
@pytest.mark.parametrize("steps", [None, 1, 2, 3, 4, 5, 6, 7])
@pytest.mark.parametrize("purpose", ["train", "validation"])
def test_a_feed_goes_to_any_position_as_if_it_had_read_all_before_it(
    purpose: Any, steps: int | None, length: int | None
) -> None:
    def feed() -> StreamLoader:
        return StreamLoader(Told(length), 0, 1, list, purpose=purpose, steps=steps, first_epoch=1)

    straight = told(feed(), Position(1, 0), 6)
    assert {epoch for epoch, _ in straight} == {1, 2, 3, 4, 5}
    for epoch, step in straight:
        expected = {place: batch for place, batch in straight.items() if place >= (epoch, step)}
        assert told(feed(), Position(epoch, step), 6) == expected, (epoch, step)


@pytest.mark.parametrize("steps", [None, 4, 7])
def test_a_feed_does_not_go_on_after_other_batches_than_before(
    steps: int | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """As those of an input that shuffles without a seed, and is made anew in another process.

    A new pass has all rows, in whatever order.
    """

    def feed(moved: int) -> StreamLoader:
        source = Told(6)
        source.moved = moved
        return StreamLoader(source, 0, 1, list, steps=steps)

    before = feed(0)
    for place in told(before, Position(0, 0), 3):
        digest = before.digest_at(Position(*place))
        assert digest is not None
        again, other = feed(0), feed(1)
        for one in (again, other):
            one.expect(Position(*place), digest)
        assert told(again, Position(*place), 3)
        if steps is None and place[1] == 0:
            assert told(other, Position(*place), 3)
            assert ("not bit for bit" in capsys.readouterr().out) == (place > (0, 0))
        elif place > (0, 0):
            with pytest.raises(DataError, match=r"brought other batches before epoch \d, step \d"):
                told(other, Position(*place), 3)


def test_validation_in_a_group_of_another_size_says_nothing_of_passes_it_skips(
    capsys: pytest.CaptureFixture[str],
) -> None:
    feed = StreamLoader(Told(6), 0, 1, list, purpose="validation")
    list(feed.one_pass(2))
    feed.deal(0, 1)
    feed.reopen()
    feed.skip_passes(1)
    assert len(list(feed.one_pass(1))) == 6
    assert capsys.readouterr().out == ""


def test_a_feed_that_is_dealt_anew_does_not_go_on_after_other_batches() -> None:
    source = Told(6)
    feed = StreamLoader(source, 0, 1, list)
    chunks = feed.chunks(0, 0, 4, 2)
    next(chunks), next(chunks)
    chunks.close()
    feed.deal(0, 1)
    assert [chunk.data[0].tolist()[0][0][-1] for chunk in feed.chunks(0, 3, 2, 1)] == [3, 4]
    source.moved = 1
    feed.deal(0, 1)
    with pytest.raises(DataError, match="brought other batches before epoch 0, step 5"):
        next(iter(feed.chunks(0, 5, 1, 1)))


@pytest.mark.parametrize("length", [6, None])
@pytest.mark.parametrize("steps", [None, 2, 6, 7])
def test_passes_that_are_skipped_count_as_read(steps: int | None, length: int | None) -> None:
    def feed() -> StreamLoader:
        opened = StreamLoader(Told(length), 0, 1, list, purpose="validation", steps=steps)
        opened.first()
        return opened

    def one_pass(feed: StreamLoader) -> list[Any]:
        return [chunk.data[0].tolist() for chunk in feed.one_pass(1)]

    straight = feed()
    for number, expected in enumerate([one_pass(straight) for _ in range(3)]):
        gone_on = feed()
        gone_on.skip_passes(number)
        assert one_pass(gone_on) == expected, number


@in_float64
def segments_past_the_end(collective: Any) -> Any:
    from dtrain.replica import Replica

    replica = Replica(fresh_model(), collective)
    replica.begin_fit(FitPlan(Batching(), 2), deferred(of_unknown_length))
    results = [replica.run(Segment(Position(0, start), 5)) for start in (0, 5, 10, 15)]
    results.append(replica.run(Segment(Position(1, 0), 100)))
    return [(result.num_steps, result.rows, result.epoch_end is not None) for result in results]


def test_segments_sent_past_an_unknown_end_are_passed_over(ranks: Ranks) -> None:
    expected = [(5, 40, False), (2, 13, True), (0, 0, False), (0, 0, False), (7, 53, True)]
    assert ranks.run(2, segments_past_the_end) == [expected, expected]


class SeesBatches(keras.callbacks.Callback):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, int, float]] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(("train", batch, logs["loss"]))

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:
        self.seen.append(("test", batch, logs["loss"]))


@pytest.mark.parametrize("segment", [1, 2, 7, 100])
@in_float64
def test_the_last_partial_execution_has_its_hook_though_nobody_knows_that_it_is_the_last(segment: int) -> None:
    from dtrain.replica import Replica

    def model() -> keras.Model:
        made = fresh_model()
        made.steps_per_execution = 3
        return made

    plain, ours = SeesBatches(), SeesBatches()
    model().fit(of_unknown_length(), validation_data=of_unknown_length(), epochs=2, callbacks=[plain], verbose=0)
    replica = Replica(model(), LocalCollective())
    plan = FitPlan(Batching(), 2, validation=Batching())
    replica.begin_fit(plan, deferred(of_unknown_length), deferred(of_unknown_length), [ours])
    position = Position(0, 0)
    while position.epoch < 2:
        position = replica.run(Segment(position, segment)).position
    assert [(kind, batch) for kind, batch, _ in ours.seen] == [(kind, batch) for kind, batch, _ in plain.seen]
    assert np.allclose([loss for *_, loss in ours.seen], [loss for *_, loss in plain.seen], rtol=0, atol=1e-10)


def wrong_in_row_six() -> Any:
    x, y = arrays(8)
    yield x, np.where(np.arange(8) == 6, 99, y)


@in_float64
def error_of_the_first_batch(collective: Any) -> str | None:
    from dtrain.replica import Replica

    try:
        Replica(fresh_model(), collective).begin_fit(FitPlan(Batching(), 1), deferred(wrong_in_row_six))
    except DataError as error:
        return str(error)
    return None


def test_a_wrong_value_is_named_by_its_row_in_the_whole_mini_batch(ranks: Ranks) -> None:
    first, second = ranks.run(2, error_of_the_first_batch)
    assert first is None and "y is 99 in row 6:" in second


# --- evaluate and predict


@pytest.mark.parametrize("data", [lambda: deferred(dataset), lambda: ArraySource(*arrays())])
@in_float64
def test_a_call_that_evaluates_has_few_bytes(monkeypatch: pytest.MonkeyPatch, data: Any) -> None:
    from dtrain import replica as module

    counts = []

    def call(self: Any, kind: Any, chunk: Any) -> Any:
        counts.append(chunk.num_steps)
        return plain(self, kind, chunk)

    plain = module.Replica.call
    monkeypatch.setattr(module.Replica, "call", call)
    replica = module.Replica(fresh_model(), LocalCollective())
    row = (5 + 1) * 8
    for calls_bytes, most in ((64 << 20, 6), (2 * BATCH * row, 2), (1, 1)):
        monkeypatch.setattr(module, "CALL_BYTES", calls_bytes)
        counts.clear()
        given = data()
        replica.evaluate(Batching() if isinstance(given, Deferred) else BatchPlan(ROWS, BATCH), given)
        assert sum(counts) == 7 and max(counts) == most


@in_float64
def test_of_unknown_length_keras_counts_an_update_more_in_each_epoch() -> None:
    """It reads past the end, which its optimizer counts: Adam and schedules see that. Here updates are counted."""
    from dtrain.replica import Replica

    plain, replica = fresh_model(), Replica(fresh_model(), LocalCollective())
    plain.fit(of_unknown_length(), epochs=2, verbose=0)
    replica.begin_fit(FitPlan(Batching(), 2), deferred(of_unknown_length))
    for epoch in range(2):
        replica.run(Segment(Position(epoch, 0), 100))
    batches = len(list(of_unknown_length()))
    assert int(plain.optimizer.iterations) == 2 * (batches + 1)
    assert int(replica.model.optimizer.iterations) == 2 * batches


def named_batches(with_targets: bool = True) -> Any:
    rng = np.random.default_rng(5)
    for rows in (4, 1, 2, 7, 7, 3):
        x = {"a": rng.normal(size=(rows, 5)).astype("float32"), "b": rng.normal(size=(rows, 3)).astype("float32")}
        y = {"class": rng.integers(0, 3, rows), "value": rng.normal(size=(rows, 1)).astype("float32")}
        yield (x, y) if with_targets else (x,)


def plain_passes(collective: Any) -> Any:
    model = make_two_headed()
    # Without the steps Keras reads past the end, and counts that as a batch for the losses of single outputs.
    logs = model.evaluate(named_batches(), steps=6, return_dict=True, verbose=0)
    return logs, model.predict(named_batches(False), verbose=0)


def our_passes(collective: Any) -> Any:
    from dtrain.replica import Replica

    replica = Replica(make_two_headed(), collective)
    logs = [replica.evaluate(Batching(), deferred(named_batches)) for _ in range(2)]
    short = replica.evaluate(Batching(steps=2), deferred(named_batches))
    return logs, short, replica.predict(Batching(), deferred(partial(named_batches, False)))


def of_lengths(*lengths: int) -> Any:
    for length in lengths:
        yield (np.arange(5 * length * 2.0).reshape(5, length, 2),)


def predicted(collective: Any, makes_rows: bool, lengths: tuple[int, ...]) -> Any:
    """Of a model whose outputs have a row for each step of a sequence, or else a sequence for each row."""
    from dtrain.replica import Replica

    x = keras.Input((None, 2))
    outputs = keras.layers.Lambda(lambda x: keras.ops.reshape(x, (-1, 2)) if makes_rows else x)(x)
    model = keras.Model(x, outputs)
    model.compile("sgd", "mse")
    try:
        return Replica(model, collective).predict(Batching(), deferred(partial(of_lengths, *lengths)))
    except DataError as error:
        return str(error)


def test_predictions_may_have_other_rows_than_the_data(ranks: Ranks) -> None:
    expected = np.concatenate([x.reshape(-1, 2) for (x,) in of_lengths(3, 4)])
    for world_size in (1, 2, 3):
        parts = ranks.run(world_size, predicted, True, (3, 4))
        assert np.array_equal(_in_order(parts), expected), world_size


def test_predictions_that_make_no_array_are_refused_with_a_way_out(ranks: Ranks) -> None:
    for message in ranks.run(2, predicted, False, (3, 4)):
        assert "(3, 2) and (4, 2) behind the rows: pad all of them" in message


def test_evaluate_and_predict_take_streams_and_keep_their_order(ranks: Ranks) -> None:
    ((logs, predictions),) = ranks.run(1, plain_passes)
    for world_size in (1, 2, 3):
        passes = ranks.run(world_size, our_passes)
        for found, short, _ in passes:
            assert found[0] == pytest.approx(logs, abs=1e-5) and found[1] == found[0] and short != found[0]
        ours = _in_order([rank[2] for rank in passes])
        assert {key: part.shape for key, part in ours.items()} == {"class": (24, 3), "value": (24, 1)}
        for key, part in ours.items():
            assert np.allclose(part, predictions[key], atol=1e-6)


# --- inputs that differ, or are none


def uneven(rank: int, what: str) -> Any:
    """Batches that on rank 1 are not those of rank 0."""
    for number, (x, y, _) in enumerate(batches()):
        if rank == 1 and number == 3:
            if what == "rows":
                x, y = x[:5], y[:5]
            elif what == "values":
                x = x + 1e-9
            elif what == "end":
                return
            elif what == "raise":
                raise ZeroDivisionError("the user's own mistake")
            elif what == "no batch":
                x, y = x[0], y[0]
        yield x, y


def fewer(rank: int) -> Any:
    return dataset().take(7 - rank)


def raising(rank: int) -> Any:
    if rank == 1:
        raise FileNotFoundError("no such folder")
    return dataset()


def other_arrays(rank: int, what: str) -> Any:
    return arrays(ROWS - rank) if what == "rows" else arrays(ROWS, seed=rank)


def refusals(collective: Any, makes: list[Callable[[int], Any]]) -> list[tuple[str, str]]:
    """What is raised on this rank, of each fit."""
    found = []
    for make in makes:
        try:
            our_fit(collective, Fit(partial(make, collective.rank)))
        except Exception as error:
            found.append((type(error).__name__, str(error)))
        else:
            found.append(("", "it was not refused"))
    return found


DIFFERENT: list[tuple[Callable[[int], Any], str]] = [
    (partial(uneven, what="rows"), r"rank 1's batch at epoch 0, step 3 has 5 rows, rank 0's 8"),
    (partial(uneven, what="values"), r"rank 1's batch at epoch 0, step 3 holds other data.*seed"),
    (partial(uneven, what="end"), r"ended on rank 1 at epoch 0, step 3, and goes on on rank 0"),
    (fewer, r"6 batches on rank 1, 7 batches on rank 0"),
    (partial(other_arrays, what="rows"), r"52 rows on rank 1, 53 rows on rank 0"),
    (partial(other_arrays, what="values"), r"its rows on rank 1 are other than rank 0's"),
]
RAISING: list[tuple[Callable[[int], Any], str, str]] = [
    (partial(uneven, what="raise"), "ZeroDivisionError", "the user's own mistake"),
    (partial(uneven, what="no batch"), "DataError", "single examples"),
    (raising, "FileNotFoundError", "no such folder"),
]


@pytest.fixture(scope="module")
def refused(ranks: Ranks) -> list[list[tuple[str, str]]]:
    """By rank, what is raised: one group outlives all of it, for no rank is left waiting."""
    return ranks.run(2, refusals, [case[0] for case in (*DIFFERENT, *RAISING)])


@pytest.mark.parametrize("number", range(len(DIFFERENT)), ids=[words for _, words in DIFFERENT])
def test_inputs_that_differ_are_refused_on_all_ranks(refused: Any, number: int) -> None:
    _, words = DIFFERENT[number]
    first, second = (rank[number] for rank in refused)
    assert first == second and first[0] == "DataError"
    assert re.search(words, first[1]), first[1]


@pytest.mark.parametrize("number", range(len(RAISING)), ids=[name for _, name, _ in RAISING])
def test_what_one_ranks_input_raises_ends_the_others_too(refused: Any, number: int) -> None:
    _, name, words = RAISING[number]
    first, second = (rank[len(DIFFERENT) + number] for rank in refused)
    assert second[0] == name and words in second[1]
    assert first[0] == LostPeer.__name__ and "rank 1" in first[1] and words in first[1]


def nothing() -> Any:
    yield from ()


def four_parts() -> Any:
    yield (np.zeros((2, 5)),) * 4


def no_rows() -> Any:
    yield np.zeros((0, 5)), np.zeros(0)


def lists() -> Any:
    yield [[1.0, 2.0]], [0]


def different_rows() -> Any:
    yield np.zeros((3, 5)), np.zeros(2)


def brings_ragged() -> Any:
    yield tf.ragged.constant([[1.0], [1.0, 2.0]]), np.zeros(2)


def brings_sparse() -> Any:
    yield tf.sparse.from_dense(np.eye(2)), np.zeros(2)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (nothing, "at least one batch"),
        (lambda: dataset().take(0), "no batches"),
        (lambda: of_unknown_length().skip(100), "no batch for epoch 0"),
        (lambda: dataset().unbatch(), r"single examples.*batch\(32\)"),
        (four_parts, "4 parts"),
        (no_rows, "without rows"),
        (lists, "float.*must be an array"),
        (different_rows, "one number of rows"),
        (lambda: None, "forget to return"),
        (lambda: generator, "returned a function"),
        (lambda: (1, 2, 3, 4), "tuple of 4"),
        (lambda: (dataset(), 1), "beside it"),
        (lambda: tf.data.Dataset.from_tensors(tf.ragged.constant([[1], [1, 2]])), "ragged"),
        (brings_ragged, r"x of a batch of x is ragged.*x.to_tensor\(\)"),
        (brings_sparse, r"x of a batch of x is sparse.*tf.sparse.to_dense\(x\)"),
    ],
)
def test_what_is_no_data_is_refused(make: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        local_feed(make).first()


def test_a_data_set_of_sparse_tensors_is_read_dense() -> None:
    (chunk,) = local_feed(lambda: tf.data.Dataset.from_tensors((tf.sparse.from_dense(np.eye(3)), np.zeros(3)))).chunks(
        0, 0, 1, 1
    )
    assert np.array_equal(chunk.data[0][0], np.eye(3))


def test_an_exhausted_generator_is_refused_in_its_second_epoch() -> None:
    once = generator()
    feed = StreamLoader(InMemory(lambda: once), 0, 1, list)
    assert len(list(feed.chunks(0, 0, 100, 1))) == 7
    with pytest.raises(DataError, match="no batch for epoch 1; a function .* new one each time"):
        list(feed.chunks(1, 0, 100, 1))
    feed.close()


def test_a_batch_size_is_refused_where_data_bring_batches_and_cuts_arrays() -> None:
    with pytest.raises(ConfigError, match="batch_size=4 must not be given"):
        local_feed(dataset, batch_size=4)
    feed = local_feed(arrays, batch_size=10)
    assert isinstance(feed, Loader) and feed.steps_per_epoch == 6


FIT: dict[str, Any] = {
    "batch_size": None,
    "epochs": 2,
    "initial_epoch": 0,
    "validation_split": 0.0,
    "validation_data": None,
    "shuffle": True,
    "class_weight": None,
    "sample_weight": None,
    "steps_per_epoch": None,
    "validation_steps": None,
    "validation_batch_size": None,
    "validation_freq": 1,
    "seed": (0, 0),
    "record_steps": False,
    "check_replicas_every": None,
}


class TestInTheDriver:
    """Found before any worker starts."""

    @pytest.mark.parametrize(
        ("given", "error", "words"),
        [
            ({"x": generator()}, DataError, "x is a generator.*pass generator instead of generator()"),
            ({"x": dataset(), "y": 1}, DataError, "y must not be given when x is a tf.data.Dataset"),
            ({"x": pydataset(), "sample_weight": 1}, DataError, "sample_weight must not be given.*PyDataset"),
            ({"x": dataset, "y": 1}, DataError, "y must not be given when x is a function"),
            ({"x": dataset(), "batch_size": 4}, ConfigError, "batch_size=4 must not be given where x brings"),
            ({"x": pydataset(), "batch_size": 4}, ConfigError, "batch_size=4 must not be given where x brings"),
            ({"x": lambda rank: None}, ConfigError, "is called without arguments"),
            ({"x": dataset, "validation_split": 0.1}, DataError, "validation_split=0.1 needs arrays"),
            ({"x": endless()}, DataError, r"x is a tf.data.Dataset that has no end.*\n\n    def make_dataset"),
            ({"x": dataset().unbatch()}, DataError, "single examples"),
            ({"x": dataset().take(0)}, DataError, "x has no batches"),
            ({"x": dataset, "shuffle": "rows"}, ConfigError, "shuffle='rows'"),
            ({"x": dataset, "steps_per_epoch": 0}, ConfigError, "steps_per_epoch=0"),
            ({"x": partial(print, threading.Lock())}, ConfigError, "x=.*cannot travel"),
            ({"x": arrays()[0], "y": arrays()[1], "validation_data": iter([1])}, DataError, "validation_data is a"),
        ],
    )
    def test_what_cannot_work_is_refused(
        self, in_tmp: Path, given: dict[str, Any], error: type[DtrainError], words: str
    ) -> None:
        with pytest.raises(error, match=words.replace("()", r"\(\)")):
            dtrain.Trainer(make_classifier).fit(**given)
        assert list(in_tmp.iterdir()) == []

    def test_a_dataset_that_shuffles_is_told_to_do_so_no_more(self, caplog: pytest.LogCaptureFixture) -> None:
        ordered = tf.data.Dataset.from_tensor_slices(arrays())
        once = ordered.shuffle(ROWS, seed=3, reshuffle_each_iteration=False)
        for quiet in (ordered.batch(8), once.batch(8)):
            arguments.fit_arguments(quiet, None, **FIT)
        arguments.fit_arguments(ordered.batch(8), None, **{**FIT, "validation_data": dataset()})
        arguments.fit_arguments(dataset(), None, **{**FIT, "epochs": 1})
        assert not caplog.records
        arguments.fit_arguments(tf.data.Dataset.zip(dataset(), dataset()).map(lambda one, other: one), None, **FIT)
        assert "x is a tf.data.Dataset that shuffles" in caplog.text and "pass a function" in caplog.text

    def test_a_dataset_is_read_once_if_it_is_small(self, monkeypatch: pytest.MonkeyPatch) -> None:
        read = arguments.data_of(dataset(), class_weight={0: 2.0, 2: 1.0})
        assert read.num_batches == 7 and len(read.content[0]) == 3
        monkeypatch.setattr(arguments, "READ_HERE_BYTES", 1000)
        with pytest.raises(DataError, match="has more than 0 MB.*pass a function"):
            arguments.data_of(of_unknown_length())


# --- on a real Ray


@pytest.fixture
def trainer(two_workers: dtrain.Trainer) -> dtrain.Trainer:
    return use(two_workers, fresh(make_classifier))


def blob_dataset() -> tf.data.Dataset:
    return tf.data.Dataset.from_tensor_slices(blobs(50)).batch(8)


def blobs_of_unknown_length() -> tf.data.Dataset:
    return blob_dataset().filter(lambda x, y: True)


def blob_batches() -> Any:
    x, y = blobs(50)
    while True:
        for start in range(0, 50, 8):
            yield x[start : start + 8], y[start : start + 8]


class BlobBatches(keras.utils.PyDataset):  # type: ignore[misc]
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        x, y = blobs(50)
        return x[index * 8 : index * 8 + 8], y[index * 8 : index * 8 + 8]


def blob_arrays() -> Any:
    return blobs(50)


@pytest.mark.parametrize(
    ("x", "given"),
    [
        (blobs_of_unknown_length, {"validation_data": blob_dataset()}),
        (blob_dataset(), {"class_weight": {0: 2.0, 2: 0.5}, "validation_data": blob_arrays}),
        (BlobBatches(), {"shuffle": False, "validation_data": BlobBatches()}),
        (blob_batches, {"steps_per_epoch": 5, "validation_data": blob_arrays}),
        (blob_arrays, {"batch_size": 8, "shuffle": False, "class_weight": {0: 2.0}, "validation_data": blob_arrays}),
    ],
    ids=["function of a data set of unknown length", "data set", "PyDataset", "endless generator", "arrays"],
)
def test_a_fit_on_two_workers_gives_what_keras_gives(trainer: dtrain.Trainer, x: Any, given: dict[str, Any]) -> None:
    plain = fresh(make_classifier)()
    theirs = {key: value() if callable(value) else value for key, value in given.items()}
    expected = plain.fit(*_as_arguments(x() if callable(x) else x), epochs=2, verbose=0, **theirs)
    history = trainer.fit(x, epochs=2, verbose=0, **given)
    assert set(history.history) == set(expected.history)
    for name, values in expected.history.items():
        assert np.allclose(history.history[name], values, atol=2e-5), name
    assert all(np.allclose(a, b, atol=2e-5) for a, b in zip(trainer.get_weights(), plain.get_weights(), strict=True))
    if x is not blob_batches:
        expected_logs = plain.evaluate(*_as_arguments(x() if callable(x) else x), verbose=0)
        assert np.allclose(trainer.evaluate(x, verbose=0), expected_logs, atol=2e-5)
        assert np.allclose(trainer.predict(x, verbose=0), plain.predict(blobs(50)[0], verbose=0), atol=2e-5)


def _as_arguments(x: Any) -> tuple[Any, ...]:
    return x if isinstance(x, tuple) else (x,)


def test_a_bar_without_an_end_gets_one_after_the_first_epoch(
    trainer: dtrain.Trainer, capsys: pytest.CaptureFixture[str]
) -> None:
    history = trainer.fit(blobs_of_unknown_length, epochs=2, verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Epoch")]
    assert "7/Unknown" in lines[0] and "7/7" in lines[1]
    assert history.params["steps"] == 7


def test_input_that_runs_out_is_told(trainer: dtrain.Trainer, capsys: pytest.CaptureFixture[str]) -> None:
    trainer.fit(blobs_of_unknown_length, steps_per_epoch=10, epochs=2, verbose=2)
    told = [line for line in capsys.readouterr().out.splitlines() if "ran out of data" in line]
    assert len(told) == 1 and "epoch 1, after 7 of 10 steps" in told[0]


def test_the_users_traceback_is_shown_where_an_input_raises(local_ray: None) -> None:
    def broken() -> Any:
        yield from batches(16)
        raise ZeroDivisionError("the user's own mistake")

    words = r"Traceback[\s\S]*in broken[\s\S]*ZeroDivisionError: the user's own"
    with (
        dtrain.Trainer(make_classifier, num_workers=2, **QUIET) as trainer,
        pytest.raises(WorkerError, match=words),
    ):
        trainer.fit(broken, verbose=0)


def test_a_stream_is_on_record_by_its_first_batch(local_ray: None, in_tmp: Path) -> None:
    import mlflow

    uri = f"sqlite:///{in_tmp}/mlflow.db"
    tracking = dtrain.MLflowConfig(tracking_uri=uri)
    with dtrain.Trainer(make_classifier, run_name="streamed", tracking=tracking, threads_per_worker=1) as trainer:
        history = trainer.fit(blobs_of_unknown_length, validation_data=BlobBatches(), verbose=0)
        assert trainer.evaluate(blob_arrays, verbose=0)
    run = mlflow.MlflowClient(uri).get_run(history.run_id)
    by_context = {found.tags[0].value: found.dataset for found in run.inputs.dataset_inputs}
    assert by_context["train"].name == "tf.data.Dataset" and by_context["validation"].name == "PyDataset"
    assert "[-1, 5]" in by_context["train"].schema
    assert run.data.params["batch_size"] == "8"
