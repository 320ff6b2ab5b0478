"""Owns the question what is wrong with this installation, and how to mend it: `dtrain doctor`.

Each check looks at one thing and returns a `Finding`; none raises, starts anything or changes anything. What is
heavy to import is asked in a process of its own, so that a TensorFlow that crashes is a finding too.
"""

import importlib.metadata
import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from dtrain.horovod_build import INSTALL, built, has_edits, problem_of, tensorflow_version
from dtrain.tracking import mask

if TYPE_CHECKING:
    from rich.table import Table

LOW_ROOM = 2 * 1024**3  # bytes; a few checkpoints of a middling model
_PATIENCE = 120.0  # seconds for a process that imports TensorFlow, on a busy machine
_NETWORK_PATIENCE = 5.0


@dataclass(frozen=True)
class Finding:
    """What a check found.

    Attributes:
        name: what was looked at.
        ok: True: fine; False: something does not work; None: worth knowing, nothing to mend.
        found: what is there.
        fix: what to do where `ok` is False; empty elsewhere.
    """

    name: str
    ok: bool | None
    found: str
    fix: str = ""


def diagnose(storage_path: str | os.PathLike[str] = "dtrain_runs") -> list[Finding]:
    """Looks at everything that training needs. Takes about ten seconds, most of it TensorFlow's import.

    Args:
        storage_path: where runs are to be kept.
    """
    with ThreadPoolExecutor() as pool:
        stack = pool.submit(_ask, _STACK)
        ray = pool.submit(check_ray)
        mlflow = pool.submit(check_mlflow)
        return [
            check_python(),
            check_tensorflow(stack.result()),
            check_keras(stack.result()),
            check_horovod(stack.result()),
            ray.result(),
            mlflow.result(),
            check_interface(),
            check_gpu(stack.result()),
            check_room(storage_path),
        ]


def quick_horovod_problem(gpu: bool = False) -> str | None:
    """Why the installed Horovod cannot be used, with the command that mends it; None: it can, as far as files tell.

    Takes milliseconds: nothing is imported. Call it before starting workers.

    Args:
        gpu: the job's workers use GPUs.
    """
    return problem_of(built(), tensorflow_version(), gpu=gpu)


