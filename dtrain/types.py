"""Owns the values that travel between rooms and processes: frozen dataclasses of plain fields, no behaviour.

Nothing here imports TensorFlow, Ray or MLflow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy.typing as npt

Array = npt.NDArray[Any]
Tree = Any
"""A NumPy array, or a dict, list or tuple of trees (None where there is nothing)."""

Shapes = Mapping[str, tuple[int | None, ...]]
"""Of leaves by path, without the rows; None: any size."""

Logs = dict[str, float]
"""Metrics by name, as Keras hands them to callbacks."""


@dataclass(frozen=True)
class Position:
    """The next mini-batch to train on: `step` counts the mini-batches of the whole job within `epoch`, from 0."""

    epoch: int
    step: int


@dataclass(frozen=True)
class Segment:
    """The unit of conversation: train `num_steps` mini-batches from `position` on, within one epoch."""

    position: Position
    num_steps: int


@dataclass(frozen=True)
class Membership:
    """One process's place in the group that all-reduces together.

    `generation` counts the groups of a job; a name of an older one is refused by the rendezvous.
    """

    rank: int
    world_size: int
    local_rank: int = 0
    local_size: int = 1
    cross_rank: int = 0
    cross_size: int = 1
    generation: int = 0


@dataclass(frozen=True)
class WorkerInfo:
    """Where a rank runs."""

    rank: int
    pid: int
    host: str
    node_id: str
    gpus: tuple[int, ...] = ()
    cpu: str = ""
    """The name of its processor."""


@dataclass(frozen=True)
class BatchPlan:
    """Which rows make up each mini-batch of the whole job: all that a sampler needs to know.

    Attributes:
        num_rows: rows in the data set.
        batch_size: rows in a mini-batch of the whole job; the last of a pass may have fewer.
        steps_per_epoch: mini-batches in an epoch; None: one pass over the data.
        shuffle: True: a new order every pass; "batch": of the rows inside each mini-batch only; False: as given.
        seed: of the shuffling; a run's seed and the number of the fit, say.
        blocks: rows in each block of a data set that is read block by block; empty: the rows have no blocks, or are to
            come in the order given.
        lanes: how many blocks a mini-batch draws on, at most, where there are blocks.
    """

    num_rows: int
    batch_size: int
    steps_per_epoch: int | None = None
    shuffle: bool | str = False
    seed: tuple[int, ...] = (0,)
    blocks: tuple[int, ...] = ()
    lanes: int = 32


@dataclass(frozen=True)
class Batching:
    """How data are to be cut into mini-batches, as the user asked for it: a BatchPlan before the data are there.

    Attributes:
        batch_size: None: `usual_batch_size`, or Keras's default; it must be None where the data come in batches.
        steps: mini-batches in an epoch, or to evaluate or predict; None: one pass over the data.
        shuffle: as in BatchPlan; of what comes in batches, only a PyDataset's batches are shuffled.
        seed: of the shuffling.
        usual_batch_size: what holds where neither `batch_size` is given nor the data come in batches.
        in_any_order: a whole pass may take the rows in the order in which each worker reads fewest blocks.
    """

    batch_size: int | None = None
    steps: int | None = None
    shuffle: bool | str = False
    seed: tuple[int, ...] = (0,)
    usual_batch_size: int | None = None
    in_any_order: bool = False


@dataclass(frozen=True)
class FitPlan:
    """What a worker needs to know of a fit besides the data and the callbacks.

    `train` and `validation` are plans where the driver knows the number of rows, and Batchings where it does not;
    `check_replicas_every` as in `FailureConfig`.
    """

    train: BatchPlan | Batching
    epochs: int
    initial_epoch: int = 0
    validation: BatchPlan | Batching | None = None
    validation_freq: int | Sequence[int] = 1
    record_steps: bool = True
    check_replicas_every: int | None = None


@dataclass(frozen=True)
class EpochEnd:
    """What an epoch ended with: the epoch's logs, as Keras hands them to `on_epoch_end`, and the learning rate."""

    epoch: int
    logs: Logs
    learning_rate: float | None


@dataclass(frozen=True)
class SegmentResult:
    """What a rank returns from a segment.

    Attributes:
        position: the next mini-batch to train on.
        step_logs: for each metric, its value after each step of the segment (running over the epoch, as Keras
            shows it), the same on all ranks; empty where steps are not recorded.
        logs: the last of them.
        seconds: time that the steps took, without validation and callbacks.
        learning_rate: the optimizer's, after the last step, where it has one.
        epoch_end: set when the segment ended an epoch.
        stop: training is over: a callback set `stop_training`.
        own: what this rank alone has, in a group of several: another can then be put in its place.
        callbacks: on rank 0 of such a group, for the same reason: the states of those callbacks that run there alone.
        not_finite_from: the step of the segment from which on this rank's part of the loss is not finite, counted from
            0; the last one where single steps are not kept; None: it is.
        skipped: steps of the epoch that were left out since they made a weight NaN or infinite, and whether this rank's
            own part of the loss was not finite.
        spent: of `seconds`, those that this rank was "reading data", in "callbacks" of batches and "computing"; the
            others it waited for other ranks.
    """

    position: Position
    num_steps: int
    rows: int
    seconds: float
    logs: Logs
    step_logs: Mapping[str, Array] = field(default_factory=dict)
    learning_rate: float | None = None
    epoch_end: EpochEnd | None = None
    stop: bool = False
    own: Mapping[str, Array] = field(default_factory=dict)
    callbacks: Sequence[Any] = ()
    not_finite_from: int | None = None
    skipped: Mapping[int, bool] = field(default_factory=dict)
    spent: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """What the progress bar polls from a worker while it runs."""

    phase: str
    epoch: int = 0
    step: int = 0
    steps: int = 0
    logs: Logs = field(default_factory=dict)
    printed: tuple[str, ...] = ()


