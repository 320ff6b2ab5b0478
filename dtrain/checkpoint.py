"""Owns checkpoints: files in a folder, and a manifest, written last, that makes the folder a checkpoint.

A folder without `manifest.json` is no checkpoint, on a local disk as on an object store (where a rename is not atomic).
Tensors are safetensors files and all else is JSON: nothing is unpickled. What is read is untrusted: names, sizes,
array headers and SHA-256 sums are checked against the manifest before anything is used. Which checkpoint to make, and
what the tensors mean, is decided elsewhere; only one process may commit to a store at a time.

    <root>/step-000000120/model.safetensors  fit.json   manifest.json
    <root>/.staging-step-000000180-5f3a9c01/...             being written (local disks; elsewhere without the prefix)
"""

import builtins
import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from operator import index
from typing import Any

import ml_dtypes  # noqa: F401  (makes NumPy know bfloat16 and float8)
import numpy as np

from dtrain.errors import CheckpointError, ConfigError
from dtrain.storage import Folder
from dtrain.types import Array, Position

FORMAT = 1
MANIFEST = "manifest.json"
MODEL_FILE = "model.safetensors"
"""Where rank 0 writes the variables of model and optimizer."""

SHARED = "with workers on several machines storage_path must be shared by all, a network folder or an fsspec URL"
_FOLDER = re.compile(r"step-(\d{9,18})(?:-(\d{1,9}))?")
_STAGING = re.compile(r"\.staging-(.+)-[0-9a-f]{8}")
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}\.(?:safetensors|json)")
_MANIFEST_LIMIT = 64 << 20
_HEADER_LIMIT = 100_000_000  # safetensors' own
_DTYPES = {
    "BOOL": "bool",
    "BF16": "bfloat16",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    **{f"F{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"I{bits}": f"int{bits}" for bits in (8, 16, 32, 64)},
    **{f"U{bits}": f"uint{bits}" for bits in (8, 16, 32, 64)},
}
STORED_DTYPES = {name: code for code, name in _DTYPES.items()}
"""What arrays in a checkpoint may be of: NumPy's name, and safetensors' code."""

Layout = dict[str, tuple[str, tuple[int, ...]]]
"""The dtype (safetensors' code) and the shape of each tensor."""
Offsets = dict[str, tuple[str, tuple[int, ...], int]]
"""The same and where the tensor begins in the file."""


@dataclass(frozen=True)
class FileRecord:
    """A written file: what the manifest says of it. `tensors` is None for JSON."""

    name: str
    size: int
    sha256: str
    tensors: Layout | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a checkpoint is of.

    Attributes:
        step: mini-batches trained since the run began; it names the folder.
        position: the next mini-batch to train on.
        world_size: ranks that trained it.
        seed: the run's.
        model_digest: of the model and how it is compiled, as `ModelDescription.structure`.
        versions: of dtrain, Keras and so on, by name.
        metrics: the newest ones.
        best: the monitored metric, where it was the best of the run so far.
        extra: more plain JSON values.
        files: what the workers' `Staging` returned, all of them.
        created: UTC, ISO 8601.
    """

    step: int
    position: Position
    world_size: int
    seed: int
    model_digest: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    best: float | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    files: tuple[FileRecord, ...] = ()
    created: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="milliseconds"))


@dataclass(frozen=True)
class Checkpoint:
    """A committed checkpoint; not yet verified."""

    url: str
    step: int


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A verified checkpoint. Arrays are read-only views of what was read.

    Attributes:
        tensors: by file name, then by tensor name.
        state: the JSON files' contents by file name.
    """

    checkpoint: Checkpoint
    manifest: Manifest
    tensors: Mapping[str, Mapping[str, Array]]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Staging:
    """A checkpoint being written: a value that travels to the workers, each of which writes files of its own names.

    Once it is committed or discarded, its folder is gone from a local disk: a worker that comes late can write nothing.
    """

    url: str
    target: str
    step: int

    def write_tensors(self, name: str, tensors: Mapping[str, Array]) -> FileRecord:
        """Writes arrays (numbers and bools, any shape) to the file `name`, which ends in .safetensors.

        Raises:
            CheckpointError: the file cannot be written, or an array's dtype not stored.
        """
        arrays = {key: _as_stored(value) for key, value in tensors.items()}
        layout = _layout(arrays, f"{self.url}/{name}")
        return self._write(name, _safetensors(arrays, layout), layout)

    def write_json(self, name: str, value: Any) -> FileRecord:
        """Writes a plain JSON value to the file `name`, which ends in .json."""
        return self._write(name, [json.dumps(value, sort_keys=True).encode()], None)

    def _write(self, name: str, parts: Sequence[bytes | memoryview], layout: Layout | None) -> FileRecord:
        _check_name(name, self.url)
        folder, fix = Folder(self.url), "free space, or choose another storage_path"
        if folder.is_local and not os.path.isdir(folder.url):
            fix = f"that folder is not on this machine: {SHARED}"
        with _as_checkpoint_error(f"{self.url}/{name}", "written", fix):
            folder.write(name, *parts)
        digest = hashlib.sha256()
        for part in parts:
            digest.update(part)
        return FileRecord(name, sum(len(part) for part in parts), digest.hexdigest(), layout)


class CheckpointStore:
    """The checkpoints in one folder.

    Args:
        root: a local path or an fsspec URL (file://, memory://, s3://...); it is made at the first `stage`.

    Raises:
        ConfigError: the kind of storage is unknown, or its package is missing.
    """

    def __init__(self, root: str) -> None:
        self._root = Folder(root)
        self.url = self._root.url

    def stage(self, step: int) -> Staging:
        """Begins a checkpoint after `step` steps: an empty folder for the workers to write into.

        A step that was staged before gets a folder of its own: what is committed is never written to again.
        """
        newest = self.latest()
        if newest and newest.step > step:
            raise CheckpointError(
                f"step={step} is older than the newest checkpoint, {newest.url}: rewind the store first"
            )
        with _as_checkpoint_error(self.url, "written", "free space, or choose another storage_path"):
            taken = {match[1] if (match := _STAGING.fullmatch(name)) else name for name in self._root.entries()}
            names = (f"step-{step:09d}" + (f"-{again}" if again else "") for again in range(len(taken) + 1))
            target = next(name for name in names if name not in taken)
            folder = self._root / (f".staging-{target}-{secrets.token_hex(4)}" if self._root.is_local else target)
            folder.make()
        return Staging(folder.url, target, step)

    def commit(self, staging: Staging, manifest: Manifest) -> Checkpoint:
        """Makes the staged files a checkpoint, all or nothing; called by the controller alone.

        Raises:
            CheckpointError: a file of the manifest is not there, or writing failed. Then there is no such checkpoint.
        """
        if manifest.step != staging.step:
            raise ValueError(f"the manifest is of step {manifest.step}, the staging folder of step {staging.step}")
        staged, target = Folder(staging.url), self._root / staging.target
        sealed = _encode(manifest)
        with _as_checkpoint_error(target.url, "committed", "free space, or choose another storage_path"):
            _check_staged(staged, manifest)
            try:
                if staged.url != target.url:
                    staged.move(target)
                target.replace(MANIFEST, sealed)
            except OSError:
                with suppress(OSError):
                    _remove(target)  # it would fill the disk, or be there although it was said not to be
                raise
        return Checkpoint(target.url, manifest.step)

    def discard(self, staging: Staging) -> None:
        """Removes a staging folder that will not be committed."""
        with _as_checkpoint_error(staging.url, "removed", "remove it by hand"):
            Folder(staging.url).remove()

    def list(self) -> tuple[Checkpoint, ...]:
        """The committed checkpoints, oldest first. Only `load` tells whether they are whole."""
        with _as_checkpoint_error(self.url, "listed", "check the path and the access rights"):
            return tuple(
                Checkpoint((self._root / name).url, _order(name)[0])
                for name in self._names()
                if _FOLDER.fullmatch(name) and (self._root / name).has(MANIFEST)
            )

    def latest(self) -> Checkpoint | None:
        """The newest committed checkpoint."""
        return next(reversed(self.list()), None)

    def best(self, monitor: str | None = None) -> tuple[float, Checkpoint] | None:
        """The best checkpoint by this monitored metric (None: by whichever), as manifests tell, and its value."""
        for checkpoint in reversed(self.list()):
            with suppress(CheckpointError):
                manifest = read_manifest(checkpoint.url)
                if manifest.best is not None and monitor in (None, manifest.extra.get("monitor")):
                    return manifest.best, checkpoint
        return None

    def latest_valid(self) -> tuple[LoadedCheckpoint | None, tuple[str, ...]]:
        """The newest checkpoint that verifies, and why each newer one, which is damaged, does not.

        Raises:
            CheckpointError: a newer one cannot be read at all, or is of a newer format: it may be whole.
        """
        refused: list[str] = []
        for checkpoint in reversed(self.list()):
            try:
                return load(checkpoint), tuple(refused)
            except CheckpointError as error:
                if isinstance(error, _Newer) or isinstance(error.__cause__, (OSError, MemoryError)):
                    raise
                refused.append(str(error))
        return None, tuple(refused)

    def prune(self, keep: int, best: Checkpoint | None = None) -> None:
        """Removes all but the newest `keep` checkpoints and `best`, and what older unfinished commits left."""
        if keep < 1:
            raise ConfigError(f"keep={keep!r} must be 1 or more: the newest checkpoint is always kept")
        committed = self.list()
        # By name: the run may have been moved since `best` was noted down.
        spared = {_name(checkpoint.url) for checkpoint in (*committed[-keep:], *filter(None, [best]))}
        newest = _order(committed[-1].url) if committed else (-1, 0)
        self._remove(lambda name: name not in spared and _order(name) <= newest)

    def rewind(self, checkpoint: Checkpoint | None) -> None:
        """Removes everything newer than `checkpoint` (None: everything), before training goes on from there.

        Otherwise the newest checkpoint would be one of the abandoned steps.

        Raises:
            CheckpointError: it is none of this store's, and nothing was removed; or removing failed.
        """
        if checkpoint is not None and checkpoint not in self.list():
            raise CheckpointError(f"{checkpoint.url} is no checkpoint of {self.url}: give one that `list` returns")
        self._remove(lambda name: checkpoint is None or _order(name) > _order(checkpoint.url))

    def _remove(self, is_doomed: Callable[[str], bool]) -> None:
        """Newest first: stopped half-way, a rewind leaves a history without gaps."""
        with _as_checkpoint_error(self.url, "pruned", "remove old checkpoints by hand"):
            for name in reversed(self._names()):
                if is_doomed(name):
                    _remove(self._root / name)

    def _names(self) -> builtins.list[str]:
        """Our folders, committed or not, oldest first."""
        folders = (name for name, entry in self._root.entries().items() if entry.kind == "directory")
        return sorted((name for name in folders if _order(name) >= (0, 0)), key=_order)


class _Newer(CheckpointError):
    """A checkpoint is of a newer format."""


def load(checkpoint: Checkpoint | str) -> LoadedCheckpoint:
    """Reads a checkpoint and verifies all of it: listing, sizes, array headers, then contents.

    Raises:
        CheckpointError: it is missing, damaged, of a newer format, or holds what it should not.
        ConfigError: the URL's kind of storage is unknown.
    """
    url = checkpoint if isinstance(checkpoint, str) else checkpoint.url
    folder = Folder(url)
    with _as_checkpoint_error(folder.url, "read", "check the path and the access rights"):
        manifest = read_manifest(folder.url)
        if _FOLDER.fullmatch(_name(folder.url)) and _order(folder.url)[0] != manifest.step:
            raise _damaged(folder, f"its manifest is of step {manifest.step}")
        _check_listing(folder, manifest)
        layouts = {
            record.name: _check_header(folder, record) for record in manifest.files if record.tensors is not None
        }
        contents = {record.name: _read_verified(folder, record) for record in manifest.files}
    try:
        state = {name: json.loads(data) for name, data in contents.items() if name not in layouts}
    except (ValueError, RecursionError) as error:
        raise _damaged(folder, f"a state file is not JSON ({error})") from error
    tensors = {name: _views(contents[name], layout) for name, layout in layouts.items()}
    return LoadedCheckpoint(Checkpoint(folder.url, manifest.step), manifest, tensors, state)


def read_manifest(url: str) -> Manifest:
    """A checkpoint's manifest alone, verified: enough to list metrics or compare variables. Raises CheckpointError."""
    folder = Folder(url)
    with _as_checkpoint_error(folder.url, "read", "check the path and the access rights"):
        entry = folder.entries().get(MANIFEST)
        if entry is None:
            raise CheckpointError(
                f"{folder.url} is no checkpoint: it has no {MANIFEST}. It is missing or was not finished; "
                "give the URL of a step-... folder"
            )
        if entry.kind != "file" or entry.size > _MANIFEST_LIMIT:
            raise _damaged(folder, f"{MANIFEST} is a {entry.kind} of {entry.size} bytes")
        raw = folder.read(MANIFEST)
    try:
        return _decode(raw, folder)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise _damaged(folder, f"{MANIFEST} cannot be understood ({error})") from error


def _remove(folder: Folder) -> None:
    folder.remove_file(MANIFEST)  # first: a kill here must not leave half a checkpoint
    folder.remove()


def _name(url: str) -> str:
    return url.rpartition("/")[2]


def _order(name_or_url: str) -> tuple[int, int]:
    """(step, attempt) of a folder of ours; negative for any other."""
    name = _name(name_or_url)
    staging = _STAGING.fullmatch(name)
    match = _FOLDER.fullmatch(staging[1] if staging else name)
    return (int(match[1]), int(match[2] or 0)) if match else (-1, 0)


def _check_name(name: str, where: str) -> str:
    if not _FILE.fullmatch(name) or name == MANIFEST:
        raise CheckpointError(
            f"{where}: {name!r} is no name for a checkpoint's file: it must be letters, digits, - and _, ending in "
            ".safetensors or .json"
        )
    return name


def _as_stored(value: Array) -> Array:
    """In C order and little-endian, as the format has it; where it is so already, the same memory."""
    array = np.asarray(value, order="C")
    return array.astype(array.dtype.newbyteorder("<")) if array.dtype.byteorder == ">" else array


def _safetensors(arrays: Mapping[str, Array], layout: Layout) -> list[bytes | memoryview]:
    """The parts of a safetensors file: the header, then the arrays' own memory.

    The format's library makes a copy of all of it, and no other Python code runs meanwhile: half a second without a
    step for 300 MB, where these are hashed and written beside the training.
    """
    names = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))  # so that each lies at its own alignment
    header: dict[str, Any] = {}
    end = 0
    for name in names:
        start, end = end, end + arrays[name].nbytes
        dtype, shape = layout[name]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (start, end)}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [len(text).to_bytes(8, "little") + text, *(arrays[name].reshape(-1).view(np.uint8).data for name in names)]


