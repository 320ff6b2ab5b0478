"""Owns which cases are compared, as plain values: pytest collects them without loading TensorFlow."""

from dataclasses import dataclass

DTYPES = ("float64", "float32")
FLOAT64_BOUND = 1e-10
PERMUTED_RUNS = 5
"""Float32 is measured against so many plain runs with the rows inside each mini-batch permuted ..."""
PARTS = (2, 3)
"""... and, in CORE, one with each mini-batch computed in so many parts ..."""
FLOAT32_FACTOR = 2.0
"""... and may differ by at most so many times what the furthest of them differs."""


@dataclass(frozen=True)
class Size:
    """A data set and the mini-batches of it."""

    rows: int
    batch: int

    def __str__(self) -> str:
        return f"{self.rows}/{self.batch}"


@dataclass(frozen=True)
class Run:
    """One fit on several ranks.

    Attributes:
        shuffle: every epoch has an order of its own.
        segment: steps in a segment; None: whole epochs.
        steps_per_call: steps in a call into TensorFlow; None: as many as the Replica thinks good.
        wrong: a mistake that must show: "1/N": each rank's share is 1/N whatever its rows; "counted N times": a
            mini-batch that goes whole to every rank counts on all of them; "rows apart": a loss that mixes rows is
            computed from each rank's own.
    """

    size: Size
    shuffle: bool = False
    segment: int | None = None
    steps_per_call: int | None = None
    wrong: str | None = None


UNEVEN = Size(53, 17)
"""One size with all that can be uneven: 9 + 8 rows, 6 + 6 + 5 rows, and a last mini-batch of 2."""

SIZES = (
    UNEVEN,
    Size(101, 16),  # the last mini-batch has 5 rows
    Size(97, 32),  # ... 1 row, fewer than ranks
    Size(33, 16),  # ... 1 row
    Size(50, 16),  # ... 2 rows: fewer than ranks at N=3 only
    Size(101, 101),  # batch gradient descent
    Size(12, 1),  # stochastic gradient descent
    Size(23, 2),  # at N=3 every mini-batch has fewer rows than ranks
)

CORE = ("sgd_momentum", "adam", "sample_weight")
"""Compared at all sizes, at N=2 and N=3, the first of them in both dtypes; with `--full` all of them.

Float32 is measured by parts, too: the order of one or two rows may change no bit, while how many rows go into a matrix
product decides which kernel computes it, and that in which order it adds.
"""

FEATURES = (
    *CORE,
    "regularizers",
    "several_outputs",
    "adam_usual_epsilon",
    "class_weight",
    "metrics_binary",
    "metrics_of_classes",
    "scalar_metric",
    "cnn",
    "clipnorm",
    "global_clipnorm",
    "clipvalue",
    "weight_decay",
    "ema",
    "accumulation",
    "schedule_nesterov",
    "loss_scaling",
    "masked_lstm",
    "masked_outputs",
    "ignore_class",
    "loss_sum",
    "loss_none",
    "loss_mean_with_sample_weight",
    "sparse_gradients",
    "sparse_gradients_clipped",
    "added_loss",
    "custom_step",
    "custom_step_tensors",
    "short_epochs",
    "long_epochs",
    "unbuilt",
    "eager",
    "deciding_callbacks",
    "user_callback",
    "batch_hooks",
)
"""Equal for any N; those that are not in CORE at one uneven size, in float64 at N=2 or N=3, and some at N=1.

The other combinations run with `--full`.
"""

OPTIMIZERS = (
    "optimizer_Adadelta",
    "optimizer_Adafactor",
    "optimizer_Adagrad",
    "optimizer_Adamax",
    "optimizer_Ftrl",
    "optimizer_Lamb",
    "optimizer_Lion",
    "optimizer_MultiOptimizer",
    "optimizer_Muon",
    "optimizer_Nadam",
    "optimizer_RMSprop",
    "optimizer_ScheduleFreeAdamW",
)

MIXING_ROWS = ("loss_dice", "loss_tversky", "loss_circle", "loss_whole_batch", "loss_mixed_in_custom_step")

SUMS = ("loss_none", "loss_of_rows")
"""Losses whose gradient is a sum over rows: no share is taken of them, so a wrong one changes nothing."""

SPARSE = ("sparse_SGD", "sparse_RMSprop", "sparse_Adagrad", "sparse_Ftrl")
"""Gathered gradients with optimizers that treat them in ways of their own, clipped by value and by norm."""

