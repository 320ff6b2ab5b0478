"""Claims about Ray datasets as data sets, on a real Ray."""

import pickle
from typing import Any

import cloudpickle
import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest
import ray

import dtrain.data
from dtrain.errors import DataError

ROWS = np.arange(40)


@pytest.fixture(scope="module")
def dataset(local_ray: None) -> Any:
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data.from_pandas(
        [
            pandas.DataFrame({"row": rows, "half": rows / 2, "pair": [[row, 1.5] for row in rows]})
            for rows in (ROWS[:9], ROWS[9:30], ROWS[30:])
        ]
    )


def test_blocks_are_rows(dataset: Any) -> None:
    source = dtrain.data.ray_dataset(dataset, x=["row", "half"], y={"a": "row", "b": "pair"})
    x, y = source.read(np.array([39, 0, 9]))
    assert source.blocks == (9, 21, 10)
    assert x.tolist() == [[39, 19.5], [0, 0], [9, 4.5]] and y["a"].tolist() == [39, 0, 9]
    assert y["b"].tolist() == [[39, 1.5], [0, 1.5], [9, 1.5]]


def test_tensors_are_arrays_that_are_not_copied(local_ray: None) -> None:
    images = np.arange(24, dtype=np.float32).reshape(6, 2, 2)
    dataset = ray.data.from_numpy([images[:4], images[4:]]).rename_columns({"data": "image"})
    source = dtrain.data.ray_dataset(dataset, x="image")
    assert source.read(np.array([5, 0]))[0].tolist() == images[[5, 0]].tolist()
    assert not source.read(np.array([0, 1]))[0].flags.writeable  # the object store's own memory


def test_a_worker_reads_blocks_from_the_store(dataset: Any) -> None:
    source = dtrain.data.ray_dataset(dataset, x="row")

    @ray.remote(num_cpus=0)
    def rows(source: Any, indices: np.ndarray) -> list[int]:
        found: list[int] = source.read(indices)[0].tolist()
        return found

    assert ray.get(rows.remote(ray.put(source), np.array([38, 2]))) == [38, 2]
    assert len(cloudpickle.dumps(source)) < 5000 and pickle.HIGHEST_PROTOCOL


def test_what_cannot_be_used_is_refused(dataset: Any) -> None:
    with pytest.raises(DataError, match="y: the dataset has no column 'hall'.*did you mean 'half'"):
        dtrain.data.ray_dataset(dataset, x="row", y="hall")
    with pytest.raises(DataError, match=r"dataset=\[1\] must be a ray.data.Dataset, not a list"):
        dtrain.data.ray_dataset([1], x="row")
    with pytest.raises(DataError, match="block 0 of the dataset: column 'a' has 1 nulls"):
        nulls = ray.data.from_pandas(pandas.DataFrame({"a": pandas.array([1, None], "Int64")}))
        dtrain.data.ray_dataset(nulls, x="a").read(np.array([0]))
