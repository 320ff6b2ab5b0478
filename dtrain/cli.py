"""Owns the command line: `dtrain fit`, `evaluate`, `predict`, `export`, `runs`, `doctor` and `install-horovod`.

It finds what the user named, calls Trainer and prints what came of it; it decides nothing about training. Whatever is
slow to import is imported by the command that needs it, so that `dtrain --help` answers at once.

Exit codes: 0 done; 1 failed; 2 usage; 130 interrupted by Ctrl-C, 143 by SIGTERM. Results go to standard output, all
else to standard error.
"""

import contextlib
import functools
import inspect
import json
import math
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import typer

from dtrain import __version__
from dtrain.errors import CheckpointError, ConfigError, DataError, DtrainError
from dtrain.named import find_function, users_code

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from dtrain.history import History
    from dtrain.runs import CheckpointSummary, RunSummary
    from dtrain.trainer import Trainer

Item = TypeVar("Item", "RunSummary", "CheckpointSummary")

INTERRUPTED, TERMINATED = 130, 143
"""Exit codes after Ctrl-C, which is Typer's, and after SIGTERM: those that shells have for them."""

app = typer.Typer(
    name="dtrain",
    help="Train a compiled Keras 3 model on many workers as if they were one.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: rich's cuts the options' names off
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Factory = Annotated[
    str,
    typer.Argument(
        metavar="MODULE:FACTORY",
        help="The function that makes and compiles the model. MODULE: an importable module, or a path to a .py file.",
    ),
]
Loader = Annotated[
    str,
    typer.Option(
        "--data",
        metavar="MODULE:LOADER",
        help="The function that returns the data: (x, y), (x, y, sample_weight), a dtrain.data source, or a dict of"
        " these with train, and if you like validation and test.",
    ),
]
NumWorkers = Annotated[int, typer.Option(help="How many workers hold a replica each.")]
BatchSize = Annotated[int | None, typer.Option(help="Rows in a mini-batch of the whole job; 32 unless given.")]
StoragePath = Annotated[str, typer.Option(help="Folder or fsspec URL of the runs.")]
Address = Annotated[str | None, typer.Option(help="Of a Ray cluster; else RAY_ADDRESS, else a local Ray.")]
UseGpu = Annotated[bool, typer.Option("--use-gpu", help="One GPU for each worker.")]
Threads = Annotated[int | None, typer.Option(help="TensorFlow threads of each worker; else chosen for the machine.")]
Verbose = Annotated[int | None, typer.Option(help="0: silent; 1: a bar; 2: a line an epoch.")]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An entry of FACTORY's config: JSON, else text. Any number."),
]
CheckpointUrl = Annotated[str | None, typer.Option("--checkpoint", metavar="URL", help="Use this checkpoint.")]
RunName = Annotated[str | None, typer.Option("--run-name", help="Use this run's newest checkpoint that is whole.")]
ExportFormat = Literal["keras", "saved_model"]
OnLoss = Literal["replace", "shrink"]
OnNan = Literal["stop", "skip", "ignore"]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run the command line and end the process with its exit code."""
    try:
        app()
    except SystemExit as end:
        if end.code in (INTERRUPTED, TERMINATED):
            _note("interrupted" if end.code == INTERRUPTED else "terminated")
        raise
    except (ConfigError, DataError) as error:
        _end(str(error), 2)
    except DtrainError as error:
        _end(str(error), 1)


def _end(message: str, code: int) -> None:
    print(message, file=sys.stderr)
    sys.exit(code)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"dtrain {__version__}")
        raise typer.Exit


# Commands -------------------------------------------------------------------------------------------------------------


@app.command()
def fit(
    factory: Factory,
    data: Loader,
    num_workers: NumWorkers = 1,
    epochs: Annotated[int, typer.Option(help="Passes over the data.")] = 1,
    batch_size: BatchSize = None,
    steps_per_epoch: Annotated[int | None, typer.Option(help="Mini-batches in an epoch; else one pass.")] = None,
    initial_epoch: Annotated[int, typer.Option(help="The epoch to begin with, from 0.")] = 0,
    shuffle: Annotated[bool, typer.Option(help="Another order of the rows in every epoch.")] = True,
    validation_split: Annotated[float, typer.Option(help="Share of the rows, from the end, to validate on.")] = 0.0,
    validation_steps: Annotated[int | None, typer.Option(help="Mini-batches of a validation; else all.")] = None,
    validation_batch_size: Annotated[int | None, typer.Option(help="Else that of training.")] = None,
    validation_freq: Annotated[int, typer.Option(help="Validate after every n-th epoch.")] = 1,
    settings: Settings = None,
    seed: Annotated[int, typer.Option(help="Of weights, shuffling and random layers.")] = 0,
    run_name: Annotated[str | None, typer.Option(help="Names the run and its folder; else a unique one.")] = None,
    storage_path: StoragePath = "dtrain_runs",
    checkpoint: Annotated[bool, typer.Option(help="Write a checkpoint after every epoch.")] = True,
    checkpoint_every_steps: Annotated[
        int | None, typer.Option(metavar="N", help="Write one after every n-th mini-batch, too.")
    ] = None,
    resume: Annotated[
        str | None,
        typer.Option(metavar="auto|URL", help="auto: go on with the run of that name, or begin it."),
    ] = None,
    spares: Annotated[int, typer.Option(help="Processes that wait to take a dead worker's place.")] = 0,
    min_workers: Annotated[
        int | None, typer.Option(metavar="N", help="Begin, and go on, with so few; more join when there is room.")
    ] = None,
    max_failures: Annotated[int, typer.Option(help="Deaths of workers in a row, without a new step, to survive.")] = 3,
    on_loss: Annotated[OnLoss, typer.Option(help="What becomes of a dead worker's place.")] = "replace",
    on_nan: Annotated[OnNan, typer.Option(help="What becomes of a fit whose loss is no number.")] = "stop",
    tracking_uri: Annotated[str | None, typer.Option(help="MLflow's; else MLFLOW_TRACKING_URI, else SQLite.")] = None,
    experiment: Annotated[str | None, typer.Option(help="MLflow's; else MLFLOW_EXPERIMENT_NAME, else dtrain.")] = None,
    no_tracking: Annotated[bool, typer.Option("--no-tracking", help="Record nothing in MLflow.")] = False,
    address: Address = None,
    use_gpu: UseGpu = False,
    threads_per_worker: Threads = None,
    verbose: Verbose = None,
) -> None:
    """Train a model."""
    if no_tracking and (tracking_uri is not None or experiment is not None):
        raise ConfigError("--no-tracking contradicts --tracking-uri and --experiment; leave out one or the other")
    if not checkpoint and checkpoint_every_steps is not None:
        raise ConfigError("--no-checkpoint contradicts --checkpoint-every-steps; leave out one or the other")
    config = read_settings(settings or [])
    make_model, load = find_function("MODULE:FACTORY", factory), find_function("--data", data)

    from dtrain.config import CheckpointConfig, FailureConfig, MLflowConfig

    with _trainer(
        make_model,
        config,
        num_workers=num_workers if min_workers is None else (min_workers, num_workers),
        seed=seed,
        run_name=run_name,
        storage_path=storage_path,
        checkpoint=checkpoint and CheckpointConfig(every_steps=checkpoint_every_steps),
        spares=spares,
        failure=FailureConfig(max_failures=max_failures, on_loss=on_loss, on_nan=on_nan),
        tracking=not no_tracking and MLflowConfig(tracking_uri=tracking_uri, experiment_name=experiment),
        address=address,
        use_gpu=use_gpu,
        threads_per_worker=threads_per_worker,
    ) as trainer:
        parts = _load(data, load)
        if "train" not in parts:
            raise DataError(f"--data={data!r} returned a dict without 'train'; fit needs it")
        x, y, sample_weight = _as_triple(parts["train"])
        history = trainer.fit(
            x,
            y,
            batch_size=batch_size,
            epochs=epochs,
            verbose="auto" if verbose is None else verbose,
            validation_split=validation_split,
            validation_data=parts.get("validation"),
            shuffle=shuffle,
            sample_weight=sample_weight,
            initial_epoch=initial_epoch,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_batch_size=validation_batch_size,
            validation_freq=validation_freq,
            resume=resume or False,
        )
    _print_history(history)


@dataclass(frozen=True, kw_only=True)
class PassOptions:
    """The options that `evaluate` and `predict` share."""

    factory: Factory
    data: Loader
    checkpoint: CheckpointUrl = None
    run_name: RunName = None
    num_workers: NumWorkers = 1
    batch_size: BatchSize = None
    steps: Annotated[int | None, typer.Option(help="Mini-batches to go through; else all.")] = None
    settings: Settings = None
    storage_path: StoragePath = "dtrain_runs"
    address: Address = None
    use_gpu: UseGpu = False
    threads_per_worker: Threads = None
    verbose: Verbose = None


def _with_pass_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of PassOptions to a command's own; it gets them as its first argument."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        shared = PassOptions(**{option.name: given.pop(option.name) for option in fields(PassOptions)})
        command(shared, **given)

    _, *own = inspect.signature(command).parameters.values()
    shared = inspect.signature(PassOptions).parameters.values()
    run.__signature__ = inspect.Signature([*shared, *own])  # type: ignore[attr-defined]  # which typer reads
    return run


@app.command()
@_with_pass_options
def evaluate(options: PassOptions, *, as_json: Json = False) -> None:
    """Print a checkpoint's loss and metrics.

    On the test data if there is any, else the validation data, else the training data.
    """
    with _restored(options) as (trainer, (x, y, sample_weight)):
        logs = trainer.evaluate(
            x,
            y,
            batch_size=options.batch_size,
            verbose=_verbosity(options.verbose, as_json),
            sample_weight=sample_weight,
            steps=options.steps,
            return_dict=True,
        )
    if as_json:
        print(json.dumps(_finite(logs)))
    else:
        _print_metrics(logs)


@app.command()
@_with_pass_options
def predict(
    options: PassOptions,
    *,
    output: Annotated[Path, typer.Option(help="The .npz file to write; several outputs become several arrays.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the output file.")] = False,
) -> None:
    """Write a checkpoint's predictions to a file.

    Of the test data if there is any, else the validation data, else the training data.
    """
    _check_output(output, force)
    with _restored(options) as (trainer, (x, _, _)):
        predictions = trainer.predict(
            x, batch_size=options.batch_size, verbose=_verbosity(options.verbose), steps=options.steps
        )
    arrays = name_arrays(predictions)
    write_npz(output, arrays)
    for name, array in arrays.items():
        print(f"{output}: {name} {array.dtype} {array.shape}")


@app.command()
def export(
    factory: Factory,
    checkpoint: CheckpointUrl = None,
    run_name: RunName = None,
    format: Annotated[ExportFormat, typer.Option(help="keras: one file; saved_model: a folder to serve.")] = "keras",
    *,
    output: Annotated[Path, typer.Option(help="What to write: a .keras file, or a folder that is not there yet.")],
    data: Annotated[
        str | None,
        typer.Option(metavar="MODULE:LOADER", help="For a model that learns its shapes from data."),
    ] = None,
    settings: Settings = None,
    storage_path: StoragePath = "dtrain_runs",
    force: Annotated[bool, typer.Option("--force", help="Overwrite a .keras file.")] = False,
) -> None:
    """Write a checkpoint's model as plain Keras has it. No worker is started."""
    if format == "keras" and output.suffix != ".keras":
        raise ConfigError(f"--output={str(output)!r} must end in .keras; or choose --format saved_model")
    _check_output(output, force and format == "keras")
    url = find_checkpoint(checkpoint, run_name, storage_path)
    make_model = find_function("MODULE:FACTORY", factory)
    load = find_function("--data", data) if data is not None else None
    with _trainer(make_model, read_settings(settings or []), checkpoint=False, tracking=False) as trainer:
        trainer.restore(url)
        if load is not None:
            trainer.build(*_as_triple(held_out(str(data), _load(str(data), load)))[:2])
        if format == "keras":
            trainer.save(output)
        else:
            trainer.export(output)
    print(f"model:      {output}")


