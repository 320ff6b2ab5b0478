"""Claims about data sets in memory: what is accepted, what it becomes, and what is refused in which words."""

import pickle
from collections import namedtuple
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pandas  # type: ignore[import-untyped]
import pytest

import dtrain.data
from dtrain.data.blocks import BlockSource
from dtrain.data.source import (
    ArraySource,
    Blocked,
    ClassWeights,
    DataSource,
    describe,
    keras_batch,
    leaves,
    train_validation_split,
)
from dtrain.errors import ConfigError, DataError

ROWS = np.arange(10)
Pair = namedtuple("Pair", "left right")


def at(*indices: int) -> np.ndarray:
    return np.array(indices, np.int64)


def test_rows_come_in_the_order_asked_for() -> None:
    source: DataSource = ArraySource(ROWS[:, None] * [1, 10], ROWS * 2)
    x, y = source.read(at(7, 0, 7))
    assert len(source) == 10
    assert x.tolist() == [[7, 70], [0, 0], [7, 70]] and y.tolist() == [14, 0, 14]


def test_contiguous_rows_are_views_and_nothing_beyond_the_end_is_made_up() -> None:
    x = np.zeros((10, 3), np.float32)
    source = ArraySource(x)
    assert np.shares_memory(source.read(at(3, 4, 5))[0], x)
    assert not np.shares_memory(source.read(at(3, 5, 4))[0], x)
    with pytest.raises(IndexError):
        source.read(at(8, 9, 10))


def test_structures_are_kept_with_lists_as_tuples() -> None:
    source = ArraySource({"a": ROWS, "b": [ROWS, None, Pair(ROWS, ROWS)]}, (ROWS,))
    x, y = source.read(at(1))
    assert x == {"a": at(1), "b": (at(1), None, Pair(at(1), at(1)))} and y == (at(1),)
    assert [path for path, _ in leaves((x, y))] == ["x['a']", "x['b'][0]", "x['b'][2][0]", "x['b'][2][1]", "y[0]"]


@pytest.mark.parametrize("float_dtype", ["float32", "float64", "float16", "bfloat16"])
def test_floats_become_floatx_and_the_rest_is_kept(float_dtype: str) -> None:
    given = ["float16", "float32", "float64", "bfloat16", ">f4", "int8", "uint32", "int64", "bool", "complex64", ">i4"]
    x = ArraySource([np.ones(2, dtype) for dtype in given], float_dtype=float_dtype).read(at(0))[0]
    kept = ["int8", "uint32", "int64", "bool", "complex64", "int32"]
    assert [leaf.dtype.name for leaf in x] == [float_dtype] * 5 + kept
    assert all(leaf.dtype.isnative for leaf in x)


def test_pandas_comes_as_keras_takes_it() -> None:
    frame = pandas.DataFrame({"a": [1, 2], "b": [1.5, 2.5]})
    x, y = ArraySource(frame, pandas.Series([3, 4])).read(at(0, 1))
    assert x.tolist() == [[1, 1.5], [2, 2.5]] and x.dtype == np.float32
    assert y.tolist() == [[3], [4]] and y.dtype == np.int64


def test_anything_with_array_is_converted() -> None:
    class Tensor:
        def __array__(self, dtype: Any = None, copy: Any = None) -> np.ndarray:
            return np.ones((3, 2))

    assert ArraySource(Tensor()).read(at(2))[0].shape == (1, 2)


@pytest.mark.parametrize("text", [np.array(["a", "bc"]), np.array(["a", "bc"], object), np.array([b"a", b"bc"])])
def test_text_is_accepted_in_x_only(text: np.ndarray) -> None:
    assert ArraySource(text).read(at(1, 0))[0].tolist() == text.tolist()[::-1]
    with pytest.raises(DataError, match=r"y holds text .* only x may; encode it as numbers"):
        ArraySource(np.ones(2), text)