def _layout(arrays: Mapping[str, Array], where: str) -> Layout:
    for key, array in arrays.items():
        if array.dtype.name not in STORED_DTYPES:
            raise CheckpointError(
                f"{where}: tensor {key!r} has dtype {array.dtype.name}: it must be one of {[*STORED_DTYPES]}"
            )
    return {key: (STORED_DTYPES[array.dtype.name], array.shape) for key, array in arrays.items()}


def _check_staged(staged: Folder, manifest: Manifest) -> None:
    """All files of the manifest are there in their sizes, and what others left (of a killed worker, say) is not."""
    entries = staged.entries()
    for record in manifest.files:
        entry = entries.pop(record.name, None)
        if entry is None or entry.size != record.size:
            found = f"has {entry.size} bytes, not {record.size}" if entry else "is not there"
            raise CheckpointError(f"{staged.url}/{record.name} was written by a worker but {found}: {SHARED}")
    for name in entries:
        staged.remove_file(name)


def _check_listing(folder: Folder, manifest: Manifest) -> None:
    entries = {name: entry for name, entry in folder.entries().items() if not name.startswith(".")}  # .DS_Store, say
    entries.pop(MANIFEST, None)
    for record in manifest.files:
        entry = entries.pop(record.name, None)
        if entry is None:
            raise _damaged(folder, f"{record.name} is missing")
        if entry.kind != "file":
            raise _damaged(folder, f"{record.name} is not a plain file")
        if entry.size != record.size:
            raise _damaged(folder, f"{record.name} has {entry.size} bytes, not {record.size}")
    if entries:
        raise _damaged(folder, f"{min(entries)} does not belong to it")


