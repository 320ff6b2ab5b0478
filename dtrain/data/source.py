"""Owns what a data set is: a number of rows, and the rows at given indices. Here: NumPy arrays and their like.

Checks what can be wrong with arrays before anything starts, and converts as Keras's `ArrayDataAdapter` does. It does
not choose rows (sampler.py) and does not read ahead (loader.py).
"""

import hashlib
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, floor
from os import PathLike, fspath
from typing import Any, Protocol, runtime_checkable

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16, which Keras's floatx may be)
import numpy as np
import numpy.typing as npt

from dtrain.data.files import open_url
from dtrain.errors import ConfigError, DataError
from dtrain.types import Array, Tree


@runtime_checkable
class DataSource(Protocol):
    """A data set of a known number of rows that are read by index. It must pickle, and be the same on every rank."""

    def __len__(self) -> int:
        """The number of rows."""
        ...

    def read(self, indices: npt.NDArray[np.int64]) -> Tree:
        """The rows at `indices`, in their order: (x,), (x, y) or (x, y, sample_weight), each leaf (len(indices), ...).

        It is called from background threads, one at a time in each worker, and ahead of need: the first rows of the
        next epoch may be read before this one's hooks have run. What it returns may share memory with the source:
        never write to it.
        """
        ...


@runtime_checkable
class Blocked(Protocol):
    """What a source offers besides, if it reads whole blocks of rows at a time: `DataSource`s only need to if they do.

    Attributes:
        blocks: the number of rows in each block, in the order of the rows.
        lanes: how many blocks a mini-batch may draw on.
    """

    blocks: tuple[int, ...]
    lanes: int

    def keep(self, num_blocks: int) -> None:
        """Keep so many blocks loaded, at most."""
        ...


class ArraySource:
    """Arrays in memory, as `keras.Model.fit` takes them.

    Args:
        x: the inputs: an array, or dicts, lists and tuples of arrays. pandas' DataFrame and Series (a column, as in
            Keras), and whatever else has `__array__`, are converted. Text (str or bytes) is accepted here only.
        y: the targets, in the same forms.
        sample_weight: weights by row, or one array for each output.
        class_weight: weights by class number, for one output: turned into `sample_weight` as Keras does it (one-hot
            `y` by its argmax, 1 for classes without a weight).
        float_dtype: what floats become; None: Keras's `floatx` where Keras is imported, else float32. Integers and
            bools are kept. Lists become tuples, as in Keras.

    Raises:
        DataError: the data cannot be trained on; the message names the argument, the place, the rule and the fix.
    """

    def __init__(
        self,
        x: Tree,
        y: Tree = None,
        sample_weight: Tree = None,
        *,
        class_weight: Mapping[int, float] | None = None,
        float_dtype: str | None = None,
    ) -> None:
        x, y, sample_weight = _to_arrays(x, y, sample_weight)
        dtype = np.dtype(float_dtype or floatx())
        if class_weight is not None:
            sample_weight = _weights_by_class(y, sample_weight, class_weight).astype(dtype)
        elif sample_weight is not None:
            sample_weight = _for_each_output(y, sample_weight)
        parts = (x, y, sample_weight) if sample_weight is not None else (x, y) if y is not None else (x,)
        self.arrays: tuple[Tree, ...] = map_tree(lambda array: _ready(array, dtype), parts)

    def __len__(self) -> int:
        return len(_first_leaf(self.arrays))

    def read(self, indices: npt.NDArray[np.int64]) -> Tree:
        """The rows at `indices`; views where these are a contiguous range, else gathered."""
        size = len(indices)
        first = int(indices[0]) if size else 0
        is_range = 0 <= first <= len(self) - size and bool(np.all(indices == np.arange(first, first + size)))
        if is_range:
            return map_tree(lambda array: array[first : first + size], self.arrays)
        return map_tree(lambda array: array.take(indices, axis=0), self.arrays)