REFUSED = [
    (({"a": np.ones(100)}, np.ones(99)), r"x\['a'\] has 100 rows, y has 99"),
    (([np.ones(3), np.ones(4)], None), r"x\[0\] has 3 rows, x\[1\] has 4"),
    ((np.ones(3), np.ones(3), np.ones(2)), "x has 3 rows, sample_weight has 2"),
    ((np.ones((0, 4)), np.ones(0)), r"x has 0 rows \(shape \(0, 4\)\)"),
    ((None, np.ones(2)), "x=None holds no array"),
    (([], None), "holds no array"),
    ((np.float32(3), None), r"x is the scalar .*shape \(rows, \.\.\.\)"),
    (([[1, 2], [3]], None), r"x\[0\]\[0\] is 1, a int: .*numpy.asarray\(x\)"),
    ((np.ones(2), [1, 2]), r"y\[0\] is 1, a int: .*numpy.asarray\(y\)"),
    (("rows.csv", None), "x is 'rows.csv', a str"),
    ((np.array([[1], [2, 3]], object), None), r"x has dtype object, first at \[0\]: \[1\] \(list\).*padded"),
    ((np.array(["a", "b", None], object), None), r"x has dtype object, first at \[2\]: None \(NoneType\)"),
    ((np.array(["2020-01-01"], "datetime64[D]"), None), "x has dtype datetime64"),
    ((np.zeros(2, [("a", "f4")]), None), "x has dtype void32"),
]


