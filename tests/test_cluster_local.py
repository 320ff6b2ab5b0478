"""Claims about cluster/local.sh: two nodes on one machine, behind a token, and nothing left when it is stopped."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SCRIPT = Path(__file__).parents[1] / "cluster" / "local.sh"

DRIVER = """
import json, ray
ray.init(log_to_driver=False, configure_logging=False)
apart = ray.util.placement_group([{"CPU": 2}] * 2, strategy="STRICT_SPREAD")
ray.get(apart.ready(), timeout=60)
alive = sum(node["Alive"] for node in ray.nodes())
print(json.dumps({"nodes": alive, "cpus": ray.cluster_resources()["CPU"]}))
"""


@pytest.fixture
def environment(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A home of its own, so that the user's token and cluster are left alone; whatever happens, it is stopped."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(tmp_path),
        "DTRAIN_LOCAL_CLUSTER": str(tmp_path / "state"),
        "RAY": str(Path(sys.executable).parent / "ray"),
    }
    yield environment
    local(environment, "stop")


@pytest.mark.timeout(300)
def test_two_nodes_start_take_work_from_who_has_the_token_and_leave_nothing(
    environment: dict[str, str], tmp_path: Path
) -> None:
    assert local(environment, "status").returncode == 1
    started = local(environment, "start")
    assert started.returncode == 0, started.stdout + started.stderr
    exports = dict(re.findall(r"^export (\w+)=(.*)$", started.stdout, re.MULTILINE))
    assert set(exports) == {"RAY_ADDRESS", "RAY_AUTH_MODE"}
    assert local(environment, "status").stdout.endswith(started.stdout)
    assert local(environment, "start").returncode == 1, "a second start must be refused"

    driver = drive(environment | exports)
    assert json.loads(driver.stdout or "null") == {"nodes": 2, "cpus": 4.0}, driver.stderr
    stranger = environment | exports | {"RAY_AUTH_TOKEN": "0" * 64}
    assert drive(stranger).returncode != 0, "the token is not asked for"
    assert (tmp_path / ".ray" / "auth_token").stat().st_mode & 0o777 == 0o600
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700

    processes = running(environment)
    assert len(processes) > 4
    temporary = Path((tmp_path / "state" / "temporary").read_text().strip())
    assert local(environment, "stop").returncode == 0
    assert [process for process in processes if process.is_running()] == []
    assert running(environment) == []
    assert not temporary.exists()
    assert local(environment, "stop").returncode == 0, "stopping twice is fine"


@pytest.mark.timeout(300)
def test_what_a_killed_node_leaves_is_ended_too(environment: dict[str, str], tmp_path: Path) -> None:
    assert local(environment, "start").returncode == 0
    pid = int((tmp_path / "state" / "second.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=10)
    assert "second node: gone" in local(environment, "status").stdout
    assert local(environment, "stop").returncode == 0
    assert running(environment) == []


def test_a_process_that_got_an_old_pid_is_left_alone(environment: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "state").mkdir()
    bystander = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        (tmp_path / "state" / "head.pid").write_text(f"{bystander.pid} 1\n")  # not when the bystander started
        assert local(environment, "stop").returncode == 0
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_anything_else_is_a_usage_error(environment: dict[str, str]) -> None:
    for arguments in ([], ["restart"]):
        assert local(environment, *arguments).returncode == 2


def test_the_script_is_clean() -> None:
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed")
    subprocess.run([shellcheck, str(SCRIPT)], check=True)


def local(environment: dict[str, str], *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, timeout=200, check=False
    )


def drive(environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Runs a driver, far from the project, for as long as a refused one may take."""
    return subprocess.run(
        [sys.executable, "-c", DRIVER],
        env=environment,
        cwd=environment["HOME"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def running(environment: dict[str, str]) -> list[psutil.Process]:
    """Processes that inherited this test's environment, which all of Ray's do."""
    mark = environment["DTRAIN_LOCAL_CLUSTER"]
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("DTRAIN_LOCAL_CLUSTER") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found