@app.command()
def runs(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="A run's name: list its checkpoints.")] = None,
    storage_path: StoragePath = "dtrain_runs",
    as_json: Json = False,
) -> None:
    """List the runs in the storage path, or the checkpoints of one."""
    from dtrain.runs import find_run, list_checkpoints, list_runs

    if run is None:
        _show(list_runs(storage_path), as_json, _print_runs, f"no runs in {storage_path}")
    else:
        found = list_checkpoints(find_run(storage_path, run))
        _show(found, as_json, _print_checkpoints, f"no checkpoints of {run} in {storage_path}")


@app.command()
def doctor(storage_path: StoragePath = "dtrain_runs") -> None:
    """Say what is wrong here and how to mend it.

    Exit code 1 if something is wrong.
    """
    from dtrain.doctor import diagnose, render

    findings = diagnose(storage_path)
    _console().print(render(findings))
    if any(finding.ok is False for finding in findings):
        raise typer.Exit(1)


@app.command("install-horovod")
def install_horovod(
    gpu: Annotated[bool, typer.Option("--gpu", help="With NCCL, for GPUs.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the command, and run nothing.")] = False,
) -> None:
    """Build Horovod against the installed TensorFlow.

    Needed after `pip install dtrain`, and after another TensorFlow was installed.
    """
    from dtrain.horovod_build import install_horovod

    install_horovod(gpu=gpu, dry_run=dry_run)


