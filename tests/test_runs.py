"""Claims about run folders: names that cannot escape, one winner, found to be writable before anything starts."""

import errno
import json
import os
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dtrain import runs as module
from dtrain.checkpoint import Manifest
from dtrain.errors import ConfigError
from dtrain.runs import RunFolder, RunSummary, find_run, list_checkpoints, list_runs, unique_name, validate_name
from dtrain.types import Position


@pytest.fixture(autouse=True)
def own_state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def commit(run: RunFolder, step: int, best: float | None = None) -> str:
    staging = run.checkpoints.stage(step)
    manifest = Manifest(step=step, position=Position(2, 1), world_size=2, seed=0, metrics={"loss": 0.25}, best=best)
    return run.checkpoints.commit(staging, manifest).url


def test_names_are_unique_and_valid() -> None:
    names = {unique_name() for _ in range(50)}
    assert len(names) == 50 and all(validate_name(name) == name for name in names)


@pytest.mark.parametrize("name", ["a", "lr=0.1, 2nd try (b)", "größe-3", "run_1.5", "x" * 200])
def test_ordinary_names_are_taken(name: str, tmp_path: Path) -> None:
    assert Path(RunFolder.create(tmp_path, name).url).parent == tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "",
        "..",
        "../x",
        "a..b",
        "/etc",
        "a/b",
        "a\\b",
        ".hidden",
        "-rf",
        "a\0b",
        "a\nb",
        "a\x1b[2J",
        " a",
        "a ",
        "a*",
        "a?b",
        "[a]",
        "a::b",
        "\u202egnp",
        "\ud800",
        "x" * 201,
        "ä" * 101,
        None,
        3,
    ],
)
def test_names_that_could_mean_more_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run_name="):
        RunFolder.create(tmp_path / "runs", name)
    assert not (tmp_path / "runs").exists()


def test_a_run_has_its_folder(storage: str) -> None:
    run = RunFolder.create(storage, "first")
    assert run.url.endswith("/first") and run.name == "first"
    assert run.read_info()["state"] == "created" and run.read_info()["name"] == "first"
    run.journal_path.write_text("{}\n")
    again = RunFolder(run.url)
    assert again.journal_path == run.journal_path
    assert commit(run, 7) == f"{run.url}/checkpoints/step-000000007"
    assert again.checkpoints.list() == run.checkpoints.list() != ()


def test_folders_are_for_their_owner_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    local, remote = (
        RunFolder.create(tmp_path / "a" / "b", "run"),
        RunFolder.create(f"memory://{uuid.uuid4().hex}", "run"),
    )
    for folder in (local.url, local.journal_path.parent, remote.journal_path.parent):
        assert os.stat(folder).st_mode & 0o777 == 0o700


def test_an_existing_run_names_both_ways_out(storage: str) -> None:
    run = RunFolder.create(storage, "twice")
    run.write_info({"state": "finished"})
    with pytest.raises(
        ConfigError, match=r"run_name='twice' exists already .*resume=\"auto\"\), or .* another run_name"
    ):
        RunFolder.create(storage, "twice")
    again = RunFolder.create(storage, "twice", exist_ok=True)
    assert again.url == run.url and again.read_info()["state"] == "finished"


def test_a_new_run_does_not_take_up_the_journal_of_one_that_was_removed(storage: str) -> None:
    old = RunFolder.create(storage, "again")
    old.journal_path.write_text("old\n")
    assert RunFolder.create(storage, "again", exist_ok=True).journal_path.exists()
    old.discard()
    new = RunFolder.create(storage, "again")
    assert new.journal_path == old.journal_path and not new.journal_path.exists()


def test_of_many_who_make_one_run_exactly_one_wins(tmp_path: Path) -> None:
    def make(name: str) -> bool:
        try:
            RunFolder.create(tmp_path, name)
        except ConfigError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        for race in range(20):
            assert sum(pool.map(make, [f"race-{race}"] * 8)) == 1


def test_a_place_that_cannot_be_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below", Path("/proc/runs")):
        with pytest.raises(ConfigError, match=f"storage_path='{place}' is not writable"):
            RunFolder.create(place, "run")
    with pytest.raises(ConfigError, match="storage_path=''"):
        RunFolder.create("", "run")

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match="No space left on device"):
            RunFolder.create(tmp_path, "run")
    assert RunFolder.create(tmp_path, "run").name == "run"


def test_no_probe_is_left(tmp_path: Path) -> None:
    assert os.listdir(RunFolder.create(tmp_path, "run").url) == ["run.json"]


def test_info_is_replaced_whole(storage: str) -> None:
    run = RunFolder.create(storage, "run")
    run.write_info({"state": "running", "a": 1})
    run.write_info({"state": "finished"})
    assert run.read_info() == {"state": "finished", "name": "run"}


def test_runs_are_listed(storage: str) -> None:
    assert list_runs(storage) == []
    first, second = RunFolder.create(storage, "b"), RunFolder.create(storage, "a")
    newest = [commit(first, step) for step in (3, 6)][-1]
    position = {"epoch": 4, "step": 2}
    second.write_info(
        {"state": "running", "step": 9, "position": position, "metrics": {"loss": 0.5}, "mlflow_run_id": "f00"}
    )
    assert list_runs(storage) == [
        RunSummary("a", second.url, "running", 9, Position(4, 2), {"loss": 0.5}, None, "f00"),
        RunSummary("b", first.url, "created", 6, Position(2, 1), {"loss": 0.25}, newest, None),
    ]


def test_a_run_is_found_by_its_name_and_its_checkpoints_are_listed(storage: str) -> None:
    run = RunFolder.create(storage, "run")
    urls = [commit(run, 3, best=0.25), commit(run, 6)]
    assert find_run(storage, "run").url == run.url
    listed = list_checkpoints(find_run(storage, "run"))
    assert [(c.step, c.url, c.is_best) for c in listed] == [(3, urls[0], True), (6, urls[1], False)]
    assert {(c.position, c.metrics["loss"], c.damage) for c in listed} == {(Position(2, 1), 0.25, None)}
    for name in ("gone", "../run", "run/checkpoints"):
        with pytest.raises(ConfigError, match="run_name="):
            find_run(storage, name)


def test_a_damaged_run_is_listed_with_what_can_be_told(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path, "run")
    newest = Path(commit(run, 3))
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").write_text("")
    (Path(run.url) / module.INFO).write_text("{not json")
    assert [(s.name, s.state, s.step) for s in list_runs(tmp_path)] == [("run", "unknown", 3)]
    (newest / "manifest.json").write_text("{}")
    (Path(run.url) / module.INFO).write_text(json.dumps({"state": "running", "position": [1, 2]}))
    (summary,) = list_runs(tmp_path)
    assert (summary.state, summary.step, summary.position, summary.checkpoint) == ("running", None, None, str(newest))
    for metrics, expected in (([1], {}), ({"loss": "abc", "accuracy": 1}, {"accuracy": 1.0})):
        (Path(run.url) / module.INFO).write_text(json.dumps({"metrics": metrics}))
        assert list_runs(tmp_path)[0].metrics == expected
