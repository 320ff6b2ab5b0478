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

from dtrain.data.source import ClassWeights, DataSource, describe
from dtrain.tracking import DatasetDescription, RunDescription
from dtrain.types import FitPlan, ModelDescription

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
    data: Mapping[str, DataSource | None],
    model: ModelDescription | None,
    settings: Mapping[str, Any],
    config: Mapping[str, Any] | None,
    ray_address: str,
) -> RunDescription:
    """Describe a fit for the record.

    Args:
        run_name: of this fit.
        plan: what is trained.
        data: sources by context: "train", "validation".
        model: as a worker described it; None if no worker got so far.
        settings: of the Trainer.
        config: what the user's factory is given.
        ray_address: of the cluster.
    """
    params: dict[str, Any] = {
        "batch_size": plan.train.batch_size,
        "epochs": plan.epochs,
        "initial_epoch": plan.initial_epoch,
        "steps_per_epoch": plan.train.steps_per_epoch or -(-plan.train.num_rows // plan.train.batch_size),
        "shuffle": plan.train.shuffle,
        "train_rows": plan.train.num_rows,
        **settings,
        "versions": versions(),
    }
    if plan.validation is not None:
        params["validation_rows"] = plan.validation.num_rows
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
    datasets = [_describe_data(context, source) for context, source in data.items() if source is not None]
    return RunDescription(run_name, params, tags, datasets, model.summary if model is not None else "")


def _describe_data(context: str, source: DataSource) -> DatasetDescription:
    found = describe(source)
    source = source.source if isinstance(source, ClassWeights) else source
    name = type(source).__name__.removesuffix("Source").lower().replace("array", "arrays")
    # MLflow shows name and digest as one: as many digits as its own digests have.
    return DatasetDescription(name, context, found.shapes, found.dtypes, found.num_rows, found.digest[:8])


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
