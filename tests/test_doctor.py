"""Claims about dtrain/doctor.py: what is wrong is found and comes with a fix, and looking is cheap where it must be."""

import http.server
import io
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from dtrain import doctor
from dtrain._horovod_cmake import EDITS_VERSION
from dtrain.doctor import Answer, Finding, diagnose, quick_horovod_problem, render
from dtrain.horovod_build import Built

GOOD = Built(tensorflow="2.21.0", edits=EDITS_VERSION, gpu_operations="", library=True)
STACK = Answer(
    {"tensorflow": "2.21.0", "keras": "3.15.1", "backend": "tensorflow", "gloo": True, "nccl": False, "gpus": 0}, ""
)


def without(*names: str, error: str = "ImportError: broken") -> Answer:
    return Answer({name: fact for name, fact in STACK.facts.items() if name not in names}, error)


def having(**facts: Any) -> Answer:
    return Answer({**STACK.facts, **facts}, "")


@pytest.fixture
def horovod(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """What the files say of the installed Horovod and TensorFlow; tests change it."""
    installed = SimpleNamespace(horovod=GOOD, tensorflow="2.21.0")
    monkeypatch.setattr(doctor, "built", lambda: installed.horovod)
    monkeypatch.setattr(doctor, "tensorflow_version", lambda: installed.tensorflow)
    return installed


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "RAY_AUTH_MODE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.timeout(180)
def test_this_installation_is_sound(tmp_path: Path) -> None:
    findings = diagnose(tmp_path)
    assert [f.name for f in findings] == (
        ["Python", "TensorFlow", "Keras", "Horovod", "Ray", "MLflow", "Network", "GPU", "Storage"]
    )
    assert [f for f in findings if f.ok is False] == []
    assert all(f.found for f in findings)


def test_importing_the_doctor_and_the_quick_check_load_nothing_heavy() -> None:
    script = (
        "import sys; from dtrain.doctor import quick_horovod_problem; assert quick_horovod_problem() is None\n"
        "heavy = {'tensorflow', 'keras', 'horovod', 'ray', 'mlflow'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_the_quick_check_is_quick() -> None:
    begin = time.perf_counter()
    quick_horovod_problem()
    assert time.perf_counter() - begin < 0.5


def test_the_quick_check_names_the_command(horovod: SimpleNamespace) -> None:
    assert quick_horovod_problem() is None
    assert str(quick_horovod_problem(gpu=True)).endswith("run: dtrain install-horovod --gpu")
    horovod.tensorflow = "2.21.1"
    assert str(quick_horovod_problem()).endswith("but 2.21.1 is installed; run: dtrain install-horovod")


# --- each check, on what it might meet --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("installed", "stack", "ok", "found"),
    [
        ("2.21.0", STACK, True, "2.21.0"),
        (None, without("tensorflow"), False, "not installed"),
        ("2.21.0", without("tensorflow"), False, "cannot be imported: ImportError: broken"),
        ("2.20.0", having(tensorflow="2.20.0"), False, "2.20.0"),
        ("2.210.0", having(tensorflow="2.210.0"), False, "2.210.0"),
    ],
)
def test_tensorflow(horovod: SimpleNamespace, installed: str | None, stack: Answer, ok: bool, found: str) -> None:
    horovod.tensorflow = installed
    check(doctor.check_tensorflow(stack), ok, found, "pip install")


@pytest.mark.parametrize(
    ("stack", "ok", "found", "fix"),
    [
        (STACK, True, "3.15.1, backend tensorflow", ""),
        (having(backend="jax"), False, "backend jax", "export KERAS_BACKEND=tensorflow"),
        (having(keras="3.14.0"), False, "3.14.0", "pip install"),
        (without("keras", "backend"), False, "ImportError: broken", "pip install"),
    ],
)
def test_keras(stack: Answer, ok: bool, found: str, fix: str) -> None:
    check(doctor.check_keras(stack), ok, found, fix)


@pytest.mark.parametrize(
    ("built", "stack", "ok", "found"),
    [
        (GOOD, STACK, True, "built against TensorFlow 2.21.0, Gloo, dtrain's edits"),
        (GOOD, having(nccl=True), True, "Gloo, NCCL"),
        (None, STACK, False, "Horovod is not installed"),
        (replace(GOOD, tensorflow="2.20.0"), STACK, False, "against TensorFlow 2.20.0 but 2.21.0 is installed"),
        (replace(GOOD, edits=None), STACK, False, "without dtrain's edits"),
        (replace(GOOD, edits="1"), STACK, False, "version 1 of dtrain's edits"),
        (GOOD, without("gloo", error="undefined symbol"), False, "cannot be imported: undefined symbol"),
        (GOOD, having(gloo=False), False, "without Gloo"),
    ],
)
def test_horovod(horovod: SimpleNamespace, built: Built | None, stack: Answer, ok: bool, found: str) -> None:
    horovod.horovod = built
    check(doctor.check_horovod(stack), ok, found, "dtrain install-horovod")


@pytest.mark.parametrize(
    ("listed", "stack", "gpu_operations", "ok", "found", "fix"),
    [
        (None, STACK, "", None, "none", ""),
        ("", STACK, "", None, "none: nvidia-smi lists none", ""),
        ("GPU 0: Fast 3000 (UUID: x)\n", STACK, "", False, "1 (Fast 3000); TensorFlow sees 0", "dtrain[gpu]"),
        (
            "GPU 0: F (UUID: x)\nGPU 1: F (UUID: y)\n",
            having(gpus=2),
            "",
            False,
            "without NCCL",
            "install-horovod --gpu",
        ),
        ("GPU 0: F (UUID: x)\n", having(gpus=1), "NCCL", True, "1 (F); TensorFlow sees 1", ""),
    ],
)
def test_gpu(
    horovod: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    listed: str | None,
    stack: Answer,
    gpu_operations: str,
    ok: bool | None,
    found: str,
    fix: str,
) -> None:
    horovod.horovod = replace(GOOD, gpu_operations=gpu_operations)
    monkeypatch.setattr(doctor, "_output", lambda command: listed)
    check(doctor.check_gpu(stack), ok, found, fix)


@pytest.mark.parametrize(
    ("address", "answer", "ok", "found", "fix"),
    [
        (None, None, True, "a local Ray is started", ""),
        ("ray://head:10001", None, False, "ray://head:10001", "dtrain submit"),
        ("head:6379", Answer({}, "no such host"), False, "does not answer: no such host", "RAY_AUTH_MODE=token"),
        ("head:6379", Answer({"nodes": 2, "cpus": 8.0, "gpus": 0.0}, ""), None, "2 node(s), 8 CPUs", ""),
    ],
)
def test_ray(
    monkeypatch: pytest.MonkeyPatch, address: str | None, answer: Answer | None, ok: bool, found: str, fix: str
) -> None:
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr(doctor, "_ask", lambda script, patience: answer or pytest.fail("asked"))
    check(doctor.check_ray(), ok, found, fix)


@pytest.mark.parametrize(
    ("uri", "ok", "found", "fix"),
    [
        (None, True, "sqlite:///mlflow.db", ""),
        ("file:///tmp/x", False, "a file store", "sqlite:///mlflow.db"),
        ("./mlruns", False, "a file store", "sqlite:///mlflow.db"),
        ("databricks", True, "databricks", ""),
        ("postgresql://me:canary@db/mlflow", True, "postgresql://***@db/mlflow", ""),
        ("http://me:canary@127.0.0.1:1", False, "http://***@127.0.0.1:1 does not answer", "start the server"),
        ("http://[bad", False, "is no URL", "check MLFLOW_TRACKING_URI"),
    ],
)
def test_mlflow(monkeypatch: pytest.MonkeyPatch, uri: str | None, ok: bool, found: str, fix: str) -> None:
    if uri:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    finding = doctor.check_mlflow()
    check(finding, ok, found, fix)
    assert "canary" not in finding.found + finding.fix


@pytest.mark.parametrize(
    ("status", "ok", "found"),
    [(200, True, "answers"), (401, None, "asks for credentials"), (500, False, "answers 500")],
)
def test_an_mlflow_server_is_asked(
    monkeypatch: pytest.MonkeyPatch, mlflow_server: Any, status: int, ok: bool | None, found: str
) -> None:
    mlflow_server.RequestHandlerClass.status = status
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{mlflow_server.server_address[1]}")
    check(doctor.check_mlflow(), ok, found, "MLFLOW_TRACKING_URI")


@pytest.fixture
def mlflow_server() -> Iterator[http.server.HTTPServer]:
    class Health(http.server.BaseHTTPRequestHandler):
        status = 200

        def do_GET(self) -> None:
            self.send_response(self.status if self.path == "/health" else 404)
            self.end_headers()

        def log_message(self, *_: Any) -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Health) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_the_interface_is_one_of_this_machine_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_outward_address", lambda: None)
    check(doctor.check_interface(), None, "only be on this one", "")
    monkeypatch.setattr(doctor, "_outward_address", lambda: "127.0.0.1")
    check(doctor.check_interface(), None, "only be on this one", "")