class ClassWeights:
    """Another source with weights by class number: what `class_weight` means in Keras, for any source.

    Args:
        source: with y for one output, and no sample weights.
        class_weight: see `ArraySource`, which takes it itself.
        float_dtype: of the weights; see `ArraySource`.

    Raises:
        DataError: there is no y, several outputs, more than one class a row, or `sample_weight` already.
    """

    def __init__(self, source: DataSource, class_weight: Mapping[int, float], float_dtype: str | None = None) -> None:
        self.source = source
        self.class_weight = dict(class_weight)
        self.float_dtype = float_dtype or floatx()
        self.blocks: tuple[int, ...] = source.blocks if isinstance(source, Blocked) else ()
        self.lanes = source.lanes if isinstance(source, Blocked) else 1
        self.read(np.zeros(1, np.int64))  # refuses what cannot be weighed

    def __len__(self) -> int:
        return len(self.source)

    def read(self, indices: npt.NDArray[np.int64]) -> Tree:
        """The rows at `indices`, with the weights of their classes."""
        x, y, sample_weight = (*self.source.read(indices), None, None)[:3]
        return x, y, _weights_by_class(y, sample_weight, self.class_weight).astype(self.float_dtype)

    def keep(self, num_blocks: int) -> None:
        """Keep so many blocks loaded, at most."""
        if isinstance(self.source, Blocked):
            self.source.keep(num_blocks)


class Rows:
    """The rows from `start` up to `stop` of another source, as a source."""

    def __init__(self, source: DataSource, start: int, stop: int) -> None:
        self.source = source
        self.start = start
        self.stop = stop

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, indices: npt.NDArray[np.int64]) -> Tree:
        """The rows at `indices`, counted from `start`."""
        return self.source.read(indices + self.start)


