"""Owns what a checkpoint says of a fit, and in which of its files that stands: plain values, no TensorFlow.

    model.safetensors      the variables of model and optimizers, equal on all ranks (random seeds as rank 0 has them)
    rank-0000.safetensors  what rank 0 alone has: metric sums, gradients not yet applied, its random generators
    rank-0001.safetensors  the same of rank 1, and so on
    fit.json               the newest logs, and the state of the callbacks, Keras's History the first of them
    fit.safetensors        the arrays in it

When a checkpoint is made is decided in controller.py; what is in the arrays is read and put back in rank_state.py.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import ml_dtypes
import numpy as np

from dtrain.callback_checkpoint import CallbackState
from dtrain.checkpoint import MODEL_FILE, FileRecord, LoadedCheckpoint, Staging
from dtrain.errors import CheckpointError
from dtrain.state_tree import pack, unpack
from dtrain.types import Array, Logs, Position, Segment, SegmentResult

FIT = "fit"
ACCUMULATED = "accumulated/"
"""What a rank's gradients not yet applied are called in its file: this, and their place in the model's file."""

CallbackStates = list[CallbackState | None]


@dataclass(frozen=True)
class Snapshot:
    """A rank's part of a checkpoint, in memory: nothing in it changes while training goes on.

    Attributes:
        position: the next mini-batch to train on.
        own: what this rank alone has.
        state: on rank 0: the variables of model and optimizers, by name; None on the others.
        callbacks: on rank 0: their states.
        logs: on rank 0: those after the last mini-batch, of an epoch that may have no more.
        has_begun: the hook of the epoch that `position` is in was called.
        batches: a checksum of the batches before `position`; None where data have rows.
    """

    position: Position
    own: Mapping[str, Array]
    state: Mapping[str, Array] | None = None
    callbacks: CallbackStates = field(default_factory=list)
    logs: Logs = field(default_factory=dict)
    has_begun: bool = False
    batches: int | None = None


@dataclass(frozen=True)
class SavedFit:
    """A fit to go on with, as a checkpoint has it.

    Attributes:
        position: the next mini-batch to train on.
        step: mini-batches trained since the run began.
        state: the variables of model and optimizers, by name.
        own: what each rank alone had, in rank order.
        callbacks: their states.
        logs: those after the last mini-batch.
        metrics: what the manifest says of them.
        stopped: a callback had stopped the training.
        finished: the fit was over, its averages or best weights in place.
        has_begun: the hook of the epoch that `position` is in was called.
        is_own_told: `own` is what ranks that are lost have told last, which is without gradients.
        is_own_older: `own` is of an epoch before: metrics have begun anew since.
        batches: a checksum of the batches before `position`; None where data have rows, or nobody knows.
    """

    position: Position
    step: int
    state: Mapping[str, Array]
    own: tuple[Mapping[str, Array], ...]
    callbacks: CallbackStates
    logs: Logs
    metrics: Logs
    stopped: bool = False
    finished: bool = False
    has_begun: bool = False
    is_own_told: bool = False
    is_own_older: bool = False
    batches: int | None = None


@dataclass(frozen=True)
class Knowledge:
    """What a training step has shown of itself where it was traced, or run eagerly.

    Attributes:
        returned: what a custom step returns (see `dtrain.step.Steps.returned`).
        places: how that is nested.
        frozen: of each layer, whether it was frozen when the step was traced.
    """

    returned: dict[str, Any] | None
    places: Mapping[str, tuple[str, ...]]
    frozen: list[bool] | None


@dataclass(frozen=True)
class Standing:
    """How far a rank has come with a fit, as rank after rank tells when the group broke.

    Attributes:
        segments: how many it has finished.
        steps: of the one under way, how many it has finished.
        stage: of its epoch, what of the hooks and the validation is behind it.
        hooks: twice how many hooks of the fit it has called and the ranks agreed on, and one more where there is one
            that they have yet to agree on.
        result: of the last segment that it has finished.
        goes_on: the fit can go on from here in another group; not where nobody could find out what is lost with one.
    """

    segments: int
    steps: int
    stage: int
    hooks: int
    result: SegmentResult | None
    goes_on: bool

    @property
    def place(self) -> tuple[int, int, int, int]:
        """To be compared: the rank with the largest is the furthest."""
        return self.segments, self.steps, self.stage, self.hooks

    def can_catch_up_with(self, other: "Standing") -> bool:
        """Whether it lacks no more than an update that the other has made: that is all in the state.

        Of its metrics it then lacks what its own rows of that step would add; with `sync_every`, of those steps.
        """
        return (self.segments, self.stage, self.hooks) == (other.segments, other.stage, other.hooks)


@dataclass(frozen=True)
class Part:
    """What came of a segment that was interrupted.

    Attributes:
        segment: it.
        steps: how many of its steps are finished.
        rows: of these.
        seconds: that they took.
        ended: the epoch has no more of them.
        step_logs: their logs over all ranks, if the ranks still got as far as that.
        validation: the same of the validation.
    """

    segment: Segment
    steps: int
    rows: int
    seconds: float
    ended: bool
    step_logs: Mapping[str, Array] | None
    validation: Logs | None


@dataclass(frozen=True)
class Handover:
    """What a rank of a broken group tells one that is behind it, or is new.

    Attributes:
        fit: as a checkpoint would have it now, without what each rank has of its own.
        segments: how many are finished.
        result: of the last of them.
        part: of the one under way.
        has_begun: the epoch's hook was called and its metrics are reset.
        half_done: a hook that was called, and that the ranks have yet to agree on.
        hooks: how many hooks of the fit were called and agreed on.
        batch: of hooks of single batches, how far they are (see `dtrain.batch_hooks.BatchHooks.place`).
        own: what a custom step returned besides metrics, in the part's steps, times the rank's share.
        knowledge: of the training step.
        stop: a callback set `stop_training`.
        leads: callbacks that run on rank 0 alone run there, so their states in `fit` are of this moment.
        draws: how many numbers each random generator has given since so many segments were finished: `segments` of
            them (0: since the fit began), and one less, for one that died before it could tell of the last.
        is_final: nothing more is trained, and averages have taken the weights' place.
        has_ended: `on_train_end` was called, too, and agreed on.
        ends: of epochs that are over, how many steps they had.
    """

    fit: SavedFit
    segments: int
    result: SegmentResult | None
    part: Part | None
    has_begun: bool
    half_done: tuple[str, tuple[Any, ...]] | None
    hooks: int
    batch: tuple[int | None, tuple[int, int] | None]
    own: Mapping[str, Array]
    knowledge: Knowledge
    stop: bool
    leads: bool
    draws: Mapping[int, Sequence[int]]
    is_final: bool
    has_ended: bool
    ends: Mapping[int, int]


@dataclass(frozen=True)
class Lost:
    """Of what ranks that died knew alone, what they have told with their last segment.

    Attributes:
        own: what each rank alone had, if they have told it: where new ones take the places of the dead, of every rank,
            in rank order (those that live on keep what they have), else of the dead.
        segments: how many were finished when it was told.
        is_older: it was told in an epoch before.
        callbacks: where rank 0 died, the states of the callbacks that ran there alone; None in the others' places.
    """

    own: tuple[Mapping[str, Array], ...] = ()
    is_older: bool = False
    callbacks: CallbackStates = field(default_factory=list)
    segments: int = 0

    def completed(self, fit: SavedFit) -> SavedFit:
        """What a rank that lives has handed over, with that in it."""
        callbacks = self.with_callbacks_of(fit)
        return replace(fit, own=self.own, is_own_told=True, is_own_older=self.is_older, callbacks=callbacks)

    def with_callbacks_of(self, fit: SavedFit) -> CallbackStates:
        """The states of all callbacks: what was handed over is newer than what the dead have told."""
        told = self.callbacks or [None] * len(fit.callbacks)
        history, *others = [state or first for first, state in zip(told, fit.callbacks, strict=True)]
        # Keras's History is complete on every rank, and the dead one may have called the end of an epoch untold.
        return [fit.callbacks[0] or history, *others]


def write(snapshot: Snapshot, staging: Staging, rank: int) -> tuple[FileRecord, ...]:
    """Write a rank's part into a staging folder; what the manifest is to say of it.

    Raises:
        CheckpointError: it cannot be written.
    """
    records = [staging.write_tensors(_rank_file(rank), snapshot.own)]
    if snapshot.state is not None:
        _check_numbers(snapshot.state)
        records.append(staging.write_tensors(MODEL_FILE, snapshot.state))
        arrays: dict[str, Array] = {}
        logs = pack(snapshot.logs, "logs", arrays)
        named = {f"logs/{key}": array for key, array in arrays.items()}
        states = []
        for number, state in enumerate(snapshot.callbacks):
            states.append(None if state is None else {"kind": state.kind, "values": state.values})
            named.update((f"{number}/{key}", array) for key, array in (state.arrays if state else {}).items())
        known = {"has_begun": snapshot.has_begun, "batches": snapshot.batches}
        records.append(staging.write_json(f"{FIT}.json", {"callbacks": states, "logs": logs, **known}))
        records.append(staging.write_tensors(f"{FIT}.safetensors", named))
    return tuple(records)


def _check_numbers(state: Mapping[str, Array]) -> None:
    """Refuse what no fit could go on from."""
    for name, array in state.items():
        # NumPy does not count bfloat16 among its floating-point numbers.
        if (array.dtype.kind == "f" or array.dtype == ml_dtypes.bfloat16) and np.isnan(array).any():
            raise CheckpointError(f"{name} is NaN, so this would be a checkpoint that nothing can be gone on from")


def read(loaded: LoadedCheckpoint) -> SavedFit:
    """The fit that a verified checkpoint is of.

    Raises:
        CheckpointError: it lacks what a fit needs.
    """
    manifest, tensors = loaded.manifest, loaded.tensors
    try:
        fit = loaded.state[f"{FIT}.json"]
        arrays: dict[str, dict[str, Array]] = defaultdict(dict)
        for name, array in tensors[f"{FIT}.safetensors"].items():
            place, _, key = name.partition("/")
            arrays[place][key] = array
        callbacks: CallbackStates = [
            None if state is None else CallbackState(**state, arrays=arrays[str(number)])
            for number, state in enumerate(fit["callbacks"])
        ]
        history_of(callbacks)
        return SavedFit(
            manifest.position,
            manifest.step,
            dict(sorted(tensors[MODEL_FILE].items())),
            _own_of_ranks(loaded),
            callbacks,
            unpack(fit["logs"], arrays["logs"]),
            dict(manifest.metrics),
            bool(manifest.extra.get("stopped")),
            bool(manifest.extra.get("finished")),
            bool(fit["has_begun"]),
            batches=None if fit.get("batches") is None else int(fit["batches"]),
        )
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{loaded.checkpoint.url} is whole, but is not of a fit ({error!r}); Trainer.restore takes over its weights"
        ) from error


def state_of(loaded: LoadedCheckpoint) -> dict[str, Array]:
    """The variables of model and optimizers; what each rank has accumulated of a gradient is added up.

    Raises:
        CheckpointError: it has none.
    """
    try:
        state = dict(sorted(loaded.tensors[MODEL_FILE].items()))
        names = {ACCUMULATED + place_of(name): name for name in state}
        for own in _own_of_ranks(loaded)[1:]:
            for place, array in own.items():
                if place.startswith(ACCUMULATED):
                    state[names[place]] = state[names[place]] + array
        return state
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{loaded.checkpoint.url} is whole, but has no state of a model ({error!r})") from error


def place_of(name: str) -> str:
    """A variable's group and place of its name in a state; what follows differs, as Keras counts in a process."""
    return "/".join(name.split("/")[:2])


def history_of(callbacks: CallbackStates) -> tuple[dict[str, list[Any]], list[int]]:
    """Keras's history, and the numbers of its epochs."""
    state = callbacks[0]
    if state is None:
        raise ValueError("no history")
    history, epochs = (unpack(state.values["attributes"][name], state.arrays) for name in ("history", "epoch"))
    return history, epochs


def _own_of_ranks(loaded: LoadedCheckpoint) -> tuple[Mapping[str, Array], ...]:
    """What each rank alone had, in rank order; KeyError where there are not as many as the manifest says."""
    found = sorted((name for name in loaded.tensors if name.startswith("rank-")), key=lambda name: (len(name), name))
    if found != [_rank_file(rank) for rank in range(min(loaded.manifest.world_size, len(found) + 1))]:
        raise KeyError(f"files of {loaded.manifest.world_size} ranks")
    return tuple(loaded.tensors[name] for name in found)


def _rank_file(rank: int) -> str:
    return f"rank-{rank:04d}.safetensors"
