"""Owns what a fit goes on from: which checkpoint, whether it fits, and what is no longer as it was.

What is refused here is refused before a worker starts. That the checkpoint is of this model, its workers find out.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from dtrain.checkpoint import LoadedCheckpoint, Manifest, load
from dtrain.errors import CheckpointError, ConfigError
from dtrain.runs import RunFolder
from dtrain.types import BatchPlan, FitPlan, Position

AUTO = "auto"
DATA = "data_digest"

Resume = bool | str
"""False: begin anew; "auto": go on with the run of that name if there is one; else the URL of a checkpoint."""


def check_resume(resume: Any, run_name: str | None, makes_checkpoints: bool) -> Resume:
    """What the user passed to `fit` as `resume`.

    Raises:
        ConfigError: it makes no sense, alone or with the Trainer's other arguments.
    """
    if resume is False or resume is None:
        return False
    if isinstance(resume, os.PathLike):
        resume = os.fspath(resume)
    if not isinstance(resume, str) or not resume:
        raise ConfigError(f'resume={resume!r} must be False, "auto", or the URL of a checkpoint')
    if resume == AUTO and run_name is None:
        raise ConfigError(
            'resume="auto" goes on with the run of a name, and this Trainer has none; pass Trainer(run_name=...), or'
            " --run-name, or the URL of a checkpoint"
        )
    if resume == AUTO and not makes_checkpoints:
        raise ConfigError('resume="auto" contradicts checkpoint=False: leave out one or the other')
    return resume


def find(resume: Resume, folder: RunFolder | None) -> tuple[LoadedCheckpoint | None, tuple[str, ...]]:
    """The checkpoint to go on from, verified, and why newer ones were passed over.

    Raises:
        CheckpointError: the one that was named is missing or damaged, or all of the run's are.
    """
    if resume is False:
        return None, ()
    if resume != AUTO:
        return load(str(resume)), ()
    assert folder is not None
    loaded, refused = folder.checkpoints.latest_valid()
    if loaded is None and refused:
        raise CheckpointError(
            f"run_name={folder.name!r} has no checkpoint that is whole: {refused[0]}; choose another run_name to begin"
            " anew"
        )
    return loaded, refused


def as_begun(manifest: Manifest, plan: FitPlan) -> FitPlan:
    """The plan with the order of rows that the run began with, and its first epoch.

    The order hangs on the seed, and on which fit it was.

    Raises:
        CheckpointError: the manifest says nonsense of them.
    """
    begun = manifest.extra.get("plan", {})
    first, seed = begun.get("initial_epoch", plan.initial_epoch), begun.get("seed") or plan.train.seed
    if type(first) is not int or not (isinstance(seed, (list, tuple)) and all(type(word) is int for word in seed)):
        raise CheckpointError("the checkpoint's manifest has a plan that is none; use another checkpoint")
    seed = tuple(seed)
    return replace(plan, initial_epoch=first, train=replace(plan.train, seed=seed))


def plan_on_record(plan: FitPlan, data: str | None, opened: BatchPlan | None = None) -> dict[str, Any]:
    """What the position of a checkpoint refers to: JSON values.

    Args:
        plan: what is trained.
        data: a digest of its rows; None: nobody knows.
        opened: what the data, once they were open, made of it; of data in batches it knows no order.
    """
    given = plan.train
    order = {"seed": given.seed, "shuffle": given.shuffle, "initial_epoch": plan.initial_epoch}
    contents = {} if data is None else {DATA: data}
    record: dict[str, Any] = json.loads(json.dumps({**asdict(opened or given), **order, **contents}))
    return record


def check_plan(manifest: Manifest, now: Mapping[str, Any]) -> list[str]:
    """What of the plan, as `plan_on_record` gives it, is not as it was, in words.

    Raises:
        CheckpointError: something is, and the checkpoint lies in the middle of an epoch.
    """
    before = manifest.extra.get("plan", {})
    changed = [name for name, value in now.items() if name in before and before[name] != value]
    if changed and manifest.position.step > 0:
        name = changed[0]
        if name == DATA:
            raise CheckpointError(
                f"the rows to train on are others than when the checkpoint was made, {manifest.position.step}"
                f" mini-batches into epoch {manifest.position.epoch + 1}; pass what they were, or go on from a"
                " checkpoint of an epoch's end"
            )
        raise CheckpointError(
            f"{name}={_short(now[name])} was {_short(before[name])} when the checkpoint was made,"
            f" {manifest.position.step} mini-batches into epoch {manifest.position.epoch + 1}: its rows would be cut"
            f" differently; pass what it was, or go on from a checkpoint of an epoch's end"
        )
    return [f"{name} {_short(now[name])} instead of {_short(before[name])}" for name in changed]


def other_circumstances(manifest: Manifest, world_size: int, versions: Mapping[str, str], structure: str) -> list[str]:
    """What else is not as it was, in words: each makes the last bits of floating-point numbers differ, at least."""
    found = []
    if manifest.model_digest and structure and manifest.model_digest != structure:
        found.append("another model, with the same weights (layers' settings, optimizer or loss)")
    if manifest.world_size != world_size:
        found.append(f"num_workers {world_size} instead of {manifest.world_size}")
    steps = ("sync_batch_norm", "sparse_as_dense", "compression", "sync_every", "on_nan")
    settings = ("deterministic", *steps, "floatx", "dtype_policy")
    validation = ("validation_digest", "validation_freq", "validation_steps")
    for name in ("tensorflow", "keras", "horovod", "numpy", "cpu", "threads", *settings, *validation):
        before, now = manifest.versions.get(name), versions.get(name)
        if before is not None and now is not None and before != now:
            found.append(f"{name} {now} instead of {before}")
    return found


def is_done(manifest: Manifest, epochs: int) -> bool:
    """Whether nothing is left to train: the epochs are done, or a callback had stopped the training."""
    is_finished = bool(manifest.extra.get("finished"))
    return is_finished and (bool(manifest.extra.get("stopped")) or manifest.position.epoch >= epochs)


def in_words(position: Position) -> str:
    return f"epoch {position.epoch + 1}" + (f", step {position.step}" if position.step else "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."
