"""Owns the run folder: its name, its place, what it says of itself, and the list of runs.

    <storage_path>/<run name>/run.json  checkpoints/  journal.jsonl

It does not decide what a run does, and it knows neither MLflow nor the checkpoints' contents.
"""

import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from dtrain.checkpoint import Checkpoint, CheckpointStore, read_manifest
from dtrain.errors import CheckpointError, ConfigError
from dtrain.storage import Folder
from dtrain.types import Position

INFO = "run.json"

_NAME_LIMIT = 200
_PUNCTUATION = frozenset(" ._-+=@,:()")


@dataclass(frozen=True)
class RunSummary:
    """A run as its folder tells it; what is not known is None.

    Attributes:
        state: what `run.json` says: "running", "finished" ...; "unknown" where it cannot be read.
        step: mini-batches trained since the run began.
        checkpoint: URL of the newest committed checkpoint.
    """

    name: str
    url: str
    state: str
    step: int | None = None
    position: Position | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    checkpoint: str | None = None
    mlflow_run_id: str | None = None


@dataclass(frozen=True)
class CheckpointSummary:
    """A committed checkpoint as its manifest tells it; only loading it tells whether it is whole.

    Attributes:
        is_best: whether its manifest says that it was the best when it was made.
        damage: why the manifest cannot be used; None if it can.
    """

    step: int
    url: str
    is_best: bool
    position: Position | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    created: str | None = None
    damage: str | None = None


class RunFolder:
    """One run's folder. Make it with `create`, or open an existing one by its URL.

    Attributes:
        url: a local path or an fsspec URL.
        checkpoints: the run's `CheckpointStore`.
        journal_path: where the journal is written: always a local disk, since object stores cannot append. With remote
            storage it lies in a private folder under $XDG_STATE_HOME (~/.local/state).
    """

    def __init__(self, url: str) -> None:
        self._folder = Folder(url)
        self.url = self._folder.url
        self.name = self.url.rpartition("/")[2]
        self.checkpoints = CheckpointStore(f"{self.url}/checkpoints")
        local = Path(self.url) if self._folder.is_local else _private_folder(self.url)
        self.journal_path = local / "journal.jsonl"
        self._is_new = False

    @classmethod
    def create(cls, storage_path: str | os.PathLike[str], name: str, exist_ok: bool = False) -> "RunFolder":
        """Makes the folder (0700 on a local disk) and tries to write to it.

        Args:
            storage_path: a local path or an fsspec URL; it is made if it is missing.
            name: the run's name.
            exist_ok: the run may exist; it is gone on with.

        Raises:
            ConfigError: the name cannot be a folder's, the run exists, or the place is not writable.
        """
        storage = os.fspath(storage_path)
        if not storage:
            raise ConfigError("storage_path='' must be a folder or an fsspec URL; leave it out for ./dtrain_runs")
        run = cls((Folder(storage) / validate_name(name)).url)
        try:
            run._is_new = run._make()
            if not run._is_new and not exist_ok:
                raise ConfigError(
                    f"run_name={name!r} exists already in storage_path={storage!r}: go on with it by "
                    'fit(resume="auto"), or give another run_name'
                )
            run._probe()
            if run._is_new:
                run._put_old_journal_aside()
            run.journal_path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            if INFO not in run._folder.entries():
                run.write_info({"state": "created", "created": datetime.now(UTC).isoformat(timespec="seconds")})
        except OSError as error:
            run.discard()  # or the next try would say that the run exists
            raise ConfigError(
                f"storage_path={storage!r} is not writable ({error}): give another storage_path, or mend its rights"
            ) from error
        return run

    def discard(self) -> None:
        """Removes the folder of a run that never began; one that was there before is left alone."""
        if self._is_new:
            with suppress(OSError):
                self._folder.remove()

    def write_info(self, info: Mapping[str, Any]) -> None:
        """Replaces `run.json`, at once and whole.

        Plain JSON values. `list_runs` reads state, step, position ({"epoch": 0, "step": 0}), metrics, mlflow_run_id.

        Raises:
            OSError: it cannot be written.
        """
        self._folder.replace(INFO, json.dumps({**info, "name": self.name}, indent=1).encode())

    def read_info(self) -> dict[str, Any]:
        """What `run.json` says; nothing if it is missing or cannot be read as JSON."""
        try:
            info = json.loads(self._folder.read(INFO))
        except (FileNotFoundError, ValueError, RecursionError):
            return {}
        return info if isinstance(info, dict) else {}

    def _make(self) -> bool:
        """Makes the folder; False if it is there already. On a local disk exactly one of many callers gets True."""
        if not self._folder.is_local and self._folder.entries():
            return False
        try:
            self._folder.make()
        except FileExistsError:
            if os.path.isdir(self._folder.path) and not os.path.islink(self._folder.path):
                return False
            raise
        return True

    def _put_old_journal_aside(self) -> None:
        """A run whose folder was removed from remote storage leaves its journal here: it is not the new run's."""
        if self.journal_path.exists():
            folder = self.journal_path.parent
            folder.rename(f"{folder}-{secrets.token_hex(4)}")

    def _probe(self) -> None:
        # Writing is tried: access rights do not tell of read-only mounts, full disks and refused credentials.
        probe = f".probe-{secrets.token_hex(4)}"
        self._folder.write(probe, probe.encode())
        if self._folder.read(probe) != probe.encode():
            raise OSError("what is written does not come back")
        self._folder.remove_file(probe)