def npz(
    path: str | PathLike[str],
    *,
    float_dtype: str | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ArraySource:
    """The arrays `x`, `y` and `sample_weight` (the last two may be missing) of an .npz file; nothing is unpickled.

    Args:
        path: a path or an fsspec URL; it is read now, and here.
        float_dtype: what floats become; see `ArraySource`.
        storage_options: fsspec's, for the file system.

    Raises:
        DataError: the file is missing, is no .npz file, has no `x`, or holds pickled objects.
    """
    try:
        found = _read_npz(fspath(path), storage_options)
    except (OSError, ValueError, EOFError, ImportError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(
            f"path={fspath(path)!r} cannot be read as an .npz file ({error}); write it with "
            "numpy.savez(path, x=x, y=y), without object arrays"
        ) from error
    if "x" not in found:
        raise DataError(f"path={fspath(path)!r} must be an .npz file with an array 'x'; it holds {sorted(found)}")
    return ArraySource(found["x"], found.get("y"), found.get("sample_weight"), float_dtype=float_dtype)


def _read_npz(path: str, storage_options: Mapping[str, Any] | None) -> dict[str, Array]:
    with open_url(path, storage_options) as opened:
        file = np.load(opened, allow_pickle=False)
        if isinstance(file, np.ndarray):
            return {}  # an .npy file: its one array has no name
        with file:
            return dict(file)


def train_validation_split(
    x: Tree, y: Tree, sample_weight: Tree, fraction: float
) -> tuple[tuple[Tree, Tree, Tree], tuple[Tree, Tree, Tree]]:
    """Cuts off the last part of the data for validation, unshuffled, as Keras's `validation_split` does.

    Returns:
        `(x, y, sample_weight)` for training, and the same for validation.

    Raises:
        ConfigError: `fraction` is not between 0 and 1.
        DataError: one of the parts would have no rows.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"validation_split={fraction!r} must be a number between 0 and 1")
    arrays = _to_arrays(x, y, sample_weight)
    rows = len(_first_leaf(arrays))
    split_at = floor(rows * (1.0 - fraction))
    if split_at in (0, rows):
        raise DataError(
            f"Training data contains {rows} samples, which is not sufficient to split it into a validation and "
            f"training set as specified by `validation_split={fraction}`. Either provide more data, or a different "
            "value for the `validation_split` argument."
        )
    return map_tree(lambda array: array[:split_at], arrays), map_tree(lambda array: array[split_at:], arrays)


@dataclass(frozen=True)
class Description:
    """What a data set looks like, for the record and to compare nodes.

    Attributes:
        num_rows: rows in all.
        shapes: the shape of one row by path, such as "x['image']".
        dtypes: NumPy's names, by path.
        digest: 16 bytes of BLAKE2b in hex over all of it and the contents.
    """

    num_rows: int
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    digest: str


def describe(source: DataSource, *, sample_bytes: int = 64 << 20) -> Description:
    """Rows, shapes, dtypes and a digest of a source.

    The digest covers every row up to `sample_bytes` bytes of data. Beyond, it covers about that many bytes of evenly
    spaced rows and the last row, or of evenly spaced blocks, the first and the last at least; so a change between them
    goes unseen. Text counts as 8 bytes an element.
    """
    first = dict(leaves(source.read(np.zeros(1, np.int64))))
    row_bytes = max(1, sum(leaf.nbytes for leaf in first.values()))
    shapes = {path: leaf.shape[1:] for path, leaf in first.items()}
    dtypes = {path: leaf.dtype.name for path, leaf in first.items()}
    header = repr((len(source), sorted(shapes.items()), sorted(dtypes.items())))
    digest = hashlib.blake2b(header.encode(), digest_size=16)
    rows = _sampled_rows(source, ceil(len(source) * row_bytes / sample_bytes))
    block = max(1, (4 << 20) // row_bytes)
    for start in range(0, len(rows), block):
        for _, leaf in sorted(leaves(source.read(rows[start : start + block])), key=lambda item: item[0]):
            digest.update(content_of(leaf))
    return Description(len(source), shapes, dtypes, digest.hexdigest())


def _sampled_rows(source: DataSource, stride: int) -> npt.NDArray[np.int64]:
    """About one row in `stride`, spread over all, by whole blocks where there are blocks; in order."""
    blocks = source.blocks if isinstance(source, Blocked) else ()
    if not blocks:
        return np.unique(np.append(np.arange(0, len(source), stride), len(source) - 1))
    ends = np.cumsum(blocks)
    chosen = np.unique(np.append(np.arange(0, len(blocks), stride), len(blocks) - 1))
    return np.concatenate([np.arange(ends[block] - blocks[block], ends[block]) for block in chosen])


def keras_batch(batch: Tree) -> Tree:
    """A batch as Keras hands it to `train_step`: an `x` without `y` comes bare, unless it is itself a tuple."""
    return batch[0] if batch is not None and len(batch) == 1 and not isinstance(batch[0], tuple) else batch


def map_tree(function: Callable[[Array], Any], tree: Tree) -> Tree:
    """The same structure with `function` applied to each leaf. None stays, lists become tuples (as in Keras)."""
    return _map_with_path(lambda _, leaf: function(leaf), "", tree)


def leaves(batch: Tree) -> Iterator[tuple[str, Array]]:
    """The arrays of a batch with their paths: "x['image']", "y", "sample_weight[0]"."""
    for name, part in zip(("x", "y", "sample_weight"), batch, strict=False):
        yield from _walk(name, part)


def shapes_of(batch: Tree) -> dict[str, tuple[int | None, ...]]:
    """Of its leaves, without the rows."""
    return {path: tuple(leaf.shape[1:]) for path, leaf in leaves(batch)}


def common_shapes(every: Sequence[Mapping[str, tuple[int | None, ...]]]) -> dict[str, tuple[int | None, ...]]:
    """What all of them are of: None where their sizes differ. Of one path each has the same rank."""
    found: dict[str, tuple[int | None, ...]] = {}
    for shapes in every:
        for path, shape in shapes.items():
            known = found.get(path, shape)
            same = len(known) == len(shape)
            found[path] = tuple(a if a == b else None for a, b in zip(known, shape, strict=True)) if same else shape
    return found


def _map_with_path(function: Callable[[str, Any], Any], path: str, tree: Tree) -> Tree:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: _map_with_path(function, f"{path}[{key!r}]", value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        values = [_map_with_path(function, f"{path}[{i}]", value) for i, value in enumerate(tree)]
        return type(tree)(*values) if hasattr(tree, "_fields") else tuple(values)
    return function(path, tree)


def _walk(path: str, tree: Tree) -> Iterator[tuple[str, Any]]:
    if isinstance(tree, (Mapping, list, tuple)):
        for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
            yield from _walk(f"{path}[{key!r}]", value)
    elif tree is not None:
        yield path, tree


def _first_leaf(parts: tuple[Tree, ...]) -> Array:
    return next(leaves(parts))[1]


def floatx() -> str:
    """Keras's `floatx` where Keras is imported, else float32."""
    # Keras is looked up, never imported: the driver starts jobs without it, and then nobody can have changed floatx.
    keras = sys.modules.get("keras")
    return str(keras.config.floatx()) if keras is not None and hasattr(keras, "config") else "float32"


def _to_arrays(x: Tree, y: Tree, sample_weight: Tree) -> tuple[Tree, Tree, Tree]:
    """The same with every leaf a checked NumPy array, all of the same number of rows."""
    x = _map_with_path(_to_array, "x", x)
    y = _map_with_path(_to_array, "y", y)
    sample_weight = _map_with_path(_to_array, "sample_weight", sample_weight)
    found = list(leaves((x, y, sample_weight)))
    if not found or not found[0][0].startswith("x"):
        raise DataError(f"x={x!r} holds no array: give a NumPy array, or a dict, list or tuple of arrays")
    (path, first), *others = found
    for other_path, other in others:
        if len(other) != len(first):
            raise DataError(
                f"{path} has {len(first)} rows, {other_path} has {len(other)}: all must have the same number of rows"
            )
    if len(first) == 0:
        raise DataError(f"{path} has 0 rows (shape {first.shape}): there must be at least 1; check how it was loaded")
    return x, y, sample_weight


def _to_array(path: str, leaf: Any) -> Array:
    pandas = sys.modules.get("pandas")
    check_dense(path, leaf)
    if not hasattr(leaf, "__array__"):
        raise DataError(
            f"{path} is {leaf!r:.60}, a {type(leaf).__name__}: it must be an array. A list or a tuple is a structure "
            f"of inputs, as in Keras; for one array use numpy.asarray({path.split('[')[0]})"
        )
    try:
        array = np.asarray(leaf)
    except Exception as error:
        raise DataError(f"{path} ({type(leaf).__name__}) cannot become a NumPy array: {error}") from error
    if array.ndim == 0:
        raise DataError(f"{path} is the scalar {array[()]!r:.60}: it must have one entry per row, shape (rows, ...)")
    check_dtype(path, array)
    if pandas is not None and isinstance(leaf, pandas.Series):
        return array[:, np.newaxis]  # Keras makes a column of it
    return array


def check_dense(path: str, leaf: Any, where: str = "") -> None:
    """Refuse SciPy's sparse matrices and TensorFlow's sparse and ragged tensors.

    Raises:
        DataError: naming the place, `where` it was found, and the fix.
    """
    kind = type(leaf).__name__
    fixes = {"SparseTensor": f"tf.sparse.to_dense({path})", "RaggedTensor": f"{path}.to_tensor()"}
    fix = f"{path}.toarray()" if hasattr(leaf, "tocoo") else fixes.get(kind)
    if fix is not None:
        what = "ragged" if kind == "RaggedTensor" else "sparse"
        raise DataError(f"{path}{where} is {what} ({kind}): only dense arrays are taken; use {fix}")


def check_dtype(path: str, array: Array) -> None:
    """Refuse what holds neither numbers nor bools, nor text in x.

    Raises:
        DataError: naming the place, the dtype and the fix.
    """
    name, kind = array.dtype.name, array.dtype.kind
    if kind in "biufc" or name.startswith(("bfloat", "float8")):
        return
    is_text = kind in "US"
    if kind == "O":
        bad = next((i for i, item in np.ndenumerate(array) if not isinstance(item, (str, bytes))), None)
        if bad is not None:
            where, item = ", ".join(map(str, bad)), array[bad]
            ragged = "; rows of different lengths must be padded" if hasattr(item, "__len__") else ""
            raise DataError(
                f"{path} has dtype object, first at [{where}]: {item!r:.60} ({type(item).__name__}). Arrays must hold "
                f"numbers, or text in x; convert it, e.g. {path}.astype('float32'){ragged}"
            )
        is_text = True
    if is_text and path.startswith("x"):
        return
    if is_text:
        fix = "encode it as numbers, e.g. numpy.unique(y, return_inverse=True)[1]"
        raise DataError(f"{path} holds text ({array.flat[0]!r:.60} at [0]), dtype {name}: only x may; {fix}")
    raise DataError(f"{path} has dtype {name}: it must be numbers or bools, or text in x; convert it with .astype(...)")


def _ready(array: Array, dtype: np.dtype[Any]) -> Array:
    """Floats as `dtype` (Keras's rule goes by name), and contiguous: faster to gather, and pickled without a copy."""
    is_float = array.dtype.name.startswith(("float", "bfloat"))
    return np.ascontiguousarray(array, dtype=dtype if is_float else array.dtype.newbyteorder("="))


def _for_each_output(y: Tree, sample_weight: Tree) -> Tree:
    """Keras's rules for several outputs: a weight array each, or one weight a row for all."""
    is_nested = isinstance(y, (Mapping, tuple))
    if not is_nested:
        return sample_weight
    if isinstance(sample_weight, (Mapping, tuple)):
        targets, weights = ([path for path, _ in _walk("", tree)] for tree in (y, sample_weight))
        places = [path for path, _ in _walk("", _without_none(sample_weight))]  # None: each row counts once
        if not set(weights) <= set(targets) <= set(places):
            raise DataError(
                "You should provide one `sample_weight` array per output in `y`, or None. The two structures did not"
                f" match: y has {targets}, sample_weight has {places}"
            )
        return sample_weight
    if sample_weight.ndim > 2 or sample_weight.shape[1:] not in ((), (1,)):
        raise DataError(
            f"sample_weight has shape {sample_weight.shape}: for a model with multiple outputs a single array must "
            "have one weight per row, that is shape (rows,); for more, give one array per output"
        )
    return map_tree(lambda _: sample_weight, y)


def _without_none(tree: Tree) -> Tree:
    """The same structure with a leaf in each place that has none."""
    if isinstance(tree, Mapping):
        return {key: _without_none(part) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return tuple(map(_without_none, tree))
    return False if tree is None else tree


def _weights_by_class(y: Tree, sample_weight: Tree, class_weight: Mapping[int, float]) -> npt.NDArray[np.float64]:
    if sample_weight is not None:
        raise DataError("You cannot `class_weight` and `sample_weight` at the same time: multiply one into the other")
    if y is None:
        raise DataError(f"class_weight={class_weight!r} needs y: it weighs rows by their class")
    if isinstance(y, (Mapping, tuple)):
        raise DataError("`class_weight` is only supported for Models with a single output: give sample_weight instead")
    classes = y if y.ndim == 1 else y[..., 0] if y.shape[-1] == 1 else np.argmax(y, axis=-1)
    if classes.ndim > 1:
        raise DataError(f"class_weight needs one class per row, but y has shape {y.shape}: give sample_weight instead")
    numbers, inverse = np.unique(np.round(classes).astype(np.int32), return_inverse=True)
    return np.array([class_weight.get(int(number), 1.0) for number in numbers], np.float64)[inverse]


def content_of(leaf: Array) -> bytes | memoryview:
    """The bytes that tell an array's contents, of text too."""
    if leaf.dtype.kind == "O":
        texts = [item.encode() if isinstance(item, str) else item for item in leaf.flat]
        return b"".join(len(text).to_bytes(8, "little") + text for text in texts)
    return np.ascontiguousarray(leaf).reshape(-1).view(np.uint8).data