# What the user named --------------------------------------------------------------------------------------------------


def read_settings(pairs: Sequence[str]) -> dict[str, Any] | None:
    """The config that `--set key=value ...` stands for, each value JSON, else text; None if there are none.

    Raises:
        ConfigError: one has no `=` or no key.
    """
    config: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set={pair!r} must be KEY=VALUE, such as --set units=64")
        try:
            config[key] = json.loads(value)
        except ValueError:
            config[key] = value
    return config or None


def find_checkpoint(url: str | None, run_name: str | None, storage_path: str) -> str:
    """The URL of the checkpoint to use: the one given, or the run's newest that verifies.

    Raises:
        ConfigError: both or neither are given, or there is no such run.
        CheckpointError: the run has none that verifies.
    """
    if (url is None) == (run_name is None):
        given = "both were given" if url is not None else "neither was given"
        raise ConfigError(f"give either --checkpoint URL or --run-name NAME; {given}")
    if url is not None:
        return url

    from dtrain.runs import find_run

    loaded, refused = find_run(storage_path, run_name or "").checkpoints.latest_valid()
    for reason in refused:
        _note(f"passed over: {reason}")
    if loaded is None:
        raise CheckpointError(f"--run-name={run_name!r} has no checkpoint that is whole; give --checkpoint of another")
    _note(f"checkpoint {loaded.checkpoint.url}")
    return loaded.checkpoint.url


