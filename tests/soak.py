"""Owns the long proof of exact resume: a fit that is killed again and again ends as one that was left alone.

    python tests/soak.py --kills 50 --workers 1,2,3 --seed 0

For each number of workers a control run trains undisturbed, then the same command trains a run of another name and is
killed, with SIGKILL, at moments that the seed chooses: the driver, a worker, all workers, or all of them; while it
starts, while it trains, or in the middle of a commit. Each time the same command is run again. In the end nothing may
differ, neither the checkpoint's files nor the journal nor MLflow, and nothing may be left over. No test that pytest
collects: it takes a minute for some kills, and shows what a few planned ones cannot. Exit code 1 when anything differs.

One Ray lasts for all of it, so that a restart costs what it costs on a cluster: the driver's and the workers' start.
"""

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_worker_niceness", "0")  # as in a local Ray that dtrain starts
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

import dtrain

BATCH, EVERY_STEPS = 32, 10
TRAINED = 1437
"""So many of the 1,797 digits are trained on, the last step of an epoch is smaller; the others are validated."""
SECONDS_PER_ROW = 0.0006
"""The data are as slow to read as a disk: a run then lasts long enough to be killed in, and costs no CPU."""
PATIENCE = 120.0
"""Seconds within which a driver ends once its workers are gone, and workers once their driver is."""
VICTIMS = ("driver", "one worker", "all workers", "all processes")
MOMENTS = ("training", "training", "commit", "commit", "start")
TIMINGS = {"epoch_seconds", "samples_per_second", "step_time"}
"""Metrics that tell how long something took: alone they may differ."""


# --- the driver, which is killed


class Digits:
    """Rows of digits; a target is the digit and the row's number, for the metric that counts rows."""

    def __init__(self, file: Path, part: slice) -> None:
        with np.load(file) as arrays:
            self.x, y = arrays["x"][part], arrays["y"]
        self.y = np.stack([y, np.arange(len(y))], 1).astype("int32")[part]

    def __len__(self) -> int:
        return len(self.x)

    def read(self, indices: Any) -> Any:
        time.sleep(len(indices) * SECONDS_PER_ROW)
        return self.x[indices], self.y[indices]


def make_model(config: Mapping[str, Any]) -> Any:
    """All that has a state: random layers, moving statistics, an optimizer with a schedule; and a ledger of rows."""
    import keras
    from keras import layers

    class Rows(keras.metrics.Metric):  # type: ignore[misc]
        """How often each row was trained on, or validated, in the epoch: an array in the history."""

        def __init__(self) -> None:
            super().__init__(name="rows")
            self.counts = self.add_variable((config["rows"],), "zeros", name="counts")

        def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
            numbers = keras.ops.cast(y_true[:, 1], "int32")
            self.counts.assign_add(keras.ops.sum(keras.ops.one_hot(numbers, config["rows"]), axis=0))

        def result(self) -> Any:
            return self.counts.value

    def loss(y_true: Any, y_pred: Any) -> Any:
        return keras.losses.sparse_categorical_crossentropy(y_true[:, 0], y_pred)

    def correct(y_true: Any, y_pred: Any) -> Any:
        return keras.metrics.sparse_categorical_accuracy(y_true[:, 0], y_pred)

    model = keras.Sequential(
        [
            keras.Input((64,)),
            layers.Dense(48, "relu"),
            layers.BatchNormalization(),
            layers.Dropout(0.4),
            layers.Dense(10, activation="softmax"),
        ]
    )
    rate = keras.optimizers.schedules.CosineDecay(3e-3, config["steps"])
    model.compile(keras.optimizers.Adam(rate), loss, metrics=[correct, Rows()])
    return model