MORE_FEATURES = (
    *OPTIMIZERS,
    *MIXING_ROWS,
    "normalized_synchronized",
    "normalized_renorm",
    "normalized_sync_batch_norm",
    "normalized_masked",
    "channels_first",
    "accumulation_unfinished",
    "accumulation_sparse",
    "accumulation_loss_scaling",
    "adversaries",
    "losses_stacked",
    "loss_of_rows",
    "loss_weighted_by_token",
    "loss_scalar_weighted",
    *SPARSE,
    "clips_itself",
    "returns_some",
    "own_loss",
    "recurrent",
    "constrained",
    "frozen_and_unused",
    "metrics_of_numbers",
    "metrics_of_labels",
    "metrics_of_one_hot",
    "metrics_of_decisions",
    "sparse_as_dense",
    "skipped_steps",
    "metrics_of_top_k",
    "losses_of_numbers",
    "losses_of_classes",
    "loss_ctc",
)
"""Equal for any N as well; compared in float64 at N=2 or N=3, the rest with `--full`."""

IN_THREE = (
    *MIXING_ROWS,
    *("normalized_synchronized", "normalized_sync_batch_norm", "normalized_masked"),
    *("sparse_gradients", "sparse_gradients_clipped", "accumulation", "accumulation_sparse", "masked_outputs"),
    *("loss_none", "loss_mean_with_sample_weight", "several_outputs", "custom_step_tensors", "adversaries"),
    *("metrics_binary", "cnn", "skipped_steps", "short_epochs", "loss_of_rows", "loss_weighted_by_token"),
)
"""Compared at N=3 rather than 2: what gathers, or sums in an order of its own."""

ALONE = ("custom_step", "custom_step_tensors", "eager", "user_callback", "batch_hooks", "accumulation", "masked_lstm")
"""Compared at N=1, too, where nothing is patched."""

FLOAT64_ONLY = ("adam_usual_epsilon", "adversaries", *OPTIMIZERS)
"""Where float32's own errors are larger than what the bound is measured by (see features.adam_optimizer).

Of the adversaries the second optimizer is built by the first step, and plain runs here share one model.
"""

MIXED = ("mixed_float16", "mixed_bfloat16")
"""Layers that compute in half of float32's bits: partial sums are rounded on each rank."""

FLOAT32_ONLY = ("metrics_of_top_k", "channels_first", "loss_ctc", *MIXED)
"""What there is in float32 alone; what CTC computes within is, too."""

ONE_RANK_ONLY = ("batch_normalization", "dropout", *MIXED)
"""The stated exceptions of several ranks; at N=1 they are plain Keras, too."""


ONE_STEP = Size(17, 17)
"""One mini-batch an epoch, of uneven parts."""


def combinations() -> list[tuple[int, str, str]]:
    """N above 1, feature and dtype, one N after the other: forming a group takes time."""
    return [(n, feature, dtype) for n in (2, 3) for feature, dtype in pairs(*FEATURES, *MORE_FEATURES)]


def is_left_out(world_size: int, feature: str, dtype: str) -> bool:
    """Whether a combination runs with `--full` only."""
    if feature in CORE:
        return dtype == "float32" and feature != CORE[0]
    if dtype != ("float32" if feature in FLOAT32_ONLY else "float64"):
        return True
    if world_size == 1:
        return feature not in (*ONE_RANK_ONLY, *ALONE)
    return world_size != (3 if feature in IN_THREE else 2)


def pairs(*features: str) -> list[tuple[str, str]]:
    """Features with each of their dtypes."""
    other = {**dict.fromkeys(FLOAT64_ONLY, "float32"), **dict.fromkeys(FLOAT32_ONLY, "float64")}
    return [(name, dtype) for name in features for dtype in DTYPES if dtype != other.get(name)]


def with_mistake(feature: str) -> Run:
    """A run that must not end where plain Keras does. Losses that mix rows are whole on every rank for any shares."""
    return Run(UNEVEN, wrong="rows apart" if feature in MIXING_ROWS else "1/N")


def runs_of(feature: str, world_size: int) -> list[Run]:
    """What one Replica of a feature runs: all sizes, and once with a mistake."""
    wrong = [with_mistake(feature)] if world_size > 1 else []
    return [Run(size) for size in sizes_of(feature)] + wrong


def sizes_of(feature: str) -> tuple[Size, ...]:
    return SIZES if feature in CORE else (UNEVEN,)
