"""The stated exceptions: what BatchNormalization and random layers promise on several ranks, and what is refused."""

from typing import Any

import numpy as np
import pytest

from exactness.cases import DTYPES, MIXED, ONE_STEP, SIZES, UNEVEN, Run
from exactness.compare import compare, largest_difference


@pytest.mark.parametrize("world_size", [2, 3])
def test_batch_normalization_has_the_same_bits_on_all_ranks(lab: Any, world_size: int) -> None:
    runs = [Run(size) for size in SIZES]
    ranks = lab.run(world_size, "batch_normalization", "float32", runs)
    for run in runs:
        assert len({rank[run].digest for rank in ranks}) == 1, run
        assert np.isfinite(moving(ranks[0][run], "moving_variance")).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("world_size", [2, 3])
def test_the_moving_mean_after_one_step_is_plain_keras(lab: Any, world_size: int, dtype: str) -> None:
    run, wrong = Run(ONE_STEP), Run(ONE_STEP, wrong="1/N")
    feature = "batch_normalization_one_step"
    reference = lab.plain_at(feature, dtype, [ONE_STEP])[ONE_STEP]
    rank, *_ = lab.run(world_size, feature, dtype, [run, wrong])
    plain = {"": moving(reference.run, "moving_mean")}
    bound = 1e-10
    if dtype == "float32":
        bound = 2 * max(largest_difference({"": moving(run, "moving_mean")}, plain) for run in reference.again)
    assert largest_difference({"": moving(rank[run], "moving_mean")}, plain) <= bound
    assert largest_difference({"": moving(rank[wrong], "moving_mean")}, plain) > bound


def test_random_layers_repeat_to_the_last_bit_at_the_same_n(lab: Any) -> None:
    run = Run(UNEVEN)
    first, second = (lab.run(2, "dropout", "float32", [run]) for _ in range(2))
    assert len({rank[run].digest for rank in [*first, *second]}) == 1
    assert largest_difference(first[0][run].history, second[0][run].history) == 0


def test_random_layers_draw_other_numbers_on_each_rank_and_plain_keras_s_on_rank_0(lab: Any) -> None:
    def masks(collective: Any) -> Any:
        from exactness.runs import dropout_masks

        return dropout_masks(collective)

    (plain, alone), *_ = lab.ranks.run(1, masks)
    (_, first), (_, second), (_, third) = lab.ranks.run(3, masks)
    assert plain.any() and not plain.all()
    assert np.array_equal(alone, plain) and np.array_equal(first, plain)
    assert len({mask.tobytes() for mask in (first, second, third)}) == 3


def test_a_step_that_reduces_nothing_is_refused_by_name(lab: Any) -> None:
    def refusal(collective: Any) -> str:
        from exactness.runs import refusal_of_a_step_without_optimizer

        return refusal_of_a_step_without_optimizer(collective)

    for message in lab.ranks.run(2, refusal):
        assert "UpdatesNothing.train_step" in message
        assert "self.optimizer.apply" in message


def test_an_optimizer_that_the_model_does_not_hold_is_refused_by_name(lab: Any) -> None:
    def refusal(collective: Any) -> str:
        from exactness.runs import refusal_of_a_hidden_optimizer

        return refusal_of_a_hidden_optimizer(collective)

    for message in lab.ranks.run(2, refusal):
        assert "optimizer 'hidden', which the model does not hold" in message
        assert "make it an attribute of the model" in message


def test_gradients_that_would_be_reduced_twice_or_not_at_all_are_refused(lab: Any) -> None:
    def refusals(collective: Any) -> list[str]:
        from exactness.runs import refusals_of_gradients_reduced_wrongly

        return refusals_of_gradients_reduced_wrongly(collective)

    for unreduced, twice in lab.ranks.run(2, refusals):
        assert "give it what reduce_gradients returned" in unreduced
        assert "does not go with gradient_accumulation_steps" in twice


def test_a_stateful_layer_is_refused_on_several_ranks(lab: Any) -> None:
    def refusal(collective: Any) -> str:
        from exactness.runs import refusal_of_a_stateful_layer

        return refusal_of_a_stateful_layer(collective)

    for message in lab.ranks.run(2, refusal):
        assert "layer 'remembers' is stateful" in message and "stateful=False" in message
    assert lab.ranks.run(1, refusal) == ["it was not refused"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_unsynchronised_batch_normalization_is_an_exception_indeed(lab: Any, dtype: str) -> None:
    """If this fails the exception is gone, and the feature belongs among those that are equal."""
    run = Run(UNEVEN)
    reference = lab.plain_at("batch_normalization", dtype, [UNEVEN])[UNEVEN]
    ranks = lab.run(2, "batch_normalization", dtype, [run])
    assert compare([rank[run] for rank in ranks], reference).too_large


@pytest.mark.parametrize("feature", MIXED)
@pytest.mark.parametrize("world_size", [2, 3])
def test_mixed_precision_is_no_further_from_float32_than_plain_keras_is(
    lab: Any, world_size: int, feature: str
) -> None:
    run = Run(UNEVEN)
    exact = lab.plain_at("mixed_float32", "float32", [UNEVEN])[UNEVEN].run.weights
    plain = lab.plain_at(feature, "float32", [UNEVEN])[UNEVEN].run.weights
    ranks = [rank[run] for rank in lab.run(world_size, feature, "float32", [run])]
    assert len({rank.digest for rank in ranks}) == 1
    assert 0 < largest_difference(ranks[0].weights, exact) <= 2 * largest_difference(plain, exact)


def moving(outcome: Any, name: str) -> Any:
    (value,) = [array for key, array in outcome.weights.items() if key.endswith(name)]
    return value
