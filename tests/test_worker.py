"""Claims about what a worker reports of what was raised in it."""

import keras
import numpy as np
import pytest

from dtrain import worker
from dtrain.collective import LocalCollective
from dtrain.errors import LostPeer
from dtrain.replica import Replica
from dtrain.types import Failure, Position, Segment


def test_a_layer_that_only_gpus_compute_in_channels_first_is_reported_with_the_fix() -> None:
    layer = keras.layers.Conv2D(2, 3, data_format="channels_first", dtype="float64")
    with pytest.raises(Exception, match="NHWC") as caught:  # in float64 on every CPU, with oneDNN too
        layer(np.zeros((1, 2, 5, 5)))
    failure = worker._failure(caught.value)
    for text in (failure.error, failure.traceback):
        assert 'data_format="channels_last"' in text and "set_image_data_format" in text and "use_gpu=True" in text


@pytest.mark.parametrize(
    ("message", "is_that"),
    [
        ("Conv2DCustomBackpropFilterOp only supports NHWC.\n\t [[{{node gradient_tape/conv}}]]", True),
        ("Conv2DCustomBackpropInputOp only supports NHWC. [Op:Conv2DBackpropInput]", True),
        ("The Conv3D op currently only supports the NDHWC tensor format on the CPU.", True),
        ("Depthwise convolution on CPU is only supported for NHWC format", True),
        ("Dimensions must be equal, but are 3 and 4", False),
        ("my layer takes NHWC or NCHW", False),
    ],
)
def test_the_fix_is_told_for_what_tensorflow_says_of_channels_first_alone(message: str, is_that: bool) -> None:
    assert ("channels_last" in worker._failure(ValueError(message)).error) == is_that


def test_a_rank_whose_call_has_ended_in_an_error_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would be to blame where another one waits for what has died."""
    own = worker.Worker("run", 0)
    replica = own._replica = Replica(keras.Sequential([keras.layers.Dense(1)]), LocalCollective())

    def run(segment: Segment) -> None:
        replica.beat("reading data")
        raise LostPeer("the others are gone")

    monkeypatch.setattr(replica, "run", run)
    assert isinstance(own.run(Segment(Position(0, 0), 1)), Failure)
    assert own.heartbeat().waits
