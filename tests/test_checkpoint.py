"""Claims about checkpoints: whole or not there, nothing damaged is used, nothing foreign is believed."""

import builtins
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from fsspec.implementations.memory import MemoryFileSystem
from s3fs import S3FileSystem

from dtrain import checkpoint as module
from dtrain.checkpoint import Checkpoint, CheckpointStore, Manifest, load, read_manifest
from dtrain.errors import CheckpointError, ConfigError
from dtrain.storage import Folder
from dtrain.types import Array, Position

DTYPES = [
    *("float64", "float32", "float16", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, "complex64"),
    *("int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"),
]


def manifest(step: int, **fields: Any) -> Manifest:
    return Manifest(**{"step": step, "position": Position(1, 3), "world_size": 2, "seed": 7, **fields})


def commit(store: CheckpointStore, step: int, size: int = 3000) -> Checkpoint:
    staging = store.stage(step)
    files = (
        staging.write_tensors(
            "model.safetensors", {"w": np.full(size, step, np.float32), "iterations": np.array(step)}
        ),
        staging.write_json("state.json", {"step": step, "history": [0.5] * 20}),
    )
    return store.commit(staging, manifest(step, files=files, metrics={"loss": np.float32(0.5)}))


def step_of(loaded: module.LoadedCheckpoint) -> int:
    """The step that all parts agree on."""
    steps = {loaded.manifest.step, loaded.state["state.json"]["step"], int(loaded.tensors["model.safetensors"]["w"][0])}
    (step,) = steps
    return int(step)


def folder_of(checkpoint: Checkpoint) -> Path:
    return Path(checkpoint.url)


@pytest.fixture
def store(storage: str) -> CheckpointStore:
    return CheckpointStore(f"{storage}/run 1/checkpoints")


@pytest.fixture
def local(tmp_path: Path) -> CheckpointStore:
    return CheckpointStore(str(tmp_path / "checkpoints"))


def test_what_is_committed_is_loaded(store: CheckpointStore) -> None:
    assert store.list() == () and store.latest() is None and store.latest_valid() == (None, ())
    committed = commit(store, 120)
    assert committed.url == f"{store.url}/step-000000120"
    assert store.latest() == committed
    loaded = load(committed)
    assert step_of(loaded) == 120 and loaded.checkpoint == committed == load(committed.url).checkpoint
    assert loaded.manifest.position == Position(1, 3) and loaded.manifest.metrics == {"loss": 0.5}
    assert read_manifest(committed.url) == loaded.manifest


def test_every_dtype_and_shape_comes_back(store: CheckpointStore) -> None:
    tensors: dict[str, Array] = {}
    for dtype in DTYPES:
        name = np.dtype(dtype).name
        tensors |= {f"{name}/{shape}": np.ones(shape, dtype) for shape in [(), (3,), (2, 5), (0, 4)]}
    tensors["scrambled if not copied"] = np.arange(12.0).reshape(3, 4).T
    tensors["big-endian"] = np.arange(3, dtype=">i4")
    tensors["nan"] = np.array([np.nan, np.inf, -0.0], np.float32)
    staging = store.stage(1)
    files = (staging.write_tensors("model.safetensors", tensors), staging.write_tensors("empty.safetensors", {}))
    got = load(store.commit(staging, manifest(1, files=files))).tensors
    assert got["empty.safetensors"] == {} and set(got["model.safetensors"]) == set(tensors)
    for name, tensor in tensors.items():
        back = got["model.safetensors"][name]
        assert (back.dtype, back.shape) == (tensor.dtype.newbyteorder("="), tensor.shape)
        assert back.tobytes() == tensor.astype(tensor.dtype.newbyteorder("=")).tobytes(), name


def test_the_format_s_own_library_reads_what_is_written(tmp_path: Path) -> None:
    tensors = {"a": np.arange(6.0).reshape(2, 3), "é": np.arange(3, dtype=np.uint8), "z": np.zeros((0, 4), np.float32)}
    staging = CheckpointStore(str(tmp_path)).stage(1)
    for name, written in (("model.safetensors", tensors), ("empty.safetensors", {})):
        staging.write_tensors(name, written)
        read = safetensors.numpy.load(Path(staging.url, name).read_bytes())
        assert read.keys() == written.keys()
        for key, tensor in written.items():
            assert (read[key].dtype, read[key].shape) == (tensor.dtype, tensor.shape)
            assert read[key].tobytes() == tensor.tobytes()