# Trainer and data -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _trainer(make_model: Any, config: Mapping[str, Any] | None, **arguments: Any) -> "Iterator[Trainer]":
    """A Trainer that is shut down whatever happens, at once: its weights are in the checkpoints."""
    from dtrain.interrupts import Terminated
    from dtrain.trainer import Trainer

    trainer = Trainer(make_model, config=config, **arguments)
    try:
        try:
            yield trainer
        finally:
            trainer.shutdown(keep_weights=False)
    except Terminated as end:
        raise typer.Exit(TERMINATED) from end


@contextlib.contextmanager
def _restored(options: PassOptions) -> "Iterator[tuple[Trainer, tuple[Any, Any, Any]]]":
    """A Trainer with a checkpoint's weights, which records nothing, and the data to use it on."""
    url = find_checkpoint(options.checkpoint, options.run_name, options.storage_path)
    config = read_settings(options.settings or [])
    make_model = find_function("MODULE:FACTORY", options.factory)
    load = find_function("--data", options.data)
    with _trainer(
        make_model,
        config,
        num_workers=options.num_workers,
        address=options.address,
        use_gpu=options.use_gpu,
        threads_per_worker=options.threads_per_worker,
        checkpoint=False,
        tracking=False,
    ) as trainer:
        trainer.restore(url)
        yield trainer, _as_triple(held_out(options.data, _load(options.data, load)))


def _load(value: str, load: Any) -> dict[str, Any]:
    """What the loader returned, by what it is for: train, validation, test."""
    with users_code("--data", value):
        data = load()
    if data is None:
        raise DataError(f"--data={value!r} returned None; did you forget to return the data?")
    parts = data if isinstance(data, dict) else {"train": data}
    names = ("train", "validation", "test")
    unknown = [key for key in parts if key not in names]
    if unknown or not parts:
        raise DataError(
            f"--data={value!r} returned a dict with {', '.join(map(repr, unknown)) or 'nothing'}; its keys must be"
            " 'train', and if you like 'validation' and 'test'. Inputs by name go into a tuple: ({...}, y)"
        )
    return {key: part for key, part in parts.items() if part is not None}


def held_out(value: str, parts: Mapping[str, Any]) -> Any:
    """The data to evaluate and predict on; says which."""
    name = next((name for name in ("test", "validation", "train") if name in parts), None)
    if name is None:
        raise DataError(f"--data={value!r} returned a dict of nothing but None; it must hold 'train'")
    _note(f"on the {name} data")
    return parts[name]


def _as_triple(data: Any) -> tuple[Any, Any, Any]:
    """x, y and sample_weight of a data set; a source brings its own."""
    if not isinstance(data, tuple):
        return data, None, None
    if not 1 <= len(data) <= 3:
        raise DataError(f"--data returned a tuple of {len(data)}; it must be (x, y) or (x, y, sample_weight)")
    x, y, sample_weight = (*data, None, None)[:3]
    return x, y, sample_weight


# Output ---------------------------------------------------------------------------------------------------------------


def _console(stderr: bool = False) -> "Console":
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False)
    if not console.is_terminal:
        console.width = 10_000  # a file or a pipe has no width: no path is to be broken
    return console


def _note(text: str) -> None:
    print(_printable(text), file=sys.stderr)