def test_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check(doctor.check_room(tmp_path / "not/yet/there"), True, "GiB free", "")
    check(doctor.check_room("s3://me:canary@bucket/runs"), None, "s3://***@bucket/runs", "")
    (tmp_path / "file").touch()
    check(doctor.check_room(tmp_path / "file"), False, "not writable", "--storage-path")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1024**2))
    check(doctor.check_room(tmp_path), False, "0.0 GiB free", "make room")


# --- asking in a process of its own -----------------------------------------------------------------------------------


def test_a_process_that_dies_keeps_what_it_said_and_why() -> None:
    answer = doctor._ask("say(a=1)\nraise ImportError('http://me:canary@host is broken')\nsay(b=2)")
    assert answer == Answer({"a": 1}, "ImportError: http://***@host is broken")
    assert doctor._ask("say(a=1)\nimport os; os.abort()") == Answer({"a": 1}, "exit code -6")


def test_a_process_that_hangs_is_ended() -> None:
    answer = doctor._ask("say(a=1)\nimport time; time.sleep(60)", patience=1.0)
    assert answer == Answer({"a": 1}, "no answer within 1 s")


def test_findings_are_shown_with_their_fixes() -> None:
    output = io.StringIO()
    Console(file=output, width=100).print(
        render(
            [Finding("A", True, "fine"), Finding("B", None, "so so"), Finding("C", False, "bad", "pip install 'x[y]'")]
        )
    )
    lines = [line.split() for line in output.getvalue().splitlines()]
    assert lines[1:] == [
        ["ok", "A", "fine"],
        ["note", "B", "so", "so"],
        ["wrong", "C", "bad"],
        ["fix:", "pip", "install", "'x[y]'"],
    ]


def check(finding: Finding, ok: bool | None, found: str, fix: str) -> None:
    """A fix comes with what is wrong, and only with that."""
    assert finding.ok is ok
    assert found in finding.found
    assert fix in finding.fix if ok is False else finding.fix == ""
