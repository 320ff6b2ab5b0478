"""Claims about Parquet files as data sets: what columns become, what is read of the files, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow
import pytest
from counted import CountedFiles, rows_and_bytes
from pyarrow import parquet as pq

import dtrain.data
from dtrain.data.source import leaves
from dtrain.errors import ConfigError, DataError

ROWS = 24
TABLE = {
    "row": np.arange(ROWS),
    "age": np.arange(ROWS) / 2,
    "old": np.arange(ROWS) > 20,
    "name": [f"n{i}" for i in range(ROWS)],
    "image": [[i, i + 0.5, -i] for i in range(ROWS)],
    "grid": [[[i, 1], [2, 3]] for i in range(ROWS)],
}


def write(path: Path, table: Any = None, rows: slice = slice(None), group: int = 5) -> str:
    table = pyarrow.table(TABLE) if table is None else pyarrow.table(table)
    pq.write_table(table.take(np.arange(len(table))[rows]), path, row_group_size=group)
    return str(path)


@pytest.fixture
def file(tmp_path: Path) -> str:
    return write(tmp_path / "a.parquet")


AT = np.array([7, 0, 23])


@pytest.mark.parametrize(
    ("x", "shapes"),
    [
        ("age", {"x": ((3,), "float32")}),
        ("image", {"x": ((3, 3), "float32")}),
        ("grid", {"x": ((3, 2, 2), "int64")}),
        ("name", {"x": ((3,), "object")}),
        (["age"], {"x": ((3, 1), "float32")}),
        (["row", "age", "old", "image"], {"x": ((3, 6), "float32")}),
        (["row", "old"], {"x": ((3, 2), "int64")}),
        ({"a": "image", "b": ["age", "row"]}, {"x['a']": ((3, 3), "float32"), "x['b']": ((3, 2), "float32")}),
        (("image", "age"), {"x[0]": ((3, 3), "float32"), "x[1]": ((3,), "float32")}),
    ],
)
def test_columns_become_arrays_as_keras_takes_them(file: str, x: Any, shapes: dict[str, Any]) -> None:
    found = dtrain.data.parquet(file, x=x).read(AT)
    assert {path: (leaf.shape, leaf.dtype.name) for path, leaf in leaves(found)} == shapes


def test_rows_come_with_their_targets_and_weights(file: str) -> None:
    source = dtrain.data.parquet(
        file, x=["row", "image"], y={"a": "row", "b": "age"}, sample_weight="age", float_dtype="float64"
    )
    x, y, weight = source.read(AT)
    assert (source.blocks, len(source)) == ((5, 5, 5, 5, 4), ROWS)
    assert x.tolist() == [[7, 7, 7.5, -7], [0, 0, 0.5, 0], [23, 23, 23.5, -23]]
    assert y["a"].tolist() == [7, 0, 23] and y["b"].tolist() == [3.5, 0, 11.5]
    assert weight["a"].tolist() == weight["b"].tolist() == [3.5, 0, 11.5]


def test_files_are_one_data_set(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "readme.txt").write_text("not data")
    parts = [
        write(tmp_path / "b.parquet", rows=slice(0, 7)),
        write(tmp_path / "a[1].parquet", rows=slice(7, 10)),
        write(tmp_path / "deep" / "c.parquet", rows=slice(10, None)),
        write(tmp_path / "none.parquet", rows=slice(0, 0)),
    ]

    def rows(path: Any) -> list[int]:
        source = dtrain.data.parquet(path, x="row")
        found: list[int] = source.read(np.arange(len(source)))[0].tolist()
        return found

    assert rows(parts) == list(range(ROWS))
    assert rows([Path(parts[1]), Path(parts[0])]) == [7, 8, 9, *range(7)]
    assert rows(tmp_path / "*.parquet") == [7, 8, 9, *range(7)]
    assert rows(tmp_path) == [7, 8, 9, *range(7), *range(10, ROWS)]
    assert rows(f"file://{parts[0]}") == list(range(7))


def test_a_relative_path_is_read_where_the_script_was(file: str, in_tmp: Path, monkeypatch: Any) -> None:
    source = dtrain.data.parquet("a.parquet", x="row")
    monkeypatch.chdir("/")
    assert pickle.loads(pickle.dumps(source)).read(AT)[0].tolist() == AT.tolist()


def test_urls_are_read_through_fsspec(file: str) -> None:
    with fsspec.open("memory://data/a.parquet", "wb") as target:
        target.write(Path(file).read_bytes())
    assert dtrain.data.parquet("memory://data/*.parquet", x="row").read(AT)[0].tolist() == AT.tolist()


def test_files_in_a_bucket_are_read_as_local_ones(file: str, bucket: str) -> None:
    with fsspec.open(f"{bucket}/data/a.parquet", "wb") as target:
        target.write(Path(file).read_bytes())
    source = pickle.loads(pickle.dumps(dtrain.data.parquet(f"{bucket}/data", x=["age", "image"], y="row")))
    (x, y), (same, _) = source.read(AT), dtrain.data.parquet(file, x=["age", "image"], y="row").read(AT)
    assert y.tolist() == AT.tolist() and x.tolist() == same.tolist()


WIDTH = 512


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, int]:
    """A URL of two files of 64 row groups together, and how many bytes the column "x" has in them."""
    folder = tmp_path_factory.mktemp("counted")
    numbers = np.random.default_rng(0).random(1600 * WIDTH)
    for name in "ab":
        column = pyarrow.FixedSizeListArray.from_arrays(numbers, WIDTH)
        table = pyarrow.table({"x": column, "unused": column, "row": np.arange(1600) + 1600 * (name == "b")})
        path = folder / f"{name}.parquet"
        pq.write_table(table, path, row_group_size=50, compression="none", use_dictionary=False)
    return f"counted://{folder}/*.parquet", 2 * numbers.nbytes


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_reads_at_most_a_fifth_more_bytes_than_its_part(counted: tuple[str, int], world_size: int) -> None:
    url, size = counted
    source = dtrain.data.parquet(url, x="x", y="row")
    read = [rows_and_bytes(source, rank, world_size) for rank in range(world_size)]
    assert max(num_bytes for _, num_bytes in read) <= 1.2 * size / world_size
    assert sorted(row for rows, _ in read for row in rows) == list(range(3200))


def test_only_the_ends_of_files_are_read_before_training(counted: tuple[str, int]) -> None:
    url, size = counted
    CountedFiles.read = 0
    source = dtrain.data.parquet(url, x="x")
    assert CountedFiles.read < size / 50
    source.read(np.arange(50))
    CountedFiles.read = 0
    source.read(np.arange(50, 100))
    assert CountedFiles.read <= 1.2 * size / 64  # of one row group the column, and no end of the file again


NULLS = pyarrow.array([1.0, None, 3.0])
REFUSED = [
    ({"x": "rwo"}, DataError, r"x: '.*' has no column 'rwo'; it has \['row', .*did you mean 'row'\?"),
    ({"x": "row", "y": "q"}, DataError, "y: .* has no column 'q'"),
    ({"x": None}, ConfigError, "x=None must name columns"),
    ({"x": []}, ConfigError, r"x=\[\] must name columns"),
    ({"x": {"a": 3}}, ConfigError, r"x\['a'\]=3 must name columns: .*a list of names"),
    ({"x": [["row"]]}, ConfigError, r"x=\[\['row'\]\] must name columns"),
    ({"x": "row", "lanes": 0}, ConfigError, "lanes=0"),
]


@pytest.mark.parametrize(("arguments", "error", "message"), REFUSED)
def test_columns_that_are_not_there_are_refused_at_once(
    file: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        dtrain.data.parquet(file, **arguments)


def test_a_type_that_holds_no_numbers_is_refused_at_once(tmp_path: Path) -> None:
    for values in (pyarrow.array([1], "timestamp[s]"), [{"a": 1}]):
        path = write(tmp_path / "times.parquet", {"t": values})
        with pytest.raises(DataError, match="column 't' has type .* must hold numbers, bools or text.*convert it"):
            dtrain.data.parquet(path, x="t")


@pytest.mark.parametrize(
    ("values", "x", "message"),
    [
        (NULLS, "c", r"row group 0 of '.*': column 'c' has 1 nulls, the first in row 1: fill or drop"),
        (pyarrow.array([[1], [1, None], [2]]), "c", "column 'c' has rows of 1 to 2 values.*pad"),
        (pyarrow.array([[1], [None], [2]]), "c", "column 'c' has 1 nulls"),
        (pyarrow.array(["a", "b", "c"]), ["c"], "column 'c' is object .*cannot be part of a matrix; give it"),
        (pyarrow.array([[[1]], [[2]], [[3]]]), ["c"], r"column 'c' is int64 of shape \(rows, 1, 1\)"),
    ],
)
def test_rows_that_cannot_be_used_are_refused_by_name(tmp_path: Path, values: Any, x: Any, message: str) -> None:
    source = dtrain.data.parquet(write(tmp_path / "a.parquet", {"c": values}), x=x)
    with pytest.raises(DataError, match=message):
        source.read(np.arange(3))


def test_files_that_cannot_be_used_are_refused(file: str, tmp_path: Path) -> None:
    other = write(tmp_path / "b.parquet", {"row": [1.5]})
    (tmp_path / "text.parquet").write_text("a,b\n1,2\n" * 9)
    (tmp_path / "empty").mkdir()
    for path, message in (
        (tmp_path / "gone.parquet", "there is no such file"),
        (tmp_path / "empty", "is a folder with 0 files, none of which ends in '.parquet'"),
        ([file, other], r"column 'row' has type double in '.*b.parquet', but int64 in '.*a.parquet'"),
        (tmp_path / "text.parquet", "text.parquet' cannot be read as a Parquet file"),
        (write(tmp_path / "none.parquet", rows=slice(0, 0)), "the 1 files have no rows"),
        ([], "names no file"),
        ([file, "memory://a.parquet"], "is on another file system"),
    ):
        with pytest.raises(DataError, match=message):
            dtrain.data.parquet(path, x="row")
    with pytest.raises(ConfigError, match="its file system cannot be used"):
        dtrain.data.parquet("nosuch://a.parquet", x="row")


def test_a_file_that_is_gone_on_a_node_is_named(file: str) -> None:
    source = dtrain.data.parquet(file, x="row")
    Path(file).unlink()
    with pytest.raises(DataError, match=r"a.parquet' cannot be read here .* every node must be able to read it"):
        source.read(AT)


def test_tensors_and_dictionaries_are_arrays(tmp_path: Path) -> None:
    tensors = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(np.arange(12.0).reshape(3, 2, 2))
    table = {"t": tensors, "d": pyarrow.array(["a", "b", "a"]).dictionary_encode()}
    source = dtrain.data.parquet(write(tmp_path / "a.parquet", table, group=2), x=("t", "d"))
    tensor, text = source.read(np.array([2, 0]))[0]
    assert tensor.tolist() == [[[8, 9], [10, 11]], [[0, 1], [2, 3]]] and text.tolist() == ["a", "a"]
