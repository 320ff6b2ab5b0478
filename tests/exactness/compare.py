"""Owns what "the same" means: the largest differences between two runs, and how large they may be. Plain NumPy."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from exactness.cases import FLOAT32_FACTOR, FLOAT64_BOUND

GROUPS = ("weights", "optimizer", "history", "predictions")


@dataclass(frozen=True)
class Comparison:
    """The largest difference of each group, and its bound."""

    differences: dict[str, float]
    bounds: dict[str, float]

    @property
    def too_large(self) -> dict[str, str]:
        return {
            group: f"{found:.3g} > {self.bounds[group]:.3g}"
            for group, found in self.differences.items()
            if not found <= self.bounds[group]
        }


def compare(ranks: Sequence[Any], reference: Any) -> Comparison:
    """Compare what the ranks ended with (their `Outcome`s, in rank order) with plain Keras (a `Reference`)."""
    names = list(ranks[0].predictions)
    parts = [rank.predictions for rank in ranks if rank.predictions]
    predictions = {name: np.concatenate([part[name] for part in parts]) for name in names}
    found = {**vars(ranks[0]), "predictions": predictions}
    plain = vars(reference.run)
    differences = {group: largest_difference(found[group], plain[group]) for group in GROUPS}
    if not reference.again:
        return Comparison(differences, dict.fromkeys(GROUPS, FLOAT64_BOUND))
    own = {
        group: max(largest_difference(vars(run)[group], plain[group]) for run in reference.again) for group in GROUPS
    }
    own["history"] = max(own["history"], _last_place(plain["history"]))
    return Comparison(differences, {group: FLOAT32_FACTOR * value for group, value in own.items()})


def largest_difference(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Over all numbers of all arrays; infinite where there is no number on one side only."""
    assert sorted(one) == sorted(other), f"{sorted(one)} are not {sorted(other)}"
    largest = 0.0
    for name, value in one.items():
        assert value.shape == other[name].shape, f"{name}: {value.shape} is not {other[name].shape}"
        a, b = value.astype(np.float64), other[name].astype(np.float64)
        same = (a == b) | (np.isnan(a) & np.isnan(b))
        distance = np.where(same, 0.0, np.abs(a - b))
        largest = max(largest, float(np.max(np.where(np.isnan(distance), np.inf, distance), initial=0.0)))
    return largest


def _last_place(arrays: dict[str, Any]) -> float:
    """One unit in the last place of the largest number, in float32.

    A sum over ranks may round a metric to the neighbouring number even where, by chance, no plain run does.
    """
    return float(np.spacing(np.float32(max(np.max(np.abs(array), initial=0.0) for array in arrays.values()))))
