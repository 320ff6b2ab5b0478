"""Claims about how gradients travel."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest.mock import patch

import keras
import ml_dtypes
import numpy as np
import pytest
import tensorflow as tf
from keras import layers
from ranks import Ranks

import dtrain
from dtrain import wire
from dtrain.data.source import ArraySource
from dtrain.errors import ConfigError
from dtrain.replica import Replica
from dtrain.types import BatchPlan, FitPlan, Position, Segment, StepOptions

SHAPES = ((3, 5), (), (7,), (1, 2, 2), (4,))
TYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}


def test_buckets_begin_with_what_is_computed_first_and_large_ones_go_alone() -> None:
    gradients = [tf.zeros([size]) for size in (1, 300, 2, 3, 100, 5)]
    with patch.object(wire, "BUCKET_BYTES", 400):
        assert wire.buckets(gradients) == [[4], [1], [5, 3, 2, 0]]
    with patch.object(wire, "BUCKET_BYTES", 24):
        assert wire.buckets(gradients) == [[4], [5, 3], [1], [2, 0]]
    assert wire.buckets(gradients) == [[5, 4, 3, 2, 1, 0]]
    assert wire.buckets([]) == []


@pytest.mark.parametrize("ordered", [True, False])
def test_what_only_later_buckets_need_waits_for_earlier_ones(ordered: bool) -> None:
    first, *others = (tf.Variable(np.full((3, 3), 0.1 * number, np.float32)) for number in range(1, 5))
    waits = []

    @tf.function  # type: ignore[untyped-decorator]
    def gradients(x: Any) -> Any:
        with tf.GradientTape() as tape:
            for matrix in (first, *others):
                x = tf.tanh(x @ matrix)
            loss = tf.reduce_sum(x)
        found = tape.gradient(loss, [first, *others])
        buckets = [[found[3], found[2]], [found[1]], [found[0]]]
        if ordered:
            wire.in_order(buckets)
        for earlier, later in pairwise(buckets):
            waits.extend(all(grad.op in wire._ancestors([each], set()) for grad in earlier) for each in later)
        return found

    found = gradients(tf.ones([2, 3]))
    assert waits == [ordered] * 2
    wire.in_order([[found[0]], [found[1]]])  # of what is computed already, nothing is left to be put in order


def test_order_agrees_with_what_tensorflow_adds() -> None:
    """Two heads that draw on one seed: TensorFlow has the second draw wait for the first, whatever gradients say."""
    seed = tf.Variable(1.0)
    kernels = [tf.Variable(tf.ones([3, 3])) for _ in range(2)]

    @tf.function  # type: ignore[untyped-decorator]
    def gradients(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = 0.0
            for kernel in kernels:
                drawn = seed.read_value()
                seed.assign(drawn + 1.0)
                loss += tf.reduce_sum(x @ kernel * drawn)
        found = tape.gradient(loss, kernels)
        wire.in_order([[found[1]], [found[0]]])
        return found

    found = gradients(tf.ones([2, 3]))
    assert [float(gradient[0, 0]) for gradient in found] == [2.0, 4.0]


def test_order_holds_within_control_dependencies_of_the_user_s() -> None:
    kernels = [tf.Variable(tf.fill([3, 3], 0.1)) for _ in range(2)]

    @tf.function  # type: ignore[untyped-decorator]
    def gradients(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(tf.tanh(tf.tanh(x @ kernels[0]) @ kernels[1]))
        found = tape.gradient(loss, kernels)
        with tf.control_dependencies([tf.debugging.check_numerics(gradient, "gradient") for gradient in found]):
            wire.in_order([[found[1]], [found[0]]])
        return found

    assert all(np.isfinite(gradient).all() for gradient in gradients(tf.ones([2, 3])))


def many_sums(collective: Any) -> bool:
    """More names than Horovod remembers at once, in two groups that follow each other."""

    @tf.function  # type: ignore[untyped-decorator]
    def run(start: Any) -> Any:
        first = collective.all_reduce([start + number for number in range(300)], "first")
        with tf.control_dependencies(first):
            return first, collective.all_reduce([start - number for number in range(900)], "second")

    right = []
    for step in range(4):
        first, second = run(tf.constant(float(step)))
        size = collective.world_size
        right += [float(value) == size * (step + number) for number, value in enumerate(first)]
        right += [float(value) == size * (step - number) for number, value in enumerate(second)]
    return all(right)


def test_more_sums_than_are_remembered(ranks: Ranks) -> None:
    assert ranks.run(2, many_sums) == [True, True]


def numbers(rank: int, dtype: str) -> list[Any]:
    generator = np.random.default_rng(rank)
    return [np.asarray(generator.standard_normal(shape) * 10.0**size, dtype) for size, shape in enumerate(SHAPES, -3)]


def summed(collective: Any, compression: Any) -> list[list[Any]]:
    """Sums of the numbers of all ranks in each dtype, made in a graph."""

    @tf.function  # type: ignore[untyped-decorator]
    def run(*tensors: Any) -> Any:
        return collective.all_reduce(tensors, "sums", compression)

    own = [value for dtype in ("float32", "float64", "float16") for value in numbers(collective.rank, dtype)]
    return [value.numpy() for value in run(*map(tf.constant, own))]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("compression", TYPES)
def test_numbers_of_16_bits_are_added_up_in_full(ranks: Ranks, world_size: int, compression: Any) -> None:
    every = ranks.run(world_size, summed, compression)
    for other in every[1:]:
        assert all(np.array_equal(mine, its) for mine, its in zip(every[0], other, strict=True))

    def on_the_wire(value: Any) -> Any:
        return value.astype(TYPES[compression]).astype(value.dtype)

    for dtype, start in (("float32", 0), ("float64", len(SHAPES))):
        parts = [map(on_the_wire, numbers(rank, dtype)) for rank in range(world_size)]
        for found, given in zip(every[0][start:], zip(*parts, strict=True), strict=False):
            total = np.sum(np.stack(given), axis=0)
            assert found.dtype == total.dtype and found.shape == total.shape
            np.testing.assert_array_equal(found, on_the_wire(total))


def test_what_has_16_bits_already_is_summed_as_it_is(ranks: Ranks) -> None:
    plain, shortened = (ranks.run(2, summed, compression)[0][2 * len(SHAPES) :] for compression in (None, "bf16"))
    assert all(np.array_equal(mine, its) for mine, its in zip(plain, shortened, strict=True))


class Named:
    """A collective that notes what sums are called."""

    def __init__(self, collective: Any) -> None:
        self._collective = collective
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._collective, name)

    def all_reduce(self, tensors: Any, name: str, compression: Any = None) -> Any:
        self.names.add(name)
        return self._collective.all_reduce(tensors, name, compression)


def trained(collective: Any, compression: Any = None, bucket_bytes: int = wire.BUCKET_BYTES, **compiled: Any) -> Any:
    """The weights after six mini-batches, moving statistics among them."""
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((5,)), layers.Dense(8), layers.BatchNormalization(), layers.Dense(3)])
    model.compile(keras.optimizers.SGD(0.1, **compiled), "mse")
    generator = np.random.default_rng(0)
    data = ArraySource(generator.standard_normal((45, 5)), generator.standard_normal((45, 3)))
    counting = Named(collective)
    replica = Replica(model, counting, StepOptions(compression=compression))  # type: ignore[arg-type]
    with patch.object(wire, "BUCKET_BYTES", bucket_bytes):
        replica.begin_fit(FitPlan(BatchPlan(45, 8), 1), data)
        replica.run(Segment(Position(0, 0), 6))
        replica.end_fit()
    assert ("gradients0.1-1" in counting.names) == (bucket_bytes < wire.BUCKET_BYTES)
    return model.get_weights()


@pytest.mark.parametrize("compiled", [{}, {"gradient_accumulation_steps": 2}])
def test_buckets_change_no_bit_of_two_workers_sums(ranks: Ranks, compiled: dict[str, Any]) -> None:
    whole, *others = (
        ranks.run(2, partial(trained, bucket_bytes=size, **compiled)) for size in (wire.BUCKET_BYTES, 100, 1)
    )
    for every in (whole, *others):
        assert all(np.array_equal(mine, its) for weights in every for mine, its in zip(weights, whole[0], strict=True))


@pytest.mark.parametrize("compiled", [{}, {"gradient_accumulation_steps": 2}])
@pytest.mark.parametrize("compression", TYPES)
def test_shortened_gradients_train_all_workers_alike(ranks: Ranks, compression: Any, compiled: dict[str, Any]) -> None:
    exact = ranks.run(3, partial(trained, **compiled))[0]
    every = ranks.run(3, partial(trained, compression=compression, bucket_bytes=100, **compiled))
    largest = 0.0
    for mine, *its, expected in zip(*every, exact, strict=True):
        assert all(np.array_equal(mine, other) for other in its)
        largest = max(largest, float(np.abs(mine - expected).max()))
    assert 0 < largest < (0.01 if compression == "bf16" else 0.001)


def test_a_fit_takes_the_option(in_tmp: Path, local_ray: None) -> None:
    def make() -> keras.Model:
        keras.utils.set_random_seed(1)
        model = keras.Sequential([keras.Input((5,)), keras.layers.Dense(3)])
        model.compile("sgd", "mse")
        return model

    x, y = np.ones((16, 5), np.float32), np.ones((16, 3), np.float32)
    found = []
    for compression in (None, "bf16"):
        options: Any = {"compression": compression, "tracking": False, "checkpoint": False}
        with dtrain.Trainer(make, num_workers=2, **options) as trainer:
            trainer.fit(x, y, batch_size=8, verbose=0)
            found.append(trainer.get_weights()[0])
    assert not np.array_equal(*found)
    np.testing.assert_allclose(*found, atol=0.01)
    with pytest.raises(ConfigError, match="compression='float16' must be 'fp16', 'bf16' or None"):
        dtrain.Trainer(make, num_workers=2, compression="float16")  # type: ignore[arg-type]