def _printable(text: str) -> str:
    """Without what would move the terminal's cursor: names and metrics may come from a run of somebody else's."""
    return "".join(each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text)


def _verbosity(verbose: int | None, as_json: bool = False) -> int | str:
    return 0 if as_json else "auto" if verbose is None else verbose


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text("" if cell is None else _printable(str(cell))) for cell in row))
    _console().print(table)


def _show(found: "Sequence[Item]", as_json: bool, table: "Callable[[Sequence[Item]], None]", nothing: str) -> None:
    """Items with metrics, as JSON or in a table."""
    from dataclasses import asdict

    if as_json:
        print(json.dumps([{**asdict(item), "metrics": _finite(item.metrics)} for item in found]))
    elif found:
        table(found)
    else:
        _note(nothing)


def _print_runs(runs: "Sequence[RunSummary]") -> None:
    rows = [
        [run.name, run.state, run.step, _one_line(run.metrics), run.checkpoint, run.mlflow_run_id or ""] for run in runs
    ]
    _print_table(["run", "state", "step", "metrics", "checkpoint", "MLflow run"], rows)


def _print_checkpoints(checkpoints: "Sequence[CheckpointSummary]") -> None:
    """With the epochs that were trained."""
    rows = [
        [
            item.step,
            item.position and item.position.epoch,
            "best" if item.is_best else "",
            "damaged" if item.damage else _one_line(item.metrics),
            item.url,
        ]
        for item in checkpoints
    ]
    _print_table(["step", "epochs", "", "metrics", "checkpoint"], rows)
    for item in checkpoints:
        if item.damage:
            _note(item.damage)


def _print_metrics(logs: Mapping[str, float]) -> None:
    from dtrain.progress import format_metric

    _print_table(["metric", "value"], [[name, format_metric(value)] for name, value in logs.items()])


def _print_history(history: "History") -> None:
    """What a fit came to and where it is."""
    final = {name: values[-1] for name, values in history.history.items() if values}
    lines = {
        "metrics": _one_line(final) or "none: no epoch was trained",
        "checkpoint": history.checkpoint,
        "run folder": history.url,
        "MLflow": history.open_command,
    }
    for name, text in lines.items():
        if text:
            print(f"{name + ':':<12}{text}")


def _one_line(metrics: Mapping[str, float]) -> str:
    from dtrain.progress import format_metric

    return "  ".join(f"{name} {format_metric(value)}" for name, value in metrics.items())


def _finite(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """For JSON, which has no word for NaN and infinity: null."""
    return {name: float(value) if math.isfinite(value) else None for name, value in metrics.items()}


def name_arrays(tree: Any, path: str = "") -> "dict[str, np.ndarray[Any, Any]]":
    """The arrays of nested dicts, lists and tuples by their path, such as `boxes/0`; one alone is `predictions`."""
    import numpy as np

    if isinstance(tree, Mapping):
        items = [(str(key), part) for key, part in tree.items()]
    elif isinstance(tree, (list, tuple)):
        items = [(str(index), part) for index, part in enumerate(tree)]
    else:
        array = np.asarray(tree)
        # NumPy's files know none of the small floats that NumPy itself does not have, such as bfloat16.
        return {path or "predictions": array.astype(np.float32) if array.dtype.kind == "V" else array}
    return {
        name: array
        for key, part in items
        for name, array in name_arrays(part, f"{path}/{key}" if path else key).items()
    }


def _check_output(path: Path, force: bool) -> None:
    """Refuse, before anything starts, an output file that could not be written in the end."""
    if not path.parent.is_dir():
        raise ConfigError(f"--output={str(path)!r}: there is no folder {path.parent}; make it first")
    if path.is_dir():
        raise ConfigError(f"--output={str(path)!r} is a folder that is there already; give another name")
    if path.exists() and not force:
        raise ConfigError(f"--output={str(path)!r} exists; give another, or --force to overwrite it")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"--output={str(path)!r}: {path.parent} is not writable; give another")


def write_npz(path: Path, arrays: "Mapping[str, np.ndarray[Any, Any]]") -> None:
    """Write arrays to a file that `numpy.load` reads, whole or not at all.

    Raises:
        DtrainError: it cannot be written.
    """
    import zipfile

    from numpy.lib import format as npy

    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        # Not numpy.savez, which has parameters of its own that an output could be named like.
        with zipfile.ZipFile(unfinished, "x") as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                    npy.write_array(file, array, allow_pickle=False)
        os.replace(unfinished, path)
    except OSError as error:
        raise DtrainError(f"--output={str(path)!r} cannot be written ({error}); make room, or give another") from error
    finally:
        unfinished.unlink(missing_ok=True)