IN_STEP = "a step"
"""What a rank does while it computes and sums gradients, which from outside nobody can tell apart."""
BETWEEN_SEGMENTS = "between two segments"
"""What it does while it has nothing to do."""


@dataclass(frozen=True)
class Beat:
    """What a rank answers while a fit runs.

    Attributes:
        beats: how many things it has finished: calls, chunks, hooks.
        doing: what it does now, in words.
        waits: it does something that only ends when all ranks do it.
        is_new: it has not done before what it does now, and may be building the graph of it.
    """

    beats: int
    doing: str
    waits: bool
    is_new: bool


@dataclass(frozen=True)
class ModelDescription:
    """What is recorded of a model: plain values, made on a worker, read in the driver."""

    name: str
    summary: str
    num_parameters: int
    num_trainable: int
    optimizer: str
    loss: str
    metrics: tuple[str, ...]
    learning_rate: float | None
    signature: str
    """A digest of the variables' shapes and dtypes and of the compile configuration: to be the same on all ranks."""
    structure: str
    """A digest of the same and of the layers' settings, the learning rate left out: to be the same when it goes on."""
    exceptions: tuple[str, ...]
    """Sentences on layers for which several workers do not compute what one would."""


Purpose = Literal["train", "validation", "evaluate", "predict"]
"""What data are opened for."""


@dataclass(frozen=True)
class Opened:
    """What rank 0 found when the ranks opened a data set.

    Attributes:
        kind: what it is: "arrays", "tf.data.Dataset", "generator", ...
        example: its first rows, one or a few: (x,), (x, y) or (x, y, sample_weight).
        plan: counts the steps of its epochs, by a Sampler; None: nobody knows how many there are. Of data that come
            in batches, a row of the plan is a batch.
        rows: how many there are, where that is known.
        batch_size: rows of a mini-batch, where they are of one size.
        steps_per_epoch: what Keras shows; None: unknown until the first epoch has ended.
        model: set when the model was built, or got its loss and metrics.
    """

    kind: str
    example: Tree
    plan: BatchPlan | None
    rows: int | None = None
    batch_size: int | None = None
    steps_per_epoch: int | None = None
    model: ModelDescription | None = None


@dataclass(frozen=True)
class Predictions:
    """A rank's part of what was predicted.

    Attributes:
        outputs: one row for each row predicted, in order; None: this rank has none.
        sizes: how many of them are of the first mini-batch, of the second, and so on. The whole is, mini-batch by
            mini-batch, the ranks' parts in rank order.
    """

    outputs: Tree | None
    sizes: tuple[int, ...]


Compression = Literal["fp16", "bf16"]


@dataclass(frozen=True)
class StepOptions:
    """What a user may want of steps besides what Keras does.

    Attributes:
        sync_batch_norm: every BatchNormalization uses the statistics of the whole mini-batch.
        sparse_as_dense: sparse gradients are made dense and summed, instead of gathered as they are.
        skip_nan: a training step that makes a weight NaN or infinite is put back whole.
        compression: dense gradients travel between ranks as floats of 16 bits.
        sync_every: so many steps, each rank trains by itself, between two averages of the weights; 1: gradients are
            summed in every step.
    """

    sync_batch_norm: bool = False
    sparse_as_dense: bool = False
    skip_nan: bool = False
    compression: Compression | None = None
    sync_every: int = 1


@dataclass(frozen=True)
class WorkerSettings:
    """What a worker sets up before it runs any of the user's code.

    Attributes:
        run_name: for the actor's name and its log lines.
        seed: of Python, NumPy, TensorFlow and Keras.
        deterministic: the same operations give the same bits.
        use_gpu: leave the worker the GPUs that Ray gave it; otherwise hide them.
        intra_threads: TensorFlow's threads within an operation.
        inter_threads: TensorFlow's threads across operations.
        keras: what the driver has set in Keras: floatx, epsilon, image_data_format, dtype_policy.
        steps: what training steps are to be like.
        elastic: the group may grow: one of a single worker, too.
    """

    run_name: str
    seed: int
    deterministic: bool
    use_gpu: bool
    intra_threads: int
    inter_threads: int
    keras: Mapping[str, Any] = field(default_factory=dict)
    steps: StepOptions = field(default_factory=StepOptions)
    elastic: bool = False


@dataclass(frozen=True)
class Failure:
    """Why a worker's method did not return a value: something raised, on this rank or through the loss of another.

    Attributes:
        error: one line, "ValueError: ...".
        traceback: the traceback, from the user's own code on where there is any.
        lost_peer: the group broke under this rank, which did nothing wrong itself.
        cause: the exception itself, if it is one of dtrain's own.
        died: the process ended, after it had started.
    """

    error: str
    traceback: str
    lost_peer: bool = False
    cause: Exception | None = None
    died: bool = False
