"""Claims about jobs on Ray: what its job list shows, existing clusters, and what travels to the workers."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import numpy as np
import dtrain

def make_model():
    import keras
    model = keras.Sequential([keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    return model

with dtrain.Trainer(make_model) as trainer:
    history = trainer.fit(np.zeros((8, 5)), np.zeros((8, 3)), verbose=2)
    print("run", history.run_id)
"""


def test_a_submitted_job_carries_the_mlflow_run_in_its_metadata(local_ray: None, in_tmp: Path) -> None:
    import ray
    from ray.job_submission import JobStatus, JobSubmissionClient

    (in_tmp / "script.py").write_text(SCRIPT)
    client = JobSubmissionClient(f"http://{ray._private.worker.global_worker.node.webui_url}")
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", "PYTHONPATH": os.pathsep.join(sys.path)}
    address = ray.get_runtime_context().gcs_address  # Ray gives a job that of the machine's youngest Ray
    job = client.submit_job(
        entrypoint=f"cd {in_tmp} && RAY_ADDRESS={address} {sys.executable} script.py",
        metadata={"team": "vision"},
        runtime_env={"env_vars": environment},
    )
    deadline = time.monotonic() + 300
    while not (status := client.get_job_status(job)).is_terminal():
        assert time.monotonic() < deadline, client.get_job_logs(job)
        time.sleep(0.5)
    logs = client.get_job_logs(job)
    assert status == JobStatus.SUCCEEDED, logs
    (run_id,) = [line.removeprefix("run ") for line in logs.splitlines() if len(line) == 36 and line[:4] == "run "]
    metadata = client.get_job_info(job).metadata
    assert metadata.get("mlflow_run_id") == run_id and metadata["team"] == "vision", logs
    assert metadata["dtrain_run"]


HOLDERS = """
import os, ray, time
from dtrain import cluster

class Holder: pass
first, second = Holder(), Holder()
cluster.connect(None, first)
cluster.connect(None, second)
cluster.disconnect(first)
cluster.disconnect(first)

told = []
show = ray._private.worker.print_to_stdstream
def witness(data, ignore_prefix):
    show(data, ignore_prefix)
    told.append(data["pid"])
ray._private.worker.print_to_stdstream = witness
try:
    ray.get(ray.remote(max_retries=0)(lambda: os._exit(1)).remote())
except ray.exceptions.WorkerCrashedError:
    print("died")
deadline = time.monotonic() + 200
while "raylet" not in told:
    assert time.monotonic() < deadline, "Ray no longer tells of a death in this way"
    time.sleep(0.1)
cluster.disconnect(second)
print("ended", not ray.is_initialized())
"""


def test_ray_lasts_until_its_last_holder_lets_go_and_keeps_out_of_what_is_printed(tmp_path: Path) -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", HOLDERS], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert result.stdout.splitlines() == ["died", "ended True"], result.stderr


def test_a_local_ray_keeps_its_token_to_the_user(tmp_path: Path) -> None:
    code = "from dtrain import cluster as c; import ray; c.connect(None, c); print(ray.cluster_resources()['CPU'])"
    environment = {**os.environ, "HOME": str(tmp_path), "RAY_TMPDIR": str(tmp_path)}
    environment = {key: value for key, value in environment.items() if not key.startswith("RAY_")}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300, check=True
    )
    assert float(result.stdout) >= 1
    token = tmp_path / ".ray" / "auth_token"
    assert token.stat().st_mode & 0o077 == 0


def test_a_script_started_by_uv_run_has_its_workers_in_its_own_environment_and_priority(tmp_path: Path) -> None:
    uv = shutil.which("uv") or str(Path(__file__).parents[1] / ".tools" / "bin" / "uv")
    if not Path(uv).exists():
        pytest.skip("there is no uv on this machine")
    (tmp_path / "script.py").write_text(
        "from dtrain import cluster; import os, ray, sys; cluster.connect(None, cluster)\n"
        "look = lambda: (sys.executable, os.nice(0))\n"
        "print(ray.get(ray.remote(look).remote(), timeout=200) == look())"
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    command = [uv, "run", "--no-project", "--python", sys.executable, "script.py"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.stdout.strip() == "True", result.stderr


def test_what_could_never_fit_is_told_from_what_is_taken(local_ray: None) -> None:
    from dtrain.cluster import check_resources
    from dtrain.errors import ConfigError

    check_resources(8, {"CPU": 1.0})
    check_resources(16, {"CPU": 0.5})
    check_resources(99, {"CPU": 0.0})
    with pytest.raises(ConfigError, match="room for 8"):
        check_resources(9, {"CPU": 1.0})
    with pytest.raises(ConfigError, match="special"):
        check_resources(1, {"CPU": 1.0, "special": 1.0})


def test_ray_client_addresses_are_refused(monkeypatch: Any) -> None:
    from dtrain.cluster import check_address
    from dtrain.errors import ConfigError

    monkeypatch.setenv("RAY_ADDRESS", "ray://head:10001")
    with pytest.raises(ConfigError, match="ray job submit"):
        check_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "head:6379")
    assert check_address(None) == "head:6379"
    assert check_address("local") is None