def render(findings: list[Finding]) -> "Table":
    """The findings as a table for rich to print."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, pad_edge=False)
    for column in ("", "check", "found"):
        table.add_column(column, overflow="fold")
    marks = {True: "[green]ok[/]", None: "[yellow]note[/]", False: "[red]wrong[/]"}
    for finding in findings:
        text = escape(finding.found) + (f"\n[bold]fix:[/] {escape(finding.fix)}" if finding.fix else "")
        table.add_row(marks[finding.ok], finding.name, text)
    return table


# The checks -----------------------------------------------------------------------------------------------------------


def check_python() -> Finding:
    """Python and the platform."""
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} CPUs"
    ok = (
        sys.version_info[:2] == (3, 11)
        and platform.system() == "Linux"
        and platform.machine() == "x86_64"
        and sys.implementation.name == "cpython"
    )
    return Finding("Python", ok, found, "" if ok else "use CPython 3.11 on Linux x86-64: uv venv --python 3.11")


def check_tensorflow(stack: "Answer") -> Finding:
    """TensorFlow, and whether it can be imported."""
    version = tensorflow_version()
    if version is None:
        return Finding("TensorFlow", False, "not installed", "pip install 'tensorflow>=2.21,<2.22'")
    if not stack.get("tensorflow"):
        return Finding(
            "TensorFlow",
            False,
            f"{version} cannot be imported: {stack.error}",
            "pip install --force-reinstall 'tensorflow>=2.21,<2.22'",
        )
    ok = _is(version, "2.21")
    return Finding("TensorFlow", ok, version, "" if ok else "pip install 'tensorflow>=2.21,<2.22'")


def check_keras(stack: "Answer") -> Finding:
    """Keras and its backend."""
    version, backend = stack.get("keras"), stack.get("backend")
    if version is None:
        return Finding("Keras", False, f"cannot be imported: {stack.error}", "pip install 'keras>=3.15,<3.16'")
    found = f"{version}, backend {backend}"
    if backend != "tensorflow":
        return Finding("Keras", False, found, f"export KERAS_BACKEND=tensorflow (or mend {_keras_json()})")
    ok = _is(version, "3.15")
    return Finding("Keras", ok, found, "" if ok else "pip install 'keras>=3.15,<3.16'")


def check_horovod(stack: "Answer") -> Finding:
    """Horovod: what it was built against and with, and whether it can be imported."""
    problem = quick_horovod_problem()
    horovod = built()
    if problem or horovod is None:
        return Finding("Horovod", False, problem or "not installed", INSTALL)
    version = importlib.metadata.version("horovod")
    found = f"{version}, built against TensorFlow {horovod.tensorflow}"
    if stack.get("gloo") is None:
        return Finding("Horovod", False, f"{found}, cannot be imported: {stack.error}", INSTALL)
    if not stack.get("gloo"):
        return Finding("Horovod", False, f"{found}, without Gloo", INSTALL)
    found += ", Gloo" + (", NCCL" if stack.get("nccl") else "")
    if not has_edits(horovod):
        which = f"version {horovod.edits} of" if horovod.edits else "without"
        return Finding(
            "Horovod", False, f"{found}, {which} dtrain's edits: jobs on several hosts may not connect", INSTALL
        )
    return Finding("Horovod", True, f"{found}, dtrain's edits (version {horovod.edits})")


def check_ray() -> Finding:
    """Ray, and the cluster that RAY_ADDRESS names, if it names one. None is started."""
    version = _version("ray")
    if version is None:
        return Finding("Ray", False, "not installed", "pip install 'ray[default]>=2.60,<2.61'")
    if not _is(version, "2.60"):
        return Finding("Ray", False, version, "pip install 'ray[default]>=2.60,<2.61'")
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding("Ray", True, f"{version}; RAY_ADDRESS is not set: a local Ray is started when training starts")
    found = f"{version}; RAY_ADDRESS={mask(address)}"
    if address.startswith("ray://"):
        return Finding(
            "Ray", False, found, "ray:// cannot be used: use dtrain submit, or HEAD:6379 on a cluster machine"
        )
    cluster = _ask(_CLUSTER, patience=60)
    if cluster.get("nodes") is None:
        token = (
            "" if os.environ.get("RAY_AUTH_MODE") else " If the cluster asks for a token: export RAY_AUTH_MODE=token."
        )
        fix = f"start a cluster there (ray start --head), or unset RAY_ADDRESS.{token}"
        return Finding("Ray", False, f"{found} does not answer: {cluster.error}", fix)
    open_door = "" if os.environ.get("RAY_AUTH_MODE") == "token" else "; it asks for no token: see cluster/README.md"
    text = f"{found} has {cluster.get('nodes')} node(s), {cluster.get('cpus'):g} CPUs, {cluster.get('gpus'):g} GPUs"
    return Finding("Ray", None if open_door else True, text + open_door)


def check_mlflow() -> Finding:
    """MLflow and its tracking URI; a server must answer."""
    version = _version("mlflow")
    if version is None:
        return Finding("MLflow", False, "not installed", "pip install 'mlflow>=3.17,<3.18'")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlflow.db"
    found = f"{version}; {mask(uri)}"
    try:
        parts = urlsplit(uri)
    except ValueError as error:
        return Finding("MLflow", False, f"{found} is no URL: {error}", "check MLFLOW_TRACKING_URI")
    if parts.scheme in ("", "file") and uri != "databricks":
        return Finding("MLflow", False, f"{found} is a file store", "export MLFLOW_TRACKING_URI=sqlite:///mlflow.db")
    if parts.scheme not in ("http", "https"):
        return Finding("MLflow", True, found)
    health = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path.rstrip('/')}/health"
    try:
        with urllib.request.urlopen(health, timeout=_NETWORK_PATIENCE):
            return Finding("MLflow", True, f"{found} answers")
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return Finding(
                "MLflow", None, f"{found} asks for credentials: MLFLOW_TRACKING_USERNAME and _PASSWORD, or _TOKEN"
            )
        return Finding("MLflow", False, f"{found} answers {error.code}", "check MLFLOW_TRACKING_URI")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Finding(
            "MLflow", False, f"{found} does not answer: {reason}", "start the server, or unset MLFLOW_TRACKING_URI"
        )


def check_interface() -> Finding:
    """The network interface that workers on several hosts would talk over: the one that leads out of this machine."""
    import psutil

    address = _outward_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(item.address == address for item in addresses):
            if name == "lo":
                break
            return Finding("Network", True, f"{name}, {address}; lo where all workers are on one machine")
    return Finding("Network", None, "no way out of this machine: workers can only be on this one, over lo")


def check_gpu(stack: "Answer") -> Finding:
    """GPUs: the driver's, TensorFlow's, and Horovod's NCCL."""
    listed = _output(["nvidia-smi", "-L"])
    names = re.findall(r"^GPU \d+: (.*?)(?: \(UUID|$)", listed or "", re.MULTILINE)
    seen = stack.get("gpus") or 0
    if not names:
        return Finding(
            "GPU", None, "none: nvidia-smi " + ("lists none" if listed is not None else "is not there or fails")
        )
    found = f"{len(names)} ({', '.join(sorted(set(names)))}); TensorFlow sees {seen}"
    if not seen:
        return Finding("GPU", False, found, "pip install 'dtrain[gpu]', and check CUDA_VISIBLE_DEVICES")
    if quick_horovod_problem(gpu=True) and not quick_horovod_problem():
        return Finding("GPU", False, f"{found}; Horovod was built without NCCL", f"{INSTALL} --gpu")
    return Finding("GPU", True, found)


