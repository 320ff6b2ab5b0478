"""Owns what can be wrong with the values of a mini-batch. To be asked before the first step; it changes nothing."""

import logging
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from dtrain.data.source import check_dtype, leaves
from dtrain.errors import DataError
from dtrain.types import Array, Tree

log = logging.getLogger("dtrain")

Classes = int | Mapping[str, int] | None


def check_batch(
    batch: Tree,
    rows: npt.NDArray[np.int64],
    *,
    num_classes: Classes = None,
    ignore_class: Classes = None,
    has_own_loss: bool = False,
    with_loss: Collection[str] | None = None,
) -> None:
    """Refuse a batch that cannot be trained on, by the place of its first wrong value.

    NaN and infinity in y and sample_weight make every weight of the model NaN in one step: an error. In x, and in y
    where the loss is the user's, they are a warning in the log, since some models and losses mask them and attention
    masks are of minus infinity on purpose. So are negative weights, which Keras takes and some fields use.

    Args:
        batch: (x,), (x, y) or (x, y, sample_weight), each leaf (rows, ...), as NumPy arrays.
        rows: for each row of the batch, its number in the data set: shape (rows,).
        num_classes: where y holds the numbers of classes (sparse categorical crossentropy), how many the model's output
            has; for several outputs by path, such as {"y['kind']": 10}.
        ignore_class: the label besides that the loss passes over; likewise.
        has_own_loss: whether code that is not Keras's takes the loss of y.
        with_loss: the targets that a loss is taken of, by path; None: all.

    Raises:
        DataError: naming the place, the row in the data set, the column, the rule and the fix.
    """
    for path, leaf in leaves(batch):
        part = path.split("[")[0]
        check_dtype(path, leaf)
        is_used = with_loss is None or any(path.startswith(each) for each in with_loss)
        _check_finite(path, leaf, rows, may_be_masked=part == "x" or (part == "y" and (has_own_loss or not is_used)))
        classes = _of(path, num_classes)
        if part == "y" and classes is not None:
            _check_labels(path, leaf, rows, classes, _of(path, ignore_class))
        if part == "sample_weight" and leaf.dtype.kind != "c" and np.any(leaf < 0):
            log.warning("%s; weights below 0 turn a row's loss around", _place(path, leaf, rows, leaf < 0))


def _check_finite(path: str, leaf: Array, rows: npt.NDArray[np.int64], may_be_masked: bool) -> None:
    if not (leaf.dtype.kind in "fc" or leaf.dtype.name.startswith(("bfloat", "float8"))):
        return
    wrong = ~np.isfinite(leaf)
    if not may_be_masked:
        _raise_at(path, leaf, rows, wrong, "all of it must be finite numbers; drop such rows, or fill them in")
    elif wrong.any():
        log.warning(
            "%s; there are %d such values in this mini-batch: unless model or loss mask them, the weights become NaN",
            _place(path, leaf, rows, wrong),
            np.count_nonzero(wrong),
        )


def _check_labels(path: str, leaf: Array, rows: npt.NDArray[np.int64], classes: int, ignored: int | None) -> None:
    if leaf.dtype.kind not in "biuf":
        raise DataError(f"{path} has dtype {leaf.dtype.name}: the numbers of classes must be integers")
    whole = leaf == np.floor(leaf) if leaf.dtype.kind == "f" else np.ones(leaf.shape, bool)
    _raise_at(path, leaf, rows, ~whole, "the numbers of classes must be whole; for other targets use another loss")
    wrong = (leaf < 0) | (leaf >= classes)
    if ignored is not None:
        wrong &= leaf != ignored
    first_is_one = leaf.size > 0 and np.min(leaf) >= 1 and np.max(leaf) == classes
    fix = "labels count from 0: subtract 1" if first_is_one else "give the last layer more units, or correct the labels"
    also = f", or {ignored}, which is ignored" if ignored is not None else ""
    _raise_at(
        path, leaf, rows, wrong, f"the model has {classes} classes, so labels must be 0 to {classes - 1}{also}; {fix}"
    )


def _raise_at(path: str, leaf: Array, rows: npt.NDArray[np.int64], wrong: Any, rule: str) -> None:
    if np.any(wrong):
        raise DataError(f"{_place(path, leaf, rows, wrong)}: {rule}")


def _place(path: str, leaf: Array, rows: npt.NDArray[np.int64], wrong: Any) -> str:
    row, *column = np.argwhere(wrong)[0].tolist()
    where = f", column {', '.join(map(str, column))}" if column else ""
    return f"{path} is {leaf[(row, *column)]} in row {rows[row]}{where}"


def _of(path: str, value: Classes) -> int | None:
    if isinstance(value, Mapping):
        return value.get(path)
    return value