def test_tensors_are_written_from_the_memory_where_they_are(tmp_path: Path) -> None:
    """A copy would double what a checkpoint needs, and be made while no step can run."""
    tensors = {"w": np.zeros(32 << 20, np.uint8), "b": np.zeros((1 << 20, 2), np.float64)}
    staging = CheckpointStore(str(tmp_path)).stage(1)
    tracemalloc.start()
    try:
        staging.write_tensors("model.safetensors", tensors)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20


def test_what_cannot_be_stored_is_refused(store: CheckpointStore) -> None:
    staging = store.stage(1)
    with pytest.raises(CheckpointError, match="tensor 'names' has dtype"):
        staging.write_tensors("model.safetensors", {"names": np.array(["a"])})
    for name in (
        "../model.safetensors",
        "/etc/model.json",
        "a/b.json",
        "manifest.json",
        "model.bin",
        ".json",
        "a\0.json",
    ):
        with pytest.raises(CheckpointError, match="is no name"):
            staging.write_json(name, {})


def test_half_written_checkpoint_is_never_latest(store: CheckpointStore) -> None:
    first = commit(store, 100)
    staging = store.stage(120)
    staging.write_tensors("model.safetensors", {"w": np.ones(3)})
    assert store.latest() == first and store.list() == (first,)


def test_a_file_that_did_not_arrive_is_never_committed(store: CheckpointStore) -> None:
    staging = store.stage(120)
    record = staging.write_json("state.json", {})
    for bad in (dataclasses.replace(record, name="other.json"), dataclasses.replace(record, size=5)):
        with pytest.raises(CheckpointError, match="storage_path must be shared by all"):
            store.commit(staging, manifest(120, files=(bad,)))
    assert store.latest() is None


def test_files_of_a_killed_worker_are_not_committed(store: CheckpointStore) -> None:
    staging = store.stage(120)
    staging.write_json("stale.json", {})
    committed = store.commit(staging, manifest(120, files=(staging.write_json("state.json", {"a": 1}),)))
    assert load(committed).state == {"state.json": {"a": 1}}


def test_a_late_worker_can_write_nothing(local: CheckpointStore) -> None:
    for finish in (lambda s: local.commit(s, manifest(s.step)), local.discard):
        staging = local.stage(7)
        finish(staging)
        with pytest.raises(CheckpointError, match="cannot be written"):
            staging.write_json("state.json", {})


def test_a_step_committed_twice_keeps_both(store: CheckpointStore) -> None:
    first, second = commit(store, 120), commit(store, 120)
    assert first.url != second.url and store.list() == (first, second)
    assert step_of(load(first)) == step_of(load(second)) == 120


def test_prune_keeps_the_newest_and_the_best_and_clears_old_leftovers(store: CheckpointStore) -> None:
    made = [commit(store, step) for step in (10, 20)]
    store.stage(25)
    made += [commit(store, step) for step in (30, 40)]
    pending = store.stage(50)
    store.prune(2, best=made[0])
    assert store.list() == (made[0], *made[2:])
    assert store.commit(pending, manifest(50)) == store.latest()
    store.prune(1)
    assert [c.step for c in store.list()] == [50]
    if not store.url.startswith("memory"):
        assert os.listdir(store.url) == ["step-000000050"]
    with pytest.raises(ConfigError, match="keep=0"):
        store.prune(0)


def test_rewind_makes_an_older_checkpoint_the_newest(store: CheckpointStore) -> None:
    made = [commit(store, step) for step in (10, 20, 30)]
    with pytest.raises(CheckpointError, match="rewind the store first"):
        store.stage(15)
    store.rewind(made[0])
    assert store.list() == (made[0],)
    assert commit(store, 15) == store.latest()
    store.rewind(None)
    assert store.list() == ()


def test_a_rewind_to_what_is_not_there_removes_nothing(store: CheckpointStore, tmp_path: Path) -> None:
    made = tuple(commit(store, step) for step in (10, 20))
    other = CheckpointStore(str(tmp_path / "other"))
    foreign = [commit(other, 10), Checkpoint(f"{made[0].url}/", 10), Checkpoint(f"{store.url}/step-000000015", 15)]
    for checkpoint in foreign:
        with pytest.raises(CheckpointError, match="is no checkpoint of"):
            store.rewind(checkpoint)
    assert store.list() == made