def _check_header(folder: Folder, record: FileRecord) -> Offsets:
    """Where each tensor lies, if the file's header says what the manifest says and fits the file."""
    size = int.from_bytes(folder.read(record.name, 8), "little")
    if size > min(_HEADER_LIMIT, record.size - 8):
        raise _damaged(folder, f"{record.name} has a header of {size} bytes")
    try:
        header = json.loads(folder.read(record.name, 8 + size)[8:])
        header.pop("__metadata__", None)
        spans = sorted((*_span(item["data_offsets"]), key) for key, item in header.items())
        found = {key: (item["dtype"], tuple(item["shape"])) for key, item in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(folder, f"{record.name} has a header that cannot be understood ({error})") from error
    if record.tensors is None or found != record.tensors:
        raise _damaged(folder, f"{record.name} does not hold the tensors that the manifest names")
    offsets: Offsets = {}
    end = 0
    for start, stop, key in spans:
        dtype, shape = record.tensors[key]
        if start != end or stop - start != math.prod(shape) * np.dtype(_DTYPES[dtype]).itemsize:
            raise _damaged(folder, f"{record.name} says that tensor {key!r} lies at bytes {start} to {stop}")
        offsets[key], end = (dtype, shape, 8 + size + start), stop
    if 8 + size + end != record.size:
        raise _damaged(folder, f"{record.name} has {record.size} bytes, but its tensors end at {8 + size + end}")
    return offsets


def _span(offsets: Sequence[Any]) -> tuple[int, int]:
    start, stop = map(index, offsets)
    return start, stop


def _read_verified(folder: Folder, record: FileRecord) -> bytes:
    data = folder.read(record.name, record.size)
    if hashlib.sha256(data).hexdigest() != record.sha256:
        raise _damaged(folder, f"the SHA-256 of {record.name} is not the manifest's")
    return data


def _views(data: bytes, offsets: Offsets) -> dict[str, Array]:
    return {
        key: np.ndarray(shape, np.dtype(_DTYPES[dtype]), buffer=data, offset=offset)
        if math.prod(shape)
        else np.empty(shape, np.dtype(_DTYPES[dtype]))
        for key, (dtype, shape, offset) in offsets.items()
    }


_SEAL = b',\n "digest": "'


def _encode(manifest: Manifest) -> bytes:
    """JSON whose last entry is the SHA-256 of all bytes before it, so that damage to the manifest itself shows."""
    fields = {"format": FORMAT, **asdict(manifest)}
    fields["metrics"] = {name: float(value) for name, value in manifest.metrics.items()}
    fields["files"] = {f["name"]: {k: v for k, v in f.items() if k != "name"} for f in fields["files"]}
    head = json.dumps(fields, indent=1).removesuffix("\n}").encode()
    return head + _SEAL + hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'


def _decode(raw: bytes, folder: Folder) -> Manifest:
    fields = json.loads(raw)
    version = fields.pop("format")
    if not isinstance(version, int) or version > FORMAT:
        raise _Newer(
            f"{folder.url} is of checkpoint format {version!r}; this dtrain reads up to {FORMAT}: upgrade dtrain"
        )
    head, _, seal = raw.rpartition(_SEAL)
    if seal != hashlib.sha256(head).hexdigest().encode() + b'"\n}\n':
        raise ValueError("its own digest does not match")
    del fields["digest"]
    position = fields["position"] = Position(**fields["position"])
    whole = [position.epoch, position.step, *(fields[name] for name in ("step", "world_size", "seed"))]
    if not all(type(number) is int and number >= 0 for number in whole):
        raise ValueError(f"{whole} must be whole numbers")
    if not isinstance(fields["best"], (float, int, type(None))):
        raise ValueError(f"best={fields['best']!r} must be a number")
    fields["metrics"] = {str(name): float(value) for name, value in fields["metrics"].items()}
    extra = fields["extra"]
    if not all(isinstance(part, (dict, type(None))) for part in (extra, extra.get("plan"), extra.get("tracked"))):
        raise ValueError("extra, plan and tracked must be objects")
    fields["versions"] = {str(name): str(value) for name, value in fields["versions"].items()}
    fields["files"] = tuple(_decode_record(name, item, folder) for name, item in fields["files"].items())
    return Manifest(**fields)


def _decode_record(name: str, item: Mapping[str, Any], folder: Folder) -> FileRecord:
    _check_name(name, folder.url)
    size, sha256, tensors = item["size"], item["sha256"], item["tensors"]
    if (
        (tensors is None) != name.endswith(".json")
        or not isinstance(size, int)
        or size < (8 if tensors is not None else 0)
    ):
        raise ValueError(f"the entry of {name}")
    if tensors is None:
        return FileRecord(name, size, sha256)
    layout = {key: (dtype, tuple(shape)) for key, (dtype, shape) in tensors.items()}
    for key, (dtype, shape) in layout.items():
        is_shape = all(type(n) is int and 0 <= n < 2**40 for n in shape) and len(shape) <= 32
        # NumPy refuses shapes whose other dimensions overflow even where one of them is 0.
        if dtype not in _DTYPES or not is_shape or math.prod(n for n in shape if n) > 2**56:
            raise ValueError(f"tensor {key!r} of {name} is said to be {dtype} {shape}")
    return FileRecord(name, size, sha256, layout)


def _damaged(folder: Folder, what: str) -> CheckpointError:
    return CheckpointError(f"{folder.url} is damaged: {what}. Use another checkpoint, or copy it again from its source")


@contextmanager
def _as_checkpoint_error(what: str, verb: str, fix: str) -> Iterator[None]:
    try:
        yield
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"{what} cannot be {verb}: {str(error) or 'out of memory'}; {fix}") from error