def drive(options: argparse.Namespace) -> None:
    """The command that a user, or whatever restarts jobs, runs again after each kill."""
    import keras

    class Losses(keras.callbacks.Callback):  # type: ignore[misc]
        """A callback of the user's own, with a state."""

        def __init__(self) -> None:
            super().__init__()
            self.losses: list[float] = []

        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            self.losses.append(float(logs["val_loss"]))

        def get_state(self) -> dict[str, Any]:
            return {"losses": self.losses}

        def set_state(self, state: dict[str, Any]) -> None:
            self.losses = list(state["losses"])

    data = Digits(Path("digits.npz"), slice(TRAINED))
    held_out = Digits(Path("digits.npz"), slice(TRAINED, None))
    steps = options.epochs * -(-TRAINED // BATCH)
    with dtrain.Trainer(
        make_model,
        num_workers=options.num_workers,
        threads_per_worker=1,
        config={"rows": len(data) + len(held_out), "steps": steps},
        run_name=options.run,
        checkpoint=dtrain.CheckpointConfig(every_steps=EVERY_STEPS, keep=2, monitor="val_loss"),
        failure=dtrain.FailureConfig(max_failures=0),  # every kill ends the driver, too
        tracking=dtrain.MLflowConfig(log_model=False),
    ) as trainer:
        stop = keras.callbacks.EarlyStopping("val_loss", patience=3, restore_best_weights=True)
        trainer.fit(
            data,
            batch_size=BATCH,
            epochs=options.epochs,
            validation_data=held_out,
            callbacks=[stop, Losses()],
            verbose=2,
            resume="auto",
        )


# --- what kills it


class Wrong(Exception):
    """The proof cannot go on."""


@dataclass
class Run:
    """A run as its folder shows it."""

    folder: Path
    name: str
    num_workers: int
    epochs: int

    @property
    def path(self) -> Path:
        return self.folder / "dtrain_runs" / self.name

    def steps_on_record(self) -> int:
        """Mini-batches in the journal; in a run that goes on, those that are trained twice are there once."""
        try:
            with open(self.path / "journal.jsonl", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - (64 << 10)))
                lines = file.read().split(b"\n")[:-1]
        except FileNotFoundError:
            return 0
        for line in reversed(lines):
            if line.startswith(b'{"event":"steps"'):
                event = json.loads(line)
                return int(event["first_step"]) + min(map(len, event["metrics"].values()))
        return 0

    def saved(self) -> set[str]:
        """The folders of its checkpoints, finished or not."""
        try:
            return set(os.listdir(self.path / "checkpoints"))
        except FileNotFoundError:
            return set()

    def newest_step(self) -> int:
        from dtrain.checkpoint import CheckpointStore

        newest = CheckpointStore(str(self.path / "checkpoints")).latest()
        return newest.step if newest else 0


@dataclass
class Life:
    """One start of the driver, until it ends or is killed."""

    run: Run
    number: int
    process: "subprocess.Popen[bytes]" = field(init=False)
    trains_after: float | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        run = self.run
        self.first_step, self.known = run.newest_step(), run.steps_on_record()
        self.saved_before = run.saved()
        self.log = run.folder / f"{run.name}-{self.number:03d}.log"
        (run.folder / "tmp").mkdir(exist_ok=True)
        command = [sys.executable, __file__, "drive", run.name, str(run.num_workers), str(run.epochs)]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                command,
                cwd=run.folder,
                env={**os.environ, "TMPDIR": str(run.folder / "tmp")},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started = time.monotonic()

    def look(self) -> bool:
        """Whether it still runs; notes when it began to train."""
        if self.trains_after is None and (self.run.steps_on_record() > self.known or self._new_steps()):
            self.trains_after = time.monotonic()
        return self.process.poll() is None

    def wait_for(self, is_time: Callable[[], bool], every: float = 0.02) -> bool:
        """Until a condition holds; False if the driver ended first."""
        while self.look():
            if is_time():
                return True
            time.sleep(every)
        return False

    def last_step(self) -> int:
        """How far it got, as far as anything on the disk tells."""
        record = self.run.steps_on_record()
        return max([self.first_step, *self._new_steps(), *([record] if record > self.known else [])])

    def _new_steps(self) -> list[int]:
        return [int(m[1]) for name in self.run.saved() - self.saved_before if (m := re.search(r"step-(\d+)", name))]

    def tail(self) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])


def worker_processes() -> list[Any]:
    """The processes of dtrain's workers on this Ray, which is ours alone: so of the run."""
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            title = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if title.startswith("ray::Worker"):  # others are idle, or Ray's own
            found.append(process)
    return found


def kill(life: Life, victim: str, chance: random.Random) -> str:
    """SIGKILL; what was killed, which at a start may be less than was wanted."""
    import psutil

    workers = worker_processes() if victim != "driver" else []
    if victim == "one worker" and workers:
        workers = [chance.choice(workers)]
    takes_driver = victim in ("driver", "all processes") or not workers
    if takes_driver:
        life.process.kill()
    for worker in workers:
        try:
            worker.kill()
        except psutil.NoSuchProcess:
            continue
    return victim if workers or victim == "driver" else "driver"


@dataclass
class Outcome:
    """What became of a run."""

    seconds: float
    trained: int
    kills: int = 0


