"""Claims about a model as a whole: what it holds, and its state."""

import keras

from dtrain.model import optimizers_of


def test_optimizers_are_found_however_deep_and_the_compiled_one_is_first() -> None:
    first, second, third, fourth, compiled, inner = (keras.optimizers.SGD(name=name) for name in "abcdef")

    class Holder(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.before = first
            self.many = {"one": second, "more": [{"deep": (third,)}]}
            self.part = keras.layers.Dense(1)
            self.part.own = [fourth]

    model = Holder()
    model.compile(keras.optimizers.LossScaleOptimizer(inner, name="outer"), "mse")
    model.inner = inner
    model.many["again"] = first
    assert [optimizer.name for optimizer in optimizers_of(model)] == ["outer", "a", "b", "c", "d"]
    model.compile(compiled, "mse")
    assert optimizers_of(model)[0] is compiled
