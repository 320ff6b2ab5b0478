"""Claims about TFRecord files as data sets: which records are found, what they become, and what is refused."""

import pickle
from pathlib import Path
from typing import Any

import cloudpickle
import fsspec
import numpy as np
import pytest
import tensorflow as tf
from counted import rows_and_bytes

import dtrain.data
from dtrain.data.source import leaves
from dtrain.errors import ConfigError, DataError

FEATURES = {
    "row": tf.io.FixedLenFeature([], tf.int64),
    "image": tf.io.FixedLenFeature([2, 2], tf.float32),
    "raw": tf.io.FixedLenFeature([], tf.string),
}


def example(row: int, padding: int = 0) -> bytes:
    feature = {
        "row": tf.train.Feature(int64_list=tf.train.Int64List(value=[row])),
        "image": tf.train.Feature(float_list=tf.train.FloatList(value=[row, 1, 2, 3])),
        "raw": tf.train.Feature(bytes_list=tf.train.BytesList(value=[bytes([row % 256, 7])])),
        "padding": tf.train.Feature(bytes_list=tf.train.BytesList(value=[b"." * padding])),
    }
    data: bytes = tf.train.Example(features=tf.train.Features(feature=feature)).SerializeToString()
    return data


def write(path: Path, rows: range, padding: int = 0, compression: str = "") -> str:
    with tf.io.TFRecordWriter(str(path), compression) as writer:
        for row in rows:
            writer.write(example(row, padding * (row % 3)))
    return str(path)


def test_records_become_arrays(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.tfrecord", rows) for name, rows in (("b", range(7)), ("a", range(7, 20)))]
    write(tmp_path / "c.tfrecord", range(0))
    source = dtrain.data.tfrecord(files, FEATURES, x={"i": "image", "t": "raw"}, y="row")
    x, y = source.read(np.array([19, 0, 7]))
    assert len(source) == 20 and y.tolist() == [19, 0, 7]
    assert x["i"].tolist() == [[[row, 1], [2, 3]] for row in (19, 0, 7)]
    assert x["t"].tolist() == [bytes([row, 7]) for row in (19, 0, 7)]
    assert dtrain.data.tfrecord(tmp_path, FEATURES, x="row").read(np.arange(20))[0].tolist() == [
        *range(7, 20),
        *range(7),
    ]


def test_a_block_is_some_consecutive_records(tmp_path: Path) -> None:
    source = dtrain.data.tfrecord(write(tmp_path / "a.tfrecord", range(600), padding=1000), FEATURES, x="row")
    assert 8 <= len(source.blocks) <= 12 and sum(source.blocks) == 600
    again = pickle.loads(pickle.dumps(source))
    rows = np.random.default_rng(0).permutation(600)
    assert again.read(rows)[0].tolist() == rows.tolist()


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(write(tmp_path_factory.mktemp("large") / "a.tfrecord", range(3000), padding=6000))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_rank_reads_at_most_a_fifth_more_bytes_than_its_part(large: Path, world_size: int) -> None:
    source = dtrain.data.tfrecord(f"counted://{large}", FEATURES, x="image", y="row")
    read = [rows_and_bytes(source, rank, world_size) for rank in range(world_size)]
    assert max(num_bytes for _, num_bytes in read) <= 1.2 * large.stat().st_size / world_size
    assert sorted(row for rows, _ in read for row in rows) == list(range(3000))


def test_records_in_a_bucket_are_read_as_local_ones(tmp_path: Path, bucket: str) -> None:
    with fsspec.open(f"{bucket}/records/a.tfrecord", "wb") as target:
        target.write(Path(write(tmp_path / "a.tfrecord", range(9))).read_bytes())
    source = pickle.loads(pickle.dumps(dtrain.data.tfrecord(f"{bucket}/records", FEATURES, x="image", y="row")))
    assert source.read(np.array([8, 0]))[1].tolist() == [8, 0]


def test_tensors_can_be_decoded_on_the_way(tmp_path: Path) -> None:
    def decode(tensors: dict[str, Any]) -> dict[str, Any]:
        return {"pixels": tf.io.decode_raw(tensors["raw"], tf.uint8), "label": tensors["row"] * 2}

    path = write(tmp_path / "a.tfrecord", range(5))
    source = dtrain.data.tfrecord(path, FEATURES, x="pixels", y="label", decode=decode)
    x, y = cloudpickle.loads(cloudpickle.dumps(source)).read(np.array([4, 1]))
    assert x.tolist() == [[4, 7], [1, 7]] and x.dtype == np.uint8 and y.tolist() == [8, 2]
    with pytest.raises(DataError, match="what decode returns has no column 'label2'.*did you mean 'label'"):
        dtrain.data.tfrecord(path, FEATURES, x="pixels", y="label2", decode=decode).read(np.array([0]))


def test_what_cannot_be_read_by_rows_is_refused_at_once(tmp_path: Path) -> None:
    whole = Path(write(tmp_path / "whole.tfrecord", range(5))).read_bytes()
    (tmp_path / "cut.tfrecord").write_bytes(whole[:-3])
    (tmp_path / "text.tfrecord").write_text("x,y\n1,2\n3,4\n5,6\n")
    write(tmp_path / "gzip.tfrecord", range(5), compression="GZIP")
    write(tmp_path / "none.tfrecord", range(0))
    for name, message in (
        ("cut", "is no TFRecord file, or cut short: record 4 would end beyond"),
        ("text", "is no TFRecord file, or cut short: record 0"),
        ("gzip", "is compressed: .*write it uncompressed"),
        ("none", "the 1 files have no records"),
        ("gone", "there is no such file"),
    ):
        with pytest.raises(DataError, match=message):
            dtrain.data.tfrecord(tmp_path / f"{name}.tfrecord", FEATURES, x="row")


def test_features_that_cannot_be_used_are_refused_at_once(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", range(5))
    with pytest.raises(DataError, match="x: features has no column 'rows'; .* did you mean 'row'"):
        dtrain.data.tfrecord(path, FEATURES, x="rows")
    with pytest.raises(ConfigError, match=r"features\['row'\]=VarLenFeature.* must be a tf.io.FixedLenFeature"):
        dtrain.data.tfrecord(path, {"row": tf.io.VarLenFeature(tf.int64)}, x="row")


def test_records_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tfrecord", range(5))
    wrong = {"row": tf.io.FixedLenFeature([2], tf.int64)}
    with pytest.raises(DataError, match=r"records at bytes 0 to \d+ of '.*a.tfrecord' do not fit features=\['row'\]"):
        dtrain.data.tfrecord(path, wrong, x="row").read(np.array([0]))
    source = dtrain.data.tfrecord(path, FEATURES, x="row")
    write(tmp_path / "a.tfrecord", range(2), padding=100)
    with pytest.raises(DataError, match="not those that were there"):
        source.read(np.array([0]))


def test_the_rows_of_an_example_are_its_floats(tmp_path: Path) -> None:
    source = dtrain.data.tfrecord(write(tmp_path / "a.tfrecord", range(3)), FEATURES, x="image", float_dtype="float64")
    assert [(path, leaf.dtype.name) for path, leaf in leaves(source.read(np.array([2])))] == [("x", "float64")]