def list_runs(storage_path: str | os.PathLike[str]) -> list[RunSummary]:
    """The runs in a storage path, by name. What is damaged is listed with what can be told of it.

    Raises:
        ConfigError: the storage path cannot be read.
    """
    storage = Folder(os.fspath(storage_path))
    try:
        entries = storage.entries()
        names = sorted(name for name, entry in entries.items() if entry.kind == "directory" and _is_run(storage / name))
    except OSError as error:
        raise ConfigError(f"storage_path={os.fspath(storage_path)!r} cannot be read: {error}") from error
    return [_summary(RunFolder((storage / name).url)) for name in names]


def find_run(storage_path: str | os.PathLike[str], name: str) -> RunFolder:
    """The run of that name.

    Raises:
        ConfigError: there is none.
    """
    storage = os.fspath(storage_path)
    folder = Folder(storage) / validate_name(name)
    try:
        is_there = _is_run(folder)
    except OSError as error:
        raise ConfigError(f"storage_path={storage!r} cannot be read: {error}") from error
    if not is_there:
        raise ConfigError(f"run_name={name!r} is no run in storage_path={storage!r}; `dtrain runs` lists what is there")
    return RunFolder(folder.url)


def list_checkpoints(run: RunFolder) -> list[CheckpointSummary]:
    """The run's checkpoints, oldest first. What is damaged is listed with the reason.

    Raises:
        CheckpointError: the folder cannot be read.
    """
    best = run.checkpoints.best()
    return [
        _checkpoint_summary(checkpoint, best is not None and checkpoint == best[1])
        for checkpoint in run.checkpoints.list()
    ]


def unique_name() -> str:
    """A new run name: the local time and four random characters, such as 20260131-235959-k7fq."""
    letters = "abcdefghjkmnpqrstuvwxyz23456789"
    return f"{datetime.now():%Y%m%d-%H%M%S}-{''.join(secrets.choice(letters) for _ in range(4))}"


def validate_name(name: str) -> str:
    """The name, if it can name a folder, an object and an MLflow run.

    Raises:
        ConfigError: it is empty or too long, or has characters that a path, a URL or a terminal would take for more.
    """
    if not isinstance(name, str) or not name:
        raise ConfigError(f"run_name={name!r} must be text and not empty; leave it out for a unique one")
    bad = next((character for character in name if not (character.isalnum() or character in _PUNCTUATION)), None)
    if bad is not None:
        allowed = "".join(sorted(_PUNCTUATION - {" "}))
        raise ConfigError(f"run_name={name!r} has {bad!r}: it must be letters, digits, spaces and {allowed}")
    if ".." in name or "::" in name or name[0] in ".- " or name[-1] == " ":
        raise ConfigError(f"run_name={name!r} must not have '..' or '::', begin with '.' or '-', or have outer spaces")
    if len(name.encode()) > _NAME_LIMIT:
        raise ConfigError(f"run_name={name[:20]!r}... has {len(name.encode())} bytes: it must be {_NAME_LIMIT} at most")
    return name


def _is_run(folder: Folder) -> bool:
    return bool({INFO, "checkpoints"} & folder.entries().keys())


def _numbers(metrics: Any) -> dict[str, float]:
    """What of it are metrics."""
    found = metrics.items() if isinstance(metrics, dict) else ()
    return {name: float(value) for name, value in found if isinstance(value, (int, float))}


def _summary(run: RunFolder) -> RunSummary:
    """What run.json says, and what only the newest checkpoint tells; both may be damaged."""
    info: dict[str, Any] = {}
    newest = manifest = None
    with suppress(OSError):
        info = run.read_info()
    with suppress(CheckpointError):
        newest = run.checkpoints.latest()
        manifest = read_manifest(newest.url) if newest else None
    step = info.get("step")  # it is written at the start and at the end
    is_behind = manifest is not None and not (isinstance(step, int) and step >= manifest.step)
    position = info.get("position")
    if isinstance(position, dict) and position.keys() == {"epoch", "step"} and not is_behind:
        position = Position(**position)
    else:
        position = manifest.position if manifest else None
    return RunSummary(
        name=run.name,
        url=run.url,
        state=str(info.get("state", "unknown")),
        step=manifest.step if manifest is not None and is_behind else step,
        position=position,
        metrics=(not is_behind and _numbers(info.get("metrics"))) or (manifest.metrics if manifest else {}),
        checkpoint=newest.url if newest else None,
        mlflow_run_id=info.get("mlflow_run_id"),
    )


def _checkpoint_summary(checkpoint: Checkpoint, is_best: bool) -> CheckpointSummary:
    summary = CheckpointSummary(checkpoint.step, checkpoint.url, is_best)
    try:
        manifest = read_manifest(checkpoint.url)
    except CheckpointError as error:
        return replace(summary, damage=str(error))
    return replace(summary, position=manifest.position, metrics=manifest.metrics, created=manifest.created)


def _private_folder(url: str) -> Path:
    state = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
    return state / "dtrain" / sha256(url.encode()).hexdigest()[:16]
