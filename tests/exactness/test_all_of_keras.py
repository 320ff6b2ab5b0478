"""No optimizer, loss or metric of Keras is left out of the comparison with plain Keras."""

import inspect
from collections.abc import Iterator
from typing import Any

import keras
import pytest

from exactness.cases import FEATURES, MORE_FEATURES
from exactness.features import FEATURES as BY_NAME

BASES: list[Any] = [keras.losses.Loss, keras.metrics.Metric, keras.optimizers.Optimizer]
NOT_USED_AS_SUCH = {"Loss", "Metric", "MeanMetricWrapper", "Optimizer", "OptimizerMap"}
"""What others are made of."""


@pytest.fixture(scope="module")
def used() -> Iterator[set[type]]:
    """The classes of all that the models of the compared features make, as classes and not by name."""
    found: set[type] = set()

    def recording(plain: Any) -> Any:
        def init(self: Any, *args: Any, **options: Any) -> None:
            found.update(type(self).__mro__)
            plain(self, *args, **options)

        return init

    with pytest.MonkeyPatch.context() as patch:
        for base in BASES:
            patch.setattr(base, "__init__", recording(base.__init__))
        for name in (*FEATURES, *MORE_FEATURES):
            BY_NAME[name].model()
    return found


@pytest.mark.parametrize(
    "module", [keras.losses, keras.metrics, keras.optimizers], ids=["losses", "metrics", "optimizers"]
)
def test_every_class_of_keras_is_in_a_feature_that_is_compared(used: set[type], module: Any) -> None:
    public = {name: kind for name, kind in vars(module).items() if inspect.isclass(kind)}
    assert {name for name, kind in public.items() if kind not in used} <= NOT_USED_AS_SUCH