def control(run: Run) -> tuple[Outcome, float]:
    """Train without a disturbance. Besides, the seconds until it trained."""
    life = Life(run, 0)
    life.wait_for(lambda: False)
    if life.process.returncode != 0 or life.trains_after is None:
        raise Wrong(f"the control run failed ({life.process.returncode}):\n{life.tail()}")
    return Outcome(time.monotonic() - life.started, run.steps_on_record()), life.trains_after - life.started


def disturb(
    run: Run, kills: int, steps: int, start_seconds: float, chance: random.Random, is_late: Callable[[], bool]
) -> Outcome:
    """Train, killed up to so many times, until the run is done."""
    began = time.monotonic()
    outcome = Outcome(0.0, 0)
    pending: tuple[str, float] | None = None  # the line of a kill, and when it was
    for number in range(10**6):
        life = Life(run, number)
        moment, victim, is_ready = _next_kill(life, steps, kills - outcome.kills, start_seconds, chance)
        is_to_kill = outcome.kills < kills and not is_late()
        may_be_killed = is_to_kill and life.wait_for(is_ready)
        if may_be_killed and moment == "training":
            time.sleep(chance.uniform(0, 0.2))
        elif may_be_killed and moment == "commit":
            before = run.saved()
            may_be_killed = life.wait_for(lambda: _is_committing(run, before), every=0.0005)  # noqa: B023
        line = ""
        if may_be_killed and life.look():
            step = life.last_step()
            outcome.kills += 1
            killed_at = time.monotonic()
            line = f"  {outcome.kills:3d}  {kill(life, victim, chance):14s} {moment:9s} step {step:5d}"
        _await_end(life)
        pending = _tell(pending, life)
        outcome.trained += life.last_step() - life.first_step
        if line:
            pending = line, killed_at
        elif life.process.returncode != 0:
            raise Wrong(f"the driver failed, and nobody had killed it ({life.process.returncode}):\n{life.tail()}")
        else:
            break
    outcome.seconds = time.monotonic() - began
    return outcome


def _next_kill(
    life: Life, steps: int, left: int, start_seconds: float, chance: random.Random
) -> tuple[str, str, Callable[[], bool]]:
    """The next kill's moment and victim, and what tells that it is time. They spread over what is left to train."""
    moment, victim = chance.choice(MOMENTS), chance.choice(VICTIMS)
    if moment == "start":
        due = life.started + chance.uniform(0, start_seconds)
        return moment, victim, lambda: time.monotonic() >= due
    reach = 2 * max(0, steps - life.first_step) / (left + 1)
    target = min(life.first_step + 1 + int(chance.uniform(0, max(reach, 2 * EVERY_STEPS))), steps - 1)
    return moment, victim, lambda: life.trains_after is not None and life.last_step() >= target


def _is_committing(run: Run, before: set[str]) -> bool:
    return any(name.startswith(".staging-") for name in run.saved() - before)


def _await_end(life: Life) -> None:
    deadline = time.monotonic() + PATIENCE
    while life.look():
        if worker_processes():
            deadline = time.monotonic() + PATIENCE
        elif time.monotonic() > deadline:
            life.process.kill()
            raise Wrong(f"the driver hangs without workers:\n{life.tail()}")
        time.sleep(0.1)


def _tell(pending: tuple[str, float] | None, life: Life) -> None:
    """Print the line of the kill before this life, now that it is known when training went on."""
    if pending is not None:
        line, when = pending
        again = f"{life.trains_after - when:.1f} s" if life.trains_after is not None else "not before the next"
        print(f"{line}, going on from {life.first_step:5d}: training again after {again}", flush=True)


# --- what must be the same


def differences(run: Run, other: Run) -> Iterator[str]:
    """In what a disturbed run is not the control, in words."""
    ours, theirs = final_state(run), final_state(other)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: {ours.get(name)}, the control {theirs.get(name)}"
    yield from _rows_amiss(run)
    yield from _journal_amiss(run, other)
    yield from _mlflow_amiss(run)
    yield from _left_over(run)


def final_state(run: Run) -> dict[str, str]:
    """SHA-256 of each file of the last checkpoint: all state of model, optimizer, ranks, callbacks; the history."""
    from dtrain.checkpoint import CheckpointStore

    loaded, refused = CheckpointStore(str(run.path / "checkpoints")).latest_valid()
    if loaded is None or refused:
        raise Wrong(f"{run.name}: the last checkpoint is damaged: {refused}")
    manifest = loaded.manifest
    rest = [manifest.step, manifest.position, sorted(manifest.metrics.items()), manifest.best, manifest.world_size]
    flags = [manifest.extra.get(name) for name in ("finished", "stopped", "plan")]
    told = {"manifest": hashlib.sha256(repr([rest, flags]).encode()).hexdigest()}
    return told | {record.name: record.sha256 for record in manifest.files}