def test_a_resume_from_an_older_checkpoint_goes_on_from_there(store: CheckpointStore) -> None:
    made = [commit(store, step) for step in (10, 20, 30)]
    store.stage(40)  # of a driver that was killed
    again = CheckpointStore(store.url)
    older = load(made[1].url).checkpoint
    again.rewind(older)
    assert again.list() == tuple(made[:2]) and older == again.latest()
    redone = [commit(again, step) for step in (25, 30, 40)]
    assert again.list() == (*made[:2], *redone) and step_of(load(again.list()[-1])) == 40


def test_the_best_is_kept_wherever_the_run_was_moved_to(local: CheckpointStore) -> None:
    best, *_ = [commit(local, step) for step in (10, 20, 30)]
    moved = Path(local.url).rename(Path(local.url).with_name("moved"))
    CheckpointStore(str(moved)).prune(1, best=best)
    assert sorted(os.listdir(moved)) == ["step-000000010", "step-000000030"]


# Damage


def test_truncation_anywhere_is_found(local: CheckpointStore) -> None:
    folder = folder_of(commit(local, 120, size=20_000))
    for path in folder.iterdir():
        whole = path.read_bytes()
        for cut in [*range(0, len(whole), 4096), len(whole) - 1]:
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError):
                load(str(folder))
        path.write_bytes(whole)
    assert step_of(load(str(folder))) == 120