@pytest.mark.parametrize(("given", "message"), REFUSED)
def test_what_cannot_be_trained_on_is_refused_by_name(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource(*given)


def test_sparse_matrices_are_refused_with_the_fix() -> None:
    scipy_sparse = pytest.importorskip("scipy.sparse")
    with pytest.raises(DataError, match=r"x is sparse \(csr_matrix\).*x.toarray\(\)"):
        ArraySource(scipy_sparse.csr_matrix(np.eye(3)))


def test_sparse_and_ragged_tensors_are_refused_with_the_fix() -> None:
    import tensorflow as tf

    with pytest.raises(DataError, match=r"x is sparse \(SparseTensor\).*tf.sparse.to_dense\(x\)"):
        ArraySource(tf.sparse.from_dense(np.eye(3)))
    with pytest.raises(DataError, match=r"x\['a'\] is ragged \(RaggedTensor\).*x\['a'\].to_tensor\(\)"):
        ArraySource({"a": tf.ragged.constant([[1.0], [1.0, 2.0]])})


@pytest.mark.parametrize(
    "y",
    [
        np.array([0, 1, 2, 1]),
        np.array([[0], [1], [2], [1]]),
        np.eye(3)[[0, 1, 2, 1]],
        np.array([0.1, 0.9, 2.2, 1.4]),
    ],
)
def test_class_weight_weighs_rows_by_class(y: np.ndarray) -> None:
    _, _, weight = ArraySource(np.ones(4), y, class_weight={0: 0.5, 2: 3}).read(at(0, 1, 2, 3))
    assert weight.tolist() == [0.5, 1, 3, 1] and weight.dtype == np.float32


@pytest.mark.parametrize(
    ("y", "sample_weight", "message"),
    [
        (ROWS, np.ones(10), "at the same time"),
        (None, None, "needs y"),
        ([ROWS, ROWS], None, "single output"),
        (np.ones((10, 3, 4)), None, "needs one class per row"),
    ],
)
def test_class_weight_is_refused_where_keras_refuses_it(y: Any, sample_weight: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ArraySource(ROWS, y, sample_weight, class_weight={0: 1.0})


def test_class_weight_weighs_the_rows_of_any_source() -> None:
    class Sums:
        def __len__(self) -> int:
            return 4

        def read(self, indices: np.ndarray) -> Any:
            return indices, indices % 3

    source: DataSource = ClassWeights(Sums(), {0: 0.5, 2: 3})
    x, y, weight = source.read(at(2, 3, 1))
    assert x.tolist() == [2, 3, 1] and y.tolist() == [2, 0, 1]
    assert weight.tolist() == [3, 0.5, 1] and weight.dtype == np.float32
    assert describe(pickle.loads(pickle.dumps(ClassWeights(ArraySource(ROWS, ROWS), {1: 2.0})))) == describe(
        ArraySource(ROWS, ROWS, class_weight={1: 2.0})
    )


def test_class_weight_keeps_the_blocks_of_a_source() -> None:
    blocks = BlockSource(
        [ArraySource(ROWS[:6], ROWS[:6]), ArraySource(ROWS[6:], ROWS[6:])].__getitem__, [6, 4], lanes=7
    )
    source = ClassWeights(blocks, {1: 2.0})
    assert isinstance(source, Blocked) and (source.blocks, source.lanes) == ((6, 4), 7)
    source.keep(5)
    assert source.read(at(1, 9))[2].tolist() == [2, 1] and blocks._capacity == 5
    with pytest.raises(DataError, match="at the same time"):
        ClassWeights(ArraySource(ROWS, ROWS, ROWS), {1: 2.0})
    with pytest.raises(DataError, match="needs y"):
        ClassWeights(ArraySource(ROWS), {1: 2.0})


def test_an_output_may_have_no_weights() -> None:
    y, weight = {"a": np.zeros(3), "b": np.zeros(3)}, np.arange(3.0)
    source = ArraySource(np.zeros((3, 1)), y, {"a": weight, "b": None})
    _, _, found = source.read(np.array([2]))
    assert found["a"].tolist() == [2.0] and found["b"] is None
    for wrong in ({"a": weight}, {"a": weight, "b": None, "c": weight}):
        with pytest.raises(DataError, match="one `sample_weight` array per output in `y`, or None"):
            ArraySource(np.zeros((3, 1)), y, wrong)


def test_one_sample_weight_serves_all_outputs() -> None:
    weight = np.linspace(0, 1, 10, dtype=np.float32)
    got = ArraySource(ROWS, {"a": ROWS, "b": ROWS}, weight).read(ROWS)[2]
    assert set(got) == {"a", "b"} and all(np.array_equal(part, weight) for part in got.values())
    with pytest.raises(DataError, match="one weight per row"):
        ArraySource(ROWS, [ROWS, ROWS], np.ones((10, 3)))
    with pytest.raises(DataError, match="structures did not match"):
        ArraySource(ROWS, {"a": ROWS, "b": ROWS}, {"a": weight})


def test_arrays_pickle_out_of_band() -> None:
    source = ArraySource(np.asfortranarray(np.ones((1000, 100))), np.ones(2000)[::2], np.arange(1000) / 1000)
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(source, protocol=5, buffer_callback=buffers.append)
    assert len(pickled) < 2000 and len(buffers) == 3
    again = pickle.loads(pickled, buffers=buffers)
    assert describe(again) == describe(source)


@pytest.mark.parametrize(("rows", "fraction"), [(10, 0.25), (10, 0.3), (7, 0.5), (3, 0.6), (1000, 0.001)])
def test_validation_is_the_last_part_cut_where_keras_cuts(rows: int, fraction: float) -> None:
    x, y = [np.arange(rows)], np.arange(rows)
    (x, y, weight), (val_x, val_y, val_weight) = train_validation_split(x, y, None, fraction)
    cut = int(np.floor(rows * (1.0 - fraction)))
    assert x[0].tolist() == y.tolist() == list(range(cut))
    assert val_x[0].tolist() == val_y.tolist() == list(range(cut, rows))
    assert weight is None and val_weight is None


def test_a_split_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(DataError, match="contains 2 samples, which is not sufficient to split it"):
        train_validation_split(np.ones(2), None, None, 0.9)
    for fraction in (-0.1, 0, 1, 1.5):
        with pytest.raises(ConfigError, match="validation_split="):
            train_validation_split(np.ones(2), None, None, fraction)


def test_describe_tells_data_sets_apart() -> None:
    x = np.arange(300_000, dtype=np.float32).reshape(-1, 3)
    whole = describe(ArraySource({"a": x}, x[:, 0]))
    assert (whole.num_rows, whole.shapes, whole.dtypes) == (
        100_000,
        {"x['a']": (3,), "y": ()},
        {"x['a']": "float32", "y": "float32"},
    )
    digests = {whole.digest}
    for row in (0, 54_321, 99_999):
        changed = x.copy()
        changed[row, 1] += 1
        digests.add(describe(ArraySource({"a": changed}, x[:, 0])).digest)
    digests.add(describe(ArraySource({"b": x}, x[:, 0])).digest)
    digests.add(describe(ArraySource({"a": x.view(np.int32)}, x[:, 0])).digest)
    assert len(digests) == 6
    assert describe(ArraySource({"a": x.copy()}, x[:, 0])) == whole
    assert len({describe(ArraySource(np.array(t, object))).digest for t in (["ab", "c"], ["a", "bc"])}) == 2


def test_describe_samples_what_is_large() -> None:
    x = np.zeros((10_000, 10), np.float32)
    digests = [describe(ArraySource(x), sample_bytes=4000).digest]
    for row in (0, 9_999, 1):
        changed = x.copy()
        changed[row] = 1
        digests.append(describe(ArraySource(changed), sample_bytes=4000).digest)
    assert len(set(digests[:3])) == 3 and digests[3] == digests[0]


def test_describe_samples_whole_blocks() -> None:
    read: list[int] = []

    def load(block: int) -> ArraySource:
        read.append(block)
        return ArraySource(np.full((10, 100), block, np.float32))

    for sample_bytes, blocks in ((40_000, [0, *range(10, 100, 10), 99]), (100, [0, 99])):
        read.clear()
        describe(BlockSource(load, [10] * 100), sample_bytes=sample_bytes)
        assert read == blocks


def test_an_npz_file_is_a_source(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.ones((4, 2)), y=np.arange(4))
    x, y = dtrain.data.npz(tmp_path / "data.npz").read(at(1, 3))
    assert x.shape == (2, 2) and y.tolist() == [1, 3]


def test_an_npz_file_may_be_anywhere_that_fsspec_reads(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.arange(4))
    with fsspec.open("memory://npz/data.npz", "wb") as file:
        file.write((tmp_path / "data.npz").read_bytes())
    for url in (f"file://{tmp_path}/data.npz", "memory://npz/data.npz"):
        assert dtrain.data.npz(url).read(at(3, 1))[0].tolist() == [3, 1]
    with pytest.raises(DataError, match="cannot be read as an .npz file"):
        dtrain.data.npz("memory://npz/gone.npz")


def test_an_npz_file_that_cannot_be_used_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "names.npz", a=np.ones(2))
    np.savez(tmp_path / "pickled.npz", x=np.array([print, {}], object))
    np.save(tmp_path / "single.npy", np.ones(2))
    (tmp_path / "cut.npz").write_bytes((tmp_path / "names.npz").read_bytes()[:50])
    (tmp_path / "text.npz").write_text("x,y\n1,2\n")
    with pytest.raises(DataError, match=r"must be an .npz file with an array 'x'; it holds \['a'\]"):
        dtrain.data.npz(tmp_path / "names.npz")
    for name in ("pickled.npz", "single.npy", "cut.npz", "text.npz", "missing.npz"):
        with pytest.raises(DataError, match=name):
            dtrain.data.npz(tmp_path / name)


def test_a_batch_without_targets_reaches_train_step_bare() -> None:
    assert keras_batch(ArraySource(ROWS).read(at(3))) == at(3)
    assert keras_batch(ArraySource([ROWS, ROWS]).read(at(3))) == ((at(3), at(3)),)
    assert keras_batch(ArraySource(ROWS, ROWS).read(at(3))) == (at(3), at(3))