def _rows_amiss(run: Run) -> Iterator[str]:
    """Every row is trained on once in each epoch, or validated once: as counted where it was done."""
    from dtrain.checkpoint import CheckpointStore
    from dtrain.fit_state import history_of, read

    loaded, _ = CheckpointStore(str(run.path / "checkpoints")).latest_valid()
    assert loaded is not None
    history, epochs = history_of(read(loaded).callbacks)
    if epochs != list(range(len(epochs))) or len(history["rows"]) != len(epochs):
        yield f"the history has the epochs {epochs}"
    for kind, first in (("rows", True), ("val_rows", False)):
        for epoch, counts in enumerate(history[kind]):
            is_trained = np.arange(len(counts)) < TRAINED
            wrong = np.flatnonzero(np.asarray(counts) != (is_trained if first else ~is_trained))
            if len(wrong):
                yield f"{kind} of epoch {epoch + 1}: {len(wrong)} rows not once, the first of them {wrong[0]}"


Series = dict[str, list[tuple[int, float]]]


def read_journal(run: Run) -> tuple[Series, Series]:
    """The per-step series and the rare metrics, as the journal has them."""
    steps: Series = {}
    rare: Series = {}
    for line in (run.path / "journal.jsonl").read_text().splitlines():
        event = json.loads(line)
        for name, value in event["metrics"].items() if event["event"] in ("steps", "metrics") else ():
            if event["event"] == "steps":
                steps.setdefault(name, []).extend((event["first_step"] + i, v) for i, v in enumerate(value))
            else:
                rare.setdefault(name, []).append((event["step"], value))
    return steps, rare


def _journal_amiss(run: Run, other: Run) -> Iterator[str]:
    (steps, rare), (other_steps, other_rare) = read_journal(run), read_journal(other)
    for name, values in steps.items():
        if [step for step, _ in values] != list(range(run.steps_on_record())):
            yield f"the journal does not have each step of {name} once"
    if steps != other_steps:
        yield "the journal's steps have other values than the control's"
    for name in sorted(rare.keys() | other_rare.keys()):
        values = rare.get(name, [])
        if max(Counter(step for step, _ in values).values(), default=0) > 1:
            yield f"the journal has a step of {name} twice"
        # By the step: learning_rate stands at the ends of segments, which are where the time puts them.
        if name in TIMINGS | {"learning_rate"}:
            continue
        if values != other_rare.get(name):
            yield f"the journal's {name} is not the control's"


def _mlflow_amiss(run: Run) -> Iterator[str]:
    """One run, FINISHED, with the points that the journal makes, each once."""
    from mlflow import MlflowClient

    from dtrain.journal import Journal, Thinner

    client = MlflowClient(f"sqlite:///{run.folder}/mlflow.db")
    experiment = client.get_experiment_by_name("dtrain")
    found = client.search_runs([experiment.experiment_id], f"attributes.run_name = '{run.name}'")
    if [item.info.status for item in found] != ["FINISHED"]:
        yield f"MLflow has runs {[item.info.status for item in found]}, not one that is FINISHED"
        return
    thinner = Thinner(None)
    expected: Series = {}
    points = [point for event, _ in Journal(run.path / "journal.jsonl").read() for point in thinner.feed(event)]
    for name, value, _, step in [*points, *thinner.flush()]:
        expected.setdefault(name, []).append((step, value))
    for name in sorted(expected.keys() | found[0].data.metrics.keys()):
        history = [(point.step, point.value) for point in client.get_metric_history(found[0].info.run_id, name)]
        if len({step for step, _ in history}) != len(history):
            yield f"MLflow has a step of {name} twice"
        if sorted(history) != sorted(expected.get(name, [])):
            yield f"MLflow's {name} has {len(history)} points, the journal makes {len(expected.get(name, []))}"