def check_room(storage_path: str | os.PathLike[str]) -> Finding:
    """Room and the right to write where runs are kept."""
    text = os.fspath(storage_path)
    if "://" in text:
        return Finding("Storage", None, f"{mask(text)}: not looked at")
    folder = Path(text).absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(there).free
    found = f"{folder}: {free / 1024**3:.1f} GiB free"
    if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
        return Finding("Storage", False, f"{found}, but not writable", "give another --storage-path")
    ok = free >= LOW_ROOM
    return Finding("Storage", ok, found, "" if ok else "make room, or give another --storage-path")


# Asking in a process of its own ---------------------------------------------------------------------------------------

# What each line of these prints is kept, even if a later line ends the process.
_STACK = """
import tensorflow; say(tensorflow=tensorflow.__version__)
say(gpus=len(tensorflow.config.list_physical_devices("GPU")))
import keras; say(keras=keras.__version__, backend=keras.backend.backend())
import horovod.tensorflow as hvd; say(gloo=bool(hvd.gloo_built()), nccl=bool(hvd.nccl_built()))
"""
_CLUSTER = """
import os, ray
ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, configure_logging=False)
total = ray.cluster_resources()
say(nodes=sum(node["Alive"] for node in ray.nodes()), cpus=total.get("CPU", 0.0), gpus=total.get("GPU", 0.0))
"""
_SAY = """
import json
def say(**facts): print("dtrain: " + json.dumps(facts), flush=True)
"""


@dataclass(frozen=True)
class Answer:
    """What a process said before it ended, and why it ended, if it failed."""

    facts: Mapping[str, Any]
    error: str

    def get(self, name: str) -> Any:
        """The fact, or None if the process did not get so far."""
        return self.facts.get(name)


def _ask(script: str, patience: float = _PATIENCE) -> Answer:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "3"} | os.environ
    try:
        done = subprocess.run(
            [sys.executable, "-c", _SAY + script],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=patience,
            check=False,
        )
        output, error = done.stdout, _last_line(done.stderr) or f"exit code {done.returncode}"
    except subprocess.TimeoutExpired as late:
        output = late.stdout.decode() if isinstance(late.stdout, bytes) else ""
        error = f"no answer within {patience:g} s"
    facts: dict[str, Any] = {}
    for line in output.splitlines():
        if line.startswith("dtrain: "):
            facts |= json.loads(line.removeprefix("dtrain: "))
    return Answer(facts, mask(error))


def _last_line(text: str) -> str:
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _outward_address() -> str | None:
    """The address that this machine would send from. A UDP socket sends nothing when it connects."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("203.0.113.1", 9))  # reserved for documentation: the default route leads there
        except OSError:
            return None
        return str(probe.getsockname()[0])


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _is(version: str, release: str) -> bool:
    return version == release or version.startswith(f"{release}.")


def _keras_json() -> Path:
    return Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "keras.json"
