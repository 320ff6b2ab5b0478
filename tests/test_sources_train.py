"""Claims about training from files that are read by rows, on a real Ray: the same as Keras on the same rows."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cloudpickle
import keras
import models
import numpy as np
import pyarrow
import pytest
import warm
from models import blobs, make_classifier
from pyarrow import parquet as pq

import dtrain
from dtrain.arguments import fit_arguments, plan_of, source_of
from dtrain.data.sampler import Sampler
from dtrain.data.source import DataSource
from dtrain.errors import DataError
from dtrain.types import BatchPlan

for module in (models, warm):
    cloudpickle.register_pickle_by_value(module)

FIT: dict[str, Any] = {
    "batch_size": None,
    "epochs": 1,
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


@pytest.fixture
def in_float64() -> Iterator[None]:
    set_dtype("float64")
    yield
    set_dtype("float32")


def set_dtype(dtype: str) -> None:
    keras.config.set_floatx(dtype)
    keras.config.set_dtype_policy(dtype)  # Keras keeps the one that it first made of floatx


def write(path: Path, rows: int, seed: int) -> tuple[DataSource, np.ndarray, np.ndarray]:
    x, y = blobs(rows, seed)
    table = pyarrow.table({**{f"x{i}": x[:, i] for i in range(5)}, "y": y})
    pq.write_table(table, path, row_group_size=7)
    return dtrain.data.parquet(path, x=[f"x{i}" for i in range(5)], y="y"), x, y


def test_parquet_on_two_workers_gives_what_keras_gives(local_ray: None, in_tmp: Path, in_float64: None) -> None:
    source, x, y = write(in_tmp / "train.parquet", 101, 0)
    validation, val_x, val_y = write(in_tmp / "validation.parquet", 40, 1)
    weights = {0: 2.0, 1: 0.5}
    with dtrain.Trainer(make_classifier, num_workers=2, checkpoint=False, tracking=False) as trainer:
        history = trainer.fit(
            source, batch_size=16, epochs=3, class_weight=weights, validation_data=validation, verbose=0
        )
        evaluated = trainer.evaluate(validation, batch_size=16, verbose=0)
        predicted = trainer.predict(validation, batch_size=16, verbose=0)
        trained = trainer.get_weights()
    plan = plan_of(source, 16, None, "steps_per_epoch", True, (0, 0))
    assert isinstance(plan, BatchPlan)
    sampler = Sampler(plan)
    plain = make_classifier()
    expected: dict[str, list[float]] = {}
    for epoch in range(3):
        rows = np.concatenate(list(sampler.batches(epoch, 0, 7)))
        assert sorted(rows) == list(range(101))
        logs = plain.fit(
            x[rows], y[rows], 16, shuffle=False, class_weight=weights, validation_data=(val_x, val_y), verbose=0
        )
        for name, values in logs.history.items():
            expected.setdefault(name, []).extend(values)
    for name, values in expected.items():
        assert np.allclose(history.history[name], values, atol=1e-10, rtol=0), name
    for ours, theirs in zip(trained, plain.get_weights(), strict=True):
        assert ours.dtype == np.float64 and np.allclose(ours, theirs, atol=1e-10, rtol=0)
    assert np.allclose(evaluated, plain.evaluate(val_x, val_y, 16, verbose=0), atol=1e-10, rtol=0)
    assert np.allclose(predicted, plain.predict(val_x, verbose=0), atol=1e-10, rtol=0)


def in_npz(folder: Path, x: np.ndarray, y: np.ndarray) -> Any:
    np.savez(folder / "a.npz", x=x, y=y)
    return dtrain.data.npz(folder / "a.npz"), None


def in_pandas(folder: Path, x: np.ndarray, y: np.ndarray) -> Any:
    import pandas  # type: ignore[import-untyped]

    return pandas.DataFrame(x), pandas.Series(y)


def in_ray_dataset(folder: Path, x: np.ndarray, y: np.ndarray) -> Any:
    import ray

    ray.data.DataContext.get_current().enable_progress_bars = False
    table = {f"x{i}": x[:, i] for i in range(5)}
    dataset = ray.data.from_numpy([y[:30], y[30:]]).rename_columns({"data": "y"})
    dataset = dataset.zip(ray.data.from_arrow(pyarrow.table(table)))
    return dtrain.data.ray_dataset(dataset.materialize(), x=[*table], y="y"), None


def in_records(folder: Path, x: np.ndarray, y: np.ndarray) -> Any:
    import tensorflow as tf

    with tf.io.TFRecordWriter(str(folder / "a.tfrecord")) as writer:
        for row, label in zip(x, y, strict=True):
            feature = {
                "x": tf.train.Feature(float_list=tf.train.FloatList(value=row)),
                "y": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
            }
            writer.write(tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString())
    features = {"x": tf.io.FixedLenFeature([5], tf.float32), "y": tf.io.FixedLenFeature([], tf.int64)}
    return dtrain.data.tfrecord(folder / "a.tfrecord", features, x="x", y="y"), None


@pytest.mark.parametrize("make", [in_npz, in_pandas, in_ray_dataset, in_records])
def test_a_fit_on_any_source_gives_what_keras_gives(two_workers: dtrain.Trainer, make: Any, tmp_path: Path) -> None:
    x, y = blobs(50)
    trainer = warm.use(two_workers, warm.fresh(make_classifier))
    given, targets = make(tmp_path, x, y)
    trainer.fit(given, targets, batch_size=16, epochs=2, shuffle=False, verbose=0)
    plain = warm.fresh(make_classifier)()
    plain.fit(x, y, 16, epochs=2, shuffle=False, verbose=0)
    for ours, theirs in zip(trainer.get_weights(), plain.get_weights(), strict=True):
        assert np.allclose(ours, theirs, atol=2e-5, rtol=0)


def test_rows_come_by_blocks_where_no_order_is_asked_for(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", 20, 0)[0]

    def plans(**changes: Any) -> list[tuple[int, ...]]:
        plan = fit_arguments(source, None, **{**FIT, "validation_data": source, **changes}).plan
        assert isinstance(plan.train, BatchPlan) and isinstance(plan.validation, BatchPlan)
        return [plan.train.blocks, plan.validation.blocks]

    assert plans() == [(7, 7, 6)] * 2
    assert plans(class_weight={0: 2.0}) == [(7, 7, 6)] * 2
    assert plans(shuffle=False) == plans(shuffle="batch") == [(), (7, 7, 6)]
    assert plans(validation_steps=2) == [(7, 7, 6), ()]
    plan = plan_of(source, 4, 2, "steps", in_any_order=True)
    assert isinstance(plan, BatchPlan) and plan.blocks == ()


def test_what_a_source_brings_itself_is_refused_beside_it(tmp_path: Path) -> None:
    source = write(tmp_path / "a.parquet", 20, 0)[0]
    with pytest.raises(DataError, match="validation_split=0.5 needs arrays"):
        fit_arguments(source, None, **{**FIT, "validation_split": 0.5})
    with pytest.raises(DataError, match="y must not be given when x is a data source"):
        source_of(source, np.ones(20))