def _left_over(run: Run) -> Iterator[str]:
    """Processes, actors, room, and files that no finished run has."""
    import ray

    deadline = time.monotonic() + PATIENCE
    while (workers := worker_processes()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if workers:
        yield f"processes are left: {[worker.pid for worker in workers]}"
    if actors := ray.util.list_named_actors(all_namespaces=True):
        yield f"actors are left: {actors}"
    groups = [group for group in ray.util.placement_group_table().values() if group["state"] != "REMOVED"]
    if groups:
        yield f"placement groups are left: {[(group['name'], group['state']) for group in groups]}"
    names = [str(path.relative_to(run.path)) for path in run.path.rglob("*")]
    parts = (".staging-", ".probe-", ".tmp", ".new")
    if files := [name for name in names if any(part in name for part in parts)]:
        yield f"files are left: {files}"
    if len(run.saved()) > 4:  # the newest two, the last one, and the best
        yield f"checkpoints are left: {sorted(run.saved())}"
    if files := sorted(os.listdir(run.folder / "tmp")):
        yield f"temporary files are left: {files}"


# --- the proof


def prove(num_workers: int, kills: int, folder: Path, seed: int, is_late: Callable[[], bool]) -> tuple[str, list[str]]:
    """Row of the table, and what differs, for one number of workers."""
    chance = random.Random(f"{seed}-{num_workers}")
    epochs = max(8, kills)
    undisturbed = Run(folder, f"control-{num_workers}", num_workers, epochs)
    base, start_seconds = control(undisturbed)
    found = [f"control: {text}" for text in differences(undisturbed, undisturbed)]
    print(f"N={num_workers}: the control trained {base.trained} steps in {base.seconds:.0f} s", flush=True)
    total = Outcome(0.0, 0)
    runs = 0
    while total.kills < kills and not (runs and is_late()):
        run = Run(folder, f"disturbed-{num_workers}-{runs}", num_workers, epochs)
        outcome = disturb(run, kills - total.kills, base.trained, start_seconds, chance, is_late)
        found += [f"{run.name}: {text}" for text in differences(run, undisturbed)]
        total = Outcome(total.seconds + outcome.seconds, total.trained + outcome.trained, total.kills + outcome.kills)
        runs += 1
        if outcome.kills == 0:
            break
    goodput = base.trained * runs / max(1, total.trained)
    digest = hashlib.sha256(repr(sorted(final_state(undisturbed).items())).encode()).hexdigest()[:16]
    verdict = "the same" if not found else f"{len(found)} differences"
    row = (
        f"{num_workers:3d} {total.kills:6d} {runs:5d} {base.trained * runs:8d} {total.trained:8d} {goodput:8.1%}"
        f" {base.seconds * runs:9.0f} s {total.seconds:7.0f} s  {digest}  {verdict}"
    )
    return row, found


def soak(options: argparse.Namespace) -> int:
    import psutil
    import ray
    from sklearn.datasets import load_digits

    ray.init(
        address="local", num_cpus=8, namespace="dtrain", include_dashboard=False, log_to_driver=False,
        logging_level="WARNING", object_store_memory=200 << 20,
    )  # fmt: skip
    folder = Path(tempfile.mkdtemp(prefix="dtrain-soak-"))
    digits = load_digits()
    np.savez(folder / "digits.npz", x=(digits.data / 16).astype("float32"), y=digits.target)
    os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
    began = time.monotonic()
    counts = [int(text) for text in options.workers.split(",")]
    shares = [options.kills // len(counts) + (i < options.kills % len(counts)) for i in range(len(counts))]
    rows: list[str] = []
    found: list[str] = []
    print(f"seed {options.seed}, logs in {folder}", flush=True)
    try:
        for i, (num_workers, kills) in enumerate(zip(counts, shares, strict=True)):
            until = began + 60 * options.minutes * (i + 1) / len(counts)
            row, different = prove(num_workers, kills, folder, options.seed, lambda: time.monotonic() > until)  # noqa: B023
            rows.append(row)
            found += different
    except Wrong as error:
        found.append(str(error))
    finally:
        ray.shutdown()
        for process in psutil.Process().children(recursive=True):
            process.kill()  # a driver, where the proof itself was stopped
    print("\n  N  kills  runs    steps  trained  goodput  undisturbed  disturbed  state", *rows, sep="\n")
    print(*(f"DIFFERS: {text}" for text in found), sep="\n")
    if not found:
        shutil.rmtree(folder)
    return 1 if found else 0


def main() -> int:
    if sys.argv[1:2] == ["drive"]:
        parser = argparse.ArgumentParser()
        parser.add_argument("run")
        parser.add_argument("num_workers", type=int)
        parser.add_argument("epochs", type=int)
        drive(parser.parse_args(sys.argv[2:]))
        return 0
    parser = argparse.ArgumentParser(description="Kill training runs again and again, and compare how they end.")
    parser.add_argument("--kills", type=int, default=50, help="in all (50)")
    parser.add_argument("--workers", default="1,2,3", help="numbers of workers, with commas between (1,2,3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and victims (0)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="no kill after so many; runs then end")
    return soak(parser.parse_args())


if __name__ == "__main__":
    sys.exit(main())