def test_a_thousand_random_bit_flips_are_found(local: CheckpointStore) -> None:
    folder = folder_of(commit(local, 120))
    random = np.random.default_rng(0)
    for path in folder.iterdir():
        whole = path.read_bytes()
        for at in random.integers(0, len(whole) * 8, 350):
            flipped = bytearray(whole)
            flipped[at // 8] ^= 1 << (at % 8)
            path.write_bytes(flipped)
            with pytest.raises(CheckpointError):
                load(str(folder))
        path.write_bytes(whole)
    assert step_of(load(str(folder))) == 120


def test_extra_values_come_back_and_are_sealed(store: CheckpointStore) -> None:
    extra = {"best": {"loss": 0.25, "nan": float("inf")}, "list": [1, None, 'ü,\n "digest": "'], "digest": "no"}
    committed = store.commit(store.stage(7), manifest(7, extra=extra))
    assert load(committed).manifest.extra == extra
    folder = Folder(committed.url)
    folder.write("manifest.json", folder.read("manifest.json").replace(b"0.25", b"0.24"))
    with pytest.raises(CheckpointError, match="its own digest does not match"):
        load(committed)


def test_extra_values_that_are_no_json_leave_nothing_behind(store: CheckpointStore) -> None:
    first, staging = commit(store, 100), store.stage(120)
    with pytest.raises(TypeError):
        store.commit(staging, manifest(120, extra={"a": object()}))
    store.discard(staging)
    assert Folder(store.url).entries().keys() == {"step-000000100"} and store.list() == (first,)


def test_a_damaged_checkpoint_gives_way_to_the_one_before_and_says_so(local: CheckpointStore) -> None:
    commit(local, 100)
    newest = folder_of(commit(local, 120))
    data = newest / "model.safetensors"
    data.write_bytes(data.read_bytes()[:-1] + b"!")
    loaded, refused = local.latest_valid()
    assert loaded is not None and step_of(loaded) == 100
    assert len(refused) == 1 and "step-000000120 is damaged: the SHA-256 of model.safetensors" in refused[0]


def test_a_missing_checkpoint_is_named(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match=r"step-000000001 is no checkpoint: it has no manifest.json"):
        load(f"{store.url}/step-000000001")


# A commit that is cut short


class Killed(BaseException):
    """Stands for SIGKILL: no handler of ours catches it."""


COUNTED = [(os, name) for name in ("mkdir", "fsync", "rename", "replace", "open", "close")] + [(builtins, "open")]


@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_step_of_a_commit_leaves_this_checkpoint_or_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    def die_at(patch: pytest.MonkeyPatch, fatal: int) -> None:
        calls = iter(range(1, 1000))

        def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                is_last = next(calls) == fatal
                if is_last and not after:
                    raise Killed
                try:
                    return plain(*args, **kwargs)
                finally:
                    if is_last:
                        raise Killed

            return call

        for owner, name in COUNTED:
            patch.setattr(owner, name, counted(getattr(owner, name)))

    newest = []
    for fatal in range(1, 1000):
        store = CheckpointStore(str(tmp_path / str(fatal)))
        commit(store, 100)
        try:
            with monkeypatch.context() as patch:
                die_at(patch, fatal)
                commit(store, 120)
        except Killed:
            loaded, refused = store.latest_valid()
            assert loaded is not None and refused == ()
            newest.append(step_of(loaded))
            # The next try finds nothing in its way, and pruning clears what was left.
            assert commit(store, 120) == store.latest()
            store.prune(1)
            assert len(os.listdir(store.url)) == 1
        else:
            break
    assert len(newest) > 10 and newest == sorted(newest) and set(newest) == {100, 120}


CHANGES = ["make", "write", "replace", "move", "remove_file", "remove"]


@contextmanager
def stopping_at(fatal: int, error: BaseException, half: bool) -> Iterator[None]:
    """Ends the `fatal`-th change of a folder with `error`: before it is made, or with half of the data written."""
    calls = iter(range(1, 1000))

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(folder: Folder, *args: Any) -> Any:
            if next(calls) != fatal:
                return plain(folder, *args)
            if half and plain is write:
                write(folder, args[0], args[1][: len(args[1]) // 2])
            raise error

        return call

    write = Folder.write
    with pytest.MonkeyPatch.context() as patch:
        for name in CHANGES:
            patch.setattr(Folder, name, counted(getattr(Folder, name)))
        yield


def each_stop(store: CheckpointStore, act: Callable[[CheckpointStore], Any], error: BaseException) -> Iterator[Any]:
    """Stops `act` at every change it makes, each time in a store of its own with the steps 80 and 100."""
    # An object is there when it is whole.
    for half in (False,) if store.url.startswith("memory") else (False, True):
        for fatal in range(1, 1000):
            fresh = CheckpointStore(f"{store.url}/{uuid.uuid4().hex}")
            commit(fresh, 80)
            commit(fresh, 100)
            try:
                with stopping_at(fatal, error, half):
                    act(fresh)
            except (Killed, CheckpointError):
                yield fresh
            else:
                assert fatal > 2
                break


def test_a_commit_that_is_stopped_anywhere_leaves_this_checkpoint_or_the_one_before(store: CheckpointStore) -> None:
    for stopped in each_stop(store, lambda fresh: commit(fresh, 120), Killed()):
        loaded, refused = stopped.latest_valid()
        assert loaded is not None and refused == () and step_of(loaded) == 100
        assert step_of(load(commit(stopped, 120))) == 120


def save(store: CheckpointStore) -> None:
    """As the controller does it."""
    staging = store.stage(120)
    try:
        store.commit(staging, manifest(120, files=(staging.write_json("state.json", {"a": 1}),)))
    except CheckpointError:
        store.discard(staging)
        raise


def test_a_commit_that_fails_anywhere_is_taken_back(store: CheckpointStore) -> None:
    for failed in each_stop(store, save, OSError(28, "No space left on device")):
        assert Folder(failed.url).entries().keys() == {"step-000000080", "step-000000100"}


def test_a_commit_that_does_not_reach_the_disk_is_taken_back(
    local: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail_at(fatal: int) -> Callable[[int], None]:
        calls, plain = iter(range(1, 1000)), os.fsync

        def fsync(descriptor: int) -> None:
            plain(descriptor)
            if next(calls) == fatal:
                raise OSError(5, "Input/output error")

        return fsync

    first = commit(local, 100)
    for fatal in range(1, 1000):
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail_at(fatal))
            try:
                save(local)
            except CheckpointError:
                assert os.listdir(local.url) == ["step-000000100"] and local.list() == (first,)
            else:
                assert fatal > 4
                break


def test_a_prune_or_rewind_that_is_stopped_anywhere_leaves_whole_checkpoints(store: CheckpointStore) -> None:
    def forget(fresh: CheckpointStore) -> None:
        commit(fresh, 120)
        fresh.rewind(fresh.list()[0])

    for stopped in each_stop(store, lambda fresh: fresh.prune(1), Killed()):
        steps = [step_of(load(checkpoint)) for checkpoint in stopped.list()]
        assert steps in ([80, 100], [100])
    for stopped in each_stop(store, forget, Killed()):
        steps = [step_of(load(checkpoint)) for checkpoint in stopped.list()]
        assert steps in ([80, 100, 120], [80, 100], [80]), "what is abandoned goes newest first"


def test_a_full_disk_leaves_the_checkpoint_before(local: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(local, 100)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            CheckpointError, match=r"No space left on device; free space, or choose another storage_path"
        ):
            commit(local, 120)
    loaded, _ = local.latest_valid()
    assert loaded is not None and step_of(loaded) == 100


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", disk], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"a small disk cannot be mounted: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", disk], check=True)


def test_a_disk_that_is_full_keeps_its_checkpoints_and_takes_more_once_there_is_room(small_disk: Path) -> None:
    store = CheckpointStore(str(small_disk / "checkpoints"))
    first = commit(store, 100)
    before = shutil.disk_usage(small_disk).used
    staging = store.stage(120)
    with pytest.raises(CheckpointError, match=r"No space left on device; free space, or choose another storage_path"):
        staging.write_tensors("model.safetensors", {"w": np.zeros(2 << 20, np.uint8)})
    store.discard(staging)
    assert shutil.disk_usage(small_disk).used == before
    staging = store.stage(120)
    with open(small_disk / "filler", "wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(b"0" * 4096)
    with pytest.raises(CheckpointError, match="No space left on device"):
        store.commit(staging, manifest(120))
    store.discard(staging)
    assert store.list() == (first,) and step_of(load(first)) == 100
    os.remove(small_disk / "filler")
    assert step_of(load(commit(store, 120))) == 120


def test_a_disk_that_turned_read_only_keeps_its_checkpoints(small_disk: Path) -> None:
    store = CheckpointStore(str(small_disk / "checkpoints"))
    made = (commit(store, 100), commit(store, 110))
    staging = store.stage(120)
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    for change in (
        lambda: store.stage(120),
        lambda: staging.write_json("state.json", {}),
        lambda: store.commit(staging, manifest(120)),
        lambda: store.discard(staging),
        lambda: store.prune(1),
        lambda: store.rewind(None),
    ):
        with pytest.raises(CheckpointError, match="Read-only file system"):
            change()
    assert store.list() == made and [step_of(load(checkpoint)) for checkpoint in made] == [100, 110]


KILLER = """
import os, random, select, signal, sys, time
sys.path.insert(0, {tests!r})
from test_checkpoint import commit, step_of
from dtrain.checkpoint import CheckpointStore

store, random = CheckpointStore(sys.argv[1]), random.Random(0)
for kill in range(30):
    said, says = os.pipe()
    writer = os.fork()
    if writer == 0:
        step = store.latest().step if store.latest() else 0
        while True:
            step += 1
            commit(store, step, size=100_000)
            store.prune(2)
            os.write(says, b"%d " % step)
    select.select([said], [], [])
    time.sleep(random.uniform(0, 0.02))  # a moment like any other
    os.kill(writer, signal.SIGKILL)
    os.waitpid(writer, 0)
    newest = int(os.read(said, 10_000).split()[-1])
    loaded, refused = store.latest_valid()
    assert refused == () and step_of(loaded) >= newest, (newest, loaded, refused)
"""


def test_a_writer_killed_at_any_moment_leaves_a_checkpoint_that_verifies(local: CheckpointStore) -> None:
    script = KILLER.format(tests=str(Path(__file__).parent))
    subprocess.run([sys.executable, "-c", script, local.url], timeout=300, check=True)
    assert local.list()[-1].step >= 30


# Foreign checkpoints


def reseal(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest as somebody would who knows the format."""
    fields = json.loads((folder / "manifest.json").read_text())
    del fields["digest"]
    change(fields)
    head = json.dumps(fields).removesuffix("}").encode()
    seal = hashlib.sha256(head).hexdigest().encode()
    (folder / "manifest.json").write_bytes(head + b',\n "digest": "' + seal + b'"\n}\n')


def rename_file(new: str) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["files"].update({new: fields["files"].pop("state.json")})


def tensor(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields["files"]["model.safetensors"]["tensors"].update({key: value})


MALICIOUS: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda fields: fields.update(format=2), "is of checkpoint format 2; this dtrain reads up to 1: upgrade dtrain"),
    (lambda fields: fields.update(format="1"), "upgrade dtrain"),
    (rename_file("../state.json"), r"'../state.json' is no name"),
    (rename_file("/etc/passwd"), "'/etc/passwd' is no name"),
    (rename_file("manifest.json"), "'manifest.json' is no name"),
    (rename_file("other.json"), "other.json is missing"),
    (lambda fields: fields["files"].pop("state.json"), "state.json does not belong to it"),
    (
        lambda fields: fields["files"]["model.safetensors"].update(size=10**15),
        "model.safetensors has .* bytes, not 10{15}",
    ),
    (lambda fields: fields["files"]["model.safetensors"].update(tensors=None), "cannot be understood"),
    (lambda fields: fields["files"]["model.safetensors"].pop("sha256"), "cannot be understood"),
    (tensor("w", ["F32", [10**9]]), "does not hold the tensors that the manifest names"),
    (tensor("w", ["F32", [2**62, 0, 2**62]]), "cannot be understood"),
    (tensor("w", ["F32", [-3000]]), "cannot be understood"),
    (tensor("w", ["O", [3000]]), "cannot be understood"),
    (tensor("v", ["F32", [1]]), "does not hold the tensors that the manifest names"),
    (lambda fields: fields.update(step="120"), "must be whole numbers"),
    (lambda fields: fields.update(step=119), "step-000000120 is damaged: its manifest is of step 119"),
    (lambda fields: fields.update(position={"epoch": 1}), "cannot be understood"),
    (lambda fields: fields.update(unknown=1), "cannot be understood"),
    (lambda fields: fields.update(extra=[]), "cannot be understood"),
    (lambda fields: fields.update(extra={"plan": 3}), "cannot be understood"),
    (lambda fields: fields.update(extra={"tracked": "run"}), "cannot be understood"),
    (lambda fields: fields.update(metrics={"loss": "low"}), "cannot be understood"),
    (lambda fields: fields.update(metrics=[1.0]), "cannot be understood"),
    (lambda fields: fields.update(versions=1), "cannot be understood"),
    (lambda fields: fields.update(files=[]), "cannot be understood"),
]


@pytest.mark.parametrize(("change", "message"), MALICIOUS)
def test_a_manifest_that_lies_is_refused(
    local: CheckpointStore, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    folder = folder_of(commit(local, 120))
    reseal(folder, lambda fields: None)
    assert step_of(load(str(folder))) == 120
    reseal(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(str(folder))


def test_links_and_foreign_files_are_refused(local: CheckpointStore, tmp_path: Path) -> None:
    folder = folder_of(commit(local, 120))
    for name in ("state.json", "manifest.json"):
        outside = tmp_path / name
        (folder / name).rename(outside)
        (folder / name).symlink_to(outside)
        with pytest.raises(CheckpointError, match="not a plain file|is a other|no manifest"):
            load(str(folder))
        (folder / name).unlink()
        outside.rename(folder / name)
    (folder / ".DS_Store").write_bytes(b"")  # what desktops leave is nobody's
    assert step_of(load(str(folder))) == 120
    (folder / "extra.pkl").write_bytes(b"")
    with pytest.raises(CheckpointError, match="extra.pkl does not belong to it"):
        load(str(folder))


class Trap:
    """Says when it is unpickled."""

    def __reduce__(self) -> Any:
        return pytest.fail, ("something was unpickled",)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_pickle_under_another_name_is_refused(local: CheckpointStore, name: str) -> None:
    folder = folder_of(commit(local, 120))
    data = pickle.dumps(Trap()) + b" " * 20
    (folder / name).write_bytes(data)
    if name != "manifest.json":
        reseal(
            folder,
            lambda fields: fields["files"][name].update(size=len(data), sha256=hashlib.sha256(data).hexdigest()),
        )
    with pytest.raises(CheckpointError, match=r"header of|is not JSON|manifest.json cannot be understood"):
        load(str(folder))


def test_what_links_point_to_is_never_removed_or_listed(local: CheckpointStore, tmp_path: Path) -> None:
    (outside := tmp_path / "outside").mkdir()
    (outside / "file").write_text("mine")
    commit(local, 10)
    (folder_of(commit(local, 20)) / "link").symlink_to(outside)
    (Path(local.url) / "step-000000005").symlink_to(outside)
    (Path(local.url) / "step-000000040").symlink_to(folder_of(commit(local, 30)))
    assert [checkpoint.step for checkpoint in local.list()] == [10, 20, 30]
    local.prune(1)
    local.rewind(None)
    assert local.list() == () and (outside / "file").read_text() == "mine"


def test_a_checkpoint_larger_than_memory_is_refused(local: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = commit(local, 120)

    def too_large(folder: Folder, name: str, limit: int = -1) -> bytes:
        raise MemoryError

    monkeypatch.setattr(Folder, "read", too_large)
    with pytest.raises(CheckpointError, match="cannot be read: out of memory"):
        load(committed)


def lying_header(shape: list[Any], offsets: list[Any], padding: int = 0) -> bytes:
    header = json.dumps({"w": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(header).to_bytes(8, "little") + header + b"\0" * (12 + padding)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lying_header([3], [0, 8]), "lies at bytes 0 to 8"),
        (lying_header([3], [4, 16], 4), "lies at bytes 4 to 16"),
        (lying_header([3], [-4, 8]), "lies at bytes -4 to 8"),
        (lying_header([3], [0, 12], 5), "but its tensors end at"),
        (lying_header([3], [0.0, 12.0]), "cannot be understood"),
        (lying_header([3], ["0", "12"]), "cannot be understood"),
        (lying_header([3], [0, 12, 12]), "cannot be understood"),
        ((2**62).to_bytes(8, "little") + b"\0" * 20, "has a header of 4611686018427387904 bytes"),
        ((4).to_bytes(8, "little") + b"[1] " + b"\0" * 12, "cannot be understood"),
        ((900).to_bytes(8, "little") + b"[" * 900, "cannot be understood"),
    ],
)
def test_array_headers_are_checked_before_memory_is_taken(local: CheckpointStore, data: bytes, message: str) -> None:
    staging = local.stage(1)
    record = staging.write_tensors("model.safetensors", {"w": np.zeros(3, np.float32)})
    (Path(staging.url) / record.name).write_bytes(data)
    lie = dataclasses.replace(record, size=len(data), sha256=hashlib.sha256(data).hexdigest())
    committed = local.commit(staging, manifest(1, files=(lie,)))
    with pytest.raises(CheckpointError, match=message):
        load(committed)


def test_what_a_client_of_an_object_store_raises_is_said_as_a_failure_to_write(monkeypatch: pytest.MonkeyPatch) -> None:
    """Training goes on after a CheckpointError; not all clients raise OSErrors."""

    class HttpError(Exception):
        pass

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise HttpError("503, slow down")

    store = CheckpointStore(f"memory://{uuid.uuid4().hex}")
    commit(store, 100)
    staging = store.stage(120)
    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", refuse)
        with pytest.raises(CheckpointError, match=r"cannot be written: .*HttpError: 503, slow down"):
            staging.write_tensors("model.safetensors", {})
    store.discard(staging)
    assert [step_of(load(checkpoint)) for checkpoint in store.list()] == [100]


def test_a_bucket_keeps_checkpoints(bucket: str) -> None:
    store = CheckpointStore(f"{bucket}/run 1/checkpoints")
    made = [commit(store, step) for step in (10, 20)]
    store.stage(25).write_json("state.json", {})  # of a driver that was killed
    made += [commit(store, step) for step in (30, 40)]
    again = CheckpointStore(store.url)
    assert again.latest() == made[-1] and step_of(load(made[-1].url)) == 40
    again.prune(2, best=made[0])
    assert again.list() == (made[0], *made[2:])
    again.rewind(made[0])
    assert again.list() == (made[0],) and commit(again, 15) == again.latest()
    assert Folder(store.url).entries().keys() == {"step-000000010", "step-000000015"}


def test_a_bucket_that_nobody_reaches_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(CheckpointError, match=r"unreached.* cannot be .*127\.0\.0\.1:9"):
        commit(CheckpointStore("s3://bucket/unreached"), 100)
    S3FileSystem.clear_instance_cache()


def test_storage_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ConfigError, match="'nosuch://bucket/x' cannot be used as storage: Protocol not known"):
        CheckpointStore("nosuch://bucket/x")


def test_folders_are_for_their_owner_alone(local: CheckpointStore) -> None:
    assert folder_of(commit(local, 1)).stat().st_mode & 0o777 == 0o700
