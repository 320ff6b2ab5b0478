"""Training curves."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from dtrain import plots
from dtrain.plots import training_curves


def panels(figure: Figure) -> dict[str, list[str]]:
    """The labels of the lines in each panel."""
    return {
        axes.get_title("left"): [str(line.get_label()) for line in axes.lines] for axes in figure.axes if axes.axison
    }


def test_training_and_validation_share_a_panel_and_the_learning_rate_has_its_own() -> None:
    names = ["learning_rate", "accuracy", "loss", "val_accuracy", "val_loss"]
    figure = training_curves({name: [1.0, 0.5] for name in names}, [0, 1], "a run")
    both = ["training", "validation"]
    assert panels(figure) == {"loss": both, "accuracy": both, "learning rate": ["training"]}
    assert figure.axes[0].get_title("left") == "loss"


@pytest.mark.parametrize(("rates", "scale"), [([1e-2, 1e-5], "log"), ([1e-2, 5e-3], "linear"), ([0.0, 1.0], "linear")])
def test_a_learning_rate_over_decades_has_a_log_axis(rates: list[float], scale: str) -> None:
    assert training_curves({"learning_rate": rates}, [0, 1]).axes[0].get_yscale() == scale


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8])
def test_there_are_at_most_two_columns(count: int) -> None:
    figure = training_curves({f"m{i}": [1.0] for i in range(count)}, [0])
    assert len(panels(figure)) == count
    assert len({round(axes.get_subplotspec().colspan.start) for axes in figure.axes}) <= 2


@pytest.mark.parametrize("values", [[1.0], [math.nan], [math.inf, 1.0, math.nan], [math.nan, math.nan], [1e30, -1e30]])
def test_any_values_can_be_drawn(values: list[float], tmp_path: Path) -> None:
    history = {"loss": values, "val_loss": values, "learning_rate": values}
    training_curves(history, list(range(len(values)))).savefig(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


def test_a_metric_that_is_an_array_has_no_curve() -> None:
    figure = training_curves({"loss": [1.0, 0.5], "f1_score": [np.zeros(3), np.ones(3)]}, [0, 1])  # type: ignore[dict-item]
    assert panels(figure) == {"loss": ["training"]}


def test_one_epoch_is_a_marker_and_epochs_count_from_one() -> None:
    line = training_curves({"loss": [0.3]}, [4]).axes[0].lines[0]
    assert (list(line.get_xdata()), line.get_marker()) == ([5], "o")


def test_a_validation_every_other_epoch_stands_where_it_was_made() -> None:
    figure = training_curves({"loss": [4.0, 3.0, 2.0, 1.0], "val_loss": [3.0, 1.0]}, [0, 1, 2, 3])
    assert list(figure.axes[0].lines[1].get_xdata()) == [2, 4]


def test_pyplot_is_never_loaded() -> None:
    code = "import sys; from dtrain.plots import training_curves as t"
    code += "; t({'loss': [1.0]}, [0]).savefig('/dev/null', format='png')"
    code += "; assert 'matplotlib.pyplot' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(plots.__file__).parents[1])
