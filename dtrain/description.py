"""Owns what is put on record of a run before its first step: parameters, tags, data sets. Plain values only.

Only what is listed here is recorded: never the environment, never what a function closes over.
"""

import contextlib
import getpass
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from dtrain.data.sampler import Sampler
from dtrain.data.source import ClassWeights, Description, leaves
from dtrain.tracking import DatasetDescription, RunDescription
from dtrain.types import Batching, BatchPlan, FitPlan, ModelDescription, Opened

RECORDED_VERSIONS = ("dtrain", "tensorflow", "keras", "horovod", "ray", "mlflow", "numpy")


def versions() -> dict[str, str]:
    """The versions that a run depends on."""
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for package in RECORDED_VERSIONS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe_run(
    run_name: str,
    plan: FitPlan,
    data: Mapping[str, Any],
    described: Mapping[str, Description | None],
    opened: Mapping[str, Opened],
    model: ModelDescription | None,
    settings: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    ray_address: str,
) -> RunDescription:
    """Describe a fit for the record.

    Args:
        run_name: of this fit.
        plan: what is trained.
        data: what was passed, by context: "train", "validation".
        described: of these, data that have rows.
        opened: what the workers found it to be, if they got so far.
        model: as a worker described it; None if no worker got so far.
        settings: of the Trainer.
        config: what the user's factory is given.
        ray_address: of the cluster.
    """
    train = opened.get("train") or _expected(plan.train)
    params: dict[str, Any] = {
        "batch_size": train.batch_size,
        "epochs": plan.epochs,
        "initial_epoch": plan.initial_epoch,
        "steps_per_epoch": train.steps_per_epoch,
        "shuffle": plan.train.shuffle,
        "train_rows": train.rows,
        **settings,
        "versions": versions(),
    }
    if plan.validation is not None:
        params["validation_rows"] = (opened.get("validation") or _expected(plan.validation)).rows
    if model is not None:
        params |= {
            "optimizer": model.optimizer,
            "loss": model.loss,
            "metrics": ", ".join(name for name in model.metrics if name != "loss"),
            # Of a float32, the digits that it has.
            "initial_learning_rate": None if model.learning_rate is None else float(f"{model.learning_rate:.7g}"),
            "num_parameters": model.num_parameters,
            "num_trainable_parameters": model.num_trainable,
        }
    if config:
        params["config"] = dict(config)
    tags = environment_tags(sys.argv[0] or None) | {"ray.address": ray_address}
    datasets = [
        _describe_data(context, given, described.get(context), opened.get(context))
        for context, given in data.items()
        if given is not None
    ]
    return RunDescription(run_name, params, tags, datasets, model.summary if model is not None else "")


def _expected(plan: BatchPlan | Batching) -> Opened:
    """What is known of data before they are open."""
    if isinstance(plan, Batching):
        return Opened("", None, None, steps_per_epoch=plan.steps)
    return Opened("", None, plan, plan.num_rows, plan.batch_size, Sampler(plan).steps_per_epoch)


def _describe_data(context: str, given: Any, found: Description | None, opened: Opened | None) -> DatasetDescription:
    if found is not None:
        given = given.source if isinstance(given, ClassWeights) else given
        name = _name_of(type(given).__name__)
        # MLflow shows name and digest as one: as many digits as its own digests have.
        return DatasetDescription(name, context, found.shapes, found.dtypes, found.num_rows, found.digest[:8])
    if opened is None:
        return DatasetDescription(getattr(given, "kind", "batches"), context)
    # Data that the workers made, or that come in batches: described by the first of them, and never read for it.
    first = dict(leaves(opened.example))
    shapes = {path: leaf.shape[1:] for path, leaf in first.items()}
    dtypes = {path: leaf.dtype.name for path, leaf in first.items()}
    return DatasetDescription(_name_of(opened.kind), context, shapes, dtypes, opened.rows)


def _name_of(kind: str) -> str:
    return kind.removesuffix("Source").lower().replace("array", "arrays") if kind.endswith("Source") else kind


def environment_tags(script: str | None) -> dict[str, str]:
    """Tags for where a run comes from: user, host, script, git commit. To be resolved where the script starts.

    Args:
        script: the script that the user started; None: unknown, as in a notebook.
    """
    tags = {"mlflow.source.type": "LOCAL", "dtrain.host": socket.gethostname()}
    with contextlib.suppress(OSError, KeyError):  # A container's user may have no name.
        tags["mlflow.user"] = getpass.getuser()
    if script:
        tags["mlflow.source.name"] = script
    folder = Path(script).absolute().parent if script else Path.cwd()
    if commit := _git(folder, "rev-parse", "HEAD"):
        tags["mlflow.source.git.commit"] = commit
        changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
        if changes is not None:
            tags["mlflow.source.git.dirty"] = "true" if changes else "false"
    return tags


def _git(folder: Path, *arguments: str) -> str | None:
    """Git's answer; None without git or outside of a repository."""
    # fsmonitor names a program that git would start, and the folder may be anybody's.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *arguments]
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
